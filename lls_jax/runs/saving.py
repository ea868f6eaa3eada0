"""When a run's checkpoints are written: no more often than it is worth, and with its best epoch."""

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


class _Epoch(NamedTuple):
    reached: CheckpointState
    evaluation: Any
    accuracy: float | None


class Saver:
    """Writes a run's checkpoints.

    The end of an epoch is written if it is the first one of this start or 20 seconds have passed
    since the last checkpoint; of those that are not, the most accurate one is kept in memory, and
    written before the next checkpoint. So whoever resumes after a kill repeats 20 seconds, or an
    epoch, and where a run ends, is stopped or diverges, its best epoch is on the disk.
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
        resuming.save(self._manager, self._settings, *epoch)
        self._tell(int(epoch.reached.state.step))

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of that step."""
        return step in checkpoints.list_steps(self._manager)

    def save_kept(self) -> None:
        """Write the epoch that was kept, if one was."""
        if self._kept is not None:
            self._write(self._kept)
            self._kept = None


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, may_alias=False), tree)
