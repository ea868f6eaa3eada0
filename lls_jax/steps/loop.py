"""Many training steps in one launch: an epoch's inside, compiled, with its data on the device.

On a GPU a loop whose number of steps is a constant of the program is only enqueued. One whose
number is an argument copies the loop's condition to the host before each step, and waits for it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lls_jax.data import batches
from lls_jax.data.order import alternates
from lls_jax.data.specs import DatasetSpec
from lls_jax.models import Network
from lls_jax.steps.averaging import batch_share, mean_of_shares
from lls_jax.steps.state import TrainState

# An epoch is not cut into launches so much shorter than they may be to have one program less.
_SHORTEST_EVEN_LAUNCH = 0.5


def launch_length(steps_per_epoch: int, most: int) -> int:
    """Steps of a launch: at most `most`, and such that they divide an epoch where that can be.

    Each length is a program of its own. Where no length from half of `most` on divides the epoch,
    its last launch is shorter, and there are two.

    >>> launch_length(390, 50), launch_length(781, 50), launch_length(20, 50)
    (39, 50, 20)
    """
    if steps_per_epoch <= most:
        return steps_per_epoch
    even = max(length for length in range(1, most + 1) if steps_per_epoch % length == 0)
    return even if even >= _SHORTEST_EVEN_LAUNCH * most else most


class Loop(NamedTuple):
    """Launches of many steps: ``launch(state, sums, data, permutation, key, index, count)``.

    Both do `count` steps from batch `index` of an epoch on, give ``(state, sums)``, and take the
    memory of what they are given of these.

    Attributes:
        constant: compiled for each `count`, a number.
        any_count: compiled once for all of them, and slower on a GPU. For one step too: XLA takes
            a loop of constant length one apart, and its numbers are rounded differently then.
    """

    constant: Callable[..., tuple[TrainState, Any]]
    any_count: Callable[..., tuple[TrainState, Any]]


def make_loop(
    step: Callable[..., Any],
    add: Callable[[Any, Any], Any],
    spec: DatasetSpec,
    augmentation: str,
    batch_size: int,
    sharding: jax.sharding.NamedSharding | None = None,
) -> Loop:
    """A compiled loop over training steps that draws and augments its batches itself.

    Args:
        step: ``step(state, batch) -> (state, metrics)``, as of
            :func:`lls_jax.training.make_train_step`.
        add: ``add(sums, metrics) -> sums``; `metrics` has ``label`` too.
        spec: the data set.
        augmentation: of :func:`lls_jax.data.batches.make_augment`.
        batch_size: examples a step.
        sharding: of the batches, where several devices share them; state, sums and data are then
            whole on each of them.

    Returns:
        The key of a batch is ``fold_in(key, step)``, and the numbers do not depend on how an epoch
        is cut into launches.
    """
    augment = batches.make_augment(spec, augmentation)
    mirrors = alternates(augmentation)

    def loop(
        state: TrainState,
        sums: Any,
        data: batches.DeviceSplit,
        permutation: jax.Array,
        key: jax.Array,
        index: jax.Array,
        count: jax.Array | int,
    ) -> tuple[TrainState, Any]:
        def body(i: jax.Array, carry: tuple[TrainState, Any]) -> tuple[TrainState, Any]:
            state, sums = carry
            batch = batches.gather(data, permutation, index + i, batch_size, sharding, mirrors)
            image = augment(jax.random.fold_in(key, state.step), batch["image"])
            state, metrics = step(state, {"image": image, "label": batch["label"]})
            return state, add(sums, {**metrics, "label": batch["label"]})

        # A scan where JAX knows the number.
        return jax.lax.fori_loop(0, count, body, (state, sums))

    compiled = functools.partial(jax.jit, donate_argnums=(0, 1), **_results(sharding))
    return Loop(compiled(loop, static_argnums=6), compiled(loop))


def _results(sharding: jax.sharding.NamedSharding | None) -> dict[str, Any]:
    """Options of ``jax.jit`` for results that are whole on each device."""
    return {} if sharding is None else {"out_shardings": batches.whole(sharding)}


def make_statistics_loop(
    model: Network,
    spec: DatasetSpec,
    augmentation: str,
    batch_size: int,
    sharding: jax.sharding.NamedSharding | None = None,
) -> Callable[..., Any]:
    """BatchNorm's statistics, estimated anew from training batches in one launch.

    Args:
        model: the network.
        spec: the data set.
        augmentation: of :func:`lls_jax.data.batches.make_augment`.
        batch_size: examples a batch.
        sharding: as of :func:`make_loop`.

    Returns:
        ``estimate(params, batch_stats, data, permutation, key, count) -> batch_stats``: what
        :func:`lls_jax.steps.averaging.estimate_batch_stats` gives for the first `count` batches of
        the epoch in that order; the key of a batch is ``fold_in(key, its number)``.
    """
    augment = batches.make_augment(spec, augmentation)
    mirrors = alternates(augmentation)

    @functools.partial(jax.jit, static_argnums=5, **_results(sharding))
    def estimate(
        params: Any,
        batch_stats: Any,
        data: batches.DeviceSplit,
        permutation: jax.Array,
        key: jax.Array,
        count: int,
    ) -> Any:
        def share(index: Any) -> tuple[Any, Any]:
            batch = batches.gather(data, permutation, index, batch_size, sharding, mirrors)
            image = augment(jax.random.fold_in(key, index), batch["image"])
            return batch_share(model, params, batch_stats, image, index)

        def add(index: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            new, kept = share(index)
            return jax.tree.map(jnp.add, carry[0], new), kept

        nothing = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(share, 0)
        )
        total, kept = jax.lax.fori_loop(0, count, add, nothing)
        return mean_of_shares(batch_stats, total, kept, count)

    return estimate
