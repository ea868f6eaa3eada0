"""The op in plain XLA operations: what it means, on any device."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.local_loss.heads import Head, per_example


def head_loss(
    latents: jax.Array, projection: jax.Array, labels: jax.Array, head: Head, params: Any
) -> jax.Array:
    """The loss of each example; :func:`pallas_kernels.local_loss.head_loss` says more."""
    z = latents.astype(jnp.float32)
    scores = jnp.matmul(z, projection.astype(jnp.float32).T, precision="highest")
    square = jnp.sum(jnp.square(z), axis=1)
    return per_example(head, scores, square, params, labels).astype(jnp.float32)
