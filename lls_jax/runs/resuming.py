"""Where a run is: at its start, in a checkpoint, or on the way; and whether it can go on."""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lls_jax import processes
from lls_jax.errors import DamagedError, DivergedError, StructureError, UserError
from lls_jax.models import Network
from lls_jax.rules import Rule
from lls_jax.runs import checkpoints, epoch_sums
from lls_jax.runs import folder as folders
from lls_jax.training import TrainState


class CheckpointState(NamedTuple):
    """Where a run is: all that a checkpoint holds to go on with.

    Attributes:
        state: the training state; its step counts updates over all epochs.
        sums: of the epoch that is under way.
        epochs_done: epochs trained and evaluated.
        seconds: spent training and evaluating so far, over all starts.
        epoch_seconds: of those, spent in the epoch that is under way.
    """

    state: TrainState
    sums: epoch_sums.EpochSums
    epochs_done: int
    seconds: float
    epoch_seconds: float

    def arrays(self) -> dict[str, Any]:
        """What is written as arrays; its keys are those of the folders of earlier versions."""
        return {"state": self.state._asdict(), "totals": self.sums._asdict()}


@jax.jit
def _all_finite(params: dict[str, Any]) -> dict[str, jax.Array]:
    return {
        name: jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()
        for name, tree in params.items()
        if jax.tree.leaves(tree)
    }


def check_finite(model: Network, reached: CheckpointState) -> None:
    """Raise DivergedError, naming the layer, if a loss or a parameter is not a finite number."""
    step = int(reached.state.step)
    *layer_losses, classifier_loss = np.asarray(reached.sums.losses)
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
    for name, is_finite in _all_finite(reached.state.params).items():
        if not is_finite:
            names = model.block_names
            where = f"layer L{names.index(name) + 1}" if name in names else "the classifier"
            raise DivergedError(f"a weight of {where} is not finite by step {step}; {advice}")


def resume(
    manager: Any, folder: pathlib.Path, start: CheckpointState, warn: Callable[[str], None]
) -> CheckpointState | None:
    """The newest checkpoint that is whole; damaged ones after it are reported and set aside.

    Args:
        manager: from :func:`lls_jax.runs.checkpoints.open_checkpoints`.
        folder: of the run.
        start: the run's start, for the structure of what it trains.
        warn: is told of each checkpoint that was set aside.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        UserError: every checkpoint is damaged, or one is of another structure; nothing was moved.
    """
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        start.arrays(),
    )
    agree = processes.make_agreement()
    damaged: dict[int, str] = {}
    for step in reversed(checkpoints.list_steps(manager)):
        try:
            restored, meta = checkpoints.restore_training(manager, step, abstract)
            problem = ""
        except DamagedError as error:
            problem = str(error)
        except StructureError as error:
            raise UserError(
                f"{error}: the rule, the model or the optimizer's library has changed since; go on "
                f"with what {folder} was trained with, or give another --workdir."
            ) from error
        # What one process cannot read none may use.
        if agree(int(bool(problem))):
            damaged[step] = problem or f"checkpoint {step} is damaged where another process reads"
            continue
        for bad, reason in damaged.items():
            aside = checkpoints.set_aside(folders.checkpoints(folder), bad)
            manager.reload()
            warn(f"{reason}; set aside as {aside}, trying the one before")
        return CheckpointState(
            TrainState(**restored["state"]),
            epoch_sums.EpochSums(**restored["totals"]),
            meta["epochs_done"],
            meta["seconds"],
            meta["epoch_seconds"],
        )
    if damaged:
        raise UserError(
            f"every checkpoint in {folders.checkpoints(folder)} is damaged "
            f"({'; '.join(damaged.values())}); nothing was changed. Bring one back, or give "
            "another --workdir to train anew."
        )
    return None


