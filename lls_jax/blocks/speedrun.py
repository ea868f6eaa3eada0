"""The blocks of the CIFAR-10 speed-runs: two convolutions, and the whitening before the first."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lls_jax.blocks.linen import running_average
from lls_jax.layers.convolution import convolve_3x3
from lls_jax.layers.gelu import biased_gelu
from lls_jax.layers.initializers import fan_in_uniform
from lls_jax.layers.normalized_gelu import apply_gelu, normalize_gelu
from lls_jax.layers.pooling import max_pool

# Beside the statistics of batches: what was taken from training images before the first step, and
# stays (:class:`lls_jax.models.whitening.Whitening`).
FROM_IMAGES = "from_images"

_PATCH = 2
_KEPT_STATISTICS = 0.6
_EPSILON = 1e-12


def _unit_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform, of mean 0 and deviation 1."""
    bound = 3.0**0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def identity_first(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """A 3x3 kernel ``[3, 3, channels, features]`` whose first outputs are its inputs.

    As many outputs as there are inputs hand these on; what there are more is drawn
    U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
    """
    channels, features = shape[2:]
    drawn = fan_in_uniform(9 * channels)(key, shape, dtype)
    same = min(channels, features)
    identity = jnp.zeros((3, 3, channels, same), dtype)
    identity = identity.at[1, 1].set(jnp.eye(channels, same, dtype=dtype))
    return jnp.concatenate([identity, drawn[..., same:]], axis=3)


class NormalizeGelu(nn.Module):
    """BatchNorm with a bias and no scale, then GELU.

    Running statistics are six tenths old and four tenths new, and the variance is divided by as it
    is (epsilon 1e-12).
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """``[..., channels]`` to the activation, in the shape and dtype of `x`."""
        channels = (x.shape[-1],)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        variance = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        if not train:
            return apply_gelu(x, mean.value, variance.value, bias, _EPSILON)
        y, batch_mean, batch_variance = normalize_gelu(x, bias, _EPSILON)
        if not self.is_initializing():
            running = {"mean": mean.value, "var": variance.value}
            running = running_average(running, batch_mean, batch_variance, _KEPT_STATISTICS)
            mean.value, variance.value = running["mean"], running["var"]
        return y


class ConvPair(nn.Module):
    """Convolution, 2x2 max-pooling, BatchNorm, GELU, convolution, BatchNorm, GELU.

    The convolutions are 3x3, without a bias, and start as the identity on their first outputs;
    BatchNorm and GELU are :class:`NormalizeGelu`.

    Attributes:
        features: number of output channels.
        dtype: of the activations, float32 or bfloat16; parameters and statistics are float32.

    References:
        Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU",
        https://arxiv.org/abs/2404.00498.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """``[batch, height, width, channels] -> [batch, height // 2, width // 2, features]``."""
        for index in range(2):
            shape = (3, 3, x.shape[-1], self.features)
            kernel = self.param(f"kernel_{index}", identity_first, shape)
            x = convolve_3x3(x.astype(self.dtype), kernel.astype(self.dtype))
            x = x if index else max_pool(x)
            x = NormalizeGelu(name=f"norm_{index}")(x, train=train)
        return x


class WhitenedConvPair(nn.Module):
    """A whitening convolution and GELU, then a :class:`ConvPair`.

    The whitening filters are no parameters: a :class:`lls_jax.models.Network` takes them from
    training images before its first step (its ``whitening``), and they stay. Their bias is learned.

    Attributes:
        features: number of output channels.
        dtype: of the activations, float32 or bfloat16; parameters and statistics are float32.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """``[batch, height, width, channels]`` to half the size, and ``features``."""
        channels = x.shape[-1]
        patch = _PATCH * _PATCH * channels

        def of_white_images() -> dict[str, jax.Array]:
            identity = jnp.eye(patch, dtype=jnp.float32)
            both = jnp.concatenate([identity, -identity], axis=1)
            return {"kernel": both.reshape(_PATCH, _PATCH, channels, 2 * patch)}

        kernel = self.variable("batch_stats", FROM_IMAGES, of_white_images).value["kernel"]
        bias = self.param("whitening_bias", fan_in_uniform(patch), (2 * patch,))
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = biased_gelu(x, bias)
        return ConvPair(self.features, self.dtype, name="pair")(x, train=train)


class ScaledClassifier(nn.Module):
    """A dense layer without a bias, its outputs divided by the number of its inputs.

    Its weights have deviation 1, so that it starts close to giving all classes alike.

    Attributes:
        features: number of classes.
        dtype: of the computation; parameters are float32.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[batch, inputs] -> [batch, features]``, float32 logits."""
        inputs = x.shape[-1]
        kernel = self.param("scaled_kernel", _unit_uniform, (inputs, self.features))
        logits = x.astype(self.dtype) @ kernel.astype(self.dtype)
        return logits.astype(jnp.float32) / inputs
