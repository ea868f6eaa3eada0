"""BatchNorm without a scale, and GELU, as one operation that keeps its input alone."""

import functools

import jax
import jax.numpy as jnp

from lls_jax.layers.gelu import gelu, gelu_slope
from lls_jax.layers.normalization import NormGradients, along, moments, through_statistics


def apply_gelu(
    x: jax.Array, mean: jax.Array, variance: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
    """Normalise with given statistics, then GELU, in the shape and dtype of `x`.

    Args:
        x: ``[..., channels]``.
        mean: float32 ``[channels]``, like `variance` and `bias`.
        variance: biased.
        bias: added to what is normalised.
        epsilon: added to the variance.
    """
    return gelu(_normalized(x, mean, variance, bias, epsilon)).astype(x.dtype)


def _normalized(
    x: jax.Array, mean: jax.Array, variance: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
    inverse_std = jax.lax.rsqrt(variance + epsilon)
    offset = bias - mean * inverse_std
    return x.astype(jnp.float32) * along(inverse_std, x) + along(offset, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def normalize_gelu(
    x: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalise each channel over all other axes, add a bias, then GELU.

    ``y = gelu((x - mean) / sqrt(variance + epsilon) + bias)``, in float32 whatever the dtype of
    `x`. The variance is the biased one. Differentiable once, in reverse; nothing flows back through
    the statistics that are returned.

    Args:
        x: ``[..., channels]``.
        bias: float32 ``[channels]``.
        epsilon: added to the variance.

    Returns:
        ``(y, mean, variance)``: `y` in the shape and dtype of `x`; the batch's own statistics,
        float32 ``[channels]``.

    References:
        Ioffe, Szegedy, https://arxiv.org/abs/1502.03167; Hendrycks, Gimpel,
        https://arxiv.org/abs/1606.08415.
    """
    return _forward(x, bias, epsilon)[0]


def _forward(x: jax.Array, bias: jax.Array, epsilon: float) -> tuple:
    mean, variance = moments(x)
    y = apply_gelu(x, mean, variance, bias, epsilon)
    return (y, mean, variance), (x, mean, variance, bias)


def _backward(epsilon: float, residuals: tuple, cotangents: tuple) -> tuple:
    x, mean, variance, bias = residuals
    inverse_std = jax.lax.rsqrt(variance + epsilon)
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    slope = gelu_slope(_normalized(x, mean, variance, bias, epsilon))
    # Written to memory once, where each of three passes would find erf and exp again.
    dz = jax.lax.optimization_barrier((cotangents[0].astype(jnp.float32) * slope).astype(x.dtype))
    wide = dz.astype(jnp.float32)
    d_bias = jnp.sum(wide, axes)
    # That of a scale, if there were one; without writing x - mean to memory.
    d_scale = (jnp.sum(wide * x.astype(jnp.float32), axes) - mean * d_bias) * inverse_std
    gradients = NormGradients(d_scale, d_bias)
    dx = through_statistics(x, wide, mean, inverse_std, inverse_std, gradients, count)
    return dx, d_bias


normalize_gelu.defvjp(_forward, _backward)
