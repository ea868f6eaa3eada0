"""Mono-Forward: a linear classifier of the whole activation a block."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lls_jax.layers.initializers import fan_in_uniform
from lls_jax.rules.base import LocalRule, check_options
from lls_jax.rules.cross_entropy import smoothed_cross_entropy


@dataclasses.dataclass(frozen=True)
class MonoForward(LocalRule):
    """The goodness of each class is a learned projection of the activation, which is not pooled.

    ``loss = CE(M a, y)``, with ``a`` the activation flattened and ``M`` ``[K, activations]``:
    ``local_classifier`` without its pooling and with temperature 1.

    Attributes:
        num_classes: number of classes, ``K``.
        label_smoothing: of the cross-entropy, in [0, 1).

    References:
        Gong, Li, Abdulla, "Mono-Forward: Backpropagation-Free Algorithm for Efficient Neural
        Network Training Harnessing Local Errors", https://arxiv.org/abs/2501.09238.
    """

    num_classes: int
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for an option that is out of its range."""
        check_options(self.num_classes, label_smoothing=self.label_smoothing)

    @property
    def name(self) -> str:
        """``mono_forward``."""
        return "mono_forward"

    def init(
        self, key: jax.Array, activation_shape: tuple[int, ...], pool_size: int
    ) -> dict[str, Any]:
        """``{"projection": M}``, drawn U(-1/sqrt(n), 1/sqrt(n)) for ``n`` activations.

        Args are those of :meth:`Rule.init`.
        """
        del pool_size
        size = math.prod(activation_shape)
        return {"projection": fan_in_uniform(size)(key, (self.num_classes, size))}

    def loss(
        self,
        params: dict[str, Any],
        seen: jax.Array,
        labels: jax.Array,
        *,
        pool_size: int | None,
    ) -> jax.Array:
        """The local loss, a float32 scalar; see :meth:`LocalRule.loss`."""
        del pool_size
        goodness = seen.astype(jnp.float32).reshape(seen.shape[0], -1) @ params["projection"].T
        return smoothed_cross_entropy(goodness, labels, self.label_smoothing)
