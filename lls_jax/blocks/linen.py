"""Flax Linen blocks: a layer, BatchNorm, LeakyReLU."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lls_jax.layers.convolution import convolve_3x3
from lls_jax.layers.depthwise import depthwise_3x3
from lls_jax.layers.initializers import fan_in_uniform
from lls_jax.layers.normalization import (
    apply_statistics,
    normalize_activate,
)
from lls_jax.layers.pointwise import pointwise
from lls_jax.layers.pooled_normalization import normalize_activate_pool

_RUNNING_AVERAGE = 0.9


def running_average(
    running: dict[str, jax.Array],
    mean: jax.Array,
    variance: jax.Array,
    kept: float = _RUNNING_AVERAGE,
) -> dict[str, jax.Array]:
    """BatchNorm's running statistics after a batch: nine tenths old, one tenth new.

    Args:
        running: ``{"mean", "var"}``, float32 ``[channels]`` each.
        mean: the batch's.
        variance: the batch's.
        kept: the share that is old, in [0, 1], where it is not nine tenths.
    """
    batch = {"mean": mean, "var": variance}
    return {name: kept * running[name] + (1 - kept) * batch[name] for name in running}


class Linear(nn.Module):
    """``x W`` and a bias, both drawn ``U(-1/sqrt(fan_in), 1/sqrt(fan_in))``.

    Attributes:
        features: number of outputs.
        dtype: of the computation; parameters are float32.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``[batch, inputs] -> [batch, features]``, and the bias, which is not added yet."""
        init = fan_in_uniform(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", init, (self.features,))
        return x.astype(self.dtype) @ kernel.astype(self.dtype), bias


class Convolution(nn.Module):
    """A 3x3 convolution and a bias, both drawn ``U(-1/sqrt(fan_in), 1/sqrt(fan_in))``.

    Attributes:
        features: number of output channels.
        stride: pixels from one output to the next.
        dtype: of the computation; parameters are float32.
    """

    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``[batch, height, width, channels]`` to ``features``, and the bias, not added yet."""
        init = fan_in_uniform(9 * x.shape[-1])
        kernel = self.param("kernel", init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", init, (self.features,))
        return convolve_3x3(x.astype(self.dtype), kernel.astype(self.dtype), self.stride), bias


class Classifier(nn.Module):
    """A dense layer with its bias.

    Attributes:
        features: number of classes.
        dtype: of the computation; parameters are float32.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[batch, inputs] -> [batch, features]``, float32 logits."""
        logits, bias = Linear(self.features, self.dtype, name="linear")(x)
        return logits.astype(jnp.float32) + bias[None, :]


class NormalizeActivate(nn.Module):
    """BatchNorm (eps 1e-5, running average 0.9), then LeakyReLU(0.01).

    It takes the bias of the layer before it separately. In training, subtracting the batch's mean
    takes that bias out again, whatever it is: it only moves the running mean, its gradient is
    exactly zero, and adding it would be two passes over the activation for nothing.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, layer_bias: jax.Array, *, train: bool, pool_size: int | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Normalise ``x + layer_bias`` and activate.

        Args:
            x: ``[..., channels]``.
            layer_bias: float32 ``[channels]``.
            train: whether the batch's statistics are used, and averaged into the running ones.
            pool_size: windows along each spatial axis whose means are wanted too.

        Returns:
            ``(activation, pooled)``: the activation, in the shape and dtype of `x`, and the means;
            None without a `pool_size`, of what is no image, and in evaluation.
        """
        channels = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        variance = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        pooled = None
        if not train:
            y = apply_statistics(x, mean.value - layer_bias, variance.value, scale, bias)
            return y, None
        if pool_size is not None and x.ndim == 4:
            y, pooled, batch_mean, batch_variance = normalize_activate_pool(
                x, scale, bias, pool_size
            )
        else:
            y, batch_mean, batch_variance = normalize_activate(x, scale, bias)
        if not self.is_initializing():
            running = {"mean": mean.value, "var": variance.value}
            shifted = batch_mean + jax.lax.stop_gradient(layer_bias)
            running = running_average(running, shifted, batch_variance)
            mean.value, variance.value = running["mean"], running["var"]
        return y, pooled


class PoolingBlock(nn.Module):
    """A block that gives its pooled activation too, from the pass that normalises.

    A local loss on latents needs no gradient of the size of the activation then. A block of your
    own may derive from this; one that does not is pooled by its :class:`LocalBlock`.
    """

    def activate_and_pool(
        self, x: jax.Array, *, train: bool, pool_size: int | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The activation, and the means over its windows, ``[batch, p, p, channels]``.

        Args:
            x: ``[batch, height, width, channels]``.
            train: whether BatchNorm uses, and averages, this batch's statistics.
            pool_size: ``p``, windows along each spatial axis; None for no means.

        Returns:
            ``(activation, pooled)``; the latter is None where it is not to be had.
        """
        raise NotImplementedError

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """``[batch, height, width, channels]`` to the activation."""
        return self.activate_and_pool(x, train=train, pool_size=None)[0]


class ConvBlock(PoolingBlock):
    """3x3 convolution with bias, BatchNorm, LeakyReLU(0.01).

    Attributes:
        features: number of output channels.
        dtype: of the activations, float32 or bfloat16; parameters and statistics are float32.
        stride: pixels from one output to the next.
    """

    features: int
    dtype: Any = jnp.float32
    stride: int = 1

    @nn.compact
    def activate_and_pool(
        self, x: jax.Array, *, train: bool, pool_size: int | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """``[batch, height, width, channels] -> [batch, height / stride, ..., features]``, and
        the means of its windows: see :class:`PoolingBlock`.
        """
        x, bias = Convolution(self.features, self.stride, self.dtype, name="conv")(x)
        return NormalizeActivate(name="norm")(x, bias, train=train, pool_size=pool_size)


class Depthwise(nn.Module):
    """A 3x3 convolution of each channel by itself, without a bias, padded by its stride.

    Attributes:
        stride: pixels from one output to the next.
        dtype: of the computation; parameters are float32.
    """

    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[batch, height, width, channels]`` to as many channels."""
        kernel = self.param("kernel", fan_in_uniform(9), (3, 3, 1, x.shape[-1]))
        return depthwise_3x3(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)


class Pointwise(nn.Module):
    """A 1x1 convolution without a bias.

    Attributes:
        features: number of output channels.
        dtype: of the computation; parameters are float32.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[batch, height, width, channels]`` to ``features``."""
        channels = x.shape[-1]
        kernel = self.param("kernel", fan_in_uniform(channels), (1, 1, channels, self.features))
        # A matrix product: XLA's CPU convolution is slower at the same arithmetic.
        return pointwise(x.astype(self.dtype), kernel[0, 0].astype(self.dtype))


class DepthwiseSeparableBlock(PoolingBlock):
    """Depthwise 3x3, BatchNorm, LeakyReLU(0.01), pointwise, BatchNorm, LeakyReLU(0.01).

    Attributes:
        features: number of output channels.
        dtype: of the activations, float32 or bfloat16; parameters and statistics are float32.
        stride: pixels from one output of the depthwise convolution to the next, and its padding.

    References:
        Howard et al., "MobileNets", https://arxiv.org/abs/1704.04861.
    """

    features: int
    dtype: Any = jnp.float32
    stride: int = 1

    @nn.compact
    def activate_and_pool(
        self, x: jax.Array, *, train: bool, pool_size: int | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """``[batch, height, width, channels] -> [batch, height', width', features]``, and the
        means of its windows: see :class:`PoolingBlock`.
        """
        no_bias = jnp.zeros((), jnp.float32)
        x = Depthwise(self.stride, self.dtype, name="depthwise")(x)
        x, _ = NormalizeActivate(name="depthwise_norm")(x, no_bias, train=train)
        x = Pointwise(self.features, self.dtype, name="pointwise")(x)
        return NormalizeActivate(name="pointwise_norm")(
            x, no_bias, train=train, pool_size=pool_size
        )


class DenseBlock(nn.Module):
    """Dense layer, BatchNorm, LeakyReLU(0.01).

    Attributes:
        features: number of outputs.
        dtype: of the activations, float32 or bfloat16; parameters and statistics are float32.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """``[batch, inputs] -> [batch, features]``."""
        x, bias = Linear(self.features, self.dtype, name="linear")(x)
        return NormalizeActivate(name="norm")(x, bias, train=train)[0]
