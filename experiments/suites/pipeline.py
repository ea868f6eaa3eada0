"""Blocks on several devices: stage times, and the ideal and the achieved speed-up.

The same compiled updates, block by block, run once all on one device and once spread over the
devices. Ideal is the sum of the stages' times over the longest one. For comparison, what a GPipe
schedule of backpropagation over stages of these times would reach at its best: computed from the
same times and a number of micro-batches, not measured.
"""

import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import optimizers
from experiments.config import TrainConfig
from experiments.config_choices import BASELINES
from experiments.setup import bytes_above
from experiments.suites import report
from experiments.suites.training import make_benchmark_task
from lls_jax import placement, training
from lls_jax.errors import UserError

_MICRO_BATCHES = 8
_COLUMNS = {
    "model": "model",
    "rule": "rule",
    "batch_size": "batch",
    "devices": "devices",
    "units_a_stage": "units a stage",
    "stage_ms": "stages [ms]",
    "ideal": "ideal speed-up",
    "achieved": "achieved",
    "gpipe": "GPipe of bp, computed",
    "one_device_ms": "ms a step, one device",
    "pipeline_ms": "pipeline",
}


def _milliseconds(execution: placement.Execution, state: Any, batch: Any, steps: int) -> float:
    running = execution.enter(state)
    for _ in range(3):
        running, metrics = execution.step(running, batch)
    jax.block_until_ready(metrics)
    start = time.perf_counter()
    for _ in range(steps):
        running, metrics = execution.step(running, batch)
    jax.block_until_ready((metrics, running.states))
    return 1e3 * (time.perf_counter() - start) / steps


def run(config: Any) -> int:
    """The suite; returns the exit status."""
    devices = jax.devices()
    if len(devices) < 2:
        raise UserError(
            f"--suite pipeline needs several devices and this machine has {len(devices)} "
            f"({devices[0].platform}); on a CPU XLA_FLAGS=--xla_force_host_platform_device_count=2 "
            "makes two of one, which share its threads."
        )
    rows: list[report.Row] = []
    for model in config.models:
        for rule in (name for name in config.rules if name not in BASELINES):
            for batch_size in config.batch_sizes:
                rows += _measure(
                    config,
                    TrainConfig(model=model, rule=rule, batch_size=batch_size, remat=config.remat),
                )
    text = f"{report.device_line()}, {len(devices)} devices\n\n" + report.markdown(_COLUMNS, rows)
    report.write(pathlib.Path(config.out), config, rows, text)
    return 0


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
    above = bytes_above(train_config.remat)
    units = placement.measure_units(task.model, task.rule, tx, state, batch, remat_above=above)
    devices = jax.devices()
    alone = placement.pipeline(task.model, task.rule, tx, devices[:1], (len(units),), above)
    rows = []
    for count in range(2, min(len(devices), len(units)) + 1):
        sizes = placement.partition(units, count)
        ends = np.cumsum(sizes)
        stages = [sum(units[end - size : end]) for size, end in zip(sizes, ends)]
        spread = placement.pipeline(task.model, task.rule, tx, devices[:count], sizes, above)
        one, several = [], []
        # In turns, so that what else the machine does meets both alike.
        for _ in range(max(3, config.turns // 2)):
            one.append(_milliseconds(alone, state, batch, 5))
            several.append(_milliseconds(spread, state, batch, 5))
        total, longest = sum(stages), max(stages)
        rows.append(
            {
                "model": train_config.model,
                "rule": train_config.rule,
                "batch_size": train_config.batch_size,
                "devices": count,
                "units_a_stage": ", ".join(map(str, sizes)),
                "stage_ms": ", ".join(f"{1e3 * seconds:.1f}" for seconds in stages),
                "ideal": total / longest,
                "achieved": float(np.median(one) / np.median(several)),
                "gpipe": _MICRO_BATCHES * total / ((_MICRO_BATCHES - 1) * longest + total),
                "one_device_ms": float(np.median(one)),
                "pipeline_ms": float(np.median(several)),
            }
        )
    return rows
