"""A row's run: trained for its budget, and judged by the test images once, at its end."""

import functools
import json
import pathlib
from typing import NamedTuple

from experiments import batch, setup, train
from experiments.board.rows import Row
from experiments.config import TrainConfig
from experiments.suites.entrants import BASELINE_STEPS
from lls_jax import placement
from lls_jax.runs import folder as folders
from lls_jax.runs.callbacks import Callback, RunStart, StepEnd
from lls_jax.runs.evaluate import evaluate_weights

_FINAL = "final.json"


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        step: updates done.
        test: accuracy on the test images after the last of them, in percent.
        validation: likewise on those that are held out; None where there are none.
        views: test accuracy by the mean over views; None where that was not asked for.
    """

    step: int
    test: float
    validation: float | None
    views: float | None


class StopAt(Callback):
    """Stops a run after a number of updates, counted over all its starts."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_start(self, event: RunStart) -> bool:
        """Whether it was there before."""
        return event.step >= self._step

    def on_step(self, event: StepEnd) -> bool:
        """Whether it is there."""
        return event.step >= self._step


def read(folder: pathlib.Path) -> Outcome | None:
    """How a run ended; None where it has not."""
    path = folder / _FINAL
    return Outcome(**json.loads(path.read_text())) if path.is_file() else None


def is_over(folder: pathlib.Path) -> bool:
    """Whether there is nothing left to run."""
    return read(folder) is not None or batch.divergence(folder) is not None


def train_run(config: TrainConfig, row: Row, steps: int | None) -> int:
    """Train a run from where it is to the end of its budget, and judge it.

    Args:
        config: of the run.
        row: which line of the board it belongs to.
        steps: updates after which it ends; None for its epochs' end.

    Returns:
        Exit status: 0, or 130 / 143 after Ctrl-C / SIGTERM, with all saved.
    """
    trained = train.train(
        config,
        adapt=functools.partial(_with_step, row),
        listeners=[] if steps is None else [StopAt(steps)],
    )
    if trained.signal:
        return 128 + trained.signal
    outcome = _judge(config, trained)
    folders.write_atomically(
        pathlib.Path(config.run_folder()) / _FINAL, folders.to_json(outcome._asdict())
    )
    return 128 + trained.late_signal if trained.late_signal else 0


def _with_step(row: Row, run: setup.Run) -> setup.Run:
    """A run whose step is made in the row's way."""
    if row.baseline is None:
        return run
    step = BASELINE_STEPS[row.baseline](run.task.model, run.tx)
    return run._replace(execution=placement.of_step(step))


def _judge(config: TrainConfig, trained: train.Trained) -> Outcome:
    run, result = trained.run, trained.result
    step = int(result.state.step)
    last = result.records[-1] if result.records else {"step": 0}
    if last["step"] == step:
        return Outcome(
            step,
            last["test_accuracy"],
            last.get("validation_accuracy"),
            last.get("test_views_accuracy"),
        )

    def accuracy(examples: setup.Examples, views: str = "none") -> float:
        variables = {
            "params": result.evaluation.params,
            "batch_stats": result.evaluation.batch_stats,
        }
        return evaluate_weights(
            *(run.task.model, variables, result.spec, examples, config.eval_batch_size),
            views=views,
        ).accuracy

    return Outcome(
        step,
        accuracy(run.test),
        None if run.validation is None else accuracy(run.validation),
        None if config.test_views == "none" else accuracy(run.test, config.test_views),
    )
