"""Residual blocks as local blocks: two convolutions, added to what came in."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lls_jax.layers.convolution import convolve_3x3
from lls_jax.layers.normalization import EPSILON
from lls_jax.layers.pointwise import pointwise

_he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _normalization(train: bool, dtype: Any, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=EPSILON, dtype=dtype, name=name
    )


class _Kernel(nn.Module):
    """The kernel of a convolution without a bias, N(0, 2 / fan_out).

    Attributes:
        size: height and width.
        features: number of output channels.
    """

    size: int
    features: int

    @nn.compact
    def __call__(self, channels: int) -> jax.Array:
        shape = (self.size, self.size, channels, self.features)
        kernel: jax.Array = self.param("kernel", _he_normal, shape, jnp.float32)
        return kernel


class ResidualStem(nn.Module):
    """3x3 convolution without a bias, BatchNorm, ReLU: what comes before residual blocks.

    Attributes:
        features: number of output channels.
        dtype: of the activations, float32 or bfloat16; parameters and statistics are float32.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """``[batch, height, width, channels] -> [batch, height, width, features]``."""
        kernel = _Kernel(3, self.features, name="conv")(x.shape[-1])
        x = convolve_3x3(x.astype(self.dtype), kernel.astype(self.dtype))
        return nn.relu(_normalization(train, self.dtype, "norm")(x))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to what came in, then ReLU.

    ``relu(f(x) + shortcut(x))``; the shortcut is the input itself, or where shapes differ a 1x1
    convolution of it with BatchNorm.

    Attributes:
        features: number of output channels.
        stride: pixels from one output to the next, of the first convolution and the shortcut.
        dtype: of the activations, float32 or bfloat16; parameters and statistics are float32.

    References:
        He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition",
        https://arxiv.org/abs/1512.03385.
    """

    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """``[batch, height, width, channels] -> [batch, height / stride, ..., features]``."""
        x = x.astype(self.dtype)
        shortcut = x
        for index, stride in enumerate((self.stride, 1)):
            kernel = _Kernel(3, self.features, name=f"conv_{index}")(x.shape[-1])
            x = convolve_3x3(x, kernel.astype(self.dtype), stride)
            x = _normalization(train, self.dtype, f"norm_{index}")(x)
            x = nn.relu(x) if not index else x
        if shortcut.shape != x.shape:
            kernel = _Kernel(1, self.features, name="shortcut_conv")(shortcut.shape[-1])
            shortcut = shortcut[:, :: self.stride, :: self.stride]
            shortcut = pointwise(shortcut, kernel[0, 0].astype(self.dtype))
            shortcut = _normalization(train, self.dtype, "shortcut_norm")(shortcut)
        return nn.relu(x + shortcut)
