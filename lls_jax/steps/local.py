"""The local step: each block from its own loss, one after another."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lls_jax.layers.ordering import token_of, wait_for
from lls_jax.models import BlockSpec, Network
from lls_jax.rules import LocalRule, Rule, Targets, has_local_losses, labels_of
from lls_jax.steps import block_run
from lls_jax.steps.block import (
    BlockOutput,
    BlockState,
    apply_gradients,
    classifier_loss,
    local_update,
    merge_params,
    split_params,
)
from lls_jax.steps.slice_plan import Cuts
from lls_jax.steps.state import (
    CLASSIFIER,
    Batch,
    Metrics,
    Optimizer,
    TrainState,
    block_state,
    join_states,
    optimizer_of,
    stack_losses,
    targets_of,
)


def update_block(
    spec: BlockSpec,
    rule: LocalRule,
    tx: optax.GradientTransformation,
    state: BlockState,
    x: jax.Array,
    labels: Targets,
    dropout_key: jax.Array,
    cuts: Cuts,
) -> tuple[BlockState, jax.Array, jax.Array]:
    """A block's own update, which needs nothing of the blocks above it.

    Args:
        spec: the block, and what follows it.
        rule: the block's own.
        tx: the block's optimizer.
        state: the block's.
        x: its input, ``[batch, ...]``.
        labels: integers ``[batch]``, or :class:`lls_jax.rules.LabeledImages`.
        dropout_key: the block's own, of this step.
        cuts: when the batch is cut.

    Returns:
        The new state, the local loss, and the next block's input: from the activation that was
        computed before the update.
    """
    run_own = functools.partial(block_run.run, spec, rule, cuts)

    def apply(params: Any, batch_stats: Any, x: jax.Array, key: jax.Array | None) -> BlockOutput:
        own = block_run.differentiable(run_own, params, batch_stats["block"], x, key)
        passed_on = own.after(jax.lax.stop_gradient(own.seen), key)
        return BlockOutput(own.activation, {"block": own.batch_stats}, passed_on, own.pooled)

    labels = labels if rule.needs_image else labels_of(labels)
    update = local_update(apply, rule, tx, pool_size=spec.pool_size)
    return update(state, x, labels, dropout_key)


def update_classifier(
    model: Network,
    tx: optax.GradientTransformation,
    state: BlockState,
    features: jax.Array,
    labels: jax.Array,
) -> tuple[BlockState, jax.Array, jax.Array]:
    """The classifier's update on detached features: its new state, its loss, the logits."""

    def logits_loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.classify(params, features)
        return classifier_loss(logits, labels, model.classifier_smoothing), logits

    (loss, logits), grads = jax.value_and_grad(logits_loss, has_aux=True)(state.params)
    params, opt_state = apply_gradients(tx, state.opt_state, state.params, grads, loss)
    return BlockState(params, {}, opt_state), loss, logits


def update_last_group(
    model: Network,
    rule: LocalRule,
    tx: tuple[optax.GradientTransformation, optax.GradientTransformation],
    states: tuple[BlockState, BlockState],
    x: jax.Array,
    labels: jax.Array,
    dropout_key: jax.Array,
    cuts: Cuts,
) -> tuple[tuple[BlockState, BlockState], jax.Array, jax.Array]:
    """The update of a last block that the classifier belongs to, from the classifier's loss.

    Args:
        model: the network.
        rule: the block's own, whose loss is left out.
        tx: the block's optimizer and the classifier's.
        states: the block's and the classifier's.
        x: the block's input.
        labels: integers ``[batch]``.
        dropout_key: the block's own, of this step.
        cuts: when the batch is cut.

    Returns:
        The new states, the loss, the logits.
    """
    block, classifier = states
    run_last = functools.partial(block_run.run, model.specs[-1], None, cuts, from_above=True)

    def logits_loss(params: Any) -> tuple[jax.Array, Any]:
        own, classifier_params = params
        outcome = block_run.differentiable(
            run_last,
            own["block"],
            block.batch_stats["block"],
            jax.lax.stop_gradient(x),
            dropout_key,
        )
        logits = model.classify(classifier_params, outcome.after(outcome.seen, dropout_key))
        return classifier_loss(logits, labels, model.classifier_smoothing), (
            logits,
            {"block": outcome.batch_stats},
        )

    own = {"block": block.params["block"]}
    (loss, (logits, stats)), grads = jax.value_and_grad(logits_loss, has_aux=True)(
        (own, classifier.params)
    )
    # Its rule's parameters, which no loss reaches, get gradients of 0.
    trained, fixed = split_params(rule, block.params)
    grads_block = {**jax.tree.map(jnp.zeros_like, trained), **grads[0]}
    params, opt_state = apply_gradients(tx[0], block.opt_state, trained, grads_block, loss)
    new_block = BlockState(merge_params(params, fixed), stats, opt_state)
    params, opt_state = apply_gradients(
        tx[1], classifier.opt_state, classifier.params, grads[1], loss
    )
    return (new_block, BlockState(params, {}, opt_state)), loss, logits


