"""Blocks on several devices, which learn at the same time.

A local block needs nothing of the blocks above it. So blocks can lie on different devices and learn
at the same time, device k from batch t while device k + 1 learns from batch t - 1, with no bubble
and no stale gradient: the next block takes the activation computed before the update, which is all
that it takes in sequential training too.

With a reach of R a block also waits for what comes down from the R - 1 blocks above it, which may
lie on the next device: it learns from a batch before it sees the next one. The blocks below it go
on meanwhile (:func:`lls_jax.placement.stages.order`), so that a device waits where R blocks in a
row take longer than what else it has to do, and not for the whole way up and down.
"""

import collections
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lls_jax.models import Network
from lls_jax.placement.execution import Execution
from lls_jax.placement.stages import by_unit, order
from lls_jax.placement.unit_work import States, Work, make_pieces
from lls_jax.rules import Rule, labels_of
from lls_jax.steps.reach_schedule import Move
from lls_jax.steps.state import block_state, join_states, targets_of
from lls_jax.training import Batch, Metrics, Optimizer, Reach, TrainState

# Batches that may be under way in a pipeline, beside one a stage.
_SPARE = 2


class Running(NamedTuple):
    """A state whose blocks lie on their devices.

    Attributes:
        step: number of updates done.
        keys: the run's random key on each device.
        states: by name, blocks and classifier, each on its device.
        before: the batch from which some of them have still to learn; None for no such.
    """

    step: int
    keys: dict[Any, jax.Array]
    states: States
    before: Work | None = None


@jax.jit
def _split_losses(losses: list[jax.Array]) -> Metrics:
    """The units' losses, ``[1]`` each, the classifier's last, as a step's metrics have them."""
    *blocks, (loss,) = losses
    return {"layer_loss": jnp.concatenate([jnp.zeros(0), *blocks]), "loss": loss}


def pipeline(
    model: Network,
    rule: Rule,
    tx: Optimizer,
    devices: Sequence[Any],
    sizes: Sequence[int],
    remat_above: int | None = None,
    reach: Reach = 1,
    slice_above: int | None = None,
) -> Execution:
    """Consecutive blocks on several devices, each learning as soon as it can.

    Every unit is dispatched without waiting; a device works through what it is given in order, so
    that device k learns from batch t while device k + 1 learns from batch t - 1. A few batches may
    be under way, then `step` waits for the oldest. The numbers are those of one device to the bit.

    Args:
        model: the network.
        rule: a local rule, or one a block.
        tx: any optax transformation.
        devices: one a stage; a device may be there more than once.
        sizes: units a stage, blocks and at last the classifier, as
            :func:`lls_jax.placement.partition` gives them.
        remat_above: as of :func:`lls_jax.training.make_train_step`.
        reach: likewise.
        slice_above: likewise.

    Raises:
        ValueError: the sizes do not add up, or the rule has no local losses.
    """
    pieces = make_pieces(model, rule, tx, reach, remat_above, slice_above)
    count = len(pieces.names)
    if len(devices) != len(sizes) or min(sizes, default=0) < 1 or sum(sizes) != count:
        raise ValueError(
            f"stages of {', '.join(map(str, sizes))} units on {len(devices)} devices; expected one "
            f"stage a device, together {count} units: the blocks, and the classifier."
        )
    stage_of = [stage for stage, size in enumerate(sizes) for _ in range(size)]
    moves, late = order(pieces.moves, stage_of)
    places = [devices[stage] for stage in stage_of]
    home: dict[str, Any] = {name: d for names, d in zip(pieces.names, places) for name in names}
    under_way: collections.deque[jax.Array] = collections.deque()

    def enter(state: TrainState) -> Running:
        # A copy, because the units give their buffers back.
        states = {
            name: jax.device_put(jax.tree.map(jnp.copy, block_state(state, name)), device)
            for name, device in home.items()
        }
        keys = {device: jax.device_put(state.key, device) for device in devices}
        return Running(int(state.step), keys, states)

    def step(running: Running, batch: Batch) -> tuple[Running, Metrics]:
        states, before, keys = running.states, running.before, running.keys
        work = Work(batch["image"], targets_of(model, rule, batch), running.step)
        for move, is_late in moves:
            if not is_late:
                states, work = pieces.do(move, places, keys, states, work)
            elif before is not None:
                states, before = pieces.do(move, places, keys, states, before)
        under_way.append(work.x)
        if len(under_way) > len(sizes) + _SPARE:
            jax.block_until_ready(under_way.popleft())
        losses = jax.device_put([work.losses[unit] for unit in range(count)], places[-1])
        metrics = {**_split_losses(losses), "logits": work.x, "label": labels_of(work.labels)}
        return Running(running.step + 1, keys, states, work if late else None), metrics

    def leave(running: Running) -> TrainState:
        states, before = running.states, running.before
        if before is not None:
            # On copies: `running` stays as it is, and does this once more.
            taught = {name for move in late for name in pieces.names[move.unit]}
            states = {
                name: jax.tree.map(jnp.copy, state) if name in taught else state
                for name, state in states.items()
            }
            for move in late:
                states, before = pieces.do(move, places, running.keys, states, before)
        states = jax.device_put(jax.tree.map(jnp.copy, states), devices[0])
        return join_states(states, jnp.int32(running.step), running.keys[devices[0]])

    return Execution(enter, step, leave, lambda tree: jax.device_put(tree, places[-1]))


def measure_moves(
    model: Network,
    rule: Rule,
    tx: Optimizer,
    state: TrainState,
    batch: Batch,
    repeats: int = 3,
    remat_above: int | None = None,
    reach: Reach = 1,
    slice_above: int | None = None,
) -> dict[Move, float]:
    """Seconds of each piece of a step on the default device: the least of a few, compilation apart.

    Args:
        model: the network.
        rule: a local rule, or one a block.
        tx: the optimizer of `state`.
        state: any state; not modified.
        batch: ``image`` and ``label`` of the size that is trained with.
        repeats: updates that are timed.
        remat_above: as of :func:`lls_jax.training.make_train_step`.
        reach: likewise.
        slice_above: likewise.

    Returns:
        By move, in their order; with a reach of 1 a ``run`` has a unit's update in it.
    """
    pieces = make_pieces(model, rule, tx, reach, remat_above, slice_above)
    (here,) = batch["image"].devices()
    places, keys = [here] * len(pieces.names), {here: state.key}
    states = {
        name: jax.tree.map(jnp.copy, block_state(state, name))
        for names in pieces.names
        for name in names
    }
    times: dict[Move, list[float]] = {move: [] for move in pieces.moves}
    for index in range(repeats + 1):
        work = Work(batch["image"], targets_of(model, rule, batch), index)
        for move in pieces.moves:
            jax.block_until_ready((states, work))
            start = time.perf_counter()
            states, work = pieces.do(move, places, keys, states, work)
            jax.block_until_ready((states, work))
            times[move].append(time.perf_counter() - start)
    return {move: min(seconds[1:]) for move, seconds in times.items()}


def measure_units(
    model: Network, rule: Rule, tx: Optimizer, state: TrainState, batch: Batch, **options: Any
) -> list[float]:
    """Seconds of each unit; the arguments are those of :func:`measure_moves`."""
    return by_unit(measure_moves(model, rule, tx, state, batch, **options))
