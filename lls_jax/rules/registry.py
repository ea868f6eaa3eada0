"""Rules by name."""

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from lls_jax.basis import WAVEFORMS
from lls_jax.rules.backpropagation import Backpropagation
from lls_jax.rules.classifier import ClassifierRule
from lls_jax.rules.contrastive import ContrastiveRule
from lls_jax.rules.decoupled import DecoupledRule
from lls_jax.rules.feedback import FeedbackRule
from lls_jax.rules.periodic import PeriodicRule
from lls_jax.rules.predsim import PredSimRule
from lls_jax.rules.protocol import LocalRule, Rule


@dataclasses.dataclass(frozen=True)
class _Options:
    """What a rule may be made with; each takes what it has a use for."""

    num_classes: int
    waveform: str
    temperature: float
    label_smoothing: float
    basis_rows: int | None
    implementation: str | None
    sign: bool


def _periodic(name: str, modulation: Any) -> Callable[[_Options], Rule]:
    return lambda options: PeriodicRule(
        name=name,
        num_classes=options.num_classes,
        modulation=modulation,
        basis_rows=options.basis_rows or options.num_classes,
        waveform=options.waveform,
        temperature=options.temperature,
        label_smoothing=options.label_smoothing,
        implementation=options.implementation,
    )


def _classifier(name: str, modulation: Any, learned: bool = False) -> Callable[[_Options], Rule]:
    return lambda options: ClassifierRule(
        name=name,
        num_classes=options.num_classes,
        modulation=modulation,
        learned=learned,
        temperature=options.temperature,
        label_smoothing=options.label_smoothing,
        implementation=options.implementation,
    )


_MAKERS: dict[str, Callable[[_Options], Rule]] = {
    "lls": _periodic("lls", "none"),
    "lls_m": _periodic("lls_m", "vector"),
    "lls_mxm": _periodic("lls_mxm", "matrix"),
    "lls_mxm_reduced": _periodic("lls_mxm_reduced", "matrix"),
    "lls_random": _classifier("lls_random", "none"),
    "lls_m_random": _classifier("lls_m_random", "vector"),
    "lls_mxm_random": _classifier("lls_mxm_random", "matrix"),
    "local_classifier": _classifier("local_classifier", "none", learned=True),
    "predsim": lambda options: PredSimRule(
        options.num_classes, label_smoothing=options.label_smoothing
    ),
    "contrastive": lambda options: ContrastiveRule(options.num_classes),
    "decoupled": lambda options: DecoupledRule(options.num_classes, options.label_smoothing),
    "bp": lambda options: Backpropagation("bp", options.num_classes),
    "dfa": lambda options: FeedbackRule("dfa", options.num_classes, "error", options.sign),
    "drtp": lambda options: FeedbackRule("drtp", options.num_classes, "target"),
}
_REDUCED = "lls_mxm_reduced"

NAMES = tuple(_MAKERS)


def _unknown(name: str) -> ValueError:
    close = difflib.get_close_matches(name, NAMES, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(
        f"unknown rule {name!r}; expected one of {', '.join(NAMES)}, or your own as "
        f"package.module:function.{hint}"
    )


def _own(name: str, options: _Options) -> Rule:
    """A rule from a user's own function, called with the options that it has parameters for."""
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise ValueError(
            f"rule {name!r}: module {module_name!r} cannot be imported ({error}); is its folder "
            "the current one, or on PYTHONPATH?"
        ) from error
    except AttributeError:
        raise ValueError(f"rule {name!r}: {module_name} has no {function_name!r}.") from None
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    known = {parameter.name for parameter in parameters}
    values = dataclasses.asdict(options)
    rule = function(**{k: v for k, v in values.items() if takes_all or k in known})
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


def make(
    name: str,
    *,
    num_classes: int,
    waveform: str = "square",
    temperature: float = 0.5,
    label_smoothing: float = 0.0,
    basis_rows: int | None = None,
    implementation: str | None = None,
    sign: bool = False,
) -> Rule:
    """Make a rule by its name.

    Args:
        name: of a local rule: ``lls``, ``lls_m``, ``lls_mxm``, ``lls_mxm_reduced``, ``lls_random``,
            ``lls_m_random``, ``lls_mxm_random``, ``local_classifier``, ``predsim``,
            ``contrastive``, ``decoupled``; of a baseline without local losses: ``bp``, ``dfa``,
            ``drtp``; or ``"package.module:function"``, whose function is called with those of the
            options below that it has parameters for. A rule ignores what it has no use for.
        num_classes: number of classes, at least 2.
        waveform: of the periodic basis, ``"square"`` or ``"cosine"``.
        temperature: divides a local loss's logits; positive, dimensionless.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1).
        basis_rows: rows of the reduced basis; ``lls_mxm_reduced`` only, and required there.
        implementation: of the local loss, ``"xla"``, ``"pallas"``, ``"triton"`` or None to choose;
            :func:`pallas_kernels.local_loss.local_loss` says more.
        sign: whether ``dfa`` feeds back the sign of the error alone.

    Returns:
        An immutable, hashable rule.

    Raises:
        ValueError: an unknown name, or an option out of its range.

    >>> import jax
    >>> rule = make("lls_mxm", num_classes=10)
    >>> params = rule.init(jax.random.key(0), latent_dim=512)
    >>> activation = jax.random.normal(jax.random.key(1), (8, 32, 32, 32))
    >>> rule.loss(params, activation, jax.numpy.arange(8), pool_size=4).shape
    ()
    """
    if name not in NAMES and ":" not in name:
        raise _unknown(name)
    if num_classes < 2:
        raise ValueError(f"`num_classes` is {num_classes}; it must be at least 2.")
    if waveform not in WAVEFORMS:
        raise ValueError(f"unknown waveform {waveform!r}; expected one of {', '.join(WAVEFORMS)}.")
    if not temperature > 0:
        raise ValueError(f"`temperature` is {temperature}; it must be positive.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"`label_smoothing` is {label_smoothing}; it must lie in [0, 1).")
    if name in NAMES and (name == _REDUCED) != (basis_rows is not None):
        wanted = "a number of rows" if name == _REDUCED else "None"
        raise ValueError(f"`basis_rows` is {basis_rows}; rule {name!r} takes {wanted}.")
    if basis_rows is not None and basis_rows < 1:
        raise ValueError(f"`basis_rows` is {basis_rows}; it must be at least 1.")
    if sign and name in NAMES and name != "dfa":
        raise ValueError(f"`sign` is True; rule {name!r} has no use for it, only 'dfa' has.")
    options = _Options(
        num_classes, waveform, temperature, label_smoothing, basis_rows, implementation, sign
    )
    return _own(name, options) if ":" in name else _MAKERS[name](options)


__all__ = ["NAMES", "LocalRule", "Rule", "make"]