class Unit(NamedTuple):
    """What is updated at once: a block, the classifier, or a last block together with it.

    Attributes:
        names: of the states that it updates.
        update: ``update(states, x, labels, key, step) -> (states, losses, x)``: a pure function;
            `labels` as of :func:`lls_jax.steps.state.targets_of`, `key` is the run's. The last
            unit's `x` are the logits, and its last loss is the classifier's.
    """

    names: tuple[str, ...]
    update: Callable[..., Any]


def make_units(
    model: Network,
    rule: Rule,
    tx: Optimizer,
    cuts: Cuts,
) -> list[Unit]:
    """A network's updates in order, each of which needs nothing of those after it.

    The step on one device runs them in one program, a pipeline each on its device.

    Args:
        model: the network.
        rule: a local rule, or one a block.
        tx: the optimizer, or one a block.
        cuts: when the batch is cut.

    Raises:
        ValueError: the rule's blocks have no losses of their own.
    """
    if not has_local_losses(rule):
        raise ValueError(
            f"rule {rule.name!r} has no local losses, so that its blocks cannot learn by "
            "themselves; a pipeline takes a local rule."
        )

    def block_unit(index: int, name: str, spec: BlockSpec, own_rule: LocalRule) -> Unit:
        own_tx = optimizer_of(tx, name)

        def update(states: Any, x: Any, labels: Any, key: Any, step: Any) -> Any:
            block_key = jax.random.fold_in(jax.random.fold_in(key, step), index)
            state, loss, x = update_block(
                spec,
                own_rule,
                own_tx,
                states[0],
                x.astype(model.dtype),
                labels,
                block_key,
                cuts,
            )
            return (state,), loss[None], x

        return Unit((name,), update)

    def classifier_unit() -> Unit:
        def update(states: Any, x: Any, labels: Any, key: Any, step: Any) -> Any:
            del key, step
            state, loss, logits = update_classifier(
                model, optimizer_of(tx, CLASSIFIER), states[0], x, labels_of(labels)
            )
            return (state,), loss[None], logits

        return Unit((CLASSIFIER,), update)

    def last_group_unit(index: int, name: str, own_rule: LocalRule) -> Unit:
        own_tx = optimizer_of(tx, name), optimizer_of(tx, CLASSIFIER)

        def update(states: Any, x: Any, labels: Any, key: Any, step: Any) -> Any:
            block_key = jax.random.fold_in(jax.random.fold_in(key, step), index)
            states, loss, logits = update_last_group(
                model,
                own_rule,
                own_tx,
                states,
                x.astype(model.dtype),
                labels_of(labels),
                block_key,
                cuts,
            )
            return states, loss[None], logits

        return Unit((name, CLASSIFIER), update)

    rows = list(zip(model.block_names, model.specs, model.block_rules(rule)))
    alone = len(rows) - model.classifier_in_last_group
    units = [block_unit(index, *row) for index, row in enumerate(rows[:alone])]
    if alone == len(rows):
        return [*units, classifier_unit()]
    name, _, own_rule = rows[-1]
    return [*units, last_group_unit(alone, name, own_rule)]


def local_step(
    model: Network,
    rule: Rule,
    tx: Optimizer,
    state: TrainState,
    batch: Batch,
    *,
    cuts: Cuts,
    in_order: bool = True,
) -> tuple[TrainState, Metrics]:
    """One step of all blocks and the classifier; see :func:`lls_jax.training.make_train_step`."""
    units = make_units(model, rule, tx, cuts)
    x, labels = batch["image"], targets_of(model, rule, batch)
    states: dict[str, BlockState] = {}
    losses: list[jax.Array] = []
    below: tuple[BlockState, ...] = ()
    for unit in units:
        own = tuple(block_state(state, name) for name in unit.names)
        if in_order and below:
            # The block below has its gradient, and what it was taken from is free again.
            token = token_of(tuple(one.params for one in below))
            own = tuple(one._replace(params=wait_for(token, one.params)) for one in own)
        below, loss, x = unit.update(own, x, labels, state.key, state.step)
        states.update(zip(unit.names, below))
        losses.append(loss[0])
    metrics = {"layer_loss": stack_losses(losses[:-1]), "loss": losses[-1], "logits": x}
    return join_states(states, state.step + 1, state.key), metrics
