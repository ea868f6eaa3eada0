"""Blocks on several devices, which learn at the same time.

A local block needs nothing of the blocks above it. So blocks can lie on different devices and learn
at the same time, device k from batch t while device k + 1 learns from batch t - 1, with no bubble
and no stale gradient: the next block takes the activation computed before the update, which is all
that it takes in sequential training too.
"""

import collections
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lls_jax.models import Network
from lls_jax.placement.execution import Execution
from lls_jax.rules import Rule, labels_of
from lls_jax.steps.local import Unit, make_units
from lls_jax.steps.state import block_state, join_states, targets_of
from lls_jax.training import Batch, BlockState, Metrics, Optimizer, TrainState

# Batches that may be under way in a pipeline, beside one a stage.
_SPARE = 2


class Running(NamedTuple):
    """A state whose blocks lie on their devices.

    Attributes:
        step: number of updates done.
        keys: the run's random key on each device.
        states: by name, blocks and classifier, each on its device.
    """

    step: int
    keys: dict[Any, jax.Array]
    states: dict[str, BlockState]


def _compiled_units(
    model: Network, rule: Rule, tx: Optimizer, remat_above: int | None
) -> list[Unit]:
    """Each unit compiled by itself: its numbers do not depend on which others share its device."""
    return [
        unit._replace(update=jax.jit(unit.update, donate_argnums=0))
        for unit in make_units(model, rule, tx, remat_above)
    ]


@jax.jit
def _split_losses(losses: list[jax.Array]) -> Metrics:
    """The units' losses, ``[1]`` each, the classifier's last, as a step's metrics have them."""
    *blocks, (loss,) = losses
    return {"layer_loss": jnp.concatenate([jnp.zeros(0), *blocks]), "loss": loss}


def partition(seconds: Sequence[float], stages: int) -> tuple[int, ...]:
    """Cut a row of costs into consecutive stages, the dearest of which is as cheap as can be.

    Args:
        seconds: cost of each unit, in order.
        stages: how many, at most as many as there are units.

    Returns:
        Units a stage; each at least one.

    Raises:
        ValueError: there are fewer units than stages, or no stage.

    >>> partition([4.0, 1.0, 1.0, 2.0], 2)
    (1, 3)
    """
    count = len(seconds)
    if not 1 <= stages <= count:
        raise ValueError(
            f"{stages} stages for {count} units (the blocks and the classifier); expected 1 to "
            f"{count}."
        )

    @functools.cache
    def best(start: int, stages: int) -> tuple[float, tuple[int, ...]]:
        if stages == 1:
            return sum(seconds[start:]), (count - start,)
        options = []
        for size in range(1, count - start - stages + 2):
            rest, sizes = best(start + size, stages - 1)
            options.append((max(sum(seconds[start : start + size]), rest), (size, *sizes)))
        return min(options)

    return best(0, stages)[1]


def pipeline(
    model: Network,
    rule: Rule,
    tx: Optimizer,
    devices: Sequence[Any],
    sizes: Sequence[int],
    remat_above: int | None = None,
) -> Execution:
    """Consecutive blocks on several devices, each learning as soon as its input is there.

    Every unit is dispatched without waiting; a device works through its own units in order, so that
    device k learns from batch t while device k + 1 learns from batch t - 1. A few batches may be
    under way, then `step` waits for the oldest. The numbers are those of one device to the bit.

    Args:
        model: the network.
        rule: a local rule, or one a block.
        tx: any optax transformation.
        devices: one a stage; a device may be there more than once.
        sizes: units a stage, blocks and at last the classifier, as :func:`partition` gives them.
        remat_above: as of :func:`lls_jax.training.make_train_step`.

    Raises:
        ValueError: the sizes do not add up, or the rule has no local losses.
    """
    units = _compiled_units(model, rule, tx, remat_above)
    if len(devices) != len(sizes) or min(sizes, default=0) < 1 or sum(sizes) != len(units):
        raise ValueError(
            f"stages of {', '.join(map(str, sizes))} units on {len(devices)} devices; expected one "
            f"stage a device, together {len(units)} units: the blocks, and the classifier."
        )
    places = [device for device, size in zip(devices, sizes) for _ in range(size)]
    home: dict[str, Any] = {name: d for (names, _), d in zip(units, places) for name in names}
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
        states, losses = dict(running.states), []
        x, where = batch["image"], None
        labels = targets_of(model, rule, batch)
        for (names, unit), device in zip(units, places):
            if device is not where:
                x, labels = jax.device_put((x, labels), device)
                where = device
            own = tuple(states[name] for name in names)
            new, loss, x = unit(own, x, labels, running.keys[device], running.step)
            states.update(zip(names, new))
            losses.append(jax.device_put(loss, places[-1]))
        under_way.append(x)
        if len(under_way) > len(sizes) + _SPARE:
            jax.block_until_ready(under_way.popleft())
        metrics = {**_split_losses(losses), "logits": x, "label": labels_of(labels)}
        return Running(running.step + 1, running.keys, states), metrics

    def leave(running: Running) -> TrainState:
        states = jax.device_put(
            {name: jax.tree.map(jnp.copy, state) for name, state in running.states.items()},
            devices[0],
        )
        return join_states(states, jnp.int32(running.step), running.keys[devices[0]])

    return Execution(enter, step, leave, lambda tree: jax.device_put(tree, places[-1]))


def measure_units(
    model: Network,
    rule: Rule,
    tx: Optimizer,
    state: TrainState,
    batch: Batch,
    repeats: int = 3,
    remat_above: int | None = None,
) -> list[float]:
    """Seconds of each unit on the default device: the least of a few, compilation apart.

    Args:
        model: the network.
        rule: a local rule, or one a block.
        tx: the optimizer of `state`.
        state: any state; not modified.
        batch: ``image`` and ``label`` of the size that is trained with.
        repeats: updates that are timed.
        remat_above: as of :func:`lls_jax.training.make_train_step`.
    """
    x, result = batch["image"], []
    labels = targets_of(model, rule, batch)
    for names, unit in _compiled_units(model, rule, tx, remat_above):
        own = tuple(jax.tree.map(jnp.copy, block_state(state, name)) for name in names)
        times = []
        for index in range(repeats + 1):
            jax.block_until_ready((own, x))
            start = time.perf_counter()
            own, _, following = unit(own, x, labels, state.key, index)
            jax.block_until_ready((own, following))
            times.append(time.perf_counter() - start)
        x = following
        result.append(min(times[1:]))
    return result
