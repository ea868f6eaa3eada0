"""Rules by name."""

import difflib
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax

from lls_jax.basis import WAVEFORMS
from lls_jax.rules.backpropagation import Backpropagation
from lls_jax.rules.periodic import PeriodicRule


@runtime_checkable
class LocalRule(Protocol):
    """What a block needs of a rule. Hashable and immutable: a frozen dataclass is the easy way."""

    @property
    def name(self) -> str:
        """What logs and checkpoints call it."""

    def init(
        self, key: jax.Array, latent_dim: int, hidden_dim: int | None = None
    ) -> dict[str, jax.Array]:
        """The parameters that the rule learns with the block; ``{}`` where it has none."""

    def loss(
        self, params: dict[str, Any], activation: jax.Array, labels: jax.Array, *, pool_size: int
    ) -> jax.Array:
        """The block's loss, a scalar: the mean over the batch."""


Rule: TypeAlias = LocalRule | Backpropagation

# name: (modulation, whether the basis may have fewer rows than there are classes)
_PERIODIC: dict[str, tuple[Any, bool]] = {
    "lls": ("none", False),
    "lls_m": ("vector", False),
    "lls_mxm": ("matrix", False),
    "lls_mxm_reduced": ("matrix", True),
}

NAMES = (*_PERIODIC, "bp")


def _unknown(name: str) -> ValueError:
    close = difflib.get_close_matches(name, NAMES, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"unknown rule {name!r}; expected one of {', '.join(NAMES)}.{hint}")


def make(
    name: str,
    *,
    num_classes: int,
    waveform: str = "square",
    temperature: float = 0.5,
    label_smoothing: float = 0.0,
    basis_rows: int | None = None,
    implementation: str | None = None,
) -> Rule:
    """Make a rule by its name.

    Args:
        name: ``lls``, ``lls_m``, ``lls_mxm``, ``lls_mxm_reduced``, or the baseline ``bp``, which
            has no local loss and so no use for the options below.
        num_classes: number of classes, at least 2.
        waveform: of the periodic basis, ``"square"`` or ``"cosine"``.
        temperature: divides a local loss's logits; positive, dimensionless.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1).
        basis_rows: rows of the reduced basis; ``lls_mxm_reduced`` only, and required there.
        implementation: of the local loss, ``"xla"``, ``"pallas"``, ``"triton"`` or None to choose;
            :func:`pallas_kernels.local_loss.local_loss` says more.

    Returns:
        An immutable, hashable rule.

    Raises:
        ValueError: an unknown name, or an option out of its range.

    >>> rule = make("lls_mxm", num_classes=10)
    >>> params = rule.init(jax.random.key(0), latent_dim=512)
    >>> activation = jax.random.normal(jax.random.key(1), (8, 32, 32, 32))
    >>> rule.loss(params, activation, jax.numpy.arange(8), pool_size=4).shape
    ()
    """
    if name not in NAMES:
        raise _unknown(name)
    if num_classes < 2:
        raise ValueError(f"`num_classes` is {num_classes}; it must be at least 2.")
    if waveform not in WAVEFORMS:
        raise ValueError(f"unknown waveform {waveform!r}; expected one of {', '.join(WAVEFORMS)}.")
    if not temperature > 0:
        raise ValueError(f"`temperature` is {temperature}; it must be positive.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"`label_smoothing` is {label_smoothing}; it must lie in [0, 1).")
    if name == "bp":
        return Backpropagation(name, num_classes)
    modulation, reducible = _PERIODIC[name]
    if reducible != (basis_rows is not None):
        wanted = "a number of rows" if reducible else "None"
        raise ValueError(f"`basis_rows` is {basis_rows}; rule {name!r} takes {wanted}.")
    if basis_rows is not None and basis_rows < 1:
        raise ValueError(f"`basis_rows` is {basis_rows}; it must be at least 1.")
    return PeriodicRule(
        name=name,
        num_classes=num_classes,
        modulation=modulation,
        basis_rows=basis_rows or num_classes,
        waveform=waveform,
        temperature=temperature,
        label_smoothing=label_smoothing,
        implementation=implementation,
    )
