"""Whole training steps: images/s, ms a step, compile time, memory, and the ratio to bp.

Rules take turns, a few steps each, so that whatever else the machine does meets all of them alike.
A step here is all that training does for a batch: drawing, augmenting and normalising it, the
update, and the running totals.

Peak memory is the allocator's where the device has one that counts, like a GPU's; it counts from a
process's start, so that each config is measured in a process of its own. On a CPU it is what the
compiler allots to the step.
"""

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import optimizers, totals
from experiments.config import TrainConfig
from experiments.setup import Task, example_image, make_task, remat_above
from experiments.suites import report
from lls_jax import rules, training
from lls_jax.data import batches

_WARM_UP_STEPS = 3
_STEPS_A_TURN = 5
# Pixels along a side of the random images; the published runs of MobileNet have no smaller ones.
_SIDES = {"mobilenet_v1": 128, "mobilenet_v1_small": 128}
_COLUMNS = {
    "model": "model",
    "rule": "rule",
    "batch_size": "batch",
    "precision": "precision",
    "kernels": "kernels",
    "remat": "remat [MiB]",
    "images_per_second": "images/s",
    "step_ms": "ms a step",
    "compile_seconds": "compile [s]",
    "temporary_mb": "temporaries [MB]",
    "temporaries_over_bp": "temporaries over bp",
    "peak_mb": "peak memory [MB]",
    "peak_over_bp": "peak over bp",
    "speed_over_bp": "speed over bp",
}


def kernels_of(rule: str, kernels: str) -> str:
    """What computes a rule's losses, where that is asked of all: ``"auto"`` if it has none."""
    return kernels if "implementation" in rules.options_of(rule) else "auto"


def make_benchmark_task(config: TrainConfig) -> Task:
    """A config's task on random images of CIFAR-10's kind, of the size that its model is for."""
    task = make_task(config)
    side = _SIDES.get(config.model, 32)
    return task._replace(spec=dataclasses.replace(task.spec, image_shape=(side, side, 3)))


class Contestant:
    """One rule's training loop, advanced a few steps at a time.

    Args:
        config: model, rule, batch size, precision and kernels count.
        seed: of the random images and weights.
    """

    def __init__(self, config: TrainConfig, seed: int) -> None:
        task = make_benchmark_task(config)
        tx = optimizers.make(config, steps_per_epoch=1000)
        generator = np.random.default_rng(seed)
        count = config.batch_size * 4
        images = generator.integers(0, 256, (count, *task.spec.image_shape), np.uint8)
        labels = generator.integers(0, task.spec.num_classes, count).astype(np.int32)
        self.config = config
        self.times: list[float] = []
        self._index = 0
        self._data = batches.DeviceSplit(jnp.asarray(images), jnp.asarray(labels))
        self._key = jax.random.key(seed)
        self._permutation = batches.epoch_permutation(self._key, 0, count)
        self._sample = batches.make_sampler(task.spec, config.augmentation, config.batch_size)
        self._state = training.create_train_state(
            task.model, task.rule, tx, self._key, example_image(task.spec)
        )
        self._totals = totals.empty(task.model, task.rule)
        self._step = training.make_train_step(
            task.model, task.rule, tx, remat_above=remat_above(config)
        )
        batch = self._sample(self._data, self._permutation, 0, self._key)
        start = time.perf_counter()
        compiled = self._step.lower(self._state, batch).compile()  # type: ignore[attr-defined]
        self.compile_seconds = time.perf_counter() - start
        memory = compiled.memory_analysis()
        self.temporary_bytes = int(memory.temp_size_in_bytes)
        # What is donated is argument and output in one.
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        self.peak_bytes = int(held - memory.alias_size_in_bytes) + self.temporary_bytes

    def advance(self, steps: int, *, keep: bool) -> None:
        """Train, and keep the seconds of each step if asked to."""
        for _ in range(steps):
            start = time.perf_counter()
            key = jax.random.fold_in(self._key, self._index)
            batch = self._sample(self._data, self._permutation, self._index % 4, key)
            self._state, metrics = self._step(self._state, batch)
            self._totals = totals.add(self._totals, {**metrics, "label": batch["label"]})
            jax.block_until_ready((self._totals, self._state))
            self._index += 1
            if keep:
                self.times.append(time.perf_counter() - start)


