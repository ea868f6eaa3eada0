"""What a pipeline does for a batch, in pieces that are compiled one by one.

A piece's numbers do not depend on which others share its device.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from lls_jax.models import Network
from lls_jax.rules import Rule, Targets
from lls_jax.steps.local import make_units
from lls_jax.steps.reach import ReachingUnit, UnitRun, make_reaching_units
from lls_jax.steps.reach_schedule import Move, Reach, brings_own_loss, check_reach, schedule
from lls_jax.steps.slice_plan import Cuts, check_cuts
from lls_jax.training import BlockState, Optimizer

States = dict[str, BlockState]
_Key = TypeVar("_Key")
_Kept = TypeVar("_Kept")


class Work(NamedTuple):
    """A batch on its way through the units.

    Attributes:
        x: the next unit's input; at the end the logits.
        labels: what the blocks are told of it.
        step: the number of this update.
        losses: by unit, ``[1]``.
        runs: of units that have still to learn from it.
        coming: at a unit's output, a loss's gradient on its way down, by unit and loss.
        total: at a unit's output, the sum of all that has come so far.
    """

    x: jax.Array
    labels: Targets
    step: int
    losses: Mapping[int, jax.Array] = {}
    runs: Mapping[int, UnitRun] = {}
    coming: Mapping[tuple[int, int], jax.Array] = {}
    total: Mapping[int, jax.Array] = {}


class Pieces(NamedTuple):
    """A network's step, to be done piece by piece.

    Attributes:
        names: of the states that each unit updates.
        moves: of a step, in order.
        do: ``do(move, places, keys, states, work) -> (states, work)`` dispatches a move on its
            unit's device, `places[unit]`. It returns at once.
    """

    names: list[tuple[str, ...]]
    moves: tuple[Move, ...]
    do: Callable[..., tuple[States, Work]]


def make_pieces(
    model: Network,
    rule: Rule,
    tx: Optimizer,
    reach: Reach = 1,
    remat_above: int | None = None,
    slice_above: int | None = None,
) -> Pieces:
    """The compiled pieces of a step.

    With a reach of 1 a unit runs and learns in one piece. Else it runs, passes gradients down and
    learns in a piece each.

    Args are those of :func:`lls_jax.training.make_train_step`.

    Raises:
        ValueError: `reach` is no number of blocks, or not one a loss, or the rule has no local
            losses; or `remat_above` or `slice_above` is below 1, or both are given.
    """
    reach = check_reach(model, rule, reach)
    cuts = Cuts(remat_above, slice_above)
    check_cuts(cuts)
    units = make_units(model, rule, tx, cuts)
    names = [unit.names for unit in units]
    if reach == 1:
        updates = [jax.jit(unit.update, donate_argnums=0) for unit in units]
        moves = tuple(Move("run", index, index) for index in range(len(units)))
        return Pieces(names, moves, _learn_at_once(names, updates))
    reaching = make_reaching_units(model, rule, tx, cuts)
    return Pieces(names, tuple(schedule(len(units), reach)), _learn_later(reaching, reach))


def _enter(work: Work, unit: int, places: Sequence[Any]) -> Work:
    """A batch at a unit, which may lie on another device than the one below."""
    if unit and places[unit] == places[unit - 1]:
        return work
    x, labels = jax.device_put((work.x, work.labels), places[unit])
    return work._replace(x=x, labels=labels)


def _learn_at_once(
    names: list[tuple[str, ...]], updates: Sequence[Callable[..., Any]]
) -> Callable[..., tuple[States, Work]]:
    def do(
        move: Move, places: Sequence[Any], keys: Any, states: States, work: Work
    ) -> tuple[States, Work]:
        unit = move.unit
        work = _enter(work, unit, places)
        own = tuple(states[name] for name in names[unit])
        new, loss, x = updates[unit](own, work.x, work.labels, keys[places[unit]], work.step)
        states = {**states, **dict(zip(names[unit], new))}
        return states, work._replace(x=x, losses={**work.losses, unit: loss})

    return do


def _without(key: _Key, kept: Mapping[_Key, _Kept]) -> dict[_Key, _Kept]:
    """All but one, whose memory is free when the last piece that needs it is done."""
    return {other: one for other, one in kept.items() if other != key}


class _Compiled(NamedTuple):
    run: Callable[..., UnitRun]
    pass_on: Callable[..., jax.Array]
    update: Callable[..., tuple[BlockState, ...]]


def _compile(unit: ReachingUnit) -> _Compiled:
    def update(opt_states: Any, states: Any, unit_run: UnitRun, gradient: Any) -> Any:
        whole = (state._replace(opt_state=own) for own, state in zip(opt_states, states))
        return unit.update(tuple(whole), unit_run, gradient)

    return _Compiled(
        jax.jit(unit.run),
        jax.jit(unit.pass_on, static_argnums=2),
        # What the gradients need has the parameters too, whose memory cannot be given back so.
        jax.jit(update, donate_argnums=0),
    )


def _learn_later(units: list[ReachingUnit], reach: Reach) -> Callable[..., tuple[States, Work]]:
    compiled = [_compile(unit) for unit in units]
    add = jax.jit(jnp.add)

    def do(
        move: Move, places: Sequence[Any], keys: Any, states: States, work: Work
    ) -> tuple[States, Work]:
        unit, names = move.unit, units[move.unit].names
        own = tuple(states[name] for name in names)
        if move.kind == "run":
            work = _enter(work, unit, places)
            run = compiled[unit].run(own, work.x, work.labels, keys[places[unit]], work.step)
            return states, work._replace(
                x=run.passed_on,
                losses={**work.losses, unit: run.loss},
                runs={**work.runs, unit: run},
            )
        if move.kind == "pass":
            here = unit, move.loss
            given = work.coming.get(here)
            brings_own = brings_own_loss(move, len(units), reach)
            passed = compiled[unit].pass_on(work.runs[unit], given, brings_own)
            if places[unit] != places[unit - 1]:
                passed = jax.device_put(passed, places[unit - 1])
            before = work.total.get(unit - 1)
            total = passed if before is None else add(before, passed)
            return states, work._replace(
                coming={**_without(here, work.coming), (unit - 1, move.loss): passed},
                total={**work.total, unit - 1: total},
            )
        new = compiled[unit].update(
            tuple(state.opt_state for state in own),
            tuple(state._replace(opt_state=()) for state in own),
            work.runs[unit],
            work.total.get(unit),
        )
        return {**states, **dict(zip(names, new))}, work._replace(
            runs=_without(unit, work.runs),
            coming={at: one for at, one in work.coming.items() if at[0] != unit},
            total=_without(unit, work.total),
        )

    return do
