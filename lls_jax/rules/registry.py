"""Rules by name."""

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from lls_jax.basis import WAVEFORMS
from lls_jax.rules.backpropagation import Backpropagation
from lls_jax.rules.classifier import ClassifierRule
from lls_jax.rules.contrastive import ContrastiveRule
from lls_jax.rules.decoupled import DecoupledRule
from lls_jax.rules.feedback import FeedbackRule
from lls_jax.rules.periodic import PeriodicRule
from lls_jax.rules.predsim import PredSimRule
from lls_jax.rules.protocol import LocalRule, Rule


class _Maker(NamedTuple):
    """How a rule is made.

    Attributes:
        make: from ``num_classes`` and those of its options that are given.
        options: that it has a use for.
    """

    make: Callable[..., Rule]
    options: frozenset[str]


_LOSS = frozenset({"temperature", "label_smoothing", "implementation"})


def _periodic(name: str, modulation: Any) -> _Maker:
    def make(num_classes: int, basis_rows: int | None = None, **options: Any) -> Rule:
        return PeriodicRule(name, num_classes, modulation, basis_rows or num_classes, **options)

    reduced = {"basis_rows"} if name == _REDUCED else set()
    return _Maker(make, _LOSS | {"waveform"} | reduced)


def _classifier(name: str, modulation: Any, learned: bool = False) -> _Maker:
    make = functools.partial(ClassifierRule, name, modulation=modulation, learned=learned)
    return _Maker(make, _LOSS)


_REDUCED = "lls_mxm_reduced"
_MAKERS: dict[str, _Maker] = {
    "lls": _periodic("lls", "none"),
    "lls_m": _periodic("lls_m", "vector"),
    "lls_mxm": _periodic("lls_mxm", "matrix"),
    "lls_mxm_reduced": _periodic("lls_mxm_reduced", "matrix"),
    "lls_random": _classifier("lls_random", "none"),
    "lls_m_random": _classifier("lls_m_random", "vector"),
    "lls_mxm_random": _classifier("lls_mxm_random", "matrix"),
    "local_classifier": _classifier("local_classifier", "none", learned=True),
    "predsim": _Maker(PredSimRule, frozenset({"label_smoothing"})),
    "contrastive": _Maker(ContrastiveRule, frozenset({"temperature"})),
    "decoupled": _Maker(DecoupledRule, frozenset({"label_smoothing"})),
    "bp": _Maker(functools.partial(Backpropagation, "bp"), frozenset()),
    "dfa": _Maker(functools.partial(FeedbackRule, "dfa", signal="error"), frozenset({"sign"})),
    "drtp": _Maker(functools.partial(FeedbackRule, "drtp", signal="target"), frozenset()),
}

NAMES = tuple(_MAKERS)
# What a rule may be made with, beside the number of classes.
_ORDER = ("waveform", "temperature", "label_smoothing", "basis_rows", "implementation", "sign")
OPTIONS = frozenset(_ORDER)


