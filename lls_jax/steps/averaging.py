"""From a training state to the weights and statistics that are to be evaluated."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lls_jax.models import Network
from lls_jax.models.whitening import is_from_images
from lls_jax.steps.state import TrainState


def is_schedule_free(opt_state: Any) -> bool:
    """Whether an optimizer state holds a schedule-free one, at any depth."""
    return bool(_schedule_free_states(opt_state))


def check_averaged(state: TrainState) -> None:
    """Raise ValueError for weights that a schedule-free optimizer trains, which answer wrongly."""
    if is_schedule_free(state.opt_state) and int(state.step):
        raise ValueError(
            f"`state` is after {int(state.step)} steps of a schedule-free optimizer, whose weights "
            "are not those to evaluate; give `fit(...).evaluation`, or `lls_jax.evaluation."
            "evaluation_state(model, state, image_batches)` with a few batches of training images."
        )


def _schedule_free_states(opt_state: Any) -> list[Any]:
    kind = optax.contrib.ScheduleFreeState
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


@jax.jit
def _averages(opt_states: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    # In one program, for blocks of one shape too.
    return {name: _average(opt_states[name], block) for name, block in params.items()}


@jax.jit
def _average(opt_state: Any, params: Any) -> Any:
    """``x = y + (1 - 1 / b1) (z - y)`` wherever the optimizer has a `z`; the rest as it is."""
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    averaged = dict(paths)
    for state in _schedule_free_states(opt_state):
        # Of masked and fixed parameters there is none.
        for path, z in jax.tree_util.tree_flatten_with_path(state.z)[0]:
            beyond = (1.0 - 1.0 / state.b1).astype(z.dtype)
            averaged[path] = averaged[path] + beyond * (z - averaged[path])
    return jax.tree.unflatten(structure, averaged.values())


def averaged_params(state: TrainState) -> dict[str, Any]:
    """The schedule-free average of the weights; the weights themselves with other optimizers.

    Args:
        state: a training state; its optimizer state may wrap the schedule-free one.

    Returns:
        Parameters with the structure of ``state.params``.
    """
    if not is_schedule_free(state.opt_state):
        return state.params
    if isinstance(state.opt_state, dict) and state.opt_state.keys() == state.params.keys():
        # One a block; bp has one in all, which may be a dict too: of optax.named_chain.
        return _averages(state.opt_state, state.params)
    return _average(state.opt_state, state.params)


def _is_float(leaf: jax.Array) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _is_averaged(batch_stats: Any) -> list[bool]:
    """Of each leaf, whether it is an average over batches."""
    leaves = jax.tree_util.tree_leaves_with_path(batch_stats)
    return [_is_float(leaf) and not is_from_images(path) for path, leaf in leaves]


@functools.partial(jax.jit, static_argnums=0)
def batch_share(
    model: Network, params: Any, batch_stats: Any, image: jax.Array, number: jax.Array | int
) -> tuple[Any, Any]:
    """A batch's share of the running statistics, and the share of the old ones in the new ones.

    Whatever a block's momentum is: ``running = kept * old + new``, at zero and by its derivative.
    Both have the structure of `batch_stats`; where that is no average they mean nothing.

    Args:
        model: the network.
        params: the weights.
        batch_stats: its statistics.
        image: normalised ``[batch, height, width, channels]``.
        number: of the batch, from 0: all that its dropout depends on.
    """
    dropout_key = jax.random.fold_in(jax.random.key(0), number)
    leaves, structure = jax.tree.flatten(batch_stats)
    averaged = _is_averaged(batch_stats)

    def whole(averages: list[jax.Array]) -> Any:
        left = iter(averages)
        return jax.tree.unflatten(
            structure, [next(left) if own else leaf for leaf, own in zip(leaves, averaged)]
        )

    def run(averages: list[jax.Array]) -> list[jax.Array]:
        _, new = model.apply(params, whole(averages), image, train=True, dropout_key=dropout_key)
        return [leaf for leaf, own in zip(jax.tree.leaves(new), averaged) if own]

    own_leaves = [leaf for leaf, own in zip(leaves, averaged) if own]
    zeros, ones = ([fill(leaf) for leaf in own_leaves] for fill in (jnp.zeros_like, jnp.ones_like))
    new, kept = jax.jvp(run, (zeros,), (ones,))
    return whole(new), whole(kept)


def estimate_batch_stats(
    model: Network, params: dict[str, Any], batch_stats: dict[str, Any], images: Iterable[jax.Array]
) -> dict[str, Any]:
    """Estimate BatchNorm's statistics anew, at given weights.

    Args:
        model: the network.
        params: the weights.
        batch_stats: statistics that give the structure.
        images: batches of training images, normalised ``[batch, height, width, channels]``.

    Returns:
        The mean of the batches' own means and variances, with dropout as in training: the same in
        each call. A block may average its running statistics with any momentum, but linearly;
        integers, what was taken from images before training, and what no batch changes stay as they
        are.

    Raises:
        ValueError: there are statistics, and no batch to estimate them from.
    """
    total: Any = None
    count = 0
    for image in images:
        new, kept = batch_share(model, params, batch_stats, image, count)
        count += 1
        total = new if total is None else _add(total, new)
    if total is None and any(_is_averaged(batch_stats)):
        raise ValueError(
            f"`images` has no batch, from which the statistics of model {model.name!r} are to be "
            "estimated; give a few (an iterator that was gone over before has none left)."
        )
    return batch_stats if total is None else mean_of_shares(batch_stats, total, kept, count)


# One program for all statistics, where each would be a launch by itself.
@jax.jit
def _add(total: Any, new: Any) -> Any:
    return jax.tree.map(jnp.add, total, new)


@jax.jit
def mean_of_shares(batch_stats: Any, total: Any, kept: Any, count: Any) -> Any:
    """The statistics from the sum of `count` batches' :func:`batch_share`."""
    olds, structure = jax.tree.flatten(batch_stats)
    rows = zip(olds, jax.tree.leaves(total), jax.tree.leaves(kept), _is_averaged(batch_stats))
    return jax.tree.unflatten(
        structure,
        [
            jnp.where(kept < 1, total / count / (1 - kept), old) if averaged else old
            for old, total, kept, averaged in rows
        ],
    )


