"""The baseline: no local losses, one gradient from the classifier through every block."""

import dataclasses

from lls_jax.rules.base import Rule, check_options


@dataclasses.dataclass(frozen=True)
class Backpropagation(Rule):
    """Stands where a local rule does, and tells the training step to backpropagate.

    Attributes:
        num_classes: number of classes.
    """

    num_classes: int

    def __post_init__(self) -> None:
        """Raise ValueError for an option that is out of its range."""
        check_options(self.num_classes)

    @property
    def name(self) -> str:
        """``bp``."""
        return "bp"
