"""Checkpoints of a run, through Orbax: written whole or not at all, verified when read."""

import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lls_jax import processes
from lls_jax.errors import DamagedError, StructureError
from lls_jax.runs.retention import NewestAndBest, most_accurate

# How TensorStore begins its errors where what lies on the disk is not what it wrote there.
_DAMAGE = re.compile("(DATA_LOSS|NOT_FOUND|OUT_OF_RANGE|INVALID_ARGUMENT|FAILED_PRECONDITION): ")
# And how where the disk, or the memory, is at fault.
_ENVIRONMENT = re.compile("([A-Z]+(_[A-Z]+)*): ")


# A file of a checkpoint is gone; its description is no JSON; or it is, but describes no arrays.
_DAMAGES = (
    *(FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError),
    *(LookupError, AttributeError, TypeError),
)


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        step: number of updates done.
        training: all that training goes on with: a pytree of arrays.
        evaluation: ``{"params", "batch_stats"}``, the weights and statistics to evaluate.
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


def _text_digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _structure(tree: Any) -> dict[str, str]:
    """Dtype and shape of every array in a tree, by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def _check_structure(step: int, saved: dict[str, str], wanted: dict[str, str]) -> None:
    """Raise StructureError, naming an array that differs."""
    differing = {path for path in {*saved, *wanted} if saved.get(path) != wanted.get(path)}
    if differing:
        # A parameter rather than the optimizer's arrays of the same shape, which lie deeper.
        path = min(differing, key=lambda path: (path.count("/"), path))
        raise StructureError(
            f"checkpoint {step} has {path} {saved.get(path, 'nowhere')}, but what is to be "
            f"restored has it {wanted.get(path, 'nowhere')}"
        )


def _for_all(tree: Any) -> Any:
    """Arrays as Orbax takes them: of several processes none may write what is its own."""
    return tree if jax.process_count() == 1 else processes.replicate(tree, processes.everywhere())


@contextmanager
def open_checkpoints(
    folder: pathlib.Path, *, read_only: bool = False
) -> Iterator[ocp.CheckpointManager]:
    """Open a run's folder of checkpoints; it keeps the newest two and the most accurate one.

    Args:
        folder: where the checkpoints lie, one folder a step.
        read_only: whether nothing may be written or removed.
    """
    policy = NewestAndBest()
    options = ocp.CheckpointManagerOptions(
        create=not read_only,
        read_only=read_only,
        preservation_policy=policy,
        # One process that wants to go on meanwhile has a thread for all of it, digests included;
        # several have Orbax's, which know how to wait for each other.
        enable_async_checkpointing=jax.process_count() > 1,
    )
    manager = ocp.CheckpointManager(folder.absolute(), options=options)
    try:
        if not read_only:
            policy.earlier = _accuracies(manager)
        yield manager
    finally:
        manager.close()


def save(manager: ocp.CheckpointManager, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; when this returns it is on the disk, whole.

    Arguments and errors are those of :func:`begin`.
    """
    begin(manager, checkpoint)
    manager.wait_until_finished()


