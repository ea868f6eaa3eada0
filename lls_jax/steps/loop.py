"""Many training steps in one launch: an epoch's inside, compiled, with its data on the device."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from lls_jax.data import batches
from lls_jax.data.specs import DatasetSpec
from lls_jax.steps.state import TrainState


def make_loop(
    step: Callable[..., Any],
    add: Callable[[Any, Any], Any],
    spec: DatasetSpec,
    augmentation: str,
    batch_size: int,
) -> Callable[..., tuple[TrainState, Any]]:
    """A compiled loop over training steps that draws and augments its batches itself.

    Args:
        step: ``step(state, batch) -> (state, metrics)``, as of
            :func:`lls_jax.training.make_train_step`.
        add: ``add(sums, metrics) -> sums``; `metrics` has ``label`` too.
        spec: the data set.
        augmentation: of :func:`lls_jax.data.batches.make_augment`.
        batch_size: examples a step.

    Returns:
        ``loop(state, sums, data, permutation, key, index, count) -> (state, sums)``: `count`
        steps from batch `index` of the epoch on; the key of a batch is ``fold_in(key, step)``. The
        number of steps is no constant of the program: one compilation serves all, and the numbers
        do not depend on how an epoch is cut into launches. State and sums are donated.
    """
    augment = batches.make_augment(spec, augmentation)
    mirrors = batches.alternates(augmentation)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def loop(
        state: TrainState,
        sums: Any,
        data: batches.DeviceSplit,
        permutation: jax.Array,
        key: jax.Array,
        index: jax.Array,
        count: jax.Array,
    ) -> tuple[TrainState, Any]:
        def body(i: jax.Array, carry: tuple[TrainState, Any]) -> tuple[TrainState, Any]:
            state, sums = carry
            batch = batches.gather(data, permutation, index + i, batch_size, mirrors)
            image = augment(jax.random.fold_in(key, state.step), batch["image"])
            state, metrics = step(state, {"image": image, "label": batch["label"]})
            return state, add(sums, {**metrics, "label": batch["label"]})

        return jax.lax.fori_loop(0, count, body, (state, sums))

    return loop
