"""The local step whose losses teach the blocks below their own too.

With reach R the blocks j - R + 1 to j learn from the loss of block j, and the classifier counts as
the block after the last: block j learns from the sum of the losses of blocks j to j + R - 1. Reach
1 is :mod:`lls_jax.steps.local`. A reach may be given loss by loss too.

A loss's gradient goes down through the blocks that it teaches and stops. So what comes down from
different losses is passed on separately, as far as each goes, while a block's weights take one
gradient, of the sum. Losses that stop at the same block go down together, as those of the lowest R
blocks do; with a reach of all blocks there is one way down, as in backpropagation. At most R blocks
keep what a gradient needs, whatever the depth.

References:
    Gomez et al., "Interlocking Backpropagation: Improving depthwise model-parallelism", JMLR 23
    (171), 2022, https://arxiv.org/abs/2010.04116.
    Xiong, Ren, Urtasun, "LoCo: Local Contrastive Representation Learning", NeurIPS 2020,
    https://arxiv.org/abs/2008.01342.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from lls_jax.layers.ordering import token_of, wait_for
from lls_jax.models import Network
from lls_jax.rules import LocalRule, Rule, Targets, labels_of
from lls_jax.steps import block_run
from lls_jax.steps.block import (
    BlockState,
    apply_gradients,
    classifier_loss,
    merge_params,
    split_params,
)
from lls_jax.steps.reach_schedule import Reach, brings_own_loss, schedule
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


class UnitRun(NamedTuple):
    """What a unit has computed for a batch, and keeps until its update.

    Attributes:
        loss: its own, ``[1]``.
        passed_on: the next unit's input; of the last one the logits.
        batch_stats: new statistics, of the block if there is one.
        kept: what its gradients need.
    """

    loss: jax.Array
    passed_on: jax.Array
    batch_stats: Any
    kept: Any


class ReachingUnit(NamedTuple):
    """What is updated at once: a block, the classifier, or a last block together with it.

    Attributes:
        names: of the states that it updates.
        run: ``run(states, x, labels, key, step) -> UnitRun``.
        pass_on: ``pass_on(unit_run, gradient, own) -> gradient`` with respect to the unit's input:
            of what `gradient`, with respect to its output, brings from above (None for nothing)
            and, if `own`, of its own loss.
        update: ``update(states, unit_run, gradient) -> states``: from its own loss and the sum of
            what has come from above.
    """

    names: tuple[str, ...]
    run: Callable[..., UnitRun]
    pass_on: Callable[..., jax.Array]
    update: Callable[..., tuple[BlockState, ...]]


class _BlockKept(NamedTuple):
    """What the gradients of a block need.

    Attributes:
        pull_block: ``pull_block(d_activation, d_pooled, params=..., input=...)`` gives the
            gradients with respect to the block's parameters and to its input, those that are asked
            for; None is a gradient of zeros.
        pull_after: from the gradient of what is passed on to that of the activation.
        d_own: its own loss's, ``(d_activation, d_pooled)``, one of which is None.
        d_learned: its own loss's with respect to the parameters that its rule learns.
        loss: for optimizers that look at it.
    """

    pull_block: Callable[..., Any]
    pull_after: Callable[..., Any]
    d_own: tuple[jax.Array | None, jax.Array | None]
    d_learned: Any
    loss: jax.Array


def _block_key(key: jax.Array, step: jax.Array, index: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, step), index)


def _block_unit(
    model: Network,
    index: int,
    rule: LocalRule,
    tx: optax.GradientTransformation,
    cuts: Cuts,
) -> ReachingUnit:
    spec = model.specs[index]

    def run(states: Any, x: jax.Array, labels: Targets, key: Any, step: Any) -> UnitRun:
        (state,) = states
        labels = labels if rule.needs_image else labels_of(labels)
        key, x = _block_key(key, step, index), x.astype(model.dtype)
        trained, fixed = split_params(rule, state.params)
        own, stats = trained["block"], state.batch_stats["block"]
        outcome, pull_block = block_run.run(spec, rule, cuts, own, stats, x, key, from_above=True)
        # In the model's dtype, as the gradient comes back, whatever the block's own is.
        passed_on, pull_after = jax.vjp(
            lambda seen: outcome.after(seen, key).astype(model.dtype), outcome.seen
        )

        def own_loss(learned: Any, activation: Any, pooled: Any) -> jax.Array:
            return rule.block_loss(
                {**learned, **fixed},
                activation,
                labels,
                pool_size=spec.pool_size,
                pooled=pooled,
            )

        loss, (d_learned, *d_own) = jax.value_and_grad(own_loss, argnums=(0, 1, 2))(
            trained.get("rule", {}), outcome.activation, outcome.pooled
        )
        kept = _BlockKept(pull_block, pull_after, tuple(d_own), d_learned, loss)
        return UnitRun(loss[None], passed_on, ({"block": outcome.batch_stats},), kept)

    def pull(kept: _BlockKept, gradient: Any, own: bool, **wanted: bool) -> tuple[Any, Any]:
        d_activation = None if gradient is None else kept.pull_after(gradient)[0]
        d_own, d_pooled = kept.d_own if own else (None, None)
        if d_own is not None:
            d_activation = d_own if d_activation is None else d_activation + d_own
        return kept.pull_block(d_activation, d_pooled, **wanted)

    def pass_on(unit_run: UnitRun, gradient: Any, own: bool) -> jax.Array:
        return pull(unit_run.kept, gradient, own, params=False, input=True)[1]

    def update(states: Any, unit_run: UnitRun, gradient: Any) -> tuple[BlockState, ...]:
        (state,), kept = states, unit_run.kept
        grads = {"block": pull(kept, gradient, True, params=True, input=False)[0]}
        trained, fixed = split_params(rule, state.params)
        if "rule" in trained:
            grads["rule"] = kept.d_learned
        trained, opt_state = apply_gradients(tx, state.opt_state, trained, grads, kept.loss)
        return (BlockState(merge_params(trained, fixed), unit_run.batch_stats[0], opt_state),)

    return ReachingUnit((model.block_names[index],), run, pass_on, update)


def _last_unit(model: Network, rule: Rule, tx: Optimizer, cuts: Cuts) -> ReachingUnit:
    """The classifier, and the last block where the classifier belongs to it."""
    index = len(model.specs) - 1
    names: tuple[str, ...] = (CLASSIFIER,)
    own_rules: tuple[Rule | None, ...] = (None,)
    if model.classifier_in_last_group:
        names, own_rules = (model.block_names[index], CLASSIFIER), (rule, None)
    # Of that block, from the classifier's loss alone.
    run_last = functools.partial(block_run.run, model.specs[index], None, cuts, from_above=True)

    def split(states: Any) -> Any:
        """What is trained of each, and what is not."""
        pairs = [split_params(own, state.params) for own, state in zip(own_rules, states)]
        return tuple(zip(*pairs, strict=True))

    def run(states: Any, x: jax.Array, labels: Targets, key: Any, step: Any) -> UnitRun:
        blocks, labels = states[:-1], labels_of(labels)
        key, x = _block_key(key, step, index), x.astype(model.dtype)

        def logits_loss(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            *own, last = params
            stats = []
            for block_params, block in zip(own, blocks):
                outcome = block_run.differentiable(
                    run_last, block_params["block"], block.batch_stats["block"], x, key
                )
                x = outcome.after(outcome.seen, key)
                stats.append({"block": outcome.batch_stats})
            logits = model.classify(last, x)
            return classifier_loss(logits, labels, model.classifier_smoothing), (
                logits,
                (*stats, {}),
            )

        (loss, (logits, stats)), kept = jax.value_and_grad(
            logits_loss, argnums=(0, 1), has_aux=True
        )(split(states)[0], x)
        return UnitRun(loss[None], logits, stats, kept)

    def pass_on(unit_run: UnitRun, gradient: Any, own: bool) -> jax.Array:
        del gradient, own
        return unit_run.kept[1]

    def update(states: Any, unit_run: UnitRun, gradient: Any) -> tuple[BlockState, ...]:
        del gradient
        new = []
        rows = zip(names, states, *split(states), unit_run.kept[0], unit_run.batch_stats)
        for name, state, trained, fixed, grads, stats in rows:
            trained, opt_state = apply_gradients(
                optimizer_of(tx, name), state.opt_state, trained, grads, unit_run.loss[0]
            )
            new.append(BlockState(merge_params(trained, fixed), stats, opt_state))
        return tuple(new)

    return ReachingUnit(names, run, pass_on, update)


def make_reaching_units(
    model: Network,
    rule: Rule,
    tx: Optimizer,
    cuts: Cuts,
) -> list[ReachingUnit]:
    """A network's units in order, for :func:`lls_jax.steps.reach_schedule.schedule`.

    Args:
        model: the network.
        rule: a local rule, or one a block.
        tx: the optimizer, or one a block.
        cuts: when the batch is cut.
    """
    rows = list(enumerate(zip(model.block_names, model.block_rules(rule))))
    alone = len(rows) - model.classifier_in_last_group
    return [
        *(
            _block_unit(model, index, own_rule, optimizer_of(tx, name), cuts)
            for index, (name, own_rule) in rows[:alone]
        ),
        _last_unit(model, rows[-1][1][1], tx, cuts),
    ]


def reach_step(
    model: Network,
    rule: Rule,
    tx: Optimizer,
    state: TrainState,
    batch: Batch,
    *,
    reach: Reach,
    cuts: Cuts,
    in_order: bool = True,
) -> tuple[TrainState, Metrics]:
    """One step of all blocks and the classifier; see :func:`lls_jax.training.make_train_step`."""
    units = make_reaching_units(model, rule, tx, cuts)
    x, labels = batch["image"], targets_of(model, rule, batch)
    states = {name: block_state(state, name) for unit in units for name in unit.names}
    runs: dict[int, UnitRun] = {}
    # At a unit's output: what the way down that is under way brings, and the sum of all so far.
    coming: dict[int, jax.Array] = {}
    total: dict[int, jax.Array] = {}
    losses: list[jax.Array] = []
    # Names of what has learned since the last unit ran.
    learned: list[str] = []
    for move in schedule(len(units), reach):
        index = move.unit
        unit = units[index]
        own = tuple(states[name] for name in unit.names)
        if move.kind == "run":
            if in_order and learned:
                # What has learned has its gradient, and what that needed is free again.
                token = token_of(tuple(states[name].params for name in learned))
                own = tuple(one._replace(params=wait_for(token, one.params)) for one in own)
                learned = []
            runs[index] = unit.run(own, x, labels, state.key, state.step)
            x = runs[index].passed_on
            losses.append(runs[index].loss[0])
        elif move.kind == "pass":
            given = None if index == move.loss else coming[index]
            brings_own = brings_own_loss(move, len(units), reach)
            passed = unit.pass_on(runs[index], given, brings_own)
            coming[index - 1] = passed
            total[index - 1] = total[index - 1] + passed if index - 1 in total else passed
        else:
            new = unit.update(own, runs.pop(index), total.get(index))
            states.update(zip(unit.names, new))
            learned += unit.names
    metrics = {"layer_loss": stack_losses(losses[:-1]), "loss": losses[-1], "logits": x}
    return join_states(states, state.step + 1, state.key), metrics