def evaluation_state(model: Network, state: TrainState, images: Iterable[jax.Array]) -> TrainState:
    """The state to evaluate: averaged weights and statistics that belong to them.

    With a schedule-free optimizer, the average of the weights, and BatchNorm statistics estimated
    anew at that average: the running ones belong to other weights, and every accuracy would be
    wrong. With any other optimizer the state itself.

    Args:
        model: the network.
        state: a training state; not modified.
        images: batches of training images (the published runs take 50), drawn only if needed.

    Returns:
        A state for :func:`lls_jax.training.predict`.

    Raises:
        ValueError: statistics are to be estimated, and `images` has no batch.

    References:
        Defazio et al., "The Road Less Scheduled", https://arxiv.org/abs/2405.15682.
    """

    def estimate(params: dict[str, Any], batch_stats: dict[str, Any]) -> dict[str, Any]:
        return estimate_batch_stats(model, params, batch_stats, images)

    return average_state(state, estimate)


def average_state(
    state: TrainState, estimate: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
) -> TrainState:
    """:func:`evaluation_state` with ``estimate(params, batch_stats)`` for the new statistics."""
    if not is_schedule_free(state.opt_state):
        return state
    params = averaged_params(state)
    return state._replace(
        params=params,
        batch_stats=estimate(params, state.batch_stats),
        # It belongs to other weights; nobody shall train on from here.
        opt_state=None,
        # The next step takes the state's own memory.
        step=jnp.copy(state.step),
        key=jnp.copy(state.key),
    )
