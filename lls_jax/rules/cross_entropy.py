"""What the rules with a softmax over the classes share: their head, and its options."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lls_jax.rules.base import HeadRule, check_options
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

    def loss(
        self,
        params: dict[str, Any],
        seen: jax.Array,
        labels: jax.Array,
        *,
        pool_size: int | None = None,
    ) -> jax.Array:
        """The local loss; see :meth:`LocalRule.loss`.

        Inside a compiled function, where the values of labels are not known yet, a label that is no
        class makes the loss and its gradient NaN.

        Raises:
            ValueError: a label is no class.
        """
        # NumPy's, because JAX's give no values while another function is traced.
        if not isinstance(labels, jax.core.Tracer) and len(values := np.asarray(labels)):
            wrong = values[(values < 0) | (values >= self.num_classes)]
            if wrong.size:
                raise ValueError(
                    f"`labels` holds {wrong[0]}; expected indices of {self.num_classes} classes, "
                    f"from 0 to {self.num_classes - 1}."
                )
        return super().loss(params, seen, labels, pool_size=pool_size)


def draw_modulation(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A modulation before training, N(0, 0.01^2), float32."""
    return MODULATION_STDDEV * jax.random.normal(key, shape, jnp.float32)
