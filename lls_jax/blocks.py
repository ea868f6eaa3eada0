"""Flax Linen blocks, and the wrapper that gives a block its local loss."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lls_jax.convolution import convolve_3x3
from lls_jax.rules import LocalRule

Initializer = Callable[..., jax.Array]

_NEGATIVE_SLOPE = 0.01


def fan_in_uniform(fan_in: int) -> Initializer:
    """The initialiser ``U(-1/sqrt(fan_in), 1/sqrt(fan_in))``, PyTorch's for weights and biases."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Linear(nn.Module):
    """A dense layer, ``x W + b``, both drawn ``U(-1/sqrt(fan_in), 1/sqrt(fan_in))``.

    Attributes:
        features: number of outputs.
        dtype: of the computation; parameters are float32.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[batch, inputs] -> [batch, features]``."""
        init = fan_in_uniform(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", init, (self.features,))
        return x.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)


class Convolution(nn.Module):
    """A 3x3 convolution with bias, drawn ``U(-1/sqrt(fan_in), 1/sqrt(fan_in))``.

    Attributes:
        features: number of output channels.
        dtype: of the computation; parameters are float32.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[batch, height, width, channels] -> [batch, height, width, features]``."""
        init = fan_in_uniform(9 * x.shape[-1])
        kernel = self.param("kernel", init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", init, (self.features,))
        out = convolve_3x3(x.astype(self.dtype), kernel.astype(self.dtype))
        return out + bias.astype(self.dtype)


class NormalizeActivate(nn.Module):
    """BatchNorm (eps 1e-5, running average 0.9), then LeakyReLU(0.01).

    Statistics are float32 whatever the dtype of the input; the result has the input's dtype.
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """``[..., channels] -> [..., channels]``."""
        normalized = nn.BatchNorm(
            use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=x.dtype, name="norm"
        )(x)
        return nn.leaky_relu(normalized, _NEGATIVE_SLOPE)


class ConvBlock(nn.Module):
    """3x3 convolution with bias, BatchNorm, LeakyReLU(0.01).

    Attributes:
        features: number of output channels.
        dtype: of the activations, float32 or bfloat16; parameters and statistics are float32.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """``[batch, height, width, channels] -> [batch, height, width, features]``."""
        x = Convolution(self.features, self.dtype, name="conv")(x)
        return NormalizeActivate(name="activate")(x, train=train)


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
        x = Linear(self.features, self.dtype, name="linear")(x)
        return NormalizeActivate(name="activate")(x, train=train)


class LocalBlock(nn.Module):
    """A block that learns from its own loss: the unit to drop into other Flax code.

    Its input goes through ``stop_gradient``, so the gradient of its loss covers its own parameters
    and its rule's, and nothing below it. The rule's fixed projection is a constant, not a
    parameter.

    Attributes:
        block: a Flax module, called ``block(x, train=...)``.
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
        activation = self.block(jax.lax.stop_gradient(x), train=train)
        latent_dim = (
            activation.shape[-1] * self.pool_size**2 if activation.ndim == 4 else self.pool_size
        )
        rule_params = self._rule_params(latent_dim)
        if labels is None:
            return activation
        return activation, self.rule.loss(rule_params, activation, labels, pool_size=self.pool_size)

    def _rule_params(self, latent_dim: int) -> dict[str, Any]:
        # A rule with nothing to learn leaves no empty entry in the parameters.
        if self.is_initializing():
            key = jax.random.key(0)
            shapes = jax.eval_shape(lambda: self.rule.init(key, latent_dim, self.hidden_dim))
            learns = bool(jax.tree.leaves(shapes))
        else:
            learns = self.has_variable("params", "rule")
        return self.param("rule", self.rule.init, latent_dim, self.hidden_dim) if learns else {}
