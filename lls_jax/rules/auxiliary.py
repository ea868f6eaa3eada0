"""What the auxiliary networks of rules are made of; normalised by the batch alone.

They are dropped after training, so that their BatchNorm needs no running statistics.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lls_jax.layers.convolution import convolve_3x3
from lls_jax.layers.initializers import fan_in_uniform
from lls_jax.layers.normalization import along

_EPSILON = 1e-5


def init_linear(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    """A dense layer's kernel, U(-1/sqrt(inputs), 1/sqrt(inputs)), and its bias, 0."""
    kernel = fan_in_uniform(inputs)(key, (inputs, outputs))
    return {"kernel": kernel, "bias": jnp.zeros(outputs, jnp.float32)}


def linear(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """A dense layer: ``[batch, inputs] -> [batch, outputs]``."""
    return x @ params["kernel"] + params["bias"][None, :]


def init_convolution(key: jax.Array, channels: int, features: int) -> jax.Array:
    """The kernel of a 3x3 convolution, U(-1/sqrt(9 channels), 1/sqrt(9 channels))."""
    return fan_in_uniform(9 * channels)(key, (3, 3, channels, features))


def init_normalization(features: int) -> dict[str, jax.Array]:
    """Scale 1 and bias 0."""
    return {"scale": jnp.ones(features, jnp.float32), "bias": jnp.zeros(features, jnp.float32)}


def normalize(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """BatchNorm by the batch's own statistics; ``[batch, ..., channels]``."""
    axes = tuple(range(x.ndim - 1))
    centred = x - jnp.mean(x, axes, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axes, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + _EPSILON)
    return normed * along(params["scale"], x) + along(params["bias"], x)


def convolve(kernel: jax.Array, x: jax.Array, stride: int = 1) -> jax.Array:
    """A 3x3 convolution, zero-padded, of a kernel ``[3, 3, channels, features]``."""
    return convolve_3x3(x, kernel, stride)


def average_over_space(x: jax.Array) -> jax.Array:
    """``[batch, ..., channels]`` to each example's means, ``[batch, channels]``."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1))) if x.ndim > 2 else x
