"""What a row costs over bp, counted: parameters and multiply-accumulates."""

from typing import NamedTuple

from experiments.board.config import CHECKPOINTED
from experiments.board.rows import Row
from experiments.parameters import count_parameters
from experiments.reach_options import of_losses
from experiments.setup import Task
from lls_jax.accounting import Account, account
from lls_jax.rules import Backpropagation


class Costs(NamedTuple):
    """Of a row.

    Attributes:
        extra_parameters: that the rule has beside the network's.
        macs_over_bp: multiply-accumulates of an image's training step over those of ``bp``; None
            where the operations of the network or the rule are not known.
    """

    extra_parameters: int
    macs_over_bp: float | None


def count(task: Task, row: Row) -> Costs:
    """Count what a row costs.

    Args:
        task: network and rule.
        row: which line of the board it belongs to.
    """
    extra = sum(block.rule for block in count_parameters(task))
    shape, whole = task.spec.input_shape, Backpropagation(task.spec.num_classes)
    try:
        ours = account(task.model, task.rule, shape, of_losses(row.reach))
        bp = account(task.model, whole, shape)
    except ValueError:
        return Costs(extra, None)
    macs = _macs(ours)
    if row.rule == CHECKPOINTED:
        # Its blocks are computed twice; the classifier is not.
        macs += sum(cost.forward for cost in ours.blocks[:-1])
    return Costs(extra, macs / _macs(bp))


def _macs(counts: Account) -> int:
    return sum(counts.total(name) for name in ("forward", "weight_gradient", "signal"))
