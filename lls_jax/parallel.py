"""How a training step is executed: on one device, block by block on several, or on batch shards.

A local block needs nothing of the blocks above it. So blocks can lie on different devices and learn
at the same time, device k from batch t while device k + 1 learns from batch t - 1, with no bubble
and no stale gradient: the next block takes the activation computed before the update, which is all
that it takes in sequential training too.
"""

import collections
import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lls_jax import processes
from lls_jax.models import Network
from lls_jax.rules import Rule, has_local_losses, without_kernels
from lls_jax.training import (
    CLASSIFIER,
    Batch,
    BlockState,
    Metrics,
    TrainState,
    block_state,
    join_states,
    make_train_step,
    update_block,
    update_classifier,
    update_joined,
)

# Batches that may be under way in a pipeline, beside one a stage.
_SPARE = 2


class Execution(NamedTuple):
    """A way to train: a state is put in, advanced by steps, and taken out again.

    Attributes:
        enter: ``enter(state) -> running``: put a state where it is trained.
        step: ``step(running, batch) -> (running, metrics)``; `metrics` has ``label`` too, where the
            other metrics are. It returns before the devices are done, and consumes `running`.
        leave: ``leave(running) -> state``, on the first device; `running` stays valid.
        place: puts what is added to the metrics, a tree of arrays, where they are.
        sharding: of the batches, where they are shared out; else None.
    """

    enter: Callable[[TrainState], Any]
    step: Callable[[Any, Batch], tuple[Any, Metrics]]
    leave: Callable[[Any], TrainState]
    place: Callable[[Any], Any]
    sharding: jax.sharding.NamedSharding | None = None


def single(
    model: Network,
    rule: Rule,
    tx: optax.GradientTransformation,
    remat_above: int | None = None,
) -> Execution:
    """One compiled step for the whole network, on the default device.

    Args are those of :func:`lls_jax.training.make_train_step`.
    """
    train_step = make_train_step(model, rule, tx, remat_above=remat_above)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        state, metrics = train_step(state, batch)
        return state, {**metrics, "label": batch["label"]}

    return Execution(lambda state: state, step, lambda state: state, lambda tree: tree)


# --- Blocks on several devices -------------------------------------------------------------------


class Running(NamedTuple):
    """A state whose blocks lie on their devices.

    Attributes:
        step: number of updates done.
        key: the run's random key.
        states: by name, blocks and classifier, each on its device.
    """

    step: int
    key: jax.Array
    states: dict[str, BlockState]


def make_units(
    model: Network,
    rule: Rule,
    tx: optax.GradientTransformation,
    remat_above: int | None = None,
) -> list[Any]:
    """One compiled update a block, then the classifier's: what a pipeline's devices run.

    A unit is compiled by itself, so that its numbers do not depend on which other units share its
    device.

    Args:
        model: the network.
        rule: a local rule, or one a block.
        tx: any optax transformation.
        remat_above: as of :func:`lls_jax.training.make_train_step`.

    Returns:
        ``(names, unit)`` pairs: the names of the states that the unit updates, and
        ``unit(states, x, labels, key, step) -> (states, losses, x)``; the last one's `x` are the
        logits, and its last loss is the classifier's.

    Raises:
        ValueError: the rule's blocks have no losses of their own.
    """
    if not has_local_losses(rule):
        raise ValueError(
            f"rule {rule.name!r} has no local losses, so that its blocks cannot learn by "
            "themselves; a pipeline takes a local rule."
        )
    extra = optax.with_extra_args_support(tx)
    blocks = list(zip(model.block_names, model.local_blocks(rule), model.specs))

    def compiled(function: Any) -> Any:
        return jax.jit(function, donate_argnums=0)

    def block_unit(index: int) -> Any:
        _, block, spec = blocks[index]

        def unit(states: Any, x: Any, labels: Any, key: Any, step: Any) -> Any:
            block_key = jax.random.fold_in(jax.random.fold_in(key, step), index)
            x = x.astype(model.dtype)
            state, loss, x = update_block(
                block, spec, extra, states[0], x, labels, block_key, remat_above
            )
            return (state,), loss[None], x

        return compiled(unit)

    def classifier_unit(states: Any, x: Any, labels: Any, key: Any, step: Any) -> Any:
        del key, step
        state, loss, logits = update_classifier(model, extra, states[0], x, labels)
        return (state,), loss[None], logits

    def joined_unit(states: Any, x: Any, labels: Any, key: Any, step: Any) -> Any:
        block_key = jax.random.fold_in(jax.random.fold_in(key, step), len(blocks) - 1)
        states, loss, logits = update_joined(
            model, extra, states, x.astype(model.dtype), labels, block_key
        )
        return states, loss[None], logits

    alone = len(blocks) - model.joined
    units = [((blocks[index][0],), block_unit(index)) for index in range(alone)]
    if model.joined:
        return [*units, ((blocks[-1][0], CLASSIFIER), compiled(joined_unit))]
    return [*units, ((CLASSIFIER,), compiled(classifier_unit))]


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
    tx: optax.GradientTransformation,
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
    units = make_units(model, rule, tx, remat_above)
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
        return Running(int(state.step), state.key, states)

    def step(running: Running, batch: Batch) -> tuple[Running, Metrics]:
        states, losses = dict(running.states), []
        x, where = batch["image"], None
        for (names, unit), device in zip(units, places):
            if device is not where:
                x, labels, key = jax.device_put((x, batch["label"], running.key), device)
                where = device
            own = tuple(states[name] for name in names)
            new, loss, x = unit(own, x, labels, key, running.step)
            states.update(zip(names, new))
            losses.append(jax.device_put(loss, places[-1]))
        under_way.append(x)
        if len(under_way) > len(sizes) + _SPARE:
            jax.block_until_ready(under_way.popleft())
        metrics = {
            "layer_loss": jnp.concatenate([jnp.zeros(0, device=places[-1]), *losses[:-1]]),
            "loss": losses[-1][0],
            "logits": x,
            "label": labels,
        }
        return Running(running.step + 1, running.key, states), metrics

    def leave(running: Running) -> TrainState:
        states = jax.device_put(
            {name: jax.tree.map(jnp.copy, state) for name, state in running.states.items()},
            devices[0],
        )
        return join_states(states, jnp.int32(running.step), running.key)

    return Execution(enter, step, leave, lambda tree: jax.device_put(tree, places[-1]))


