"""Shards of the batch on several devices, of one process or of several."""

import functools
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax

from lls_jax import platforms, processes
from lls_jax.models import Network
from lls_jax.placement.execution import Execution
from lls_jax.rules import Rule
from lls_jax.training import Batch, Metrics, Optimizer, Reach, TrainState, make_train_step


def _cpu_threads() -> int:
    """How many threads XLA's CPU client has: as its `DefaultThreadPoolSize` finds it."""
    for name in ("PJRT_NPROC", "NPROC"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _check_threads(devices: Sequence[Any]) -> None:
    """Raise ValueError where sums over devices made of a CPU could wait for each other forever."""
    here = [device for device in devices if device.process_index == jax.process_index()]
    needed = platforms.choices(devices[0].platform).threads_a_device * len(here)
    if len(devices) == 1 or not needed:
        return
    have = _cpu_threads()
    if have < needed:
        raise ValueError(
            f"{len(here)} devices made of one CPU need {needed} threads to sum over {len(devices)} "
            f"devices without waiting for each other forever, and XLA has {have}; start this with "
            f"NPROC={needed} in the environment."
        )


def data_parallel(
    model: Network, rule: Rule, tx: Optimizer, devices: Sequence[Any], reach: Reach = 1
) -> Execution:
    """One program over a mesh: the batch is sharded, the state is on every device.

    The step is the same as on one device, and so is its meaning: BatchNorm's statistics and every
    loss are of the global batch. The compiler sums each block's gradients where they are made,
    which is before the next block's forward pass.

    The devices may belong to several processes (:func:`lls_jax.processes.initialize`), each of
    which runs this, and gives `step` its own rows of the batch
    (:func:`lls_jax.processes.local_rows`).

    Args:
        model: the network.
        rule: any rule; a kernel runs on each device's rows of the batch.
        tx: any optax transformation.
        devices: shards go to these; they divide the batch size.
        reach: as of :func:`lls_jax.training.make_train_step`.

    Raises:
        ValueError: there is no device, or they are made of a CPU with too few threads.
    """
    if not len(devices):
        raise ValueError("`devices` is empty; give one or more, `jax.devices()` for all.")
    _check_threads(devices)
    with_rule = functools.partial(_with_rule, model, tx, devices, reach)
    mesh = jax.sharding.Mesh(list(devices), ("data",))
    rule = rule.on_mesh(mesh)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    in_order = platforms.choices(devices[0].platform).ordered_collectives
    # Whole: the sums over slices would be sums over devices, each.
    train_step = make_train_step(
        model, rule, tx, reach=reach, in_order=in_order, slice_above=sys.maxsize
    )

    def place(tree: Any) -> Any:
        return processes.replicate(tree, everywhere)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = processes.shard_batch(batch, sharded)
        state, metrics = train_step(state, batch)
        return state, {**metrics, "label": batch["label"]}

    return Execution(place, step, processes.local_copy, place, sharded, train_step, with_rule)


def _with_rule(
    model: Network, tx: Optimizer, devices: Sequence[Any], reach: Reach, rule: Rule
) -> Execution:
    return data_parallel(model, rule, tx, devices, reach)
