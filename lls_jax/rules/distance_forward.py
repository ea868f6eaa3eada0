"""Distance-Forward: how close the latents are to a learned prototype of each class."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lls_jax.layers.initializers import fan_in_uniform
from lls_jax.rules.base import check_options
from lls_jax.rules.cross_entropy import HeadOfClasses, smoothed_losses
from pallas_kernels.local_loss import latent_dim

_NORM_FLOOR_SQUARED = 1e-24


@dataclasses.dataclass(frozen=True)
class DistanceForward(HeadOfClasses):
    """Pulls latents to their class's prototype, by a margin closer than to all the others.

    With ``c_k`` the cosine between the pooled activation and the learned prototype of class ``k``,
    which stands for the distance of unit vectors, ``|u - v|^2 = 2 - 2 c``::

        loss = log(1 + sum_{k != y} exp((c_k - c_y + margin) / temperature))

    the N-pair loss with a margin; without one it is the cross-entropy of ``c / temperature``.

    The paper pools nothing and has further parts (its layers share errors; it uses several of them
    together): this is its loss, of one block. The two numbers are ours.

    Attributes:
        num_classes: number of classes, ``K``.
        temperature: divides the cosines; positive, dimensionless.
        margin: by which the own prototype shall be closer, at least 0, dimensionless.

    References:
        Wu, Xu, Wu, Deng, Xu, Wen, Li, "Distance-Forward Learning: Enhancing the Forward-Forward
        Algorithm Towards High-Performance On-Chip Learning", https://arxiv.org/abs/2408.14925.
    """

    num_classes: int
    temperature: float = 0.1
    margin: float = 0.1

    def __post_init__(self) -> None:
        """Raise ValueError for an option that is out of its range."""
        check_options(self.num_classes, self.temperature)
        if not self.margin >= 0:
            raise ValueError(f"`margin` is {self.margin}; it must be at least 0.")

    @property
    def name(self) -> str:
        """``distance_forward``."""
        return "distance_forward"

    def init(
        self, key: jax.Array, activation_shape: tuple[int, ...], pool_size: int
    ) -> dict[str, Any]:
        """``{"prototypes": ...}``, ``[K, latents]``, drawn U(-1/sqrt(latents), 1/sqrt(latents)).

        Args are those of :meth:`Rule.init`.
        """
        latents = latent_dim(activation_shape, pool_size)
        return {"prototypes": fan_in_uniform(latents)(key, (self.num_classes, latents))}

    def projection(self, params: dict[str, Any], latent_dim: int) -> jax.Array:
        """The prototypes at unit length, ``[classes, latents]``."""
        del latent_dim
        prototypes = params["prototypes"]
        square = jnp.sum(jnp.square(prototypes), axis=1, keepdims=True)
        return prototypes * jax.lax.rsqrt(jnp.maximum(square, _NORM_FLOOR_SQUARED))

    def head(
        self, scores: jax.Array, square: jax.Array, params: dict[str, Any], label: jax.Array
    ) -> jax.Array:
        """The loss of one example; see :meth:`HeadRule.head`."""
        del params
        cosine = scores * jax.lax.rsqrt(jnp.maximum(square, _NORM_FLOOR_SQUARED))
        own = jax.nn.one_hot(label, self.num_classes, dtype=jnp.float32)
        logits = (cosine - self.margin * own) / self.temperature
        return smoothed_losses(logits, label)
