"""Whole training steps: images/s, ms a step, compile time, memory, and the ratio to bp.

Rules take turns, a few steps each, so that whatever else the machine does meets all of them alike.
So do backpropagation with checkpoints and with micro-batches, as a user would save its memory, and
with ``--against torch`` a PyTorch loop of each rule.
A step here is all that training does for a batch: drawing, augmenting and normalising it, the
update, and the running sums.

Peak memory is the allocator's where the device has one that counts, like a GPU's; it counts from a
process's start, so that each config is measured in a process of its own. On a CPU it is what the
compiler allots to the step.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import multiprocessing
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import optimizers, setup, several_rules
from experiments.config import TrainConfig
from experiments.execution import bytes_above, slice_above
from experiments.reach_options import of_losses
from experiments.setup import Task, example_image, make_task
from experiments.suites import against_torch, report
from experiments.suites.entrants import BASELINE_STEPS, Entrant, with_baselines
from lls_jax import rules, training
from lls_jax.data import batches
from lls_jax.data.order import epoch_permutation
from lls_jax.runs import epoch_sums

_WARM_UP_STEPS = 3
STEPS_A_TURN = 5
# Pixels along a side of the random images; the published runs of MobileNet have no smaller ones.
_SIDES = {"mobilenet_v1": 128, "mobilenet_v1_small": 128}
_COLUMNS = {
    "model": "model",
    "rule": "rule",
    "reach": "reach",
    "groups": "groups",
    "batch_size": "batch",
    "precision": "precision",
    "kernels": "kernels",
    "remat": "remat [MiB]",
    "slice": "slice [MiB]",
    "images_per_second": "images/s",
    "step_ms": "ms a step",
    "compile_seconds": "compile [s]",
    "temporary_mb": "temporaries [MB]",
    "temporaries_over_bp": "temporaries over bp",
    "peak_mb": "peak memory [MB]",
    "peak_over_bp": "peak over bp",
    "speed_over_bp": "speed over bp",
    "speed_over_float32": "over float32",
}


def make_benchmark_task(config: TrainConfig) -> Task:
    """A config's task on random images of CIFAR-10's kind, of the size that its model is for."""
    task = make_task(config)
    side = _SIDES.get(config.model, 32)
    return task._replace(spec=dataclasses.replace(task.spec, image_shape=(side, side, 3)))


class Contestant:
    """One entrant's training loop, advanced a few steps at a time.

    Args:
        entrant: what takes part.
        seed: of the random images and weights.
        make: what its config is a task of.
    """

    def __init__(
        self,
        entrant: Entrant,
        seed: int,
        make: Callable[[TrainConfig], Task] = make_benchmark_task,
    ) -> None:
        config = entrant.config
        task = make(config)
        tx = optimizers.make(config, steps_per_epoch=1000)
        generator = np.random.default_rng(seed)
        count = config.batch_size * 4
        images = generator.integers(0, 256, (count, *task.spec.image_shape), np.uint8)
        labels = generator.integers(0, task.spec.num_classes, count).astype(np.int32)
        self.entrant = entrant
        self.is_local = rules.has_local_losses(task.rule)
        self.times: list[float] = []
        self._index = 0
        self._data = batches.DeviceSplit(jnp.asarray(images), jnp.asarray(labels))
        self._key = jax.random.key(seed)
        self._permutation = epoch_permutation(self._key, 0, count)
        self._sample = batches.make_sampler(task.spec, config.augmentation, config.batch_size)
        self._state = training.create_train_state(
            task.model, task.rule, tx, self._key, example_image(task.spec)
        )
        self._sums = epoch_sums.empty(task.model, task.rule)
        if entrant.baseline is None:
            self._step = training.make_train_step(
                task.model,
                task.rule,
                tx,
                reach=of_losses(config.reach),
                remat_above=bytes_above(config.remat),
                slice_above=slice_above(config),
            )
        else:
            self._step = BASELINE_STEPS[entrant.baseline](task.model, tx)
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
            self._sums = epoch_sums.add(self._sums, {**metrics, "label": batch["label"]})
            jax.block_until_ready((self._sums, self._state))
            self._index += 1
            if keep:
                self.times.append(time.perf_counter() - start)


def _allocator() -> dict[str, int] | None:
    """What the first device's allocator has counted since the process started, if it counts."""
    return jax.local_devices()[0].memory_stats()


