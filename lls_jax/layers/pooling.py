"""Maxima and means over windows, read once and in any layout.

Nothing here merges an axis with the channels or transposes an activation, so that a GPU may keep
the layout that its convolutions want; and nothing but sums is in float32.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from lls_jax.platforms import by_platform
from pallas_kernels.local_loss.pooling import bins_of


def max_pool(x: jax.Array) -> jax.Array:
    """2x2 maxima at stride 2, ``[batch, height, width, channels]``; an odd last row is dropped."""
    return by_platform(x, cpu=_max_pool_in_halves, elsewhere=_max_pool_in_strides)


@jax.custom_vjp
def _max_pool_in_halves(x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    # Two maxima of contiguous halves: XLA's window reduction is 10 times slower backward on a CPU.
    pairs = x[:, : 2 * rows, : 2 * columns].reshape(batch, rows, 2, columns, 2 * channels)
    pairs = jnp.maximum(pairs[:, :, 0], pairs[:, :, 1])
    return jnp.maximum(pairs[..., :channels], pairs[..., channels:])


def _max_pool_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _max_pool_in_halves(x), x


def _max_pool_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    """To each window's maximum; equal ones share. (Automatic differentiation pads and adds the
    gradients of halves.)"""
    batch, height, width, channels = x.shape
    rows, columns = dy.shape[1:3]
    windows = x[:, : 2 * rows, : 2 * columns].reshape(batch, rows, 2, columns, 2, channels)
    y = _max_pool_in_halves(x)
    equal = [windows[:, :, i, :, j] == y for i, j in itertools.product(range(2), range(2))]
    equals = functools.reduce(jnp.add, [one.astype(dy.dtype) for one in equal])
    # The barrier keeps XLA from finding the maxima again for each of the four.
    y, dy = jax.lax.optimization_barrier((y, dy / jnp.maximum(equals, 1)))
    y, dy = (one[:, :, None, :, None, :] for one in (y, dy))
    dx = jnp.where(windows == y, dy, jnp.zeros_like(dy)).reshape(
        batch, 2 * rows, 2 * columns, channels
    )
    left = (height - 2 * rows, width - 2 * columns)
    return (jnp.pad(dx, ((0, 0), (0, left[0]), (0, left[1]), (0, 0))) if any(left) else dx,)


_max_pool_in_halves.defvjp(_max_pool_forward, _max_pool_backward)


def _max_pool_in_strides(x: jax.Array) -> jax.Array:
    """The same maxima in the same order, so that ties share a gradient in the same way."""
    _, height, width, _ = x.shape
    rows, columns = height // 2, width // 2
    every = functools.partial(jax.lax.slice_in_dim, stride=2)
    pairs = jnp.maximum(every(x, 0, 2 * rows, axis=1), every(x, 1, 2 * rows, axis=1))
    return jnp.maximum(every(pairs, 0, 2 * columns, axis=2), every(pairs, 1, 2 * columns, axis=2))


def spread_bins(windows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The transpose of :func:`sum_bins`: to each element the sum of its windows' values.

    Args:
        windows: ``[batch, p, p, channels]``.
        shape: ``[batch, height, width, channels]`` of the result.
    """
    for axis in (1, 2):
        windows = _spread_axis(windows, axis, shape[axis])
    return windows


def _spread_axis(windows: jax.Array, axis: int, size: int) -> jax.Array:
    edges = bins_of(size, windows.shape[axis])
    members = [
        [i for i, (start, stop) in enumerate(edges) if start <= at < stop] for at in range(size)
    ]
    total = None
    # Two windows at most where they are not larger than the axis is long.
    for owners in itertools.zip_longest(*members):
        chosen = np.array([0 if owner is None else owner for owner in owners])
        # Constants, in range.
        values = jnp.take(windows, chosen, axis=axis, mode="clip")
        if None in owners:
            shape = [1] * windows.ndim
            shape[axis] = size
            there = np.array([owner is not None for owner in owners]).reshape(shape)
            values = jnp.where(there, values, jnp.zeros_like(values))
        total = values if total is None else total + values
    assert total is not None
    return total
