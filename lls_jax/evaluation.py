"""From a training state to the weights and statistics that are to be judged."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lls_jax.models import Network
from lls_jax.training import TrainState


def is_schedule_free(opt_state: Any) -> bool:
    """Whether an optimiser state holds a schedule-free one, at any depth."""
    return bool(_schedule_free_states(opt_state))


def _schedule_free_states(opt_state: Any) -> list[Any]:
    kind = optax.contrib.ScheduleFreeState
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def _average(opt_state: Any, params: Any) -> Any:
    """The average of what the optimiser knows; the rest, which no training changes, as it is."""
    trained = _restricted(params, opt_state.z)
    return _merged(params, _average_trained(opt_state, trained))


@jax.jit
def _average_trained(opt_state: Any, trained: Any) -> Any:
    return optax.contrib.schedule_free_eval_params(opt_state, trained)


def _restricted(params: Any, like: Any) -> Any:
    if not isinstance(params, dict):
        return params
    return {name: _restricted(params[name], like[name]) for name in like}


def _merged(params: Any, changed: Any) -> Any:
    if not isinstance(params, dict):
        return changed
    return {
        name: _merged(value, changed[name]) if name in changed else value
        for name, value in params.items()
    }


def averaged_params(state: TrainState) -> dict[str, Any]:
    """The schedule-free average of the weights; the weights themselves with other optimisers.

    Args:
        state: a training state; its optimiser state may wrap the schedule-free one.

    Returns:
        Parameters with the structure of ``state.params``.
    """
    if not is_schedule_free(state.opt_state):
        return state.params
    if isinstance(state.opt_state, dict):
        return {
            name: _average(_schedule_free_states(state.opt_state[name])[0], block)
            for name, block in state.params.items()
        }
    return _average(_schedule_free_states(state.opt_state)[0], state.params)


@functools.partial(jax.jit, static_argnums=0)
def _forward_stats(model: Network, params: Any, batch_stats: Any, image: jax.Array) -> Any:
    return model.apply(params, batch_stats, image, train=True)[1]


def estimate_batch_stats(
    model: Network, params: dict[str, Any], batch_stats: dict[str, Any], images: Iterable[jax.Array]
) -> dict[str, Any]:
    """Estimate BatchNorm's statistics anew, at given weights.

    Args:
        model: the network.
        params: the weights.
        batch_stats: statistics that give the structure, and the result where `images` is empty.
        images: batches of training images, normalised ``[batch, height, width, channels]``.

    Returns:
        The mean of the batches' own means and variances.
    """
    total, count = jax.tree.map(jnp.zeros_like, batch_stats), 0
    zeros = total
    for image in images:
        # BatchNorm returns 0.9 * old + 0.1 * batch; from zero that is a tenth of the batch's.
        total = jax.tree.map(jnp.add, total, _forward_stats(model, params, zeros, image))
        count += 1
    if not count:
        return batch_stats
    return jax.tree.map(lambda leaf: leaf / (0.1 * count), total)


def evaluation_state(model: Network, state: TrainState, images: Iterable[jax.Array]) -> TrainState:
    """The state to judge: averaged weights and statistics that belong to them.

    With a schedule-free optimiser, the average of the weights, and BatchNorm statistics estimated
    anew at that average: the running ones belong to other weights, and every accuracy would be
    wrong. With any other optimiser the state itself.

    Args:
        model: the network.
        state: a training state; not modified.
        images: batches of training images (the published runs take 50), drawn only if needed.

    Returns:
        A state for :func:`lls_jax.training.predict`.

    References:
        Defazio et al., "The Road Less Scheduled", https://arxiv.org/abs/2405.15682.
    """
    if not is_schedule_free(state.opt_state):
        return state
    params = averaged_params(state)
    return state._replace(
        params=params,
        batch_stats=estimate_batch_stats(model, params, state.batch_stats, images),
    )