def _unknown(name: str) -> ValueError:
    close = difflib.get_close_matches(name, NAMES, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(
        f"unknown rule {name!r}; expected one of {', '.join(NAMES)}, or your own as "
        f"package.module:function.{hint}"
    )


def _function(name: str) -> Callable[..., Any]:
    """A user's own function, of ``package.module:function``."""
    module_name, _, function_name = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise ValueError(
            f"rule {name!r}: module {module_name!r} cannot be imported ({error}); is its folder "
            "the current one, or on PYTHONPATH?"
        ) from error
    except AttributeError:
        raise ValueError(f"rule {name!r}: {module_name} has no {function_name!r}.") from None


def _own(name: str) -> _Maker:
    """How a rule of a user's own is made: by a function that says what it takes."""
    function = _function(name)
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    known = OPTIONS if takes_all else {parameter.name for parameter in parameters}

    def make(num_classes: int, **options: Any) -> Rule:
        if takes_all or "num_classes" in known:
            options["num_classes"] = num_classes
        return _checked(name, function(**options))

    return _Maker(make, OPTIONS & frozenset(known))


def _checked(name: str, rule: Any) -> Rule:
    if not hasattr(rule, "name") or not callable(getattr(rule, "loss", None)):
        raise ValueError(
            f"rule {name!r} is a {type(rule).__name__}, which has no `name` or no `loss`; see "
            "lls_jax.rules.LocalRule."
        )
    try:
        hash(rule)
    except TypeError:
        raise ValueError(
            f"rule {name!r} is a {type(rule).__name__}, which cannot be hashed; make its class a "
            "frozen dataclass."
        ) from None
    return rule


def _maker(name: str) -> _Maker:
    if name not in NAMES and ":" not in name:
        raise _unknown(name)
    return _own(name) if ":" in name else _MAKERS[name]


def options_of(name: str) -> frozenset[str]:
    """Which options of :func:`make` a rule has a use for, beside ``num_classes``.

    Args:
        name: as of :func:`make`.

    Raises:
        ValueError: an unknown name.

    >>> sorted(options_of("contrastive"))
    ['temperature']
    """
    return _maker(name).options


def make(
    name: str,
    *,
    num_classes: int,
    waveform: str | None = None,
    temperature: float | None = None,
    label_smoothing: float | None = None,
    basis_rows: int | None = None,
    implementation: str | None = None,
    sign: bool | None = None,
) -> Rule:
    """Make a rule by its name.

    Args:
        name: of a local rule: ``lls``, ``lls_m``, ``lls_mxm``, ``lls_mxm_reduced``, ``lls_random``,
            ``lls_m_random``, ``lls_mxm_random``, ``local_classifier``, ``predsim``,
            ``contrastive``, ``decoupled``; of a baseline without local losses: ``bp``, ``dfa``,
            ``drtp``; or ``"package.module:function"``, whose function is called with the number of
            classes, if it has a parameter of that name, and with the options that are given.
        num_classes: number of classes, at least 2.
        waveform: of the periodic basis, ``"square"`` or ``"cosine"``; None for the rule's own, as
            with each option, which is ``"square"``.
        temperature: divides a local loss's logits; positive, dimensionless. The rules' own is 0.5,
            contrastive's 0.1.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1); 0.
        basis_rows: rows of the reduced basis; ``lls_mxm_reduced`` only, and required there.
        implementation: of the local loss, ``"xla"``, ``"pallas"``, ``"triton"`` or None to choose;
            :func:`pallas_kernels.local_loss.local_loss` says more.
        sign: whether ``dfa`` feeds back the sign of the error alone.

    Returns:
        An immutable, hashable rule.

    Raises:
        ValueError: an unknown name, an option out of its range, or one that the rule has no use
            for.

    >>> import jax
    >>> rule = make("lls_mxm", num_classes=10)
    >>> params = rule.init(jax.random.key(0), latent_dim=512)
    >>> activation = jax.random.normal(jax.random.key(1), (8, 32, 32, 32))
    >>> rule.loss(params, activation, jax.numpy.arange(8), pool_size=4).shape
    ()
    """
    maker = _maker(name)
    if num_classes < 2:
        raise ValueError(f"`num_classes` is {num_classes}; it must be at least 2.")
    if waveform is not None and waveform not in WAVEFORMS:
        raise ValueError(f"unknown waveform {waveform!r}; expected one of {', '.join(WAVEFORMS)}.")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"`temperature` is {temperature}; it must be positive.")
    if label_smoothing is not None and not 0 <= label_smoothing < 1:
        raise ValueError(f"`label_smoothing` is {label_smoothing}; it must lie in [0, 1).")
    if basis_rows is not None and basis_rows < 1:
        raise ValueError(f"`basis_rows` is {basis_rows}; it must be at least 1.")
    values = (waveform, temperature, label_smoothing, basis_rows, implementation, sign)
    # Not asking for the sign is no option either.
    given = {
        option: value
        for option, value in zip(_ORDER, values)
        if value is not None and value is not False
    }
    for option, value in given.items():
        if option not in maker.options:
            raise ValueError(
                f"`{option}` is {value!r}; rule {name!r} has no use for it: leave it out."
            )
    if name == _REDUCED and basis_rows is None:
        raise ValueError(f"`basis_rows` is None; rule {name!r} takes a number of rows.")
    return maker.make(num_classes, **given)


__all__ = ["NAMES", "OPTIONS", "LocalRule", "Rule", "make", "options_of"]
