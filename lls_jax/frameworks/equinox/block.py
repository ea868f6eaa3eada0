"""A block of Equinox with its local loss, and its update."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from lls_jax.rules import LocalRule, split_fixed
from lls_jax.steps.block import apply_gradients

# Of one example: its output, and the new state.
Call = Callable[[Any, jax.Array, Any, jax.Array | None], tuple[jax.Array, Any]]
BATCH = "batch"


def call_example(
    model: Any, x: jax.Array, state: Any, key: jax.Array | None
) -> tuple[jax.Array, Any]:
    """An example's output, and the new state; a key where the model takes one."""
    takes_key = "key" in inspect.signature(type(model).__call__).parameters
    options = {"key": key} if takes_key else {}
    output: Any = model(x, **options) if state is None else model(x, state, **options)
    return (output, None) if state is None else output


def channels_last(x: jax.Array) -> jax.Array:
    """A batch of images as rules and data have it; anything else as it is."""
    return jnp.moveaxis(x, 1, -1) if x.ndim == 4 else x


def channels_first(x: jax.Array) -> jax.Array:
    """A batch of images as Equinox has it; anything else as it is."""
    return jnp.moveaxis(x, -1, 1) if x.ndim == 4 else x


class LocalBlock(eqx.Module):
    """A block that learns from its own loss: the unit to drop into other Equinox code.

    Its input goes through ``stop_gradient``, so the gradient of its loss covers its own parameters
    and its rule's, and nothing below it.

    Attributes:
        block: any Equinox module of one example.
        rule_params: what its rule learns.
        rule_fixed: what that keeps; :func:`split` holds it back from optimizers.
        rule: a local rule.
        pool_size: size to which the activation is pooled before the projection.
        call: ``call(block, x, state, key) -> (output, state)`` of one example.
    """

    block: Any
    rule_params: dict[str, Any]
    rule_fixed: dict[str, Any]
    rule: LocalRule = eqx.field(static=True)
    pool_size: int = eqx.field(static=True)
    call: Call = eqx.field(static=True)

    def __init__(
        self,
        block: Any,
        example: jax.Array | jax.ShapeDtypeStruct,
        *,
        rule: LocalRule,
        pool_size: int,
        key: jax.Array,
        state: Any = None,
        call: Call = call_example,
    ) -> None:
        """Give a block its rule.

        Args:
            block: any Equinox module of one example.
            example: a batch that it takes, ``[batch, channels, height, width]`` or ``[batch,
                ...]``; its shape counts.
            rule: a local rule.
            pool_size: bins along each spatial axis, or along the features.
            key: draws the rule's parameters.
            state: of the block, from ``eqx.nn.make_with_state``; None for none.
            call: ``call(block, x, state, key) -> (output, state)`` of one example; left out, it
                is ``block(x)`` or ``block(x, state)``, with `key` where its ``__call__`` has that.
        """
        self.block, self.rule, self.pool_size, self.call = block, rule, pool_size, call
        activation, _ = eqx.filter_eval_shape(self._run, example, state, key)
        shape = jax.eval_shape(channels_last, activation).shape[1:]
        drawn = rule.init(key, shape, pool_size)
        self.rule_params, self.rule_fixed = split_fixed(rule, drawn)

    def _run(self, x: jax.Array, state: Any, key: jax.Array | None) -> tuple[jax.Array, Any]:
        keys = None if key is None else jax.random.split(key, x.shape[0])

        def one(x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Any]:
            return self.call(self.block, x, state, key)

        outputs: tuple[jax.Array, Any] = jax.vmap(one, out_axes=(0, None), axis_name=BATCH)(
            jax.lax.stop_gradient(x), keys
        )
        return outputs

    def __call__(
        self, x: jax.Array, labels: Any = None, *, state: Any = None, key: jax.Array | None = None
    ) -> Any:
        """Run the block on a batch, and its loss where there are labels.

        Args:
            x: ``[batch, channels, height, width]`` or ``[batch, ...]``.
            labels: integers ``[batch]``, or None.
            state: of the block; None for none. BatchNorm's axis is named ``batch``.
            key: of dropout; None for none.

        Returns:
            The activation; with labels ``(activation, loss)``, the loss a float32 scalar; each with
            the new state after it where one was given.
        """
        activation, new_state = self._run(x, state, key)
        outputs: tuple[Any, ...] = (activation,)
        if labels is not None:
            params = {**self.rule_params, **self.rule_fixed}
            seen = channels_last(activation)
            loss = self.rule.block_loss(params, seen, labels, pool_size=self.pool_size)
            outputs = (activation, loss)
        if state is not None:
            outputs = (*outputs, new_state)
        return outputs if len(outputs) > 1 else activation


def split(block: LocalBlock) -> tuple[LocalBlock, LocalBlock]:
    """A block in two, as ``eqx.partition`` does: what an optimizer trains, and all the rest."""
    trained = jax.tree.map(eqx.is_inexact_array, block)
    stays = jax.tree.map(lambda _: False, block.rule_fixed)
    parts: Any = eqx.partition(block, eqx.tree_at(lambda tree: tree.rule_fixed, trained, stays))
    return parts


class Learner(NamedTuple):
    """What one block learns with.

    Attributes:
        block: the block.
        opt_state: its optimizer's.
        state: its BatchNorm's and the like; None for none.
    """

    block: LocalBlock
    opt_state: Any
    state: Any = None


def start(block: LocalBlock, tx: optax.GradientTransformation, state: Any = None) -> Learner:
    """A block before its first :func:`update`.

    Args:
        block: the block.
        tx: its optimizer; it never sees what the rule keeps fixed.
        state: of the block, from ``eqx.nn.make_with_state``; None for none.
    """
    return Learner(block, tx.init(split(block)[0]), state)


@eqx.filter_jit
def update(
    learner: Learner,
    tx: optax.GradientTransformation,
    x: jax.Array,
    labels: Any,
    key: jax.Array | None = None,
) -> tuple[Learner, jax.Array, jax.Array]:
    """One step of a block from its own loss.

    Args:
        learner: from :func:`start`.
        tx: the same optimizer.
        x: the block's input, ``[batch, ...]``.
        labels: integers ``[batch]``.
        key: of dropout; None for none.

    Returns:
        ``(learner, loss, activation)``; the loss and the activation are from before the update.
    """
    trained, rest = split(learner.block)

    def local_loss(trained: LocalBlock) -> tuple[jax.Array, Any]:
        block = eqx.combine(trained, rest)
        activation, loss, *state = block(x, labels, state=learner.state, key=key)
        return loss, (activation, *state)

    (loss, (activation, *state)), grads = jax.value_and_grad(local_loss, has_aux=True)(trained)
    trained, opt_state = apply_gradients(tx, learner.opt_state, trained, grads, loss)
    return Learner(eqx.combine(trained, rest), opt_state, *state), loss, activation