def records_until(folder: pathlib.Path, epochs_done: int, resumed: bool) -> list[dict[str, Any]]:
    """The records of a run that a checkpoint has, without those that it is about to repeat.

    Args:
        folder: of the run.
        epochs_done: at the checkpoint.
        resumed: whether there is a checkpoint, and it is not the run's start.

    Raises:
        UserError: the run has more records than one that was killed before its first checkpoint,
            or fewer than its checkpoint has epochs.
    """
    records = folders.read_metrics(folder)
    if not resumed and len(records) > 1:
        raise UserError(
            f"{folder} has the records of {len(records)} epochs, but no checkpoint to go on from; "
            "bring one back, or give another --workdir to train anew."
        )
    kept = [record for record in records if record["epoch"] <= epochs_done]
    if [record["epoch"] for record in kept] != list(range(1, epochs_done + 1)):
        raise UserError(
            f"{folder / 'metrics.jsonl'} has the records of {len(kept)} epochs, and the checkpoint "
            f"to go on from has {epochs_done}; bring the file back as it was, or give another "
            "--workdir to train anew."
        )
    return kept


def check_length(
    folder: pathlib.Path,
    reached: CheckpointState,
    records: list[dict[str, Any]],
    steps_per_epoch: int,
) -> None:
    """Check that the epochs of a run were as long as they are now.

    Args:
        folder: of the run.
        reached: where it is.
        records: of its epochs.
        steps_per_epoch: of this start.

    Raises:
        UserError: there are more or fewer training examples, or batches of another size.
    """
    step, ended = int(reached.state.step), records[-1]["step"] if records else 0
    in_epoch = step - reached.epochs_done * steps_per_epoch
    if ended == reached.epochs_done * steps_per_epoch and 0 <= in_epoch < steps_per_epoch:
        return
    before = f"{ended // reached.epochs_done} steps an epoch" if records else f"step {step}"
    raise UserError(
        f"{folder} has {before}, and an epoch of these training examples has {steps_per_epoch}: "
        "they, or the size of their batches, have changed since; go on with those that the run "
        "began with, or give another --workdir."
    )


def check_lost_settings(folder: pathlib.Path, settings: folders.Settings) -> None:
    """Check settings against those of a run's checkpoints, where its config.json is lost.

    Args:
        folder: of the run.
        settings: of this start.

    Raises:
        UserError: it holds another run.
    """
    path = folders.checkpoints(folder)
    if folders.read_settings(folder) is not None or not path.is_dir():
        return
    with checkpoints.open_checkpoints(path, read_only=True) as manager:
        for step in reversed(checkpoints.list_steps(manager)):
            with contextlib.suppress(DamagedError):
                settings.check(folder, checkpoints.read_meta(manager, step)["config"])
                return


def to_checkpoint(
    settings: dict[str, Any], reached: CheckpointState, evaluation: Any, accuracy: float | None
) -> checkpoints.Checkpoint:
    """Where a run is, as a checkpoint.

    Args:
        settings: of the run, JSON values.
        reached: where the run is.
        evaluation: the weights and statistics to evaluate, ``{"params", "batch_stats"}``.
        accuracy: by which the best checkpoint is chosen; None inside an epoch.
    """
    return checkpoints.Checkpoint(
        step=int(reached.state.step),
        training=reached.arrays(),
        evaluation=evaluation,
        meta={
            "epochs_done": reached.epochs_done,
            "seconds": reached.seconds,
            "epoch_seconds": reached.epoch_seconds,
            "accuracy": accuracy,
            "config": settings,
        },
    )


def save_start(
    manager: Any, settings: dict[str, Any], model: Network, rule: Rule, state: TrainState
) -> None:
    """Write weights that come from elsewhere as a run's first checkpoint, from which it goes on.

    Args:
        manager: from :func:`lls_jax.runs.checkpoints.open_checkpoints`.
        settings: of the run, JSON values.
        model: the network.
        rule: its rule.
        state: before the first step.
    """
    start = CheckpointState(state, epoch_sums.empty(model, rule), 0, 0.0, 0.0)
    evaluation = {"params": state.params, "batch_stats": state.batch_stats}
    checkpoints.save(manager, to_checkpoint(settings, start, evaluation, None))
