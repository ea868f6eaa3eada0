"""Rules by name."""

import difflib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from lls_jax import own_parts
from lls_jax.rules.auglocal import AugLocal
from lls_jax.rules.backpropagation import Backpropagation
from lls_jax.rules.base import Rule
from lls_jax.rules.centered import CenteredLLS
from lls_jax.rules.classifier import LocalClassifier, RandomLLS
from lls_jax.rules.contrastive import Contrastive
from lls_jax.rules.decoupled import Decoupled
from lls_jax.rules.deeper_forward import DeeperForward
from lls_jax.rules.distance_forward import DistanceForward
from lls_jax.rules.feedback import DirectFeedback
from lls_jax.rules.infopro import InfoPro
from lls_jax.rules.mono_forward import MonoForward
from lls_jax.rules.periodic import LLS
from lls_jax.rules.predsim import PredSim
from pallas_kernels.local_loss import IMPLEMENTATIONS


class _Maker(NamedTuple):
    """How a rule is made.

    Attributes:
        make: from ``num_classes`` and those of its options that are given.
        options: that it has a use for.
        required: those of them that it cannot do without.
    """

    make: Callable[..., Rule]
    options: frozenset[str]
    required: frozenset[str] = frozenset()


_LOSS = frozenset({"temperature", "label_smoothing", "implementation"})
_LLS = _LOSS | {"waveform"}
_RANDOM = _LOSS | {"hidden_dim"}
_ROWS = frozenset({"basis_rows"})
_SMOOTHING = frozenset({"label_smoothing"})

_MAKERS: dict[str, _Maker] = {
    "lls": _Maker(LLS, _LLS),
    "lls_m": _Maker(functools.partial(LLS, modulation="vector"), _LLS),
    "lls_mxm": _Maker(functools.partial(LLS, modulation="matrix"), _LLS),
    "lls_mxm_reduced": _Maker(functools.partial(LLS, modulation="matrix"), _LLS | _ROWS, _ROWS),
    "lls_random": _Maker(RandomLLS, _RANDOM),
    "lls_m_random": _Maker(functools.partial(RandomLLS, modulation="vector"), _RANDOM),
    "lls_mxm_random": _Maker(functools.partial(RandomLLS, modulation="matrix"), _RANDOM),
    "local_classifier": _Maker(LocalClassifier, _RANDOM),
    "predsim": _Maker(PredSim, _SMOOTHING | {"similarity_weight"}),
    "contrastive": _Maker(Contrastive, frozenset({"temperature", "width"})),
    "decoupled": _Maker(Decoupled, _SMOOTHING),
    "auglocal": _Maker(AugLocal, _SMOOTHING | {"auxiliary_depth"}),
    "infopro": _Maker(InfoPro, frozenset({"pixel_mean", "pixel_std"})),
    "mono_forward": _Maker(MonoForward, _SMOOTHING),
    "deeper_forward": _Maker(DeeperForward, _SMOOTHING | {"temperature"}),
    "distance_forward": _Maker(DistanceForward, frozenset({"temperature", "margin"})),
    "lls_centered": _Maker(CenteredLLS, _LLS | _ROWS),
    "bp": _Maker(Backpropagation, frozenset()),
    "dfa": _Maker(functools.partial(DirectFeedback, signal="error"), frozenset({"sign"})),
    "drtp": _Maker(functools.partial(DirectFeedback, signal="target"), frozenset()),
}

NAMES = tuple(_MAKERS)
# Rules of this library's own: no published run has numbers for them.
OURS = frozenset({"lls_centered"})
# What a rule may be made with, beside the number of classes.
OPTIONS = frozenset[str]().union(*(maker.options for maker in _MAKERS.values()))

_EXPECTED = (
    "rule; make its class a frozen dataclass that derives from lls_jax.rules.LocalRule or HeadRule."
)


