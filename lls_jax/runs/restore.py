"""From the folder of a run to the weights that were evaluated, through Orbax."""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lls_jax.errors import UserError
from lls_jax.models import Network
from lls_jax.rules import Rule
from lls_jax.runs import checkpoints
from lls_jax.runs import folder as folders
from lls_jax.training import TrainState


class Restored(NamedTuple):
    """A checkpoint's weights.

    Attributes:
        state: for :func:`lls_jax.training.predict` and :func:`lls_jax.evaluation.evaluate`; its
            step is the checkpoint's, and it has no optimizer state.
        meta: the checkpoint's description: ``epochs_done``, ``accuracy`` in percent, ...
    """

    state: TrainState
    meta: dict[str, Any]


def _choose(manager: Any, wanted: str | int) -> int:
    steps = checkpoints.list_steps(manager)
    if not steps:
        raise UserError("this run has no checkpoint yet; train it first.")
    if wanted == "last":
        return steps[-1]
    if wanted == "best":
        best = checkpoints.best_step(manager)
        return steps[-1] if best is None else best
    try:
        step = int(wanted)
    except ValueError:
        raise UserError(f"checkpoint {wanted!r} is neither 'best', 'last' nor a step.") from None
    if step not in steps:
        raise UserError(
            f"there is no checkpoint of step {step}; there are {', '.join(map(str, steps))}."
        )
    return step


def restore(
    workdir: str | pathlib.Path,
    model: Network,
    rule: Rule,
    example_image: jax.Array,
    checkpoint: str | int = "best",
) -> Restored:
    """The weights and statistics of a run, as they were evaluated.

    Args:
        workdir: the run's folder, of :func:`lls_jax.fit` or of a training command.
        model: that was trained.
        rule: that it was trained with.
        example_image: an input ``[1, height, width, channels]``; its shape counts.
        checkpoint: ``"best"``: the most accurate one, on the validation images if there were some;
            ``"last"``: the newest one; or a step.

    Returns:
        The state to predict with, on the default device, verified by its digest.

    Raises:
        UserError: there is no such checkpoint.
        lls_jax.errors.CheckpointError: it is damaged, or of another model or rule.
    """
    folder = pathlib.Path(workdir)
    params, batch_stats = jax.eval_shape(
        lambda key: model.init(rule, key, example_image), jax.random.key(0)
    )
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        {"params": params, "batch_stats": batch_stats},
    )
    if not folders.checkpoints(folder).is_dir():
        raise UserError(f"{folder} has no checkpoint yet; train it first.")
    with checkpoints.open_checkpoints(folders.checkpoints(folder), read_only=True) as manager:
        step = _choose(manager, checkpoint)
        variables, meta = checkpoints.restore_evaluation(manager, step, abstract)
    state = TrainState(jnp.int32(step), **variables, opt_state=None, key=jax.random.key(0))
    return Restored(state, meta)
