"""Checkpoints of a run, through Orbax: written whole or not at all, verified when read."""

import errno
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from lls_jax import processes

# The newest ones kept; the one before the newest is there for when the newest is damaged.
_KEEP_NEWEST = 2


class CheckpointError(Exception):
    """A checkpoint is missing or damaged; the message says which and what to do."""


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        step: number of updates done.
        training: all that training goes on with: a pytree of arrays.
        evaluation: ``{"params", "batch_stats"}``, the weights and statistics to judge.
        meta: JSON values: where in the run it was taken, its accuracy, the run's config.
    """

    step: int
    training: Any
    evaluation: Any
    meta: dict[str, Any]


def _digest(tree: Any) -> str:
    """SHA-256 of every array in a tree, in its order."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        digest.update(np.ascontiguousarray(jax.random.key_data(leaf) if is_key else leaf).data)
    return digest.hexdigest()


def _for_all(tree: Any) -> Any:
    """Arrays as Orbax takes them: of several processes none may write what is its own."""
    return tree if jax.process_count() == 1 else processes.replicate(tree, processes.everywhere())


def _metric(metrics: dict[str, Any]) -> float:
    return metrics["accuracy"]


@contextmanager
def open_checkpoints(
    folder: pathlib.Path, *, read_only: bool = False
) -> Iterator[ocp.CheckpointManager]:
    """Open a run's folder of checkpoints; it keeps the newest two and the most accurate one.

    Args:
        folder: where the checkpoints lie, one folder a step.
        read_only: whether nothing may be written or removed.
    """
    policy = checkpoint_managers.AnyPreservationPolicy(
        [
            checkpoint_managers.LatestN(_KEEP_NEWEST),
            checkpoint_managers.BestN(
                get_metric_fn=_metric, n=1, keep_checkpoints_without_metrics=False
            ),
        ]
    )
    options = ocp.CheckpointManagerOptions(
        create=not read_only,
        read_only=read_only,
        preservation_policy=policy,
        # The step that follows donates the buffers that are being written.
        enable_async_checkpointing=False,
    )
    manager = ocp.CheckpointManager(folder.absolute(), options=options)
    try:
        yield manager
    finally:
        manager.close()


def save(manager: ocp.CheckpointManager, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; when this returns it is on the disk, whole.

    Of several processes every one must call this, with the same arrays.

    Args:
        manager: from :func:`open_checkpoints`.
        checkpoint: ``meta["accuracy"]``, where it is a number, decides which is the best.

    Raises:
        OSError: there is not enough room on the disk; nothing was written.
    """
    _check_room(pathlib.Path(manager.directory), (checkpoint.training, checkpoint.evaluation))
    digests = {
        "training": _digest(checkpoint.training),
        "evaluation": _digest(checkpoint.evaluation),
    }
    accuracy = checkpoint.meta.get("accuracy")
    manager.save(
        checkpoint.step,
        args=ocp.args.Composite(
            training=ocp.args.StandardSave(_for_all(checkpoint.training)),
            evaluation=ocp.args.StandardSave(_for_all(checkpoint.evaluation)),
            meta=ocp.args.JsonSave({**checkpoint.meta, "digests": digests}),
        ),
        metrics=None if accuracy is None else {"accuracy": accuracy},
        force=True,
    )
    manager.wait_until_finished()


def _check_room(folder: pathlib.Path, trees: Any) -> None:
    # Orbax writes from many threads, and each says at length that the disk is full.
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(trees)) + 2**20
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _restore_item(
    manager: ocp.CheckpointManager, step: int, name: str, abstract: Any, meta: dict[str, Any]
) -> Any:
    several = jax.process_count() > 1
    if several:
        sharding = processes.everywhere()
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract
        )
    arguments = ocp.args.Composite(**{name: ocp.args.StandardRestore(abstract)})
    tree = manager.restore(step, args=arguments)[name]
    if several:
        tree = processes.own(tree)
    if _digest(tree) != meta["digests"][name]:
        raise CheckpointError(f"the arrays of {name!r} are not those that were saved")
    return tree


def read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    restored = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
    return restored["meta"]


def restore_training(
    manager: ocp.CheckpointManager, step: int, abstract: Any
) -> tuple[Any, dict[str, Any]]:
    """What training goes on with, verified: ``(training, meta)``.

    Args:
        manager: from :func:`open_checkpoints`.
        step: of the checkpoint.
        abstract: a pytree of the same structure, of arrays or ``jax.ShapeDtypeStruct``.

    Raises:
        CheckpointError: it cannot be read, or is not what was saved.
    """
    return _guarded(manager, step, "training", abstract)


def restore_evaluation(
    manager: ocp.CheckpointManager, step: int, abstract: Any
) -> tuple[Any, dict[str, Any]]:
    """The weights and statistics to judge, verified: ``(evaluation, meta)``.

    Args and errors are those of :func:`restore_training`.
    """
    return _guarded(manager, step, "evaluation", abstract)


def _guarded(
    manager: ocp.CheckpointManager, step: int, name: str, abstract: Any
) -> tuple[Any, dict[str, Any]]:
    try:
        meta = read_meta(manager, step)
        return _restore_item(manager, step, name, abstract, meta), meta
    except Exception as error:
        # A damaged file fails wherever its bytes happen to be read.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"checkpoint {step} is damaged: {reason[:200]}") from error


def list_steps(manager: ocp.CheckpointManager) -> list[int]:
    """The steps that have a checkpoint, oldest first."""
    return sorted(manager.all_steps())


def best_step(manager: ocp.CheckpointManager) -> int | None:
    """The step of the most accurate checkpoint, the newest of equals; None without any."""
    best: tuple[float, int] | None = None
    for step in list_steps(manager):
        try:
            accuracy = read_meta(manager, step).get("accuracy")
        except Exception:
            continue  # Damaged: it cannot be the best one that can be had.
        if accuracy is not None and (best is None or accuracy >= best[0]):
            best = (accuracy, step)
    return None if best is None else best[1]


def set_aside(folder: pathlib.Path, step: int) -> pathlib.Path:
    """Move a damaged checkpoint out of the way, beside the folder of checkpoints.

    Of several processes every one must call this; one of them moves it.

    Returns:
        Where it is now.
    """
    target = folder.parent / "damaged" / str(step)
    number = 0
    while target.exists():
        number += 1
        target = folder.parent / "damaged" / f"{step}-{number}"
    processes.wait_for_all("a place for the damaged checkpoint is found")
    if processes.is_first():
        target.parent.mkdir(exist_ok=True)
        os.replace(folder / str(step), target)
    processes.wait_for_all("the damaged checkpoint is moved")
    return target