def _unknown(name: str) -> ValueError:
    close = difflib.get_close_matches(name, NAMES, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(
        f"unknown rule {name!r}; expected one of {', '.join(NAMES)}, or your own as "
        f"package.module:function.{hint}"
    )


def _own(name: str) -> _Maker:
    """How a rule of a user's own is made: by a function that says what it takes."""
    own = own_parts.find("rule", name)
    known = own.takes(OPTIONS)

    def make(num_classes: int, **options: Any) -> Rule:
        kernel = None if "implementation" in known else options.pop("implementation", None)
        rule = own.make_hashable({"num_classes": num_classes, **options}, Rule, _EXPECTED)
        if kernel is None:
            return rule
        if all(rule.with_implementation(name) == rule for name in IMPLEMENTATIONS):
            raise ValueError(
                f"`implementation` is {kernel!r}; rule {name!r} has no use for it: leave it out."
            )
        return rule.with_implementation(kernel)

    # Whether a rule has a head, which any kernel takes, is seen when it is made.
    return _Maker(make, known | {"implementation"})


def _maker(name: str) -> _Maker:
    if own_parts.is_own(name):
        return _own(name)
    if name not in NAMES:
        raise _unknown(name)
    return _MAKERS[name]


def options_of(name: str) -> frozenset[str]:
    """Which options of :func:`make` a rule has a use for, beside ``num_classes``.

    Args:
        name: as of :func:`make`.

    Raises:
        ValueError: an unknown name.

    >>> sorted(options_of("contrastive"))
    ['temperature', 'width']
    """
    return _maker(name).options


def make(name: str, *, num_classes: int, **options: Any) -> Rule:
    """Make a rule by its name: a thin front of the classes of :mod:`lls_jax.rules`.

    Args:
        name: of a local rule: ``lls``, ``lls_m``, ``lls_mxm``, ``lls_mxm_reduced``,
            ``lls_centered``, ``lls_random``, ``lls_m_random``, ``lls_mxm_random``,
            ``local_classifier``, ``predsim``, ``contrastive``, ``decoupled``, ``auglocal``,
            ``infopro``, ``mono_forward``, ``deeper_forward``, ``distance_forward``; of a baseline
            without local losses: ``bp``, ``dfa``, ``drtp``; or ``"package.module:function"``, whose
            function is called with the number of classes, if it has a parameter of that name, and
            with the options that are given.
        num_classes: number of classes, at least 2.
        **options: fields of the rule's class, of which :func:`options_of` tells the names; one
            that is None is the rule's own. ``waveform``: of the periodic basis, ``"square"`` or
            ``"cosine"``. ``temperature``: divides a local loss's logits; positive, dimensionless;
            0.5, contrastive's 0.1. ``label_smoothing``: share of the target spread evenly over the
            classes, in [0, 1); 0. ``basis_rows``: rows of the basis, of ``lls_mxm_reduced``, where
            it is required, and ``lls_centered``. ``hidden_dim``: width of a random or learned
            projection. ``similarity_weight``: of ``predsim``. ``width``: of ``contrastive``'s
            projection. ``implementation``: of the local loss, ``"xla"``, ``"split"``,
            ``"pallas"``, ``"triton"`` (:func:`pallas_kernels.local_loss.head_loss` says more).
            ``sign``: whether ``dfa`` feeds back the sign of the error alone. ``auxiliary_depth``:
            blocks of ``auglocal``'s first auxiliary network. ``pixel_mean``, ``pixel_std``: what
            ``infopro``'s images were normalised with. ``margin``: of ``distance_forward``.

    Returns:
        An immutable, hashable rule.

    Raises:
        ValueError: an unknown name, an option out of its range, or one that the rule has no use
            for.

    >>> import jax
    >>> rule = make("lls_mxm", num_classes=10)
    >>> params = rule.init(jax.random.key(0), (32, 32, 32), pool_size=4)
    >>> activation = jax.random.normal(jax.random.key(1), (8, 32, 32, 32))
    >>> rule.loss(params, activation, jax.numpy.arange(8), pool_size=4).shape
    ()
    """
    maker = _maker(name)
    # Not asking for the sign is no option either.
    given = {option: v for option, v in options.items() if v is not None and v is not False}
    for option, value in given.items():
        if option not in maker.options:
            raise ValueError(
                f"`{option}` is {value!r}; rule {name!r} has no use for it: leave it out."
            )
    if missing := sorted(maker.required - set(given)):
        raise ValueError(f"`{missing[0]}` is None; rule {name!r} takes a number of rows.")
    return maker.make(num_classes=num_classes, **given)
