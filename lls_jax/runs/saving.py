"""When a run's checkpoints are written: no more often than it is worth, and with its best epoch."""

import collections
import concurrent.futures
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lls_jax import processes
from lls_jax.runs import checkpoints, resuming
from lls_jax.runs.resuming import CheckpointState

# What a kill may cost at the end of short epochs: writing a checkpoint can take longer than one.
_SECONDS = 20.0
# Checkpoints in the host's memory: where a run is, and the best epoch before.
_MOST_UNDER_WAY = 2


class _Epoch(NamedTuple):
    reached: CheckpointState
    evaluation: Any
    accuracy: float | None


class _Writing(NamedTuple):
    """A checkpoint that is being written: its step, how to wait for it, whether it is there."""

    step: int
    wait: Callable[[], None]
    is_done: Callable[[], bool]


class Saver:
    """Writes a run's checkpoints.

    The end of an epoch is written if it is the first one of this start or 20 seconds have passed
    since the last checkpoint; of those that are not, the most accurate one is kept in memory, and
    written before the next checkpoint. So whoever resumes after a kill repeats 20 seconds, or an
    epoch, and where a run ends, is stopped or diverges, its best epoch is on the disk.

    Training waits for the copy to the host alone: the rest is done in a thread, one checkpoint
    after another. With several processes it waits for the checkpoint before, too. To be used as a
    context, at whose end all is written.
    """

    def __init__(
        self,
        manager: Any,
        settings: dict[str, Any],
        *,
        every_epoch: bool,
        best: float | None,
        written: Callable[[int], None],
    ) -> None:
        """Write to a manager of :func:`lls_jax.runs.checkpoints.open_checkpoints`.

        Args:
            manager: to write with.
            settings: of the run, JSON values.
            every_epoch: whether each epoch's end is written, whatever the clock says.
            best: the best accuracy so far; None before the first epoch.
            written: is told the step of each checkpoint.
        """
        self._manager = manager
        self._settings = settings
        self._every_epoch = every_epoch
        self._tell = written
        self._best = -math.inf if best is None else best
        self._written = -math.inf
        self._kept: _Epoch | None = None
        self._agree = processes.make_agreement()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._under_way: collections.deque[_Writing] = collections.deque()
        # Steps of the checkpoints that there are, or will be.
        self._steps = set(checkpoints.list_steps(manager))
        self._has_any = bool(self._steps)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        del error, trace
        try:
            self.finish()
        except Exception:
            # What ended the run is to be heard, and not what it led to.
            if kind is None:
                raise
        finally:
            self._thread.shutdown()

    def end_epoch(
        self, reached: CheckpointState, evaluation: Any, accuracy: float | None, is_last: bool
    ) -> None:
        """Write the end of an epoch, or keep it, or neither.

        Of several processes every one must call this, and the clock of any decides.

        Args:
            reached: where the run is.
            evaluation: the weights and statistics to evaluate, ``{"params", "batch_stats"}``.
            accuracy: by which the best epoch is chosen; None where there is none.
            is_last: whether it ends the run.
        """
        # Whoever wants checkpoints after a number of steps wants those of the epochs too.
        due = is_last or self._every_epoch
        due = due or time.monotonic() - self._written >= _SECONDS
        is_best = accuracy is not None and accuracy >= self._best
        self._best = self._best if accuracy is None else max(self._best, accuracy)
        if is_best:
            self._kept = None
        if self._agree(int(due)):
            self.save(reached, evaluation, accuracy)
        elif is_best:
            # A copy: the next step gives the buffers away.
            kept = reached._replace(state=_copy(reached.state), sums=_copy(reached.sums))
            self._kept = _Epoch(kept, _copy(evaluation), accuracy)

    def save(
        self, reached: CheckpointState, evaluation: Any, accuracy: float | None = None
    ) -> None:
        """Write where the run is, after the epoch that was kept.

        Args:
            reached: where the run is.
            evaluation: the weights and statistics to evaluate.
            accuracy: by which the best epoch is chosen; None inside an epoch.
        """
        self.save_kept()
        if not self.has(int(reached.state.step)):
            self._write(_Epoch(reached, evaluation, accuracy))
        self._written = time.monotonic()

    def _write(self, epoch: _Epoch) -> None:
        checkpoint = resuming.to_checkpoint(self._settings, *epoch)
        self._steps.add(checkpoint.step)
        if jax.process_count() > 1:
            # All of them write, in Orbax's threads, which wait for each other. None asks whether
            # the others are done, which would be answered differently in each.
            self.finish()
            checkpoints.begin(self._manager, checkpoint)
            wait = self._manager.wait_until_finished
            self._under_way.append(_Writing(checkpoint.step, wait, lambda: False))
            return
        while len(self._under_way) >= _MOST_UNDER_WAY:
            self._finish_oldest()
        checkpoint = checkpoint._replace(
            training=checkpoints.on_host(checkpoint.training),
            evaluation=checkpoints.on_host(checkpoint.evaluation),
        )
        written = self._thread.submit(checkpoints.save, self._manager, checkpoint)
        self._under_way.append(_Writing(checkpoint.step, written.result, written.done))

    def _finish_oldest(self) -> None:
        writing = self._under_way.popleft()
        writing.wait()
        self._has_any = True
        self._tell(writing.step)

    def poll(self) -> None:
        """Tell whoever listens of what has been written meanwhile; does not wait.

        Raises:
            OSError: it could not be written.
        """
        while self._under_way and self._under_way[0].is_done():
            self._finish_oldest()

    def finish(self) -> None:
        """Wait for all that is being written; see :meth:`poll`."""
        while self._under_way:
            self._finish_oldest()

    def finish_first(self) -> None:
        """Wait for what is being written if there is no other checkpoint yet.

        To be called before an epoch's record is written: a run that has records of several epochs,
        and nothing to go on from, cannot be resumed.
        """
        if not self._has_any:
            self.finish()

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of that step, or one is being written."""
        return step in self._steps

    def save_kept(self) -> None:
        """Write the epoch that was kept, if one was."""
        if self._kept is not None:
            self._write(self._kept)
            self._kept = None


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, may_alias=False), tree)
