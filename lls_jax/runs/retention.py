"""Which of a run's checkpoints stay on the disk."""

from collections.abc import Mapping, Sequence
from typing import Any

# The one before the newest is there for when the newest is damaged.
_NEWEST = 2


def most_accurate(accuracies: Mapping[int, float]) -> int | None:
    """The step with the highest accuracy, the newest of equals; None of none.

    >>> most_accurate({3: 75.0, 4: 70.0, 5: 75.0})
    5
    """
    return max(accuracies, key=lambda step: (accuracies[step], step), default=None)


class NewestAndBest:
    """A preservation policy of Orbax's: the newest two checkpoints, and the most accurate one.

    (Orbax's own policy for the best knows the metrics of what this process has written, and would
    let the best checkpoint of an earlier start go.)

    Attributes:
        earlier: the accuracies of checkpoints of earlier starts, by step.
    """

    def __init__(self) -> None:
        self.earlier: Mapping[int, float] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Whether each checkpoint stays.

        Args:
            checkpoints: with ``step`` and ``metrics`` (``{"accuracy"}`` or None), oldest first.
            context: of no use here.
        """
        del context
        steps = [one.step for one in checkpoints]
        accuracies = {step: self.earlier[step] for step in steps if step in self.earlier}
        accuracies |= {one.step: one.metrics["accuracy"] for one in checkpoints if one.metrics}
        kept = {*sorted(steps)[-_NEWEST:], most_accurate(accuracies)}
        return [step in kept for step in steps]
