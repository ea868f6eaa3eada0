"""What the rules with a softmax over the classes share: the cross-entropy, a head, its options."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lls_jax.rules.base import HeadRule, check_options
from lls_jax.rules.checks import check_labels, is_class
from pallas_kernels.local_loss import cross_entropy

MODULATION_STDDEV = 0.01


@dataclasses.dataclass(frozen=True)
class CrossEntropyRule(HeadRule):
    """Scores, modulated, are logits of a softmax cross-entropy.

    ``logits = s``, ``s * m`` or ``s M`` by the parameter ``modulation``, where there is one; the
    loss is ``cross_entropy(logits / temperature, labels, label_smoothing)``.

    Attributes:
        num_classes: number of classes, ``K``.
        temperature: divides the logits; positive, dimensionless.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1).
        implementation, interpret: see :class:`HeadRule`.
    """

    num_classes: int
    temperature: float = 0.5
    label_smoothing: float = 0.0

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
        return cross_entropy(
            scores,
            square,
            self.modulation_of(params),
            label,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            normalize=self.normalizes,
        )


def loss_of_classes(loss: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """A batch's loss, if all of its labels are classes.

    Inside a compiled function, where nobody can refuse a label, it is NaN otherwise.

    Args:
        loss: float32 scalar.
        labels: integers ``[batch]``.
        num_classes: how many classes there are.

    Raises:
        ValueError: a label is no class.
    """
    check_labels(labels, num_classes)
    all_are = jnp.all(is_class(jnp.asarray(labels), num_classes))
    # Added to the whole, and not to what it is the mean of, this leaves the loss's own program, and
    # so its rounding, as it is.
    return loss + jnp.where(all_are, jnp.float32(0.0), jnp.float32(jnp.nan))


@dataclasses.dataclass(frozen=True)
class HeadOfClasses(HeadRule):
    """A rule whose head does not look itself whether a label is a class.

    Attributes:
        num_classes: number of classes, ``K``.
        implementation, interpret: see :class:`HeadRule`.
    """

    num_classes: int

    def loss(
        self,
        params: dict[str, Any],
        seen: jax.Array,
        labels: jax.Array,
        *,
        pool_size: int | None = None,
    ) -> jax.Array:
        """The local loss; see :meth:`LocalRule.loss`, and :func:`loss_of_classes`."""
        loss = super().loss(params, seen, labels, pool_size=pool_size)
        return loss_of_classes(loss, labels, self.num_classes)


def smoothed_losses(
    logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Softmax cross-entropies, ``[...]``; of labels that are classes.

    Args:
        logits: float32 ``[..., classes]``.
        labels: integers ``[...]``.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1).
    """
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(own, label_smoothing))


def smoothed_cross_entropy(
    logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Softmax cross-entropy, the mean over the batch: a float32 scalar.

    Args:
        logits: float32 ``[batch, classes]``.
        labels: integers ``[batch]``.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1).

    Raises:
        ValueError: a label is no class, see :func:`loss_of_classes`.
    """
    loss = jnp.mean(smoothed_losses(logits, labels, label_smoothing))
    return loss_of_classes(loss, labels, logits.shape[1])


def draw_modulation(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A modulation before training, N(0, 0.01^2), float32."""
    return MODULATION_STDDEV * jax.random.normal(key, shape, jnp.float32)
