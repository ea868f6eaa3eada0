"""The loop of a run: epochs of steps, each epoch evaluated, everything resumable at every step."""

import collections
import contextlib
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lls_jax import processes
from lls_jax.errors import DivergedError
from lls_jax.runs import callbacks, checkpoints, epoch_sums, resuming, saving, source
from lls_jax.runs import folder as folders
from lls_jax.runs.evaluate import Evaluation, evaluate_weights
from lls_jax.runs.launches import Launches
from lls_jax.runs.resuming import CheckpointState
from lls_jax.runs.run import FitResult, Record, Run
from lls_jax.steps.averaging import average_state, evaluation_state
from lls_jax.training import create_train_state

# Batches from which BatchNorm's statistics are estimated at the averaged weights.
_STATS_BATCHES = 50
# Steps that may be under way at once: enough to keep a device busy, few enough to stop soon.
_IN_FLIGHT = 4
_CHECK_SECONDS = 0.5
# What processes tell each other in the place of a stop's number: a sum is not finite.
_NOT_FINITE = 1


def train(run: Run, folder: pathlib.Path | None) -> FitResult:
    """Train a run to its end, from its newest checkpoint where it has one.

    Args:
        run: what is trained.
        folder: of the run, which this process has claimed; None to write nothing.

    Raises:
        UserError: the folder or a loss is such that the run cannot go on.
    """
    with contextlib.ExitStack() as stack:
        for one in run.callbacks:
            stack.callback(one.on_exit)
        manager = None
        if folder is not None:
            opened = checkpoints.open_checkpoints(folders.checkpoints(folder))
            manager = stack.enter_context(opened)
        trainer = _Trainer(run, folder, manager)
        if trainer.saver is not None:
            stack.enter_context(trainer.saver)
        return trainer.run_to_end()


