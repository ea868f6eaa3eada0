"""BatchNorm and LeakyReLU, and the means of what they give over windows, as one operation.

The pooled activation is what a local loss on latents needs. Its gradient needs neither the
activation nor a gradient of its size.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lls_jax.layers import normalization
from lls_jax.layers.normalization import (
    NEGATIVE_SLOPE,
    Statistics,
    affine,
    along,
    gradients_from_sums,
    input_gradient,
)
from lls_jax.layers.ordering import written_out
from lls_jax.layers.passes import add_parts
from lls_jax.layers.pooling import spread_bins
from lls_jax.platforms import by_platform
from pallas_kernels.local_loss.pooling import bin_sizes, bins_of, sum_bins


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
        return _uneven_window_sums(x, *affine(*statistics), pool_size)
    return by_platform(
        *(x, *affine(*statistics)),
        cpu=functools.partial(_window_sums_in_passes, pool_size=pool_size),
        elsewhere=functools.partial(_window_sums, pool_size=pool_size),
    )


def _slope_at(x: jax.Array, slope: jax.Array, offset: jax.Array) -> jax.Array:
    inside = x * along(slope, x) + along(offset, x) >= 0
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


def _window_sums_in_passes(
    x: jax.Array, slope: jax.Array, offset: jax.Array, *, pool_size: int
) -> tuple[jax.Array, jax.Array]:
    """:func:`_window_sums` on a CPU.

    Milliseconds for 4x4 windows, two cores of an Intel Xeon, jax 0.12.0.1 / 0.10.2, in turns: a
    loop over the rows of a window, of the batch in eight slices, and of all of it; the plain form,
    for which XLA writes ``m`` to memory and reads it twice; and these passes:

                              slices       all          plain        passes
        128 of 32x32x32       5.4 / 3.9    4.4 / 2.3    5.2 / 4.0    1.6 / 1.4
        128 of 16x16x64       2.7 / 2.3    2.5 / 1.2    2.0 / 2.0    1.2 / 0.6
        32 of 32x32x256       9.7 / 6.9    8.7 / 4.4                 2.5 / 2.1
    """
    windows = _windows(x, pool_size)
    sides = windows.shape[2], windows.shape[4]

    def add_up(of: Callable[[jax.Array], jax.Array]) -> jax.Array:
        def pass_over(windows: jax.Array) -> jax.Array:
            def part(rows: slice, columns: slice) -> jax.Array:
                return of(windows[:, :, rows, :, columns].astype(jnp.float32))

            return add_parts(part, sides, axes=(2, 4))

        return jnp.sum(written_out(pass_over, windows, decided_by=slope), (2, 4))

    def times_slope(x: jax.Array) -> jax.Array:
        return _slope_at(x, slope, offset) * x

    return add_up(functools.partial(_slope_at, slope=slope, offset=offset)), add_up(times_slope)


def pool_from_sums(sums: Sequence[jax.Array], statistics: Statistics, window: Any) -> jax.Array:
    """Means over windows of `window` elements, a number or an array, from :func:`window_sums`."""
    sum_m, sum_mx = sums
    slope, offset = (along(v, sum_m) for v in affine(*statistics))
    return (slope * sum_mx + offset * sum_m) / window


def _window_size(shape: tuple[int, ...], pool_size: int) -> Any:
    """Elements of a window: a number where they are of one size, else ``[1, p, p, 1]``."""
    if can_pool(shape, pool_size):
        return shape[1] * shape[2] // pool_size**2
    return bin_sizes(shape, pool_size)[None, :, :, None]


def _forward_pool(x: jax.Array, scale: jax.Array, bias: jax.Array, pool_size: int) -> tuple:
    (y, mean, variance), _ = normalization.forward(x, scale, bias)
    statistics = Statistics(mean, variance, scale, bias)
    sums = window_sums(x, statistics, pool_size)
    pooled = pool_from_sums(sums, statistics, _window_size(x.shape, pool_size))
    return (y, pooled, mean, variance), (x, statistics, sums)


def _forward_pool_of_pairs(x: Any, scale: Any, bias: Any, pool_size: int) -> tuple:
    """With `symbolic_zeros` an argument comes as its value, and whether it is perturbed."""
    return _forward_pool(x.value, scale.value, bias.value, pool_size)


def _backward_pool(pool_size: int, residuals: tuple, cotangents: tuple) -> tuple:
    x, statistics, sums = residuals
    dy, d_pooled = cotangents[:2]
    window = _window_size(x.shape, pool_size)
    if not isinstance(dy, SymbolicZero):
        # Somebody else wants a gradient of the activation: the plain way, for the sum of both.
        whole = dy.astype(jnp.float32)
        if not isinstance(d_pooled, SymbolicZero):
            whole = whole + spread(d_pooled / window, x.shape)
        return normalization.backward((x, *statistics), (whole, None, None))
    if isinstance(d_pooled, SymbolicZero):
        return tuple(map(jnp.zeros_like, (x, statistics.scale, statistics.bias)))
    d_window = d_pooled / window
    gradients = gradients_from_sums(window_gradient_sums(d_window, sums), statistics)
    whole = spread(d_window, x.shape)
    return input_gradient(x, statistics, whole, gradients, x.size // x.shape[-1]), *gradients


def window_gradient_sums(
    d_window: jax.Array, sums: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """:func:`gradient_sums` of a gradient that is one value a window, from :func:`window_sums`.

    Args:
        d_window: gradient of each activation of a window, ``[batch, p, p, channels]``.
        sums: of the same examples.
    """
    sum_m, sum_mx = (jnp.sum(d_window * own, (0, 1, 2)) for own in sums)
    return sum_m, sum_mx


def spread(windows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``[batch, p, p, channels]``, each value to all elements of its window."""
    pool_size = windows.shape[1]
    if not can_pool(shape, pool_size):
        return spread_bins(windows, shape)
    rows, columns = shape[1] // pool_size, shape[2] // pool_size
    wide = windows[:, :, None, :, None, :]
    full = (shape[0], pool_size, rows, pool_size, columns, shape[3])
    return jnp.broadcast_to(wide, full).reshape(shape)


normalize_activate_pool.defvjp(_forward_pool_of_pairs, _backward_pool, symbolic_zeros=True)
