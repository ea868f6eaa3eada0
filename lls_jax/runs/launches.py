"""Launching the steps of an epoch: one at a time, or many in a compiled loop."""

from collections.abc import Iterator
from typing import Any

from lls_jax.runs import epoch_sums
from lls_jax.runs.run import Run

# Steps of one launch, where many go into one: a stop waits for as many.
_STEPS_A_LAUNCH = 50


class Launches:
    """What launches an epoch's steps: one at a time, or many in a compiled loop."""

    def __init__(self, run: Run, epoch: int, index: int) -> None:
        self._run = run
        self._index = index
        self._batches: Iterator[Any] | None = None
        if run.compiled_loop is None:
            self._batches = run.source.epoch(epoch, index)
        else:
            assert run.source.arrays is not None
            self._data, order = run.source.arrays
            self._order = order(epoch)

    def __call__(self, running: Any, sums: Any, step: int, end: int) -> tuple[Any, Any, Any, int]:
        """``(running, sums, metrics, steps)`` after a launch."""
        run = self._run
        if run.compiled_loop is None:
            assert self._batches is not None
            batch = next(self._batches, None)
            if batch is None:
                raise ValueError(
                    f"the training batches ended after {step} steps; an epoch has "
                    f"{run.source.steps_per_epoch}: give the number that there are."
                )
            running, metrics = run.execution.step(running, batch)
            return running, epoch_sums.add(sums, metrics), metrics, 1
        every = run.checkpoint_every or end
        count = min(_STEPS_A_LAUNCH, end - step, every - step % every)
        running, sums = run.compiled_loop(
            running, sums, self._data, self._order, run.source.key, self._index, count
        )
        self._index += count
        return running, sums, None, count

    def close(self) -> None:
        """End whatever reads ahead."""
        if self._batches is not None:
            self._batches.close()  # type: ignore[attr-defined]