class _Trainer:
    """A run under way.

    Attributes:
        reached: where it is.
        records: of the epochs so far.
        saver: writes its checkpoints; None without a folder.
    """

    def __init__(self, run: Run, folder: pathlib.Path | None, manager: Any) -> None:
        self._run = run
        self._folder = folder
        self._agree = processes.make_agreement()
        state = create_train_state(run.model, run.rule, run.tx, run.key, run.example)
        start = CheckpointState(state, epoch_sums.empty(run.model, run.rule), 0, 0.0, 0.0)
        self.reached, self.records = start, []
        self.saver: saving.Saver | None = None
        if folder is not None:
            self.reached = resuming.resume(manager, folder, start, self._warn) or start
            resumed = self.reached is not start
            self.records = resuming.records_until(folder, self.reached.epochs_done, resumed)
            if resumed:
                length = run.source.steps_per_epoch
                resuming.check_length(folder, self.reached, self.records, length)
            if processes.is_first():
                # Only now: a start that is refused leaves all as it was.
                folders.extend(folder, run.epochs)
                folders.keep_metrics(folder, self.records)
            processes.wait_for_all("the number of epochs is written")
            folders.check_epochs(folder, run.epochs)
            accuracies = map(callbacks.selection_accuracy, self.records)
            best = max((one for one in accuracies if one is not None), default=None)
            self.saver = saving.Saver(
                manager,
                run.settings,
                every_epoch=run.checkpoint_every > 0,
                best=best,
                written=self._tell_checkpoint,
            )
        self._resumed = self.reached is not start
        self._wants_to_stop = False

    def _tell_checkpoint(self, step: int) -> None:
        for one in self._run.callbacks:
            one.on_checkpoint(step)

    def _warn(self, message: str) -> None:
        for one in self._run.callbacks:
            one.on_warning(message)

    def run_to_end(self) -> FitResult:
        """Train; see :func:`train`."""
        run = self._run
        start = callbacks.RunStart(
            model=run.model,
            rule=run.rule,
            step=int(self.reached.state.step),
            epochs_done=self.reached.epochs_done,
            epochs=run.epochs,
            steps_per_epoch=run.source.steps_per_epoch,
            batch_size=run.source.batch_size,
            records=self.records,
            resumed=self._resumed,
            folder=self._folder,
            reach=run.reach,
            spec=run.spec,
            evaluation_sets={
                name: source.on_this_device(examples, run.execution.sharding)
                for name, examples in run.evaluation_sets.items()
            },
            sample=run.source.sample,
        )
        stopped = self._agree(int(_any(one.on_start(start) for one in run.callbacks)))
        evaluation = None
        while self.reached.epochs_done < run.epochs and not stopped:
            try:
                stopped = self._train_epoch()
            except DivergedError:
                if self.saver is not None:
                    self.saver.save_kept()
                raise
            if stopped:
                # What an earlier epoch was evaluated with is not where the run is.
                evaluation = None
                break
            evaluation, stopped = self._end_epoch()
        if evaluation is None:
            evaluation = self._evaluation()
        return self._result(evaluation, stopped)

    def _result(self, evaluation: Any, stopped: int) -> FitResult:
        ranked = [
            (accuracy, record["epoch"])
            for record in self.records
            if (accuracy := callbacks.selection_accuracy(record)) is not None
        ]
        state = self.reached.state
        return FitResult(
            state=state,
            evaluation=state._replace(**evaluation, opt_state=None),
            records=self.records,
            best_epoch=max(ranked)[1] if ranked else None,
            stopped=stopped,
            spec=self._run.spec,
            seconds=self.reached.seconds,
        )

    def _evaluation(self) -> Any:
        """The weights and statistics to evaluate, as ``{"params", "batch_stats"}``."""
        run, state = self._run, self.reached.state
        count = min(_STATS_BATCHES, run.source.steps_per_epoch)
        if run.execution.sharding is not None:
            state = run.execution.place(state)
        if run.compiled is None:
            averaged = evaluation_state(run.model, state, run.source.for_statistics(count))
        else:
            estimate, data = run.compiled.statistics, run.compiled.data
            drawn = (data.data, data.statistics_order, data.statistics_key, count)
            averaged = average_state(state, lambda *variables: estimate(*variables, *drawn))
        variables = {"params": averaged.params, "batch_stats": averaged.batch_stats}
        return variables if run.execution.sharding is None else processes.local_copy(variables)

    def _end_epoch(self) -> tuple[Any, int]:
        """Evaluate, record and write an epoch: ``(evaluation, stopped)``."""
        run, reached = self._run, self.reached
        began = time.perf_counter()
        evaluation = self._evaluation()
        sharding = run.execution.sharding
        placed = evaluation if sharding is None else run.execution.place(evaluation)

        def evaluated(views: str) -> dict[str, Evaluation]:
            return {
                name: evaluate_weights(
                    run.model,
                    placed,
                    run.spec,
                    examples,
                    run.eval_batch_size,
                    run.compiled is not None,
                    sharding,
                    views,
                )
                for name, examples in run.evaluation_sets.items()
            }

        results = evaluated("none")
        by_views = {} if run.test_views == "none" else evaluated(run.test_views)
        evaluation_seconds = time.perf_counter() - began
        images = run.source.steps_per_epoch * run.source.batch_size
        reached = reached._replace(
            epochs_done=reached.epochs_done + 1, seconds=reached.seconds + evaluation_seconds
        )
        record = {
            **_record(run, reached, results),
            **{f"{name}_views_accuracy": result.accuracy for name, result in by_views.items()},
            "seconds": reached.epoch_seconds + evaluation_seconds,
            "total_seconds": reached.seconds,
            "images_per_second": images / reached.epoch_seconds,
        }
        event = callbacks.EpochEnd(record, self.records, run.epochs, reached.state, evaluation)
        for one in run.callbacks:
            record |= _new_in(record, one.add_to_record(event) or {})
        # Metrics first: a kill in between leaves a record that the resumed run drops and repeats.
        if self.saver is not None:
            self.saver.finish_first()
        if self._folder is not None and processes.is_first():
            folders.append_metrics(self._folder, record)
        self.records.append(record)
        sums = epoch_sums.empty(run.model, run.rule)
        self.reached = reached = reached._replace(sums=sums, epoch_seconds=0.0)
        finished = reached.epochs_done == run.epochs
        # A callback may have wanted to stop after the epoch's last step.
        self._wants_to_stop |= _any(one.on_epoch(event) for one in run.callbacks)
        stopped = self._agree(run.should_stop() or int(self._wants_to_stop))
        if self.saver is not None:
            accuracy = callbacks.selection_accuracy(record)
            self.saver.end_epoch(reached, evaluation, accuracy, is_last=finished or bool(stopped))
        return evaluation, 0 if finished else stopped

    def _train_epoch(self) -> int:
        """The rest of an epoch; the number of a stop inside it, which is saved then."""
        run, reached = self._run, self.reached
        step = int(reached.state.step)
        running = run.execution.enter(reached.state)
        sums = run.execution.place(reached.sums)
        steps_per_epoch = run.source.steps_per_epoch
        end = (reached.epochs_done + 1) * steps_per_epoch
        index = step - reached.epochs_done * steps_per_epoch
        launches = Launches(run, reached.epochs_done, index)
        pending: collections.deque[jax.Array] = collections.deque()
        began = checked = time.perf_counter()

        def here() -> CheckpointState:
            jax.block_until_ready(sums)
            elapsed = time.perf_counter() - began
            return reached._replace(
                state=run.execution.leave(running),
                sums=processes.local_copy(sums),
                seconds=reached.seconds + elapsed,
                epoch_seconds=reached.epoch_seconds + elapsed,
            )

        # Processes must stop after the same step; with one there is nothing to wait for.
        agree, alarm, stopped = processes.make_agreement(_IN_FLIGHT), 0, 0
        try:
            while step < end:
                stopped = agree(run.should_stop() or alarm or int(self._wants_to_stop))
                if stopped:
                    break
                running, sums, metrics, count = launches(running, sums, step, end)
                step, index = step + count, index + count
                # A copy, because a launch donates the sums.
                pending.append(jnp.copy(sums.correct) if run.compiled else sums.correct)
                if len(pending) > _IN_FLIGHT:
                    jax.block_until_ready(pending.popleft())
                if run.callbacks:
                    event = callbacks.StepEnd(step, reached.epochs_done + 1, index, metrics, sums)
                    self._wants_to_stop = _any(one.on_step(event) for one in run.callbacks)
                if time.perf_counter() - checked > _CHECK_SECONDS:
                    checked = time.perf_counter()
                    if not np.isfinite(np.asarray(sums.losses)).all():
                        alarm = _NOT_FINITE
                if self.saver is not None:
                    self.saver.poll()
                every = run.checkpoint_every
                if self.saver is not None and every and step % every == 0 and step < end:
                    self.reached = here()
                    resuming.check_finite(run.model, self.reached)
                    self.saver.save(self.reached, self._evaluation())
        finally:
            launches.close()
        self.reached = here()
        resuming.check_finite(run.model, self.reached)
        if step == end:
            return 0
        if self.saver is not None and not self.saver.has(step):
            self.saver.save(self.reached, self._evaluation())
        return stopped


