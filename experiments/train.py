"""Training a run from its config: resumable at every step, and judged after every epoch."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import pathlib
import shlex
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import judging, plots, positions, progress, run_folder
from experiments import totals as totals_of
from experiments.config import TrainConfig, option
from experiments.positions import Position
from experiments.presets import PRESETS
from experiments.progress import say
from experiments.setup import Run, make_run
from experiments.signals import Signals
from lls_jax import checkpoint, evaluation, processes, training
from lls_jax.data import batches

# Batches from which BatchNorm's statistics are estimated at the averaged weights.
_STATS_BATCHES = 50
# Steps that may be under way at once: enough to keep a device busy, few enough to stop soon.
_IN_FLIGHT = 4
# Steps of one launch, where many go into one: a stop waits for as many.
_STEPS_A_LAUNCH = 50
_REFRESH_SECONDS = 0.5
_REDRAW_SECONDS = 10.0
# What processes tell each other in the place of a signal's number: a sum is not finite.
_NOT_FINITE = 1
# Stands in for an epoch's number where batches are drawn for the statistics.
_STATS_EPOCH = 2**31 - 1


def _evaluation_state(run: Run, state: training.TrainState, data_key: jax.Array) -> Any:
    """The weights and statistics to judge, as ``{"params", "batch_stats"}``."""
    count = min(_STATS_BATCHES, run.steps_per_epoch)

    def images() -> Iterator[jax.Array]:
        size = run.train.labels.shape[0]
        permutation = batches.epoch_permutation(data_key, _STATS_EPOCH, size)
        stats_key = jax.random.fold_in(data_key, _STATS_EPOCH)
        key_of = functools.partial(jax.random.fold_in, stats_key)
        for batch in itertools.islice(run.read(run.train, permutation, 0, key_of), count):
            yield batch["image"]

    sharding = run.execution.sharding
    if sharding is not None:
        state = run.execution.place(state)
    judged = evaluation.evaluation_state(run.task.model, state, images())
    variables = {"params": judged.params, "batch_stats": judged.batch_stats}
    return variables if sharding is None else processes.own(variables)


def _record(run: Run, config: TrainConfig, position: Position, test: Any) -> dict[str, Any]:
    images = run.steps_per_epoch * config.batch_size
    totals = jax.tree.map(np.asarray, position.totals)
    *layer_losses, loss = (float(total) / run.steps_per_epoch for total in totals.losses)
    return {
        "epoch": position.epochs_done,
        "step": int(position.state.step),
        "train_loss": loss,
        "train_accuracy": 100 * float(totals.correct) / images,
        "train_top5": None if test.top5 is None else 100 * float(totals.correct5) / images,
        "test_loss": test.loss,
        "test_accuracy": test.accuracy,
        "test_top5": test.top5,
        "layer_loss": layer_losses,
    }


def resume_command(config: TrainConfig) -> str:
    """The command that goes on with a run."""
    default = PRESETS[config.dataset]
    arguments = ["python", "-m", f"experiments.{config.dataset}"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        is_default = value == getattr(default, field.name) and field.name != "rule"
        if field.name == "dataset" or is_default:
            continue
        if isinstance(value, bool):
            arguments.append(option(field.name if value else f"no_{field.name}"))
        else:
            arguments += [option(field.name), str(value)]
    return shlex.join(arguments)


def train_and_evaluate(config: TrainConfig) -> int:
    """Train a run to its end, from its newest checkpoint where it has one.

    Args:
        config: the run.

    Returns:
        Exit status: 0, or 130 / 143 after Ctrl-C / SIGTERM, with all saved.

    Raises:
        UserError: the config, the folder or a loss is such that the run cannot go on.
        lls_jax.processes.ProcessesError: the processes could not meet, or one was lost.
    """
    folder = pathlib.Path(config.run_folder())
    signals = Signals()
    with contextlib.ExitStack() as stack:
        if config.coordinator is not None:
            stack.enter_context(
                processes.meet(config.coordinator, config.num_processes, config.process_id)
            )
            stack.enter_context(processes.told_when_lost())
        if processes.is_first():
            stack.enter_context(run_folder.claim(folder))
        stack.enter_context(signals.noted())
        processes.wait_for_all("the folder is claimed")
        run_folder.check_config(folder, config)
        run = make_run(config)
        if processes.is_first():
            # Only now: a start that failed leaves no config that would bind the next one.
            run_folder.write_config(folder, config)
            run_folder.write_environment(folder)
        processes.wait_for_all("the config is written")
        run_folder.check_config(folder, config, must_exist=True)
        with checkpoint.open_checkpoints(run_folder.checkpoints(folder)) as manager:
            return _train(config, run, folder, manager, signals)


def _train(
    config: TrainConfig, run: Run, folder: pathlib.Path, manager: Any, signals: Signals
) -> int:
    start = positions.begin(config, run)
    position = positions.resume(manager, folder, start) or start
    records = positions.records_until(folder, position.epochs_done, position is not start)
    if processes.is_first():
        run_folder.keep_metrics(folder, records)
    agree = processes.make_agreement()
    device = jax.local_devices()[0]
    say(
        f"{config.rule} on {config.model}, {config.dataset}: {run.train.labels.shape[0]} training "
        f"and {run.test.labels.shape[0]} test images, {run.steps_per_epoch} steps an epoch, "
        f"{device.platform} ({device.device_kind}), {'many steps' if run.loop else 'one step'} a "
        f"launch, in {folder}"
        + (f", {jax.process_count()} processes" if jax.process_count() > 1 else "")
    )
    if position is not start:
        say(f"resumed at step {int(position.state.step)}, epoch {position.epochs_done} done")
    _, data_key = positions.keys(config)
    drawn = 0.0
    while position.epochs_done < config.epochs:
        position, stopped = _train_epoch(config, run, manager, position, data_key, signals)
        if stopped:
            return _stopped(config, position, stopped)
        began = time.perf_counter()
        judged = _evaluation_state(run, position.state, data_key)
        sharding = run.execution.sharding
        test = judging.judge(
            run.task.model,
            judged if sharding is None else run.execution.place(judged),
            run.task.spec,
            run.test,
            config.eval_batch_size,
            run.loop is not None,
            sharding,
        )
        judging_seconds = time.perf_counter() - began
        position = position._replace(
            epochs_done=position.epochs_done + 1,
            seconds=position.seconds + judging_seconds,
        )
        images = run.steps_per_epoch * config.batch_size
        record = {
            **_record(run, config, position, test),
            "seconds": position.epoch_seconds + judging_seconds,
            "total_seconds": position.seconds,
            "images_per_second": images / position.epoch_seconds,
        }
        # Metrics first: a kill in between leaves a record that the resumed run drops and repeats.
        if processes.is_first():
            run_folder.append_metrics(folder, record)
        records.append(record)
        position = position._replace(
            totals=totals_of.empty(run.task.model, run.task.rule), epoch_seconds=0.0
        )
        positions.save(manager, config, position, judged, test.accuracy)
        say(progress.epoch_line(record, config.epochs), flush=True)
        finished = position.epochs_done == config.epochs
        stopped = agree(signals.received or 0)
        if stopped and not finished:
            return _stopped(config, position, stopped)
        if not processes.is_first():
            continue
        if finished or time.perf_counter() - drawn > _REDRAW_SECONDS:
            title = f"{config.dataset}, {config.model}, {config.rule}"
            plots.draw_curves(records, title, folder / "curves.png")
            drawn = time.perf_counter()
    if not processes.is_first():
        return 0
    best = max(records, key=lambda record: (record["test_accuracy"], record["epoch"]))
    print(
        f"done: {position.epochs_done} epochs in {position.seconds:.1f} s, test accuracy "
        f"{records[-1]['test_accuracy']:.2f} % (best {best['test_accuracy']:.2f} % after epoch "
        f"{best['epoch']}); evaluate with:\n"
        f"  python -m experiments.evaluate --workdir {shlex.quote(str(folder))}"
    )
    return 0


def _stopped(config: TrainConfig, position: Position, number: int) -> int:
    """Say how to go on after a signal of that number; returns the exit status."""
    say(
        f"stopped at step {int(position.state.step)}, saved; resume with"
        f"{'' if config.process_id is None else ', each process with its own --process-id'}:\n"
        f"  {resume_command(config)}"
    )
    return 128 + number


def _train_epoch(
    config: TrainConfig,
    run: Run,
    manager: Any,
    position: Position,
    data_key: jax.Array,
    signals: Signals,
) -> tuple[Position, int]:
    """The rest of an epoch: ``(position, signal)``; stopped inside it by a signal, it is saved."""
    step = int(position.state.step)
    running = run.execution.enter(position.state)
    totals = run.execution.place(position.totals)
    end = (position.epochs_done + 1) * run.steps_per_epoch
    permutation = batches.epoch_permutation(
        data_key, position.epochs_done, run.train.labels.shape[0]
    )
    index = step - position.epochs_done * run.steps_per_epoch
    bar = progress.EpochBar(
        position.epochs_done + 1,
        config.epochs,
        run.steps_per_epoch * config.batch_size,
        index * config.batch_size,
        enabled=config.progress and processes.is_first(),
    )
    first = step - index
    stream = run.read(
        run.train, permutation, index, lambda index: jax.random.fold_in(data_key, first + index)
    )
    pending: collections.deque[jax.Array] = collections.deque()
    began = refreshed = time.perf_counter()

    def here() -> Position:
        jax.block_until_ready(totals)
        elapsed = time.perf_counter() - began
        return position._replace(
            state=run.execution.leave(running),
            totals=processes.own(totals),
            seconds=position.seconds + elapsed,
            epoch_seconds=position.epoch_seconds + elapsed,
        )

    # Processes must stop after the same step; with one there is nothing to wait for.
    agree, alarm, stopped = processes.make_agreement(_IN_FLIGHT), 0, 0
    try:
        while step < end and not (stopped := agree(signals.received or alarm)):
            count = 1
            if run.loop is not None:
                every = config.checkpoint_every or end
                count = min(_STEPS_A_LAUNCH, end - step, every - step % every)
                running, totals = run.loop(
                    running, totals, run.train, permutation, data_key, index, count
                )
            else:
                running, metrics = run.execution.step(running, next(stream))
                totals = totals_of.add(totals, metrics)
            step, index = step + count, index + count
            # A copy, because a launch donates the totals.
            pending.append(jnp.copy(totals.correct) if run.loop else totals.correct)
            if len(pending) > _IN_FLIGHT:
                jax.block_until_ready(pending.popleft())
            bar.advance(count * config.batch_size)
            if time.perf_counter() - refreshed > _REFRESH_SECONDS:
                refreshed = time.perf_counter()
                losses = np.asarray(totals.losses)
                bar.show(
                    float(losses[-1]) / index,
                    100 * float(np.asarray(totals.correct)) / (index * config.batch_size),
                )
                if not np.isfinite(losses).all():
                    alarm = _NOT_FINITE
            is_due = config.checkpoint_every and step % config.checkpoint_every == 0
            if is_due and step < end:
                reached = here()
                positions.check_finite(run, reached)
                positions.save(
                    manager, config, reached, _evaluation_state(run, reached.state, data_key), None
                )
    finally:
        bar.close()
        stream.close()
    reached = here()
    positions.check_finite(run, reached)
    if step == end:
        return reached, 0
    if step not in checkpoint.list_steps(manager):
        positions.save(
            manager, config, reached, _evaluation_state(run, reached.state, data_key), None
        )
    return reached, stopped
