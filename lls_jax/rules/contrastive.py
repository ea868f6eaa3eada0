"""A supervised contrastive local loss."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from lls_jax.layers.initializers import fan_in_uniform
from lls_jax.rules.base import LocalRule, check_options
from pallas_kernels.local_loss import latent_dim


@dataclasses.dataclass(frozen=True)
class Contrastive(LocalRule):
    """Pull a batch's images of one class together, and push those of other classes apart.

    With ``z_i = W a_i / ||W a_i||`` of the pooled activations, ``s_ij = z_i . z_j / t`` and
    ``P(i)`` the other images of ``i``'s class::

        loss = mean_i -1/|P(i)| sum_{p in P(i)} log( exp(s_ip) / sum_{j != i} exp(s_ij) )

    over the images whose ``P(i)`` is not empty. (Where every class appears once, the loss is 0.)

    Attributes:
        num_classes: number of classes; not needed, and kept so that rules are made alike.
        width: of the learned projection ``W``.
        temperature: ``t``; positive, dimensionless.

    References:
        Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2,
        https://arxiv.org/abs/2004.11362.
    """

    num_classes: int
    width: int = 128
    temperature: float = 0.1

    def __post_init__(self) -> None:
        """Raise ValueError for an option that is out of its range."""
        check_options(self.num_classes, temperature=self.temperature)
        if self.width < 1:
            raise ValueError(f"`width` is {self.width}; it must be at least 1.")

    @property
    def classes(self) -> None:
        """Any number will do."""
        return None

    sees: ClassVar[Literal["latents", "activation"]] = "latents"
    compares_examples: ClassVar[bool] = True

    def init(
        self, key: jax.Array, activation_shape: tuple[int, ...], pool_size: int
    ) -> dict[str, Any]:
        """``{"projection": W}``, ``[latents, width]``, drawn U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

        Args are those of :meth:`Rule.init`.
        """
        latents = latent_dim(activation_shape, pool_size)
        return {"projection": fan_in_uniform(latents)(key, (latents, self.width))}

    def loss(
        self,
        params: dict[str, Any],
        seen: jax.Array,
        labels: jax.Array,
        *,
        pool_size: int | None = None,
    ) -> jax.Array:
        """The local loss, a float32 scalar; see :meth:`LocalRule.loss`."""
        z = self.observe(seen, pool_size) @ params["projection"]
        square = jnp.sum(jnp.square(z), axis=1, keepdims=True)
        z = z * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
        logits = jnp.matmul(z, z.T, precision="highest") / self.temperature
        itself = jnp.eye(labels.shape[0], dtype=bool)
        log_p = jax.nn.log_softmax(jnp.where(itself, -jnp.inf, logits), axis=1)
        positive = (labels[:, None] == labels[None, :]) & ~itself
        count = jnp.sum(positive, axis=1).astype(jnp.float32)
        per_image = -jnp.sum(jnp.where(positive, log_p, 0.0), axis=1) / jnp.maximum(count, 1)
        return jnp.sum(per_image) / jnp.maximum(jnp.sum((count > 0).astype(jnp.float32)), 1)
