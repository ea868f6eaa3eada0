"""BatchNorm and LeakyReLU as one operation, with a gradient written by hand.

Autodiff keeps the normalised activation, the mask of the LeakyReLU and more; this gradient keeps
the input alone and computes the rest again, which is cheap: less memory, fewer passes.
"""

import jax
import jax.numpy as jnp

EPSILON = 1e-5
NEGATIVE_SLOPE = 0.01


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
    slope, offset = _affine(mean, variance, scale, bias)
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
    dy = jnp.where(wide * slope + offset >= 0, dy, NEGATIVE_SLOPE * dy)
    inverse_std = jax.lax.rsqrt(variance + EPSILON)
    d_bias = jnp.sum(dy, axes)
    # The sum of dy * (x - mean), without writing x - mean to memory.
    d_scale = (jnp.sum(dy * wide, axes) - mean * d_bias) * inverse_std
    per_deviation = slope * inverse_std * d_scale / count
    dx = slope * (dy - d_bias / count) - (wide - mean) * per_deviation
    return dx.astype(x.dtype), d_scale, d_bias


normalize_activate.defvjp(_forward, _backward)
