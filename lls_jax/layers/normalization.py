"""BatchNorm and LeakyReLU as one operation, with a gradient written by hand.

Autodiff keeps the normalised activation, the mask of the LeakyReLU and more; this gradient keeps
the input alone and computes the rest again, which is cheap: less memory, fewer passes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

EPSILON = 1e-5
NEGATIVE_SLOPE = 0.01


def along(values: jax.Array, x: jax.Array) -> jax.Array:
    """``[channels]`` with as many axes as `x`, whose last one are the channels."""
    return values.reshape((1,) * (x.ndim - 1) + values.shape)


def leaky_relu(x: jax.Array) -> jax.Array:
    """``x`` where it is not negative, a hundredth of it elsewhere."""
    return jnp.where(x >= 0, x, NEGATIVE_SLOPE * x)


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


def affine(
    mean: jax.Array, variance: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Slope and offset, so that normalising is ``x * slope + offset``."""
    slope = scale * jax.lax.rsqrt(variance + EPSILON)
    return slope, bias - mean * slope


def apply_statistics(
    x: jax.Array, mean: jax.Array, variance: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
    """Normalise with given statistics, then activate; ``[..., channels]``, in the dtype of `x`."""
    slope, offset = (along(v, x) for v in affine(mean, variance, scale, bias))
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
    return forward(x, scale, bias)[0]


def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of each channel, float32 ``[channels]``, of ``[..., channels]``."""
    axes = tuple(range(x.ndim - 1))
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axes)
    # One pass over the input instead of two; rounding must not make it negative.
    return mean, jnp.maximum(jnp.mean(jnp.square(wide), axes) - jnp.square(mean), 0.0)


def forward(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple:
    """Results of :func:`normalize_activate`, and what :func:`backward` needs."""
    mean, variance = moments(x)
    y = apply_statistics(x, mean, variance, scale, bias)
    return (y, mean, variance), (x, mean, variance, scale, bias)


def backward(residuals: tuple, cotangents: tuple) -> tuple:
    """Gradients of :func:`normalize_activate`'s arguments."""
    x, *rest = residuals
    statistics = Statistics(*rest)
    sums = gradient_sums(x, statistics, cotangents[0])
    gradients = gradients_from_sums(sums, statistics)
    dx = input_gradient(x, statistics, cotangents[0], gradients, x.size // x.shape[-1])
    return dx, *gradients


normalize_activate.defvjp(forward, backward)


class NormGradients(NamedTuple):
    """Gradients of what BatchNorm learns; each float32 ``[channels]``."""

    scale: jax.Array
    bias: jax.Array


def gradient_sums(
    x: jax.Array, statistics: Statistics, d_activation: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``sum dy`` and ``sum dy x`` a channel, `dy` the gradient before the activation function.

    Args:
        x: ``[..., channels]``, before normalisation; the whole batch or a slice.
        statistics: of the whole batch.
        d_activation: gradient of the activation, in the shape of `x`.
    """
    axes = tuple(range(x.ndim - 1))
    dy = _before_activation(x, statistics, d_activation)
    # The latter without writing x - mean to memory.
    return jnp.sum(dy, axes), jnp.sum(dy * x.astype(jnp.float32), axes)


def _before_activation(x: jax.Array, statistics: Statistics, dy: jax.Array) -> jax.Array:
    slope, offset = affine(*statistics)
    inside = x.astype(jnp.float32) * along(slope, x) + along(offset, x) >= 0
    dy = dy.astype(jnp.float32)
    return jnp.where(inside, dy, NEGATIVE_SLOPE * dy)


def gradients_from_sums(sums: tuple[jax.Array, jax.Array], statistics: Statistics) -> NormGradients:
    """The gradients of scale and bias, from :func:`gradient_sums` of the whole batch."""
    d_bias, sum_dyx = sums
    d_scale = (sum_dyx - statistics.mean * d_bias) * jax.lax.rsqrt(statistics.variance + EPSILON)
    return NormGradients(d_scale, d_bias)


def input_gradient(
    x: jax.Array,
    statistics: Statistics,
    d_activation: jax.Array,
    gradients: NormGradients,
    count: int,
) -> jax.Array:
    """The gradient with respect to what is normalised, or to a slice of it.

    Args:
        x: ``[..., channels]``, the whole batch or a slice.
        statistics: of the whole batch.
        d_activation: gradient of the activation, in the shape of `x`.
        gradients: of the whole batch.
        count: elements a channel of the whole batch.

    Returns:
        In the shape and dtype of `x`.
    """
    slope, _ = affine(*statistics)
    inverse_std = jax.lax.rsqrt(statistics.variance + EPSILON)
    dy = _before_activation(x, statistics, d_activation)
    return through_statistics(x, dy, statistics.mean, slope, inverse_std, gradients, count)


def through_statistics(
    x: jax.Array,
    dy: jax.Array,
    mean: jax.Array,
    slope: jax.Array,
    inverse_std: jax.Array,
    gradients: NormGradients,
    count: int,
) -> jax.Array:
    """The gradient of what is normalised, through its mean and deviation too.

    ``slope (dy - d_bias / count) - (x - mean) slope inverse_std d_scale / count``

    Args:
        x: ``[..., channels]``, the whole batch or a slice.
        dy: float32, in the shape of `x`: the gradient of what BatchNorm gives.
        mean: of the whole batch, float32 ``[channels]``, like `slope` and `inverse_std`.
        slope: the scale over the deviation.
        inverse_std: one over the deviation.
        gradients: of scale and bias, of the whole batch.
        count: elements a channel of the whole batch.

    Returns:
        In the shape and dtype of `x`.
    """
    per_deviation = slope * inverse_std * gradients.scale / count
    constant = mean * per_deviation - slope * gradients.bias / count
    wide = x.astype(jnp.float32)
    dx = along(slope, x) * dy - wide * along(per_deviation, x) + along(constant, x)
    return dx.astype(x.dtype)
