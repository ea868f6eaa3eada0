"""The wrapper that gives a Flax Linen block its local loss."""

import inspect
from typing import Any

import flax.linen as nn
import jax

from lls_jax.blocks.linen import PoolingBlock
from lls_jax.rules.base import LocalRule, split_fixed


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


def run_block(
    module: nn.Module,
    params: Any,
    batch_stats: Any,
    x: jax.Array,
    *,
    pool_size: int | None,
    rngs: dict[str, Any] | None = None,
) -> tuple[jax.Array, jax.Array | None, Any]:
    """A block in training: :func:`apply_module`, and the pooled activation where it offers that.

    Args:
        module: the block.
        params: its parameters.
        batch_stats: its statistics.
        x: its input, ``[batch, ...]``.
        pool_size: windows along each spatial axis whose means are wanted; None for none.
        rngs: random keys by name.

    Returns:
        ``(activation, pooled, batch_stats)``; `pooled` is None where the block has it not.
    """
    if pool_size is None or not isinstance(module, PoolingBlock):
        activation, stats = apply_module(module, params, batch_stats, x, train=True, rngs=rngs)
        return activation, None, stats
    (activation, pooled), updates = module.apply(
        {"params": params, "batch_stats": batch_stats},
        x,
        train=True,
        pool_size=pool_size,
        mutable=["batch_stats"],
        rngs=rngs,
        method="activate_and_pool",
    )
    return activation, pooled, updates.get("batch_stats", {})


class LocalBlock(nn.Module):
    """A block that learns from its own loss: the unit to drop into other Flax code.

    Its input goes through ``stop_gradient``, so the gradient of its loss covers its own parameters
    and its rule's, and nothing below it. What a rule keeps fixed is no parameter: a periodic basis
    is a constant, and a random one is in the collection ``fixed``, where no optimizer sees it.

    Attributes:
        block: a Flax module, called ``block(x, train=...)``, or ``block(x)`` if it has no `train`.
        rule: a local rule, from :func:`lls_jax.rules.make` or your own.
        pool_size: size to which the activation is pooled before the projection.

    >>> import jax.numpy as jnp
    >>> from lls_jax import rules
    >>> from lls_jax.blocks import ConvBlock
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

    @nn.compact
    def __call__(
        self, x: jax.Array, labels: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Run the block, and its loss where there are labels.

        Args:
            x: ``[batch, height, width, channels]``, ``[batch, length, channels]`` or
                ``[batch, features]``.
            labels: integers ``[batch]``, or None.
            train: whether BatchNorm uses, and averages, this batch's statistics.

        Returns:
            The activation, or with labels ``(activation, loss)``; the loss is a float32 scalar.
        """
        x = jax.lax.stop_gradient(x)
        pooled = None
        is_learning = labels is not None and train and self.rule.sees == "latents"
        if is_learning and isinstance(self.block, PoolingBlock):
            activation, pooled = self.block.activate_and_pool(
                x, train=train, pool_size=self.pool_size
            )
        else:
            activation = self.block(x, **call_options(self.block, train))
        rule_params = self._rule_params(activation.shape[1:])
        if labels is None:
            return activation
        loss = self.rule.block_loss(
            rule_params, activation, labels, pool_size=self.pool_size, pooled=pooled
        )
        return activation, loss

    def _rule_params(self, activation_shape: tuple[int, ...]) -> dict[str, Any]:
        if not self.is_initializing():
            trained: dict[str, Any] = self.get_variable("params", "rule", {})
            return {**trained, **self.get_variable("fixed", "rule", {})}
        drawn = self.rule.init(self.make_rng("params"), activation_shape, self.pool_size)
        # A rule with nothing to learn leaves no empty entry.
        for collection, part in zip(("params", "fixed"), split_fixed(self.rule, drawn)):
            if part:
                self.put_variable(collection, "rule", part)
        return drawn
