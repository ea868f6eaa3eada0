"""Maxima and means over windows, read once and in any layout.

Nothing here merges an axis with the channels or transposes an activation, so that a GPU may keep
the layout that its convolutions want; and nothing of an activation's size is in float32.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from lls_jax.platforms import by_platform
from pallas_kernels.local_loss.pooling import bins_of


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """2x2 maxima at stride 2, ``[batch, height, width, channels]``; an odd last row is dropped.

    Of a gradient, elements that are the maximum together get equal shares. Differentiable in
    reverse.
    """
    return by_platform(x, cpu=_max_pool_in_halves, elsewhere=_max_pool_in_strides)


def _max_pool_in_halves(x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    # Two maxima of contiguous halves: XLA's window reduction is 10 times slower backward on a CPU.
    pairs = x[:, : 2 * rows, : 2 * columns].reshape(batch, rows, 2, columns, 2 * channels)
    pairs = pairs.astype(_wide_dtype(x.dtype))
    pairs = jnp.maximum(pairs[:, :, 0], pairs[:, :, 1])
    return jnp.maximum(pairs[..., :channels], pairs[..., channels:]).astype(x.dtype)


def _quarters(x: jax.Array) -> list[jax.Array]:
    """The four elements of every window, ``[batch, height / 2, width / 2, channels]`` each."""
    _, height, width, _ = x.shape
    every = functools.partial(jax.lax.slice_in_dim, stride=2)
    return [
        every(every(x, i, height // 2 * 2, axis=1), j, width // 2 * 2, axis=2)
        for i, j in itertools.product(range(2), range(2))
    ]


def _windows(x: jax.Array) -> jax.Array:
    """``[batch, height / 2, 2, width / 2, 2, channels]``, without an odd last row."""
    batch, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    return x[:, : 2 * rows, : 2 * columns].reshape(batch, rows, 2, columns, 2, channels)


def _from_windows(windows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of :func:`_windows`, with zeros in an odd last row."""
    batch, rows, _, columns, _, channels = windows.shape
    whole = windows.reshape(batch, 2 * rows, 2 * columns, channels)
    left = (shape[1] - 2 * rows, shape[2] - 2 * columns)
    return jnp.pad(whole, ((0, 0), (0, left[0]), (0, left[1]), (0, 0))) if any(left) else whole


def _max_pool_in_strides(x: jax.Array) -> jax.Array:
    return functools.reduce(jnp.maximum, _quarters(x))


def _max_pool_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return max_pool(x), x


def _max_pool_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    return (by_platform(x, dy, cpu=_gradient_in_windows, elsewhere=_gradient_in_strides),)


def _winners(quarters: list[jax.Array]) -> list[jax.Array]:
    """Which elements of every window are its maximum, boolean.

    Compared with each other and not with the maximum: where a compiler finds an activation twice,
    rounded once here and twice there, no element equals the maximum.
    """
    return [functools.reduce(jnp.logical_and, [own >= one for one in quarters]) for own in quarters]


def _wide_dtype(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """The dtype that maxima are taken and shared in: XLA's CPU backend rounds each bfloat16 in
    between, at some cost, though it changes nothing."""
    return jnp.float32 if dtype == jnp.bfloat16 else dtype


def _share(winners: list[jax.Array], dy: jax.Array) -> jax.Array:
    equals = functools.reduce(jnp.add, [own.astype(_wide_dtype(dy.dtype)) for own in winners])
    return (dy.astype(equals.dtype) / jnp.maximum(equals, 1)).astype(dy.dtype)


# Automatic differentiation pads and adds the gradients of halves: on two cores of an AMD EPYC, for
# 128 images of 32x32 pixels and 32 channels, twice the time of one pass that asks which elements
# equal the maximum, with a sum over all elements behind it 5 times. In turns with that pass,
# milliseconds, medians of 40, jax 0.10.2 / 0.12.0.1: 2.5 / 2.8, so 2.9 / 3.5; with the sum 2.7 /
# 3.1, so 2.8 / 4.0. The difference is the price of not asking for equality.
def _gradient_in_windows(x: jax.Array, dy: jax.Array) -> jax.Array:
    windows = _windows(x)
    places = itertools.product(range(2), range(2))
    winners = _winners([windows[:, :, i, :, j] for i, j in places])
    # A bit for each of the four.
    bits = [own.astype(jnp.uint8) << np.uint8(k) for k, own in enumerate(winners)]
    code = functools.reduce(jnp.bitwise_or, bits)
    # The barrier keeps XLA from finding the winners again for each of four elements.
    code, share = (
        one[:, :, None, :, None]
        for one in jax.lax.optimization_barrier((code, _share(winners, dy)))
    )
    bit = np.array([[1, 2], [4, 8]], np.uint8).reshape(1, 1, 2, 1, 2, 1)
    return _from_windows(jnp.where((code & bit) != 0, share, jnp.zeros_like(share)), x.shape)


def _gradient_in_strides(x: jax.Array, dy: jax.Array) -> jax.Array:
    """:func:`_gradient_in_windows` without splitting an axis."""
    winners, zero = _winners(_quarters(x)), jnp.zeros((), dy.dtype)
    share = _share(winners, dy)
    parts = []
    for place, own in zip(itertools.product(range(2), range(2)), winners):
        # A pixel between two, and what is left at the end.
        sizes = zip(place, x.shape[1:], dy.shape[1:])
        sides = [(at, size - 2 * count + 1 - at, 1) for at, size, count in sizes]
        part = jnp.where(own, share, zero)
        parts.append(jax.lax.pad(part, zero, [(0, 0, 0), *sides, (0, 0, 0)]))
    return functools.reduce(jnp.add, parts)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def share_maxima(x: jax.Array, maxima: jax.Array, dy: jax.Array) -> jax.Array:
    """What each window's gradient gives to every element that is its maximum.

    Args:
        x: ``[batch, height, width, channels]``, in memory: an array that a compiler computes once
            here and once there may be rounded in two ways, and then no element is the maximum.
        maxima: ``max_pool(x)``, ``[batch, height / 2, width / 2, channels]``.
        dy: its gradient, in its shape.

    Returns:
        In the shape and dtype of `dy`.
    """
    return _share([own == maxima for own in _quarters(x)], dy)


def spread_maxima(x: jax.Array, maxima: jax.Array, share: jax.Array) -> jax.Array:
    """The gradient of :func:`max_pool` from :func:`share_maxima`, in one pass over `x`.

    Args:
        x: ``[batch, height, width, channels]``.
        maxima: ``max_pool(x)``, ``[batch, height / 2, width / 2, channels]``.
        share: from :func:`share_maxima`, in its shape.

    Returns:
        In the shape of `x`, and the dtype of `share`.
    """
    maxima, share = (one[:, :, None, :, None] for one in (maxima, share))
    dx = jnp.where(_windows(x) == maxima, share, jnp.zeros_like(share))
    return _from_windows(dx, x.shape)


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
    at = jax.lax.broadcasted_iota(jnp.int32, [size if i == axis else 1 for i in range(4)], axis)

    def spread_one(i: int, start: int, stop: int) -> jax.Array:
        value = jax.lax.slice_in_dim(windows, i, i + 1, axis=axis)
        return jnp.where((at >= start) & (at < stop), value, jnp.zeros_like(value))

    # XLA fuses these into what reads them, and writes what is gathered to memory.
    bins = enumerate(bins_of(size, windows.shape[axis]))
    return functools.reduce(jnp.add, [spread_one(i, *ends) for i, ends in bins])
