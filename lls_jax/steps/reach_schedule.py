"""In which order units run, pass gradients on and learn, where losses reach below their block."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from lls_jax.arguments import whole_number
from lls_jax.rules import Rule, has_local_losses


def check_reach(rule: Rule, reach: int) -> int:
    """How many blocks a loss teaches, its own and those below it, as Python's own number.

    Raises:
        ValueError: the rule's losses cannot reach so far, or it is no number of blocks.
    """
    reach = whole_number("reach", reach, 1)
    if reach > 1 and isinstance(rule, Rule) and not has_local_losses(rule):
        raise ValueError(
            f"`reach` is {reach}, but rule {rule.name!r} has no local losses that could reach "
            "further; leave it out, or use a local rule."
        )
    return reach


class Move(NamedTuple):
    """One thing to do for a batch.

    Attributes:
        kind: ``"run"`` a unit forward, with its loss; ``"pass"`` a gradient from its output to its
            input; ``"update"`` it.
        unit: which one; the last is the classifier, alone or with the last block.
        loss: index of the unit whose loss's gradient it is, or whose loss is the last to come.
    """

    kind: Literal["run", "pass", "update"]
    unit: int
    loss: int


def schedule(units: int, reach: int) -> Iterator[Move]:
    """What a step does, in order: at most `reach` units are between their run and their update.

    >>> [f"{move.kind} {move.unit}" for move in schedule(3, 2)]
    ['run 0', 'run 1', 'pass 1', 'update 0', 'run 2', 'pass 2', 'update 2', 'update 1']
    """
    together = lowest_stopping(units, reach) - 1
    for loss in range(units):
        yield Move("run", loss, loss)
        if loss < together:
            continue
        lowest = max(loss - reach + 1, 0)
        for unit in range(loss, lowest - 1, -1):
            if unit > lowest:
                yield Move("pass", unit, loss)
            if unit == lowest or loss == units - 1:
                yield Move("update", unit, loss)


def lowest_stopping(units: int, reach: int) -> int:
    """The lowest unit whose loss does not teach the first; the losses below go down together."""
    return min(units, reach)


def brings_own_loss(move: Move, units: int, reach: int) -> bool:
    """Whether the gradient of a unit's own loss joins what is passed on there."""
    return move.unit == move.loss or move.loss < lowest_stopping(units, reach)
