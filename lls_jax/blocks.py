"""Flax Linen blocks, and the wrapper that gives a block its local loss."""

import functools
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lls_jax.convolution import convolve_3x3, depthwise_3x3
from lls_jax.initializers import fan_in_uniform
from lls_jax.normalization import (
    apply_statistics,
    can_pool,
    normalize_activate,
    normalize_activate_pool,
)
from lls_jax.rules.protocol import LocalRule, init_params

_RUNNING_AVERAGE = 0.9


def running_average(
    running: dict[str, jax.Array], mean: jax.Array, variance: jax.Array
) -> dict[str, jax.Array]:
    """BatchNorm's running statistics after a batch: nine tenths old, one tenth new.

    Args:
        running: ``{"mean", "var"}``, float32 ``[channels]`` each.
        mean: the batch's.
        variance: the batch's.
    """
    batch = {"mean": mean, "var": variance}
    kept, new = _RUNNING_AVERAGE, 1 - _RUNNING_AVERAGE
    return {name: kept * running[name] + new * batch[name] for name in running}


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
    ) -> Any:
        """Normalise ``x + layer_bias`` and activate.

        Args:
            x: ``[..., channels]``.
            layer_bias: float32 ``[channels]``.
            train: whether the batch's statistics are used, and averaged into the running ones.
            pool_size: windows along each spatial axis whose means are wanted too.

        Returns:
            The activation, in the shape and dtype of `x`. With a `pool_size`, ``(activation,
            pooled)``; the latter is None where windows of one size do not fit, and in evaluation.
        """
        channels = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        variance = self.variable("batch_stats", "var", jnp.ones, channels)
        pooled = None
        if not train:
            y = apply_statistics(x, mean.value - layer_bias, variance.value, scale, bias)
            return y if pool_size is None else (y, None)
        if pool_size is not None and can_pool(x.shape, pool_size):
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
        return y if pool_size is None else (y, pooled)


class ConvBlock(nn.Module):
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
    def __call__(self, x: jax.Array, *, train: bool = False, pool_size: int | None = None) -> Any:
        """``[batch, height, width, channels] -> [batch, height / stride, ..., features]``.

        With a `pool_size`, the means of its windows too: see :class:`NormalizeActivate`.
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
        return x.astype(self.dtype) @ kernel[0, 0].astype(self.dtype)


class DepthwiseSeparableBlock(nn.Module):
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
    def __call__(self, x: jax.Array, *, train: bool = False, pool_size: int | None = None) -> Any:
        """``[batch, height, width, channels] -> [batch, height', width', features]``.

        With a `pool_size`, the means of its windows too: see :class:`NormalizeActivate`.
        """
        no_bias = jnp.zeros(())
        x = Depthwise(self.stride, self.dtype, name="depthwise")(x)
        x = NormalizeActivate(name="depthwise_norm")(x, no_bias, train=train)
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
        return NormalizeActivate(name="norm")(x, bias, train=train)


# Modules that give the pooled activation too, from the pass that normalises.
_POOLING = ConvBlock | DepthwiseSeparableBlock


def call_options(module: nn.Module, train: bool) -> dict[str, Any]:
    """How a block is told whether it is trained: ``train=...``, if its `__call__` has that.

    Args:
        module: any Flax module of one input; ``nn.Conv`` is one without.
        train: whether BatchNorm uses, and averages, this batch's statistics.
    """
    takes_train = "train" in inspect.signature(type(module).__call__).parameters
    return {"train": train} if takes_train else {}


def apply_module(
    module: nn.Module,
    params: Any,
    batch_stats: Any,
    x: jax.Array,
    *,
    train: bool,
    rngs: dict[str, jax.Array] | None = None,
) -> tuple[jax.Array, Any]:
    """A block's activation, and its new statistics; ``{}`` where it has none.

    Args:
        module: the block.
        params: its parameters.
        batch_stats: its statistics.
        x: its input, ``[batch, ...]``.
        train: whether BatchNorm uses, and averages, this batch's statistics.
        rngs: random keys by name.
    """
    variables = {"params": params, "batch_stats": batch_stats}
    options = call_options(module, train)
    activation, updates = module.apply(variables, x, mutable=["batch_stats"], rngs=rngs, **options)
    return activation, updates.get("batch_stats", {})


class LocalBlock(nn.Module):
    """A block that learns from its own loss: the unit to drop into other Flax code.

    Its input goes through ``stop_gradient``, so the gradient of its loss covers its own parameters
    and its rule's, and nothing below it. The rule's fixed projection is a constant, not a
    parameter.

    Attributes:
        block: a Flax module, called ``block(x, train=...)``, or ``block(x)`` if it has no `train`.
        rule: a local rule, from :func:`lls_jax.rules.make` or your own.
        pool_size: size to which the activation is pooled before the projection.
        hidden_dim: width of the feedback matrix, for rules that have one.

    >>> from lls_jax import rules
    >>> block = LocalBlock(ConvBlock(4), rule=rules.make("lls_mxm", num_classes=10), pool_size=2)
    >>> images, labels = jnp.ones((2, 8, 8, 3)), jnp.array([0, 1])
    >>> variables = block.init(jax.random.key(0), images)
    >>> (activation, loss), updates = block.apply(
    ...     variables, images, labels, train=True, mutable=["batch_stats"])
    >>> activation.shape, loss.shape
    ((2, 8, 8, 4), ())
    """

    block: nn.Module
    rule: LocalRule
    pool_size: int
    hidden_dim: int | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, labels: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Run the block, and its loss where there are labels.

        Args:
            x: ``[batch, height, width, channels]`` or ``[batch, features]``.
            labels: integers ``[batch]``, or None.
            train: whether BatchNorm uses, and averages, this batch's statistics.

        Returns:
            The activation, or with labels ``(activation, loss)``; the loss is a float32 scalar.
        """
        x = jax.lax.stop_gradient(x)
        pooled = None
        wants_pooled = getattr(self.rule, "works_on_latents", False) and not getattr(
            self.rule, "pools_itself", False
        )
        if labels is not None and train and wants_pooled and isinstance(self.block, _POOLING):
            activation, pooled = self.block(x, train=train, pool_size=self.pool_size)
        else:
            activation = self.block(x, **call_options(self.block, train))
        rule_params = self._rule_params(activation.shape[1:])
        if labels is None:
            return activation
        # Pooling what is pooled changes nothing, and its gradient takes no memory to speak of.
        seen = activation if pooled is None else pooled
        return activation, self.rule.loss(rule_params, seen, labels, pool_size=self.pool_size)

    def _rule_params(self, activation_shape: tuple[int, ...]) -> dict[str, Any]:
        draw = functools.partial(
            init_params,
            self.rule,
            activation_shape=activation_shape,
            pool_size=self.pool_size,
            hidden_dim=self.hidden_dim,
        )
        # A rule with nothing to learn leaves no empty entry in the parameters.
        if self.is_initializing():
            shapes = jax.eval_shape(lambda: draw(jax.random.key(0)))
            learns = bool(jax.tree.leaves(shapes))
        else:
            learns = self.has_variable("params", "rule")
        return self.param("rule", draw) if learns else {}
