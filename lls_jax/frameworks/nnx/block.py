"""A block of Flax NNX with its local loss, and its update."""

from typing import Any

import jax
import optax
from flax import nnx

from lls_jax.rules import LocalRule, split_fixed


class Fixed(nnx.Variable):
    """What a rule keeps fixed: no ``nnx.Param``, so that no optimizer touches it."""


class LocalBlock(nnx.Module):
    """A block that learns from its own loss: the unit to drop into other NNX code.

    Its input goes through ``stop_gradient``, so the gradient of its loss covers its own parameters
    and its rule's, and nothing below it.

    Attributes:
        block: any NNX module of one input.
        rule: a local rule.
        pool_size: size to which the activation is pooled before the projection.
        rule_params: what the rule learns, ``nnx.Param``.
        rule_fixed: what it keeps.
    """

    def __init__(
        self,
        block: nnx.Module,
        example: jax.Array | jax.ShapeDtypeStruct,
        *,
        rule: LocalRule,
        pool_size: int,
        rngs: nnx.Rngs,
    ) -> None:
        """Give a block its rule.

        Args:
            block: any NNX module of one input.
            example: a batch that it takes; its shape counts.
            rule: a local rule.
            pool_size: bins along each spatial axis, or along the features.
            rngs: draws the rule's parameters, from the stream ``params``.
        """
        self.block, self.rule, self.pool_size = block, rule, pool_size
        graph, state = nnx.split(block)
        activation = jax.eval_shape(lambda state, x: nnx.merge(graph, state)(x), state, example)
        drawn = rule.init(rngs.params(), activation.shape[1:], pool_size)
        learned, fixed = split_fixed(rule, drawn)
        self.rule_params = nnx.data(jax.tree.map(nnx.Param, learned))
        self.rule_fixed = nnx.data(jax.tree.map(Fixed, fixed))

    def __call__(self, x: jax.Array, labels: Any = None) -> Any:
        """Run the block, and its loss where there are labels.

        Args:
            x: ``[batch, ...]``.
            labels: integers ``[batch]``, or None.

        Returns:
            The activation, or with labels ``(activation, loss)``; the loss is a float32 scalar.
        """
        activation = self.block(jax.lax.stop_gradient(x))
        if labels is None:
            return activation
        variables = {**self.rule_params, **self.rule_fixed}
        params = jax.tree.map(
            lambda one: one[...], variables, is_leaf=lambda one: isinstance(one, nnx.Variable)
        )
        loss = self.rule.block_loss(params, activation, labels, pool_size=self.pool_size)
        return activation, loss


@nnx.jit
def update(
    block: LocalBlock, optimizer: nnx.Optimizer, x: jax.Array, labels: Any
) -> tuple[jax.Array, jax.Array]:
    """One step of a block from its own loss; the block and the optimizer are changed in place.

    Args:
        block: the block.
        optimizer: its own, ``nnx.Optimizer(block, tx, wrt=nnx.Param)``.
        x: its input, ``[batch, ...]``.
        labels: integers ``[batch]``.

    Returns:
        ``(loss, activation)``, both from before the update; the activation is the next block's
        input.
    """

    def local_loss(block: LocalBlock) -> tuple[jax.Array, jax.Array]:
        activation, loss = block(x, labels)
        return loss, activation

    (loss, activation), grads = nnx.value_and_grad(local_loss, has_aux=True)(block)
    # As optax's own transformations need it where a program asks for strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        # Some change their rate by the loss.
        takes_loss = isinstance(optimizer.tx, optax.GradientTransformationExtraArgs)
        optimizer.update(block, grads, **({"value": loss} if takes_loss else {}))
    return loss, activation