def measure_units(
    model: Network,
    rule: Rule,
    tx: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    repeats: int = 3,
    remat_above: int | None = None,
) -> list[float]:
    """Seconds of each unit on the default device: the least of a few, compilation apart.

    Args:
        model: the network.
        rule: a local rule, or one a block.
        tx: the optimiser of `state`.
        state: any state; not modified.
        batch: ``image`` and ``label`` of the size that is trained with.
        repeats: updates that are timed.
        remat_above: as of :func:`lls_jax.training.make_train_step`.
    """
    x, result = batch["image"], []
    for names, unit in make_units(model, rule, tx, remat_above):
        own = tuple(jax.tree.map(jnp.copy, block_state(state, name)) for name in names)
        times = []
        for index in range(repeats + 1):
            jax.block_until_ready((own, x))
            start = time.perf_counter()
            own, _, following = unit(own, x, batch["label"], state.key, index)
            jax.block_until_ready((own, following))
            times.append(time.perf_counter() - start)
        x = following
        result.append(min(times[1:]))
    return result


# --- Shards of the batch on several devices ------------------------------------------------------


# Threads that a device made of a CPU needs: with fewer, each of them may wait in another of the
# sums over all devices that are ready at the same time, for devices that have no thread left.
_THREADS_A_DEVICE = 3


def _cpu_threads() -> int:
    """How many threads XLA's CPU client has: as its `DefaultThreadPoolSize` finds it."""
    for name in ("PJRT_NPROC", "NPROC"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _check_threads(devices: Sequence[Any]) -> None:
    """Raise ValueError where sums over devices made of a CPU could wait for each other forever."""
    here = [device for device in devices if device.process_index == jax.process_index()]
    if len(devices) == 1 or devices[0].platform != "cpu":
        return
    needed, have = _THREADS_A_DEVICE * len(here), _cpu_threads()
    if have < needed:
        raise ValueError(
            f"{len(here)} devices made of one CPU need {needed} threads to sum over {len(devices)} "
            f"devices without waiting for each other forever, and XLA has {have}; start this with "
            f"NPROC={needed} in the environment."
        )


def data_parallel(
    model: Network, rule: Rule, tx: optax.GradientTransformation, devices: Sequence[Any]
) -> Execution:
    """One program over a mesh: the batch is sharded, the state is on every device.

    The step is the same as on one device, and so is its meaning: BatchNorm's statistics and every
    loss are of the global batch. The compiler sums each block's gradients where they are made,
    which is before the next block's forward pass.

    The devices may belong to several processes (:func:`lls_jax.processes.meet`), each of which
    runs this, and gives `step` its own rows of the batch (:func:`lls_jax.processes.rows_of`).

    Args:
        model: the network.
        rule: any rule; its losses are computed by XLA, since the compiler cannot cut a kernel.
        tx: any optax transformation.
        devices: shards go to these; they divide the batch size.

    Raises:
        ValueError: the rule names a kernel, or the devices are made of a CPU with too few threads.
    """
    rule = without_kernels(rule)
    _check_threads(devices)
    mesh = jax.sharding.Mesh(list(devices), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    # The order makes a block wait for sums over all devices, which a GPU computes meanwhile. A CPU
    # needs it: its few threads, each in another of several sums, wait for each other forever.
    train_step = make_train_step(model, rule, tx, in_order=devices[0].platform == "cpu")

    def place(tree: Any) -> Any:
        return processes.replicate(tree, everywhere)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = processes.share(batch, sharded)
        state, metrics = train_step(state, batch)
        return state, {**metrics, "label": batch["label"]}

    return Execution(place, step, processes.own, place, sharded)