def _any(answers: Iterator[bool | None]) -> bool:
    """Whether a callback wants to stop; each of them is told."""
    return any(list(answers))


def _new_in(record: Record, added: Record) -> Record:
    """What a callback adds to a record, which may replace nothing."""
    if known := sorted(set(record) & set(added)):
        raise ValueError(
            f"a callback adds {known[0]!r} to a record that has it; name it otherwise."
        )
    return added


def _record(run: Run, reached: CheckpointState, results: dict[str, Evaluation]) -> Record:
    steps, images = run.source.steps_per_epoch, run.source.steps_per_epoch * run.source.batch_size
    sums = jax.tree.map(np.asarray, reached.sums)
    *layer_losses, loss = (float(total) / steps for total in sums.losses)
    has_top5 = run.model.num_classes > 5
    record: Record = {
        "epoch": reached.epochs_done,
        "step": int(reached.state.step),
        "train_loss": loss,
        "train_accuracy": 100 * float(sums.correct) / images,
        "train_top5": 100 * float(sums.correct5) / images if has_top5 else None,
    }
    for name, result in results.items():
        record |= {
            f"{name}_loss": result.loss,
            f"{name}_accuracy": result.accuracy,
            f"{name}_top5": result.top5,
        }
    return {**record, "layer_loss": layer_losses}
