"""Launching the steps of an epoch: one at a time, or many in a compiled loop."""

from collections.abc import Iterator
from typing import Any

from lls_jax.runs import epoch_sums
from lls_jax.runs.run import Compiled, Run
from lls_jax.steps.loop import launch_length

# Steps of one launch, where many go into one: a stop waits for as many.
_STEPS_A_LAUNCH = 50


class Launches:
    """What launches an epoch's steps: one at a time, or many in a compiled loop."""

    def __init__(self, run: Run, epoch: int, index: int) -> None:
        self._run = run
        self._epoch = epoch
        self._index = index
        self._batches: Iterator[Any] | None = None
        if run.compiled is None:
            self._batches = run.source.epoch(epoch, index)
        else:
            self._order = run.compiled.data.order(epoch)
            self._length = launch_length(run.source.steps_per_epoch, _STEPS_A_LAUNCH)

    def __call__(self, running: Any, sums: Any, step: int, end: int) -> tuple[Any, Any, Any, int]:
        """``(running, sums, metrics, steps)`` after a launch."""
        run = self._run
        if run.compiled is not None:
            running, sums, count = self._launch_many(run.compiled, running, sums, step, end)
            return running, sums, None, count
        assert self._batches is not None
        batch = next(self._batches, None)
        if batch is None:
            raise ValueError(
                f"the training batches of epoch {self._epoch + 1} ended after {self._index} steps; "
                f"an epoch has {run.source.steps_per_epoch}: give the number that there are."
            )
        self._index += 1
        running, metrics = run.execution.step(running, batch)
        return running, epoch_sums.add(sums, metrics), metrics, 1

    def _launch_many(
        self, compiled: Compiled, running: Any, sums: Any, step: int, end: int
    ) -> tuple[Any, Any, int]:
        index, length, data = self._index, self._length, compiled.data
        whole = min(length - index % length, end - step)
        every = self._run.checkpoint_every or end
        count = min(whole, every - step % every)
        # All epochs have launches of these numbers of steps: two at most. Where a checkpoint or a
        # stop of before cuts one, the parts may be of any number.
        is_usual = index % length == 0 and count == whole > 1
        loop = compiled.loop.constant if is_usual else compiled.loop.any_count
        running, sums = loop(running, sums, data.data, self._order, data.key, index, count)
        self._index += count
        return running, sums, count

    def close(self) -> None:
        """End whatever reads ahead."""
        if self._batches is not None:
            self._batches.close()  # type: ignore[attr-defined]
