"""In which order units run, pass gradients on and learn, where losses reach below their block."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from lls_jax.arguments import whole_number
from lls_jax.models import Network
from lls_jax.rules import Rule, has_local_losses

# How many units a loss teaches, its own and those below it: a number for all losses, or one for
# each, the classifier's last.
Reach = int | Sequence[int]


def _check_each(model: Network, reach: Sequence[int]) -> tuple[int, ...]:
    """A number for each loss, as far as there are blocks below."""
    checked = tuple(whole_number(f"reach[{i}]", own, 1) for i, own in enumerate(reach))
    if len(checked) != model.num_units:
        blocks = f"{len(model.specs)} blocks"
        has = f"{blocks} and the classifier, each with a loss"
        if model.classifier_in_last_group:
            has = f"{blocks}, each with a loss, the last one the classifier's"
        raise ValueError(
            f"`reach` has {len(checked)} numbers ({', '.join(map(str, checked))}), and model "
            f"{model.name!r} has {has}; give {model.num_units} numbers, or one for all losses."
        )
    return tuple(min(own, loss + 1) for loss, own in enumerate(checked))


def check_reach(model: Network, rule: Rule, reach: Reach) -> int | tuple[int, ...]:
    """A reach in Python's own numbers, alike for all that teach the same blocks.

    Raises:
        ValueError: the rule's losses cannot reach so far, it is no number of blocks, or they are
            not as many numbers as there are losses.

    >>> from lls_jax import models, rules
    >>> model, rule = models.make("small_conv", num_classes=10), rules.make("lls", num_classes=10)
    >>> check_reach(model, rule, (3, 2, 2, 2, 2)), check_reach(model, rule, [2, 2, 2, 1, 2])
    (2, (1, 2, 2, 1, 2))
    """
    checked: int | tuple[int, ...]
    if np.ndim(reach) == 0:
        checked = whole_number("reach", reach, 1)
    else:
        checked = _check_each(model, reach)  # type: ignore[arg-type]
        most = max(checked)
        if lowest_taught(len(checked), checked) == lowest_taught(len(checked), most):
            checked = most
    if checked != 1 and isinstance(rule, Rule) and not has_local_losses(rule):
        raise ValueError(
            f"`reach` is {reach}, but rule {rule.name!r} has no local losses that could reach "
            "further; leave it out, or use a local rule."
        )
    return checked


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


def lowest_taught(units: int, reach: Reach) -> tuple[int, ...]:
    """The lowest unit that each unit's loss teaches.

    >>> lowest_taught(4, 2), lowest_taught(4, (1, 2, 1, 2))
    ((0, 0, 1, 2), (0, 0, 2, 2))
    """
    reaches = (reach,) * units if isinstance(reach, int) else reach
    return tuple(max(loss - own + 1, 0) for loss, own in enumerate(reaches))


def schedule(units: int, reach: Reach) -> Iterator[Move]:
    """What a step does, in order: each unit learns as soon as the last gradient for it has come.

    Losses whose way down ends at the same unit go down together, from the highest of them.

    >>> [f"{move.kind} {move.unit}" for move in schedule(3, 2)]
    ['run 0', 'run 1', 'pass 1', 'update 0', 'run 2', 'pass 2', 'update 2', 'update 1']
    >>> [f"{move.kind} {move.unit}" for move in schedule(3, (1, 2, 1))]
    ['run 0', 'run 1', 'pass 1', 'update 1', 'update 0', 'run 2', 'update 2']
    """
    lowest = lowest_taught(units, reach)
    # The highest loss that teaches a unit.
    last = [
        max(loss for loss in range(unit, units) if lowest[loss] <= unit) for unit in range(units)
    ]
    for loss in range(units):
        yield Move("run", loss, loss)
        goes_later = lowest[loss] in lowest[loss + 1 :]
        for unit in range(loss, lowest[loss] - 1, -1):
            if unit > lowest[loss] and not goes_later:
                yield Move("pass", unit, loss)
            if last[unit] == loss:
                yield Move("update", unit, loss)


def brings_own_loss(move: Move, units: int, reach: Reach) -> bool:
    """Whether the gradient of a unit's own loss joins what is passed on there."""
    lowest = lowest_taught(units, reach)
    return lowest[move.unit] == lowest[move.loss]