def allocator_peak(entrant: Entrant, seed: int) -> int | None:
    """Bytes that this process had on the device at most, after a few steps; None on a CPU."""
    if _allocator() is None:
        return None
    Contestant(entrant, seed).advance(_WARM_UP_STEPS, keep=False)
    return (_allocator() or {})["peak_bytes_in_use"]


def allocator_peaks(entrants: Sequence[Entrant], seed: int) -> list[int | None]:
    """:func:`allocator_peak` of each entrant, each in a new process; to be asked before the device
    is touched, of which JAX takes most for a process."""
    with concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        if pool.submit(_allocator).result() is None:
            return [None] * len(entrants)
        return [pool.submit(allocator_peak, entrant, seed).result() for entrant in entrants]


def race(
    entrants: Sequence[Entrant],
    turns: int,
    seed: int,
    peaks: Sequence[int | None] | None = None,
    rivals: Sequence[against_torch.Rival | None] | None = None,
    make: Callable[[TrainConfig], Task] = make_benchmark_task,
) -> list[report.Row]:
    """Measure some entrants in turns, each compared to plain ``bp`` of its own precision.

    Args:
        entrants: of one model and batch size; in several precisions, those of bfloat16 are compared
            to their like of float32 too.
        turns: that each takes.
        seed: of the random images and weights.
        peaks: from :func:`allocator_peaks`.
        rivals: of each entrant, whose turn is right after the entrant's; None for no one.
        make: what a config is a task of, whose images are random.
    """
    contestants = [Contestant(entrant, seed, make) for entrant in entrants]
    rivals = rivals or [None] * len(entrants)

    def advance(steps: int, *, keep: bool) -> None:
        for contestant, rival in zip(contestants, rivals):
            contestant.advance(steps, keep=keep)
            if rival is not None:
                rival.advance(steps, keep=keep)

    advance(_WARM_UP_STEPS, keep=False)
    for _ in range(turns):
        advance(STEPS_A_TURN, keep=True)
    seconds = [statistics.median(contestant.times) for contestant in contestants]
    peak_bytes = [
        contestant.peak_bytes if peak is None else peak
        for contestant, peak in zip(contestants, peaks or [None] * len(entrants))
    ]
    index_of = {
        (entrant.label, entrant.config.reach, entrant.config.precision): index
        for index, entrant in enumerate(entrants)
    }

    def row(
        contestant: Contestant, step: float, peak: int, rival: against_torch.Rival | None
    ) -> report.Row:
        config, used = contestant.entrant.config, contestant.temporary_bytes
        bp = index_of["bp", 1, config.precision]
        float32 = index_of.get((contestant.entrant.label, config.reach, "float32"))
        against: report.Row = {}
        if rival is not None:
            against = against_torch.compare(
                contestant.times, rival, STEPS_A_TURN, config.batch_size
            )
        return {
            "model": config.model,
            "rule": contestant.entrant.label,
            "reach": config.reach,
            "groups": config.groups,
            "batch_size": config.batch_size,
            "precision": config.precision,
            "kernels": config.kernels,
            "remat": config.remat or 0 if contestant.is_local else None,
            "slice": config.slice,
            "images_per_second": config.batch_size / step,
            "step_ms": 1e3 * step,
            "compile_seconds": contestant.compile_seconds,
            "temporary_mb": used / 1e6,
            "temporaries_over_bp": used / contestants[bp].temporary_bytes,
            "peak_mb": peak / 1e6,
            "peak_over_bp": peak / peak_bytes[bp],
            "speed_over_bp": seconds[bp] / step,
            "speed_over_float32": None if float32 is None else seconds[float32] / step,
            "all_step_ms": [1e3 * value for value in contestant.times],
            **against,
        }

    return list(map(row, contestants, seconds, peak_bytes, rivals))


