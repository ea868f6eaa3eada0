"""What the rules with a softmax over the classes share: the op, and its options."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from lls_jax.rules.base import HeadRule, check_options
from pallas_kernels.local_loss import local_loss

Self = TypeVar("Self", bound="CrossEntropyRule")

MODULATION_STDDEV = 0.01
# The square of the 1e-12 below which PyTorch's `normalize` stops dividing by the norm.
_NORM_FLOOR_SQUARED = 1e-24


@dataclasses.dataclass(frozen=True)
class CrossEntropyRule(HeadRule):
    """Scores, modulated, are logits of a softmax cross-entropy.

    ``logits = s``, ``s * m`` or ``s M`` by the parameter ``modulation``, where there is one; the
    loss is ``cross_entropy(logits / temperature, labels, label_smoothing)``.

    Attributes:
        num_classes: number of classes, ``K``.
        temperature: divides the logits; positive, dimensionless.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1).
        implementation: of :func:`pallas_kernels.local_loss.local_loss`; None chooses.
    """

    num_classes: int
    temperature: float = 0.5
    label_smoothing: float = 0.0
    implementation: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for an option that is out of its range."""
        check_options(self.num_classes, self.temperature, self.label_smoothing)

    @property
    def normalizes(self) -> bool:
        """Whether the latents are scaled to unit length."""
        return True

    def modulation_of(self, params: dict[str, Any]) -> jax.Array | None:
        """What the scores are multiplied with: ``[rows]``, ``[rows, classes]``, or None."""
        return params.get("modulation")

    def head(
        self, scores: jax.Array, square: jax.Array, params: dict[str, Any], label: jax.Array
    ) -> jax.Array:
        """The cross-entropy of one example; see :meth:`HeadRule.head`."""
        if self.normalizes:
            scores = scores * jax.lax.rsqrt(jnp.maximum(square, _NORM_FLOOR_SQUARED))
        modulation = self.modulation_of(params)
        if modulation is not None:
            by_matrix = modulation.ndim == 2
            scores = (
                jnp.matmul(scores, modulation, precision="highest")
                if by_matrix
                else scores * modulation
            )
        target = jax.nn.one_hot(label, scores.shape[-1], dtype=jnp.float32)
        smoothed = optax.smooth_labels(target, self.label_smoothing)
        return optax.softmax_cross_entropy(scores / self.temperature, smoothed)

    def loss(
        self,
        params: dict[str, Any],
        seen: jax.Array,
        labels: jax.Array,
        *,
        pool_size: int | None = None,
    ) -> jax.Array:
        """The local loss, a float32 scalar: the mean over the batch; see :meth:`LocalRule.loss`.

        The same as :meth:`HeadRule.loss` of this head, by the operation that has GPU kernels.
        """
        latents = self.observe(seen, pool_size)
        per_example = local_loss(
            latents,
            self.projection(params, latents.shape[1]),
            self.modulation_of(params),
            labels,
            pool_size=latents.shape[1],
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            normalize=self.normalizes,
            implementation=self.implementation,
        )
        return jnp.mean(per_example)

    def without_kernels(self: Self) -> Self:
        """See :meth:`Rule.without_kernels`."""
        if self.implementation not in (None, "xla"):
            raise ValueError(
                f"rule {self.name!r} has the implementation {self.implementation!r}, a kernel, "
                "which the compiler cannot cut; use 'xla' or None."
            )
        return dataclasses.replace(self, implementation="xla")


def draw_modulation(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A modulation before training, N(0, 0.01^2), float32."""
    return MODULATION_STDDEV * jax.random.normal(key, shape, jnp.float32)
