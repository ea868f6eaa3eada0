"""What a run tells whoever wants to know, and how one may stop it."""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from lls_jax.data import DatasetSpec, Split, batches
from lls_jax.models import Network
from lls_jax.rules import Rule
from lls_jax.runs.epoch_sums import EpochSums
from lls_jax.runs.kernels import KernelChoice
from lls_jax.training import Batch, Metrics, Reach, TrainState

Record = dict[str, Any]


class RunStart(NamedTuple):
    """A run before its next step.

    Attributes:
        model: the network.
        rule: its rule.
        step: updates done before.
        epochs_done: epochs trained and evaluated before.
        epochs: of the whole run.
        steps_per_epoch: batches of an epoch.
        batch_size: examples a batch.
        records: of the epochs before; the run's own list, which it adds to.
        resumed: whether it goes on from a checkpoint.
        folder: of the run; None where nothing is written.
        reach: how many blocks a local loss teaches, or each of them.
        spec: how images are normalised and cut.
        evaluation_sets: what each epoch is evaluated on, by name: ``validation``, ``test``.
        sample: ``sample(count)``: some training batches, always the same, each whole and on this
            process's own device.
    """

    model: Network
    rule: Rule
    step: int
    epochs_done: int
    epochs: int
    steps_per_epoch: int
    batch_size: int
    records: list[Record]
    resumed: bool
    folder: pathlib.Path | None
    reach: Reach
    spec: DatasetSpec
    evaluation_sets: Mapping[str, Split | batches.DeviceSplit]
    sample: Callable[[int], Iterator[Batch]]


class StepEnd(NamedTuple):
    """After a step, or after a launch of several. Its arrays may still be under way.

    Attributes:
        step: updates done.
        epoch: the epoch that is under way, from 1.
        steps_done: steps of this epoch done.
        metrics: the step's, as of :func:`lls_jax.training.make_train_step`, with its ``label``;
            None where a launch has many steps.
        sums: over the epoch so far.
    """

    step: int
    epoch: int
    steps_done: int
    metrics: Metrics | None
    sums: EpochSums


class EpochEnd(NamedTuple):
    """After an epoch and its evaluation.

    Attributes:
        record: what metrics.jsonl has of it.
        records: of all epochs so far.
        epochs: of the whole run.
        state: the training state.
        evaluation: the weights and statistics that were evaluated, ``{"params", "batch_stats"}``.
    """

    record: Record
    records: list[Record]
    epochs: int
    state: TrainState
    evaluation: Any


class Callback:
    """Does nothing; derive from it, and override what you want to hear of.

    Of several processes each calls its own. A true answer of `on_start`, `on_step` or `on_epoch`
    stops the run there, in each process alike, with all saved.
    """

    def on_start(self, event: RunStart) -> bool | None:
        """Before the first step of this start."""

    def on_step(self, event: StepEnd) -> bool | None:
        """After each step. Reading an array of the event waits for the device."""

    def add_to_record(self, event: EpochEnd) -> Record | None:
        """What else the epoch's record is to hold, JSON values by name; before it is written.

        The event's `records` are those of the epochs before.
        """

    def on_epoch(self, event: EpochEnd) -> bool | None:
        """After each epoch and its evaluation."""

    def on_checkpoint(self, step: int) -> None:
        """After a checkpoint of that step has been written, which takes until some steps later."""

    def on_kernels(self, choice: KernelChoice) -> None:
        """On a GPU, before training: what computes the local losses, and why."""

    def on_warning(self, message: str) -> None:
        """Something that is no error, like a damaged checkpoint that was set aside."""

    def on_exit(self) -> None:
        """At the very end, after an error too: whatever is open is to be closed."""


class EarlyStopping(Callback):
    """Stop after a number of epochs without a better accuracy, of the validation images if any.

    >>> stopping = EarlyStopping(patience=2)
    >>> stopping.is_over([{"test_accuracy": accuracy} for accuracy in (50.0, 60.0, 59.0, 60.0)])
    True
    """

    def __init__(self, patience: int) -> None:
        """Wait for `patience` epochs, at least 1."""
        if patience < 1:
            raise ValueError(f"`patience` is {patience}; it must be at least 1.")
        self.patience = patience

    def is_over(self, records: list[Record]) -> bool:
        """Whether the best of these epochs is that long ago."""
        accuracies = [accuracy for r in records if (accuracy := selection_accuracy(r)) is not None]
        if not accuracies:
            return False
        return len(accuracies) - 1 - accuracies.index(max(accuracies)) >= self.patience

    def on_start(self, event: RunStart) -> bool:
        """Stop at once where an earlier start stopped."""
        return self.is_over(event.records)

    def on_epoch(self, event: EpochEnd) -> bool:
        """Stop where the best epoch is long ago."""
        return self.is_over(event.records)


def selection_accuracy(record: Record) -> float | None:
    """The accuracy by which the best epoch is chosen, in percent.

    That of the validation images where there are some; else that of the test images, which is then
    no honest estimate of what the best epoch is worth on new ones.
    """
    accuracy = record.get("validation_accuracy")
    return record.get("test_accuracy") if accuracy is None else accuracy