@contextlib.contextmanager
def _rivals(
    config: Any, descriptions: Sequence[dict[str, Any] | None]
) -> Iterator[list[against_torch.Rival | None]]:
    """The PyTorch loops of what is described; ended afterwards."""
    command = against_torch.command(config.torch_python)
    with contextlib.ExitStack() as stack:
        yield [
            None if one is None else stack.enter_context(against_torch.Rival(command, one))
            for one in descriptions
        ]


def _groups(config: Any) -> list[list[Entrant]]:
    """Models x batch sizes, in each the rules that race each other, in every precision."""
    # Both sides step alike: PyTorch has no schedule-free optimizer of its own.
    optimizer = TrainConfig.optimizer if config.against is None else "adamw"
    groups: list[list[Entrant]] = []
    for model, batch_size in itertools.product(config.models, config.batch_sizes):
        group: list[Entrant] = []
        for precision in dict.fromkeys(config.precisions):
            common = TrainConfig(
                model=model,
                width=config.width,
                batch_size=batch_size,
                precision=precision,
                groups=config.groups,
                kernels=config.kernels,
                remat=config.remat,
                slice=config.slice,
                optimizer=optimizer,
            )
            for one in several_rules.of_rules(common, [*config.rules, "bp"], config.reach):
                group += with_baselines(one) if one.rule == "bp" else [Entrant(one)]
        groups.append(group)
    return groups


def _describe(config: Any, entrant: Entrant) -> dict[str, Any] | None:
    """What an entrant's PyTorch loop is told; None where none is wanted."""
    if config.against is None or entrant.baseline is not None:
        return None
    task = make_benchmark_task(entrant.config)
    return against_torch.describe(task, entrant.config, config.seed)


def run(config: Any) -> int:
    """The suite; returns the exit status."""
    groups = _groups(config)
    everybody = [entrant for group in groups for entrant in group]
    asked = TrainConfig(
        kernels=config.kernels, groups=config.groups, remat=config.remat, slice=config.slice
    )
    several_rules.check_used(asked, [entrant.config for entrant in everybody])
    for entrant in everybody:
        setup.check_task(entrant.config)
        make_benchmark_task(entrant.config)
    peaks = iter(allocator_peaks(everybody, config.seed))
    # After the peaks: it touches the device.
    described = [[_describe(config, entrant) for entrant in group] for group in groups]
    rows: list[report.Row] = []
    for group, descriptions in zip(groups, described):
        with _rivals(config, descriptions) as rivals:
            own_peaks = list(itertools.islice(peaks, len(group)))
            new = race(group, config.turns, config.seed, own_peaks, rivals)
        rows += new
        # Whatever becomes of the next group.
        report.keep(pathlib.Path(config.out), config, rows, _text(config, rows))
        for precision in dict.fromkeys(row["precision"] for row in new):
            own = [row for row in new if row["precision"] == precision]
            best = max(own, key=lambda row: row["speed_over_bp"])
            print(
                f"{best['model']}, batch {best['batch_size']}, {precision}: {best['rule']}, "
                f"reach {best['reach']}: {best['speed_over_bp']:.2f} times the speed of bp",
                flush=True,
            )
    report.write(pathlib.Path(config.out), config, rows, _text(config, rows))
    return 0


def _text(config: Any, rows: Sequence[report.Row]) -> str:
    """The table, and above it on what it was measured."""
    head, columns = f"{report.device_line()}", dict(_COLUMNS)
    if len({row["precision"] for row in rows}) == 1:
        del columns["speed_over_float32"]
    if config.groups is None:
        del columns["groups"]
    head += report.width_in_words(config.width)
    if config.against is not None:
        raced = next(row for row in rows if "torch" in row)
        head += f", torch {raced['torch']} ({raced['torch_threads']} threads), both with adamw"
        head += f", load {raced['load_before']:.1f} before, OMP_WAIT_POLICY "
        head += raced["omp_wait_policy"] or "not set"
        columns |= against_torch.COLUMNS
    head += f"; medians of {STEPS_A_TURN * config.turns} steps\n\n"
    return head + report.markdown(columns, rows)