def _allocator() -> dict[str, int] | None:
    """What the first device's allocator has counted since the process started, if it counts."""
    return jax.local_devices()[0].memory_stats()


def allocator_peak(config: TrainConfig, seed: int) -> int | None:
    """Bytes that this process had on the device at most, after a few steps; None on a CPU."""
    if _allocator() is None:
        return None
    Contestant(config, seed).advance(_WARM_UP_STEPS, keep=False)
    return (_allocator() or {})["peak_bytes_in_use"]


def allocator_peaks(configs: Sequence[TrainConfig], seed: int) -> list[int | None]:
    """:func:`allocator_peak` of each config, each in a new process; to be asked before the device
    is touched, of which JAX takes most for a process."""
    with concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        if pool.submit(_allocator).result() is None:
            return [None] * len(configs)
        return [pool.submit(allocator_peak, config, seed).result() for config in configs]


def race(
    configs: Sequence[TrainConfig],
    turns: int,
    seed: int,
    peaks: Sequence[int | None] | None = None,
) -> list[report.Row]:
    """Measure some configs in turns; the one of rule ``bp`` is what the others are compared to.

    Args:
        configs: of one model and batch size.
        turns: that each takes.
        seed: of the random images and weights.
        peaks: from :func:`allocator_peaks`.
    """
    contestants = [Contestant(config, seed) for config in configs]
    for contestant in contestants:
        contestant.advance(_WARM_UP_STEPS, keep=False)
    for _ in range(turns):
        for contestant in contestants:
            contestant.advance(_STEPS_A_TURN, keep=True)
    seconds = [statistics.median(contestant.times) for contestant in contestants]
    peak_bytes = [
        contestant.peak_bytes if peak is None else peak
        for contestant, peak in zip(contestants, peaks or [None] * len(configs))
    ]
    (bp,) = (index for index, config in enumerate(configs) if config.rule == "bp")

    def row(contestant: Contestant, step: float, peak: int) -> report.Row:
        config, used = contestant.config, contestant.temporary_bytes
        return {
            "model": config.model,
            "rule": config.rule,
            "batch_size": config.batch_size,
            "precision": config.precision,
            "kernels": config.kernels,
            "remat": (remat_above(config) or 0) // 2**20,
            "images_per_second": config.batch_size / step,
            "step_ms": 1e3 * step,
            "compile_seconds": contestant.compile_seconds,
            "temporary_mb": used / 1e6,
            "temporaries_over_bp": used / contestants[bp].temporary_bytes,
            "peak_mb": peak / 1e6,
            "peak_over_bp": peak / peak_bytes[bp],
            "speed_over_bp": seconds[bp] / step,
            "all_step_ms": [1e3 * value for value in contestant.times],
        }

    return list(map(row, contestants, seconds, peak_bytes))


def run(config: Any) -> int:
    """The suite: models x batch sizes x precisions, the rules racing in each; exit status."""
    names = [*dict.fromkeys([*config.rules, "bp"])]
    entrants = [
        TrainConfig(
            model=model,
            rule=rule,
            batch_size=batch_size,
            precision=precision,
            kernels=kernels_of(rule, config.kernels),
            remat=config.remat,
        )
        for model, batch_size, precision in itertools.product(
            config.models, config.batch_sizes, config.precisions
        )
        for rule in names
    ]
    peaks = allocator_peaks(entrants, config.seed)
    rows: list[report.Row] = []
    for first in range(0, len(entrants), len(names)):
        each = slice(first, first + len(names))
        rows += race(entrants[each], config.turns, config.seed, peaks[each])
        best = max(rows[each], key=lambda row: row["speed_over_bp"])
        print(
            f"{best['model']}, batch {best['batch_size']}, {best['precision']}: {best['rule']} "
            f"{best['speed_over_bp']:.2f} times the speed of bp",
            flush=True,
        )
    head = f"{report.device_line()}; medians of {_STEPS_A_TURN * config.turns} steps\n\n"
    report.write(pathlib.Path(config.out), config, rows, head + report.markdown(_COLUMNS, rows))
    return 0