def begin(manager: ocp.CheckpointManager, checkpoint: Checkpoint) -> None:
    """Begin to write a checkpoint; ``manager.wait_until_finished()`` waits until it is there.

    With one process it is when this returns. Of several every one must call this, with the same
    arrays, whose memory is theirs again when it returns.

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
    meta = {
        **checkpoint.meta,
        "digests": digests,
        "structure": {
            "training": _structure(checkpoint.training),
            "evaluation": _structure(checkpoint.evaluation),
        },
    }
    manager.save(
        checkpoint.step,
        args=ocp.args.Composite(
            training=ocp.args.StandardSave(_for_all(checkpoint.training)),
            evaluation=ocp.args.StandardSave(_for_all(checkpoint.evaluation)),
            meta=ocp.args.JsonSave({**meta, "digest": _text_digest(meta)}),
        ),
        metrics=None if accuracy is None else {"accuracy": accuracy},
        force=True,
    )


def on_host(tree: Any) -> Any:
    """A copy in the host's memory, which stays whatever is done with the arrays afterwards.

    Random keys stay arrays of JAX's: as plain numbers they would be restored as such.
    """
    leaves, structure = jax.tree.flatten(tree)
    for leaf in leaves:
        leaf.copy_to_host_async()  # All are under way before one is waited for.

    def copied(leaf: jax.Array) -> Any:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jnp.copy(leaf) if is_key else np.array(leaf)

    return jax.tree.unflatten(structure, map(copied, leaves))


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
        tree = processes.local_copy(tree)
    # Without its description a random key comes back as plain numbers.
    if _digest(tree) != meta["digests"][name] or _structure(tree) != _structure(abstract):
        raise DamagedError(
            f"checkpoint {step} is damaged: the arrays of {name!r} are not those that were saved"
        )
    return tree


@contextmanager
def _reading(step: int) -> Iterator[None]:
    """Tell damage from what is no fault of the checkpoint: no memory, no permission, no disk.

    Raises:
        DamagedError: the storage format says that what was saved is not there.
        OSError: it cannot be read.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while type(cause) is Exception and cause.__cause__ is not None:
            # So does Orbax wrap what a single array's reading raises.
            cause = cause.__cause__
        if isinstance(cause, _DAMAGES):
            raise _damaged(step, cause) from error
        # TensorStore raises ValueError for everything, and says what it is in its first word.
        if isinstance(cause, ValueError) and _DAMAGE.match(str(cause)):
            raise _damaged(step, cause) from error
        if isinstance(cause, ValueError) and _ENVIRONMENT.match(str(cause)):
            raise OSError(errno.EIO, _first_line(cause)) from error
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _damaged(step: int, error: BaseException) -> DamagedError:
    return DamagedError(f"checkpoint {step} is damaged: {_first_line(error)}")


def read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The JSON part of a checkpoint, verified.

    Raises:
        DamagedError: it is not what was saved.
    """
    with _reading(step):
        arguments = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = manager.restore(step, args=arguments)["meta"]
        # Checkpoints of earlier versions have neither.
        if "structure" in meta or "digest" in meta:
            digest = meta.pop("digest")
            if digest != _text_digest(meta):
                raise DamagedError(f"checkpoint {step} is damaged: its description was changed")
    return meta


def restore_training(
    manager: ocp.CheckpointManager, step: int, abstract: Any
) -> tuple[Any, dict[str, Any]]:
    """What training goes on with, verified: ``(training, meta)``.

    Args:
        manager: from :func:`open_checkpoints`.
        step: of the checkpoint.
        abstract: a pytree of the same structure, of arrays or ``jax.ShapeDtypeStruct``.

    Raises:
        DamagedError: it is not what was saved; a digest or the storage format shows it.
        StructureError: it holds other arrays than `abstract`.
        OSError: it cannot be read.
    """
    return _restore(manager, step, "training", abstract)


def restore_evaluation(
    manager: ocp.CheckpointManager, step: int, abstract: Any
) -> tuple[Any, dict[str, Any]]:
    """The weights and statistics to evaluate, verified: ``(evaluation, meta)``.

    Args and errors are those of :func:`restore_training`.
    """
    return _restore(manager, step, "evaluation", abstract)


def _restore(
    manager: ocp.CheckpointManager, step: int, name: str, abstract: Any
) -> tuple[Any, dict[str, Any]]:
    meta = read_meta(manager, step)
    if "structure" in meta:
        _check_structure(step, meta["structure"][name], _structure(abstract))
    with _reading(step):
        try:
            return _restore_item(manager, step, name, abstract, meta), meta
        except ValueError as error:
            # It has the structure that is asked for, and Orbax's own note of it is gone.
            if "structure" in meta and str(error).startswith("pytree structure error"):
                raise _damaged(step, error) from error
            raise


def list_steps(manager: ocp.CheckpointManager) -> list[int]:
    """The steps that have a checkpoint, oldest first."""
    return sorted(manager.all_steps())


def best_step(manager: ocp.CheckpointManager) -> int | None:
    """The step of the most accurate checkpoint, the newest of equals; None without any."""
    return most_accurate(_accuracies(manager))


def _accuracies(manager: ocp.CheckpointManager) -> dict[int, float]:
    """Of each checkpoint that has one; a damaged one has none, and cannot be the best."""
    found = {}
    for step in list_steps(manager):
        try:
            accuracy = read_meta(manager, step).get("accuracy")
        except DamagedError:
            continue
        if accuracy is not None:
            found[step] = accuracy
    return found


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
