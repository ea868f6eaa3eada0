"""A local block of a network as data, and what follows it."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lls_jax.layers.pooling import max_pool
from pallas_kernels.local_loss import adaptive_average_pool


def flatten(x: jax.Array) -> jax.Array:
    """Flatten channel-major, as PyTorch's NCHW does, so that its dense weights fit."""
    return jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One local block of a network, and what follows it.

    Attributes:
        module: the Flax module, called ``module(x, train=...)``, or ``module(x)`` if it takes no
            `train`.
        pool_size: size to which its local loss pools the activation.
        max_pool: whether 2x2 max-pooling follows.
        average_pool: size of the adaptive average pooling that follows, if any.
        flatten: whether the next block takes feature vectors.
        dropout: rate of the dropout that follows the pooling, in [0, 1).
        then: a function of your own that follows the pooling, ``[batch, ...] -> [batch, ...]``,
            without parameters and an example at a time; None for none. The mean over tokens before
            a classifier is one.
    """

    module: nn.Module
    pool_size: int
    max_pool: bool = False
    average_pool: int | None = None
    flatten: bool = False
    dropout: float = 0.0
    then: Callable[[jax.Array], jax.Array] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError, naming the attribute, for what is out of its range."""
        for name, size in (("pool_size", self.pool_size), ("average_pool", self.average_pool)):
            if size is not None and size < 1:
                raise ValueError(f"`{name}` is {size}; it must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` is {self.dropout}; it must lie in [0, 1).")

    def downsample(self, x: jax.Array) -> jax.Array:
        """The pooling that follows, on ``[batch, ...]``."""
        return self.after_max_pool(max_pool(x) if self.max_pool else x)

    def after_max_pool(self, x: jax.Array) -> jax.Array:
        """What is left of :meth:`downsample` after the maxima, if there are any."""
        if self.average_pool is not None:
            x = adaptive_average_pool(x, self.average_pool)
        return x if self.then is None else self.then(x)

    def transition(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """From this block's activation to the next block's input.

        Args:
            x: the activation, ``[batch, ...]``.
            dropout_key: random key of the dropout; None leaves it out (evaluation).
        """
        return self.after_pooling(self.downsample(x), dropout_key)

    def after_pooling(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """What is left of :meth:`transition` after :meth:`downsample`."""
        if self.dropout and dropout_key is not None:
            keep = jax.random.bernoulli(dropout_key, 1.0 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1.0 - self.dropout), jnp.zeros_like(x))
        if self.flatten:
            x = flatten(x)
        return x
