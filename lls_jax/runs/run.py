"""What a run works with, and what it leaves."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from lls_jax.data import DatasetSpec, Split, batches
from lls_jax.models import Network
from lls_jax.placement import Execution
from lls_jax.rules import Rule
from lls_jax.runs import callbacks
from lls_jax.runs.source import OnDevices, Source
from lls_jax.steps.loop import Loop
from lls_jax.training import Optimizer, Reach, TrainState

Record = dict[str, Any]
Examples = Split | batches.DeviceSplit


class Compiled(NamedTuple):
    """Launches of many batches, with the data on the devices.

    Attributes:
        loop: of training steps.
        statistics: BatchNorm's, of :func:`lls_jax.steps.loop.make_statistics_loop`.
        data: what they take.
    """

    loop: Loop
    statistics: Callable[..., Any]
    data: OnDevices


class Run(NamedTuple):
    """All that a run works with, the data on the device or the host.

    Attributes:
        model: the network.
        rule: its rule.
        tx: the optimizer, or one a block.
        execution: how a step is executed.
        compiled: launches of many batches; None where each is one.
        source: of the training batches.
        example: an input, of which the shape counts.
        spec: how images are normalised and cut.
        evaluation_sets: what each epoch is evaluated on, by name: ``validation``, ``test``.
        key: of the weights and of dropout.
        epochs: of the whole run.
        eval_batch_size: examples a step of evaluation.
        test_views: by which each epoch is evaluated a second time; ``"none"`` for once.
        checkpoint_every: steps between checkpoints inside an epoch; 0 for none.
        reach: how many blocks a local loss teaches, or each of them.
        settings: of the run, JSON values, for its checkpoints.
        callbacks: are told what happens.
        should_stop: is asked before each step; a number other than 0 stops the run.
    """

    model: Network
    rule: Rule
    tx: Optimizer
    execution: Execution
    compiled: Compiled | None
    source: Source
    example: jax.Array
    spec: DatasetSpec
    evaluation_sets: dict[str, Examples]
    key: jax.Array
    epochs: int
    eval_batch_size: int
    test_views: str
    checkpoint_every: int
    reach: Reach
    settings: Record
    callbacks: Sequence[callbacks.Callback]
    should_stop: Callable[[], int]


class FitResult(NamedTuple):
    """What a run leaves.

    Attributes:
        state: the training state at its end.
        evaluation: the state to predict with and to evaluate: the averaged weights of a
            schedule-free optimizer, with statistics that belong to them.
        records: one an epoch, as metrics.jsonl has them.
        best_epoch: the epoch with the best accuracy, from 1, on the validation images if there
            were some, else on the test images; None without either.
        stopped: the number that `should_stop` gave; 1 for a callback; 0 for a run that has ended.
        spec: how images are normalised, for :func:`lls_jax.evaluation.evaluate`.
        seconds: spent training and evaluating, over all starts.
    """

    state: TrainState
    evaluation: TrainState
    records: list[Record]
    best_epoch: int | None
    stopped: int
    spec: DatasetSpec
    seconds: float
