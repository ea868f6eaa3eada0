"""Blocks on several devices: stage times, and the expected and the achieved speed-up.

The same compiled pieces of work, unit by unit, run once all on one device and once spread over the
devices. Expected is what the pieces' times and their order allow, if passing arrays on took no
time: the sum of the stages' times over the time that a step then takes, which is the longest
stage's unless that has to wait for gradients from above (a reach of 2 or more). Waiting is the
difference. For comparison, what a GPipe schedule of backpropagation over stages of these times
would reach at its best: computed from the same times and a number of micro-batches, not measured.
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import optimizers, setup, several_rules
from experiments.config import TrainConfig
from experiments.execution import pipeline_options
from experiments.suites import report
from experiments.suites.training import make_benchmark_task
from lls_jax import placement, training
from lls_jax.errors import UserError
from lls_jax.steps.reach_schedule import Move

_MICRO_BATCHES = 8
# As many as it takes until each is like the one before.
_SETTLING = 20
_COLUMNS = {
    "model": "model",
    "rule": "rule",
    "reach": "reach",
    "batch_size": "batch",
    "devices": "devices",
    "units_a_stage": "units a stage",
    "stage_ms": "stages [ms]",
    "waiting_ms": "waiting [ms], computed",
    "ideal": "expected speed-up",
    "achieved": "achieved",
    "gpipe": "GPipe of bp, computed",
    "one_device_ms": "ms a step, one device",
    "pipeline_ms": "pipeline",
}


def seconds_a_step(seconds: Mapping[Move, float], stage_of: Sequence[int]) -> float:
    """What a step takes in the long run, if arrays pass from device to device in no time.

    Args:
        seconds: of each piece of a step, in order.
        stage_of: each unit's stage. A device does what it is given in turn.
    """
    moves, _ = placement.order(tuple(seconds), stage_of)
    free = [0.0] * (max(stage_of) + 1)
    # When the pieces of a batch, and of the one before, were done.
    done: dict[Move, float] = {}
    ends = []
    for _ in range(2 * _SETTLING):
        before, done = done, {}
        for move, is_late in moves:
            own = before if is_late else done
            if is_late and not before:
                continue
            needed = [own[one] for one in own if _needs(move, one)]
            if move.kind == "run":
                needed += [t for one, t in before.items() if one.unit == move.unit]
            stage = stage_of[move.unit]
            free[stage] = own[move] = max([free[stage], *needed]) + seconds[move]
        ends.append(max(done.values()))
    return (ends[-1] - ends[_SETTLING - 1]) / _SETTLING


def _needs(move: Move, other: Move) -> bool:
    """Whether a piece needs what another one of the same batch gives."""
    if other.kind == "run":
        return other.unit == (move.unit - 1 if move.kind == "run" else move.unit)
    if other.kind == "update" or other.unit != move.unit + 1:
        return False
    return move.kind == "update" or (move.kind == "pass" and other.loss == move.loss)


def _milliseconds(execution: placement.Execution, state: Any, batch: Any, steps: int) -> float:
    running = execution.enter(state)
    for _ in range(3):
        running, metrics = execution.step(running, batch)
    jax.block_until_ready((metrics, running.states, running.before))
    start = time.perf_counter()
    for _ in range(steps):
        running, metrics = execution.step(running, batch)
    jax.block_until_ready((metrics, running.states, running.before))
    return 1e3 * (time.perf_counter() - start) / steps


def run(config: Any) -> int:
    """The suite; returns the exit status."""
    runs, devices = _runs(config), jax.devices()
    if len(devices) < 2:
        raise UserError(
            f"--suite pipeline needs several devices and this machine has {len(devices)} "
            f"({devices[0].platform}); on a CPU XLA_FLAGS=--xla_force_host_platform_device_count=2 "
            "makes two of one, which share its threads."
        )
    head, out = f"{report.device_line()}, {len(devices)} devices\n\n", pathlib.Path(config.out)
    rows: list[report.Row] = []
    for one in runs:
        rows += _measure(config, one)
        # Whatever becomes of the next one.
        report.keep(out, config, rows, head + report.markdown(_COLUMNS, rows))
    report.write(out, config, rows, head + report.markdown(_COLUMNS, rows))
    return 0


def _runs(config: Any) -> list[TrainConfig]:
    """What is to be measured.

    Raises:
        UserError: a name is unknown, or no rule is local.
    """
    commons = [
        TrainConfig(model=model, remat=config.remat, slice=config.slice) for model in config.models
    ]
    runs = [
        dataclasses.replace(one, batch_size=batch_size)
        for common in commons
        for one in several_rules.of_rules(common, config.rules, config.reach)
        if several_rules.has_local_losses(one)
        for batch_size in config.batch_sizes
    ]
    if not runs:
        raise UserError(
            f"--suite pipeline has nothing to measure of --rules {', '.join(config.rules)}, whose "
            "blocks have no losses of their own; give a local rule, like lls."
        )
    several_rules.check_used(TrainConfig(remat=config.remat, slice=config.slice), runs)
    for one in runs:
        setup.check_task(one)
    return runs


def _measure(config: Any, train_config: TrainConfig) -> list[report.Row]:
    task = make_benchmark_task(train_config)
    tx = optimizers.make(train_config, steps_per_epoch=1000)
    generator = np.random.default_rng(config.seed)
    shape = (train_config.batch_size, *task.spec.input_shape)
    batch = {
        "image": jnp.asarray(generator.normal(size=shape), jnp.float32),
        "label": jnp.asarray(generator.integers(0, task.spec.num_classes, shape[0]), jnp.int32),
    }
    state = training.create_train_state(
        task.model, task.rule, tx, jax.random.key(config.seed), batch["image"]
    )
    options = pipeline_options(train_config)
    seconds = placement.measure_moves(task.model, task.rule, tx, state, batch, **options)
    units = placement.by_unit(seconds)
    devices = jax.devices()
    alone = placement.pipeline(task.model, task.rule, tx, devices[:1], (len(units),), **options)
    rows = []
    for count in range(2, min(len(devices), len(units)) + 1):
        sizes = placement.partition(units, count)
        ends = np.cumsum(sizes)
        stages = [sum(units[end - size : end]) for size, end in zip(sizes, ends)]
        stage_of = [stage for stage, size in enumerate(sizes) for _ in range(size)]
        spread = placement.pipeline(task.model, task.rule, tx, devices[:count], sizes, **options)
        one, several = [], []
        # In turns, so that what else the machine does meets both alike.
        for _ in range(max(3, config.turns // 2)):
            one.append(_milliseconds(alone, state, batch, 5))
            several.append(_milliseconds(spread, state, batch, 5))
        total, longest = sum(stages), max(stages)
        expected = seconds_a_step(seconds, stage_of)
        rows.append(
            {
                "model": train_config.model,
                "rule": train_config.rule,
                "reach": train_config.reach,
                "batch_size": train_config.batch_size,
                "devices": count,
                "units_a_stage": ", ".join(map(str, sizes)),
                "stage_ms": ", ".join(f"{1e3 * seconds:.1f}" for seconds in stages),
                "waiting_ms": 1e3 * (expected - longest),
                "ideal": total / expected,
                "achieved": float(np.median(one) / np.median(several)),
                "gpipe": _MICRO_BATCHES * total / ((_MICRO_BATCHES - 1) * longest + total),
                "one_device_ms": float(np.median(one)),
                "pipeline_ms": float(np.median(several)),
            }
        )
    return rows
