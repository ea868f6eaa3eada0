"""Where a run is: at its start, in a checkpoint, or on the way; and whether it can go on."""

import dataclasses
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import run_folder
from experiments import totals as totals_of
from experiments.command_line import UserError
from experiments.config import TrainConfig
from experiments.progress import say
from experiments.setup import Run, Task, example_image
from lls_jax import checkpoint, processes, training


class DivergedError(UserError):
    """A loss or a weight is not a finite number; the message names it, and the step."""


class Position(NamedTuple):
    """Where a run is.

    Attributes:
        state: the training state; its step counts updates over all epochs.
        totals: of the epoch that is under way.
        epochs_done: epochs trained and judged.
        seconds: spent training and judging so far, over all sessions.
        epoch_seconds: of those, spent in the epoch that is under way.
    """

    state: training.TrainState
    totals: totals_of.Totals
    epochs_done: int
    seconds: float
    epoch_seconds: float


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all()


def check_finite(run: Run, position: Position) -> None:
    """Raise DivergedError, naming the layer, if a loss or a parameter is not a finite number."""
    step = int(position.state.step)
    *layer_losses, classifier_loss = np.asarray(position.totals.losses)
    advice = (
        "the last good checkpoint is untouched; try a lower --learning-rate in another --workdir."
    )
    for layer, loss in enumerate(layer_losses):
        if not np.isfinite(loss):
            raise DivergedError(
                f"the loss of local layer L{layer + 1} is not finite by step {step}; {advice}"
            )
    if not np.isfinite(classifier_loss):
        raise DivergedError(f"the classifier's loss is not finite by step {step}; {advice}")
    for name, params in position.state.params.items():
        if not _all_finite(params):
            names = run.task.model.block_names
            where = f"layer L{names.index(name) + 1}" if name in names else "the classifier"
            raise DivergedError(f"a weight of {where} is not finite by step {step}; {advice}")


def keys(config: TrainConfig) -> tuple[jax.Array, jax.Array]:
    """The run's keys: of the weights and dropout, and of the data."""
    model_key, data_key = jax.random.split(jax.random.key(config.seed))
    return model_key, data_key


def begin(config: TrainConfig, run: Run) -> Position:
    """Where a run is before its first step."""
    model_key, _ = keys(config)
    task = run.task
    state = training.create_train_state(
        task.model, task.rule, run.tx, model_key, example_image(task.spec)
    )
    return Position(state, totals_of.empty(run.task.model, run.task.rule), 0, 0.0, 0.0)


def resume(manager: Any, folder: pathlib.Path, start: Position) -> Position | None:
    """The newest checkpoint that is whole; damaged ones after it are reported and set aside.

    Args:
        manager: from :func:`lls_jax.checkpoint.open_checkpoints`.
        folder: of the run.
        start: the run's start, for the structure of what it trains.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        UserError: every checkpoint is damaged, or one is of another structure; nothing was moved.
    """
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        {"state": start.state._asdict(), "totals": start.totals._asdict()},
    )
    agree = processes.make_agreement()
    damaged: dict[int, str] = {}
    for step in reversed(checkpoint.list_steps(manager)):
        try:
            restored, meta = checkpoint.restore_training(manager, step, abstract)
            problem = ""
        except checkpoint.DamagedError as error:
            problem = str(error)
        except checkpoint.StructureError as error:
            raise UserError(
                f"{error}: the rule, the model or the optimizer's library has changed since; go on "
                f"with what {folder} was trained with, or give another --workdir."
            ) from error
        # What one process cannot read none may use.
        if agree(int(bool(problem))):
            damaged[step] = problem or f"checkpoint {step} is damaged where another process reads"
            continue
        for bad, reason in damaged.items():
            aside = checkpoint.set_aside(run_folder.checkpoints(folder), bad)
            manager.reload()
            say(f"warning: {reason}; set aside as {aside}, trying the one before", file=sys.stderr)
        return Position(
            training.TrainState(**restored["state"]),
            totals_of.Totals(**restored["totals"]),
            meta["epochs_done"],
            meta["seconds"],
            meta["epoch_seconds"],
        )
    if damaged:
        raise UserError(
            f"every checkpoint in {run_folder.checkpoints(folder)} is damaged "
            f"({'; '.join(damaged.values())}); nothing was changed. Bring one back, or give "
            "another --workdir to train anew."
        )
    return None


def records_until(folder: pathlib.Path, epochs_done: int, resumed: bool) -> list[dict[str, Any]]:
    """The records of a run that its position has, without those that it is about to repeat.

    Args:
        folder: of the run.
        epochs_done: at the position.
        resumed: whether the position is a checkpoint's, and not the run's start.

    Raises:
        UserError: the run has more records than one that was killed before its first checkpoint.
    """
    records = run_folder.read_metrics(folder)
    if not resumed and len(records) > 1:
        raise UserError(
            f"{folder} has the records of {len(records)} epochs, but no checkpoint to go on from; "
            "bring one back, or give another --workdir to train anew."
        )
    return [record for record in records if record["epoch"] <= epochs_done]


def save(
    manager: Any, config: TrainConfig, position: Position, judged: Any, accuracy: float | None
) -> None:
    """Write a position as a checkpoint.

    Args:
        manager: from :func:`lls_jax.checkpoint.open_checkpoints`.
        config: of the run.
        position: to write.
        judged: the weights and statistics to judge, ``{"params", "batch_stats"}``.
        accuracy: of them on the test images; None inside an epoch.
    """
    checkpoint.save(
        manager,
        checkpoint.Checkpoint(
            step=int(position.state.step),
            training={
                "state": position.state._asdict(),
                "totals": position.totals._asdict(),
            },
            evaluation=judged,
            meta={
                "epochs_done": position.epochs_done,
                "seconds": position.seconds,
                "epoch_seconds": position.epoch_seconds,
                "accuracy": accuracy,
                "config": dataclasses.asdict(config),
            },
        ),
    )


def save_imported(
    config: TrainConfig, folder: pathlib.Path, task: Task, state: training.TrainState
) -> None:
    """Write weights that come from elsewhere as a run's first checkpoint, from which it goes on."""
    position = Position(state, totals_of.empty(task.model, task.rule), 0, 0.0, 0.0)
    judged = {"params": state.params, "batch_stats": state.batch_stats}
    with checkpoint.open_checkpoints(run_folder.checkpoints(folder)) as manager:
        save(manager, config, position, judged, None)
