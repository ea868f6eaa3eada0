"""BatchNorm and LeakyReLU as one operation, with a gradient written by hand.

Autodiff keeps the normalised activation, the mask of the LeakyReLU and more; this gradient keeps
the input alone and computes the rest again, which is cheap: less memory, fewer passes.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lls_jax.layers.pooling import spread_bins
from lls_jax.platforms import by_platform
from pallas_kernels.local_loss.pooling import bin_sizes, bins_of, sum_bins

EPSILON = 1e-5
NEGATIVE_SLOPE = 0.01


def _along(values: jax.Array, x: jax.Array) -> jax.Array:
    """``[channels]`` with as many axes as `x`, whose last one are the channels."""
    return values.reshape((1,) * (x.ndim - 1) + values.shape)


def leaky_relu(x: jax.Array) -> jax.Array:
    """``x`` where it is not negative, a hundredth of it elsewhere."""
    return jnp.where(x >= 0, x, NEGATIVE_SLOPE * x)


def _affine(
    mean: jax.Array, variance: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Slope and offset, so that normalising is ``x * slope + offset``."""
    slope = scale * jax.lax.rsqrt(variance + EPSILON)
    return slope, bias - mean * slope


def apply_statistics(
    x: jax.Array, mean: jax.Array, variance: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
    """Normalise with given statistics, then activate; ``[..., channels]``, in the dtype of `x`."""
    slope, offset = (_along(v, x) for v in _affine(mean, variance, scale, bias))
    return leaky_relu(x.astype(jnp.float32) * slope + offset).astype(x.dtype)


@jax.custom_vjp
def normalize_activate(
    x: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalise each channel over all other axes, then activate.

    ``y = leaky_relu((x - mean) / sqrt(variance + 1e-5) * scale + bias)``, in float32 whatever the
    dtype of `x`. The variance is the biased one. Differentiable once, in reverse; nothing flows
    back through the statistics that are returned.

    Args:
        x: ``[..., channels]``.
        scale: float32 ``[channels]``.
        bias: float32 ``[channels]``.

    Returns:
        ``(y, mean, variance)``: `y` in the shape and dtype of `x`; the batch's own statistics,
        float32 ``[channels]``.

    References:
        Ioffe, Szegedy, "Batch Normalization", https://arxiv.org/abs/1502.03167.
    """
    return _forward(x, scale, bias)[0]


def _forward(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple:
    axes = tuple(range(x.ndim - 1))
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axes)
    # One pass over the input instead of two; rounding must not make it negative.
    variance = jnp.maximum(jnp.mean(jnp.square(wide), axes) - jnp.square(mean), 0.0)
    y = apply_statistics(x, mean, variance, scale, bias)
    return (y, mean, variance), (x, mean, variance, scale, bias)


def _backward(residuals: tuple, cotangents: tuple) -> tuple:
    x, mean, variance, scale, bias = residuals
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1]
    wide = x.astype(jnp.float32)
    slope, offset = _affine(mean, variance, scale, bias)
    dy = cotangents[0].astype(jnp.float32)
    dy = jnp.where(wide * _along(slope, x) + _along(offset, x) >= 0, dy, NEGATIVE_SLOPE * dy)
    inverse_std = jax.lax.rsqrt(variance + EPSILON)
    d_bias = jnp.sum(dy, axes)
    # The sum of dy * (x - mean), without writing x - mean to memory.
    d_scale = (jnp.sum(dy * wide, axes) - mean * d_bias) * inverse_std
    per_deviation = slope * inverse_std * d_scale / count
    # slope * (dy - d_bias / count) - (x - mean) * per_deviation
    constant = mean * per_deviation - slope * d_bias / count
    dx = _along(slope, x) * dy - wide * _along(per_deviation, x) + _along(constant, x)
    return dx.astype(x.dtype), d_scale, d_bias


normalize_activate.defvjp(_forward, _backward)


# --- With the pooled activation ------------------------------------------------------------------


def can_pool(shape: tuple[int, ...], pool_size: int) -> bool:
    """Whether ``[batch, height, width, channels]`` divides into windows of one size."""
    return len(shape) == 4 and shape[1] % pool_size == 0 and shape[2] % pool_size == 0


def _windows(x: jax.Array, pool_size: int) -> jax.Array:
    """``[batch, p, rows, p, columns, channels]``."""
    batch, height, width, channels = x.shape
    rows, columns = height // pool_size, width // pool_size
    return x.reshape(batch, pool_size, rows, pool_size, columns, channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_activate_pool(
    x: jax.Array, scale: jax.Array, bias: jax.Array, pool_size: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """:func:`normalize_activate`, and the mean of what it gives over windows.

    A local loss needs the pooled activation only. Then the gradient needs neither the activation
    nor a gradient of its size: with ``m`` the slope of the activation function at each element, the
    sums ``S_0 = sum m`` and ``S_1 = sum m x`` over each window give the pooled activation,
    ``(slope S_1 + offset S_0) / size``, and with its cotangent the gradients of scale and bias.
    Differentiable once, in reverse, with respect to both the activation and its means.

    Args:
        x: ``[batch, height, width, channels]``.
        scale: float32 ``[channels]``.
        bias: float32 ``[channels]``.
        pool_size: windows of adaptive pooling along each spatial axis; they may overlap.

    Returns:
        ``(y, pooled, mean, variance)``; `pooled` is float32 ``[batch, p, p, channels]``.
    """
    return _forward_pool(x, scale, bias, pool_size)[0]


class Statistics(NamedTuple):
    """What a batch is normalised with; each float32 ``[channels]``.

    Attributes:
        mean: of the batch.
        variance: of the batch, biased.
        scale: learned.
        bias: learned.
    """

    mean: jax.Array
    variance: jax.Array
    scale: jax.Array
    bias: jax.Array


def window_sums(x: jax.Array, statistics: Statistics, pool_size: int) -> tuple[Any, Any]:
    """``sum m`` and ``sum m x`` over windows, ``m`` the slope of the activation function.

    Args:
        x: ``[batch, height, width, channels]``, before normalisation.
        statistics: what it is normalised with.
        pool_size: ``p``, windows along each spatial axis.

    Returns:
        Two float32 arrays ``[batch, p, p, channels]``.
    """
    if not can_pool(x.shape, pool_size):
        return _uneven_window_sums(x, *_affine(*statistics), pool_size)
    return by_platform(
        *(x, *_affine(*statistics)),
        cpu=functools.partial(_window_sums_by_rows, pool_size=pool_size),
        elsewhere=functools.partial(_window_sums, pool_size=pool_size),
    )


def _slope_at(x: jax.Array, slope: jax.Array, offset: jax.Array) -> jax.Array:
    inside = x * _along(slope, x) + _along(offset, x) >= 0
    return jnp.where(inside, jnp.float32(1.0), jnp.float32(NEGATIVE_SLOPE))


def _window_sums(
    x: jax.Array, slope: jax.Array, offset: jax.Array, *, pool_size: int
) -> tuple[jax.Array, jax.Array]:
    windows = _windows(x.astype(jnp.float32), pool_size)
    m = _slope_at(windows, slope, offset)
    return jnp.sum(m, (2, 4)), jnp.sum(m * windows, (2, 4))


def _uneven_window_sums(
    x: jax.Array, slope: jax.Array, offset: jax.Array, pool_size: int
) -> tuple[jax.Array, jax.Array]:
    """:func:`_window_sums` where windows overlap, repeat, or differ in size."""
    rows: list[tuple[jax.Array, jax.Array]] = []
    for ends in bins_of(x.shape[1], pool_size):
        # Never the whole in float32, which two windows at a time read.
        part = jax.lax.slice_in_dim(x, *ends, axis=1).astype(jnp.float32)
        m = _slope_at(part, slope, offset)
        rows.append((jnp.sum(m, 1), jnp.sum(m * part, 1)))
    sum_m, sum_mx = (sum_bins(jnp.stack(sums, 1), pool_size, axes=(2,)) for sums in zip(*rows))
    return sum_m, sum_mx


def _window_sums_by_rows(
    x: jax.Array, slope: jax.Array, offset: jax.Array, *, pool_size: int
) -> tuple[jax.Array, jax.Array]:
    """:func:`_window_sums`, row after row of the windows.

    XLA's CPU backend would write ``m`` to memory and read it twice (32 images of 64x64 pixels and
    64 channels, 4x4 windows, jax 0.10.2 / 0.12.0.1: 13.7 / 12.8 ms of CPU time, so 6.1 / 5.7).
    """
    batch, height, width, channels = x.shape
    rows = x.reshape(batch * pool_size, height // pool_size, width, channels)

    def add_row(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row = jax.lax.dynamic_index_in_dim(rows, i, 1, keepdims=False).astype(jnp.float32)
        m = _slope_at(row, slope, offset)
        return sums[0] + m, sums[1] + m * row

    zeros = jnp.zeros((batch * pool_size, width, channels), jnp.float32)
    sums = jax.lax.fori_loop(0, rows.shape[1], add_row, (zeros, zeros))
    shape = (batch, pool_size, pool_size, width // pool_size, channels)
    return jnp.sum(sums[0].reshape(shape), 3), jnp.sum(sums[1].reshape(shape), 3)


def pool_from_sums(sums: Sequence[jax.Array], statistics: Statistics, window: Any) -> jax.Array:
    """Means over windows of `window` elements, a number or an array, from :func:`window_sums`."""
    sum_m, sum_mx = sums
    slope, offset = (_along(v, sum_m) for v in _affine(*statistics))
    return (slope * sum_mx + offset * sum_m) / window


class PooledGradients(NamedTuple):
    """Gradients from that of the pooled activation.

    Attributes:
        window: with respect to each activation of a window, ``[batch, p, p, channels]``.
        scale: float32 ``[channels]``.
        bias: float32 ``[channels]``.
    """

    window: jax.Array
    scale: jax.Array
    bias: jax.Array


def gradients_from_sums(
    d_pooled: jax.Array,
    sums: Sequence[jax.Array],
    statistics: Statistics,
    window: Any,
) -> PooledGradients:
    """The gradients of scale and bias, from :func:`window_sums` alone."""
    mean, variance, _, _ = statistics
    d_window = d_pooled / window
    d_bias = jnp.sum(d_window * sums[0], (0, 1, 2))
    d_scale = jnp.sum(d_window * sums[1], (0, 1, 2)) - mean * d_bias
    return PooledGradients(d_window, d_scale * jax.lax.rsqrt(variance + EPSILON), d_bias)


def input_gradient(
    x: jax.Array,
    statistics: Statistics,
    gradients: PooledGradients,
    count: int,
) -> jax.Array:
    """The gradient with respect to what is normalised, or to a slice of it.

    Args:
        x: ``[batch, height, width, channels]``, the whole batch or a slice.
        statistics: of the whole batch.
        gradients: `window` of the same examples as `x`, the others of the whole batch.
        count: elements a channel of the whole batch.

    Returns:
        In the shape and dtype of `x`.
    """
    slope, offset = _affine(*statistics)
    inverse_std = jax.lax.rsqrt(statistics.variance + EPSILON)
    per_deviation = slope * inverse_std * gradients.scale / count
    wide = x.astype(jnp.float32)
    m = jnp.where(wide * _along(slope, x) + _along(offset, x) >= 0, 1.0, NEGATIVE_SLOPE)
    dy = m * _spread(gradients.window, x.shape)
    # slope * (dy - d_bias / count) - (x - mean) * per_deviation
    constant = statistics.mean * per_deviation - slope * gradients.bias / count
    dx = _along(slope, x) * dy - wide * _along(per_deviation, x) + _along(constant, x)
    return dx.astype(x.dtype)


def _plain(args: tuple) -> tuple:
    return tuple(getattr(arg, "value", arg) for arg in args)


def _window_size(shape: tuple[int, ...], pool_size: int) -> Any:
    """Elements of a window: a number where they are of one size, else ``[1, p, p, 1]``."""
    if can_pool(shape, pool_size):
        return shape[1] * shape[2] // pool_size**2
    return bin_sizes(shape, pool_size)[None, :, :, None]


def _forward_pool(x: Any, scale: Any, bias: Any, pool_size: int) -> tuple:
    x, scale, bias = _plain((x, scale, bias))
    (y, mean, variance), _ = _forward(x, scale, bias)
    statistics = Statistics(mean, variance, scale, bias)
    sums = window_sums(x, statistics, pool_size)
    pooled = pool_from_sums(sums, statistics, _window_size(x.shape, pool_size))
    return (y, pooled, mean, variance), (x, statistics, sums)


def _backward_pool(pool_size: int, residuals: tuple, cotangents: tuple) -> tuple:
    x, statistics, sums = residuals
    dy, d_pooled = cotangents[:2]
    window = _window_size(x.shape, pool_size)
    if not isinstance(dy, SymbolicZero):
        # Somebody else wants a gradient of the activation: the plain way, for the sum of both.
        spread = jnp.zeros((1, *x.shape[1:]), jnp.float32)
        if not isinstance(d_pooled, SymbolicZero):
            spread = _spread(d_pooled / window, x.shape)
        whole = dy.astype(jnp.float32) + spread
        return _backward((x, *statistics), (whole, None, None))
    if isinstance(d_pooled, SymbolicZero):
        return tuple(map(jnp.zeros_like, (x, statistics.scale, statistics.bias)))
    gradients = gradients_from_sums(d_pooled, sums, statistics, window)
    dx = input_gradient(x, statistics, gradients, x.size // x.shape[-1])
    return dx, gradients.scale, gradients.bias


def _spread(windows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``[batch, p, p, channels]``, each value to all elements of its window."""
    pool_size = windows.shape[1]
    if not can_pool(shape, pool_size):
        return spread_bins(windows, shape)
    rows, columns = shape[1] // pool_size, shape[2] // pool_size
    wide = windows[:, :, None, :, None, :]
    full = (shape[0], pool_size, rows, pool_size, columns, shape[3])
    return jnp.broadcast_to(wide, full).reshape(shape)


normalize_activate_pool.defvjp(_forward_pool, _backward_pool, symbolic_zeros=True)
