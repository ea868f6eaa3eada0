"""A supervised contrastive local loss."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lls_jax.initializers import fan_in_uniform
from pallas_kernels.local_loss import pool_latents


@dataclasses.dataclass(frozen=True)
class ContrastiveRule:
    """Pull a batch's images of one class together, and push those of other classes apart.

    With ``z_i = W a_i / ||W a_i||`` of the pooled activations, ``s_ij = z_i . z_j / t`` and
    ``P(i)`` the other images of ``i``'s class::

        loss = mean_i -1/|P(i)| sum_{p in P(i)} log( exp(s_ip) / sum_{j != i} exp(s_ij) )

    over the images whose ``P(i)`` is not empty. (Where every class appears once, the loss is 0.)

    Attributes:
        num_classes: number of classes; not needed, and kept so that rules are made alike.
        width: of the learned projection ``W``.
        temperature: ``t``; positive, dimensionless.
        name: the rule's name.

    References:
        Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2,
        https://arxiv.org/abs/2004.11362.
    """

    num_classes: int
    width: int = 128
    temperature: float = 0.1
    name: str = "contrastive"
    works_on_latents = True

    def init(
        self, key: jax.Array, latent_dim: int, hidden_dim: int | None = None
    ) -> dict[str, Any]:
        """``{"projection": W}``, ``[latents, width]``, drawn U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

        Args:
            key: random key.
            latent_dim: number of latents.
            hidden_dim: not needed here.
        """
        del hidden_dim
        return {"projection": fan_in_uniform(latent_dim)(key, (latent_dim, self.width))}

    def loss(
        self, params: dict[str, Any], activation: jax.Array, labels: jax.Array, *, pool_size: int
    ) -> jax.Array:
        """The local loss, a float32 scalar.

        Args:
            params: from :meth:`init`.
            activation: ``[batch, height, width, channels]`` or ``[batch, features]``.
            labels: integers ``[batch]``.
            pool_size: bins along each spatial axis, or along the features.
        """
        z = pool_latents(activation, pool_size) @ params["projection"]
        square = jnp.sum(jnp.square(z), axis=1, keepdims=True)
        z = z * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
        logits = jnp.matmul(z, z.T, precision="highest") / self.temperature
        itself = jnp.eye(labels.shape[0], dtype=bool)
        log_p = jax.nn.log_softmax(jnp.where(itself, -jnp.inf, logits), axis=1)
        positive = (labels[:, None] == labels[None, :]) & ~itself
        count = jnp.sum(positive, axis=1).astype(jnp.float32)
        per_image = -jnp.sum(jnp.where(positive, log_p, 0.0), axis=1) / jnp.maximum(count, 1)
        return jnp.sum(per_image) / jnp.maximum(jnp.sum((count > 0).astype(jnp.float32)), 1)
