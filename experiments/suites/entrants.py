"""Who takes part in a race: a rule with a reach, or backpropagation with a way to save memory."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import optax

from experiments.config import TrainConfig
from experiments.suites import baselines
from lls_jax import training
from lls_jax.models import Network

# Micro-batches that gradients are accumulated over.
PARTS = 4
# Ways to save memory with bp, by name.
BASELINE_STEPS: dict[str, Callable[[Network, optax.GradientTransformation], training.TrainStep]] = {
    "checkpointed": baselines.make_checkpointed_step,
    "accumulated": functools.partial(baselines.make_accumulating_step, parts=PARTS),
}


class Entrant(NamedTuple):
    """What takes part in a race.

    Attributes:
        config: model, width, rule, reach, groups, batch size, precision and kernels count.
        baseline: of rule ``bp``: ``"checkpointed"``, ``"accumulated"``, or None for the plain step.
    """

    config: TrainConfig
    baseline: str | None = None

    @property
    def label(self) -> str:
        """The rule, and what is done about its memory."""
        if self.baseline == "accumulated":
            return f"{self.config.rule}, {PARTS} x {self.config.batch_size // PARTS}"
        return f"{self.config.rule}, {self.baseline}" if self.baseline else self.config.rule


def with_baselines(config: TrainConfig) -> list[Entrant]:
    """A config of rule ``bp``, and the ways to save its memory that its batch size allows."""
    names = [
        name for name in BASELINE_STEPS if name != "accumulated" or not config.batch_size % PARTS
    ]
    return [Entrant(config), *(Entrant(config, name) for name in names)]
