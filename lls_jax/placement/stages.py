"""How a network is cut into stages, and in which order a pipeline of them does its work."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lls_jax.steps.reach_schedule import Move


def partition(seconds: Sequence[float], stages: int) -> tuple[int, ...]:
    """Cut a row of costs into consecutive stages, the dearest of which is as cheap as can be.

    Args:
        seconds: cost of each unit, in order.
        stages: how many, at most as many as there are units.

    Returns:
        Units a stage; each at least one.

    Raises:
        ValueError: there are fewer units than stages, or no stage.

    >>> partition([4.0, 1.0, 1.0, 2.0], 2)
    (1, 3)
    """
    count = len(seconds)
    if not 1 <= stages <= count:
        raise ValueError(
            f"{stages} stages for {count} units (the blocks and the classifier); expected 1 to "
            f"{count}."
        )

    @functools.cache
    def best(start: int, stages: int) -> tuple[float, tuple[int, ...]]:
        if stages == 1:
            return sum(seconds[start:]), (count - start,)
        options = []
        for size in range(1, count - start - stages + 2):
            rest, sizes = best(start + size, stages - 1)
            options.append((max(sum(seconds[start : start + size]), rest), (size, *sizes)))
        return min(options)

    return best(0, stages)[1]


def by_unit(seconds: Mapping[Move, float]) -> list[float]:
    """The sums of each unit's pieces.

    >>> by_unit({Move("run", 0, 0): 2.0, Move("run", 1, 1): 1.0, Move("update", 0, 1): 4.0})
    [6.0, 1.0]
    """
    units = max(move.unit for move in seconds) + 1
    return [sum(s for move, s in seconds.items() if move.unit == unit) for unit in range(units)]


class Order(NamedTuple):
    """In which order a pipeline's work is handed to its devices.

    Attributes:
        moves: for each batch: what to do, and whether it is left over from the batch before.
        late: what of a batch is left for the time of the next.
    """

    moves: tuple[tuple[Move, bool], ...]
    late: tuple[Move, ...]


def order(moves: Sequence[Move], stage_of: Sequence[int]) -> Order:
    """The order in which no device waits for a gradient while there is something else to do.

    A device does what it is given in turn. What needs a gradient from a later stage would hold it
    up; it is put off until the unit that it teaches is about to run on the next batch, and what is
    below goes on with that batch meanwhile.

    Args:
        moves: of a step on one device, in order.
        stage_of: each unit's stage.

    >>> from lls_jax.steps.reach_schedule import schedule
    >>> moves, late = order(tuple(schedule(4, 2)), [0, 0, 1, 1])
    >>> [f"{move.kind} {move.unit}" for move in late]
    ['update 1']
    >>> [f"{move.kind} {move.unit}" for move, is_late in moves[:3]]
    ['run 0', 'update 1', 'run 1']
    """
    waits = {}
    # At the output of each unit, whether what has come down so far did from a later stage.
    from_above: dict[int, bool] = {}
    for move in moves:
        unit = move.unit
        if move.kind == "run" or (unit == move.loss and move.kind == "pass"):
            waits[move] = False
        else:
            waits[move] = from_above.get(unit, False)
        if move.kind == "pass":
            is_late = waits[move] or stage_of[unit] != stage_of[unit - 1]
            from_above[unit - 1] = from_above.get(unit - 1, False) or is_late
    late = tuple(move for move in moves if waits[move])
    merged, left = [], list(late)
    for move in moves:
        if waits[move]:
            continue
        if move.kind == "run":
            needed = [i for i, one in enumerate(left) if one[:2] == ("update", move.unit)]
            for _ in range(needed[0] + 1 if needed else 0):
                merged.append((left.pop(0), True))
        merged.append((move, False))
    return Order(tuple(merged), late)
