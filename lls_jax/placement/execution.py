"""How a training step is executed: what the ways to do it have in common, and the plain one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lls_jax.models import Network
from lls_jax.rules import Rule
from lls_jax.training import (
    Batch,
    Metrics,
    Optimizer,
    Reach,
    TrainState,
    TrainStep,
    make_train_step,
)


class Execution(NamedTuple):
    """A way to train: a state is put in, advanced by steps, and taken out again.

    Attributes:
        enter: ``enter(state) -> running``: put a state where it is trained.
        step: ``step(running, batch) -> (running, metrics)``; `metrics` has ``label`` too, where the
            other metrics are. It returns before the devices are done, and consumes `running`.
        leave: ``leave(running) -> state``, on the first device; `running` stays valid.
        place: puts what is added to the metrics, a tree of arrays, where they are.
        sharding: of the batches, where they are shared out; else None.
        train_step: ``train_step(state, batch) -> (state, metrics)``, the step as a function that
            a compiled loop may have inside; None where a step is no single program.
        with_rule: ``with_rule(rule) -> execution``: the same with another rule, like one with
            another implementation of its losses; None where that is not measured.
    """

    enter: Callable[[TrainState], Any]
    step: Callable[[Any, Batch], tuple[Any, Metrics]]
    leave: Callable[[Any], TrainState]
    place: Callable[[Any], Any]
    sharding: jax.sharding.NamedSharding | None = None
    train_step: TrainStep | None = None
    with_rule: Callable[[Rule], "Execution"] | None = None


def single(
    model: Network,
    rule: Rule,
    tx: Optimizer,
    remat_above: int | None = None,
    reach: Reach = 1,
    slice_above: int | None = None,
) -> Execution:
    """One compiled step for the whole network, on the default device.

    Args are those of :func:`lls_jax.training.make_train_step`.
    """
    return of_step(
        make_train_step(
            model, rule, tx, reach=reach, remat_above=remat_above, slice_above=slice_above
        )
    )


def of_step(train_step: TrainStep) -> Execution:
    """A step of your own, on the default device.

    Args:
        train_step: ``step(state, batch) -> (state, metrics)`` as of
            :func:`lls_jax.training.make_train_step`.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        state, metrics = train_step(state, batch)
        return state, {**metrics, "label": batch["label"]}

    def same(tree: Any) -> Any:
        return tree

    return Execution(same, step, same, same, train_step=train_step)
