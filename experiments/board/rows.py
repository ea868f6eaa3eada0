"""What a board's rows are: a rule with a reach on a network, at a budget."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments import several_rules
from experiments.board.config import ACCUMULATED, CHECKPOINTED
from experiments.config import TrainConfig, folder_name
from experiments.reach_options import TypedReach

# The rule that a row of another name trains with, and the way its step is made.
_WAYS = {CHECKPOINTED: "checkpointed", ACCUMULATED: "accumulated"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the board.

    Attributes:
        model: network.
        rule: rule, or a way to save memory with ``bp``.
        reach: blocks that a local loss teaches, as of a training run.
        budget: ``epochs`` or ``seconds``.
        amount: of the budget.
    """

    model: str
    rule: str
    reach: TypedReach
    budget: str
    amount: float

    @property
    def baseline(self) -> str | None:
        """As :class:`experiments.suites.training.Entrant` has it."""
        return _WAYS.get(self.rule)

    @property
    def trained_rule(self) -> str:
        """The rule of its runs."""
        return "bp" if self.baseline else self.rule

    @property
    def shown_budget(self) -> str:
        """For a table."""
        unit = {"epochs": " epochs", "seconds": " s"}[self.budget]
        return f"{self.amount:g}{unit}".replace("1 epochs", "1 epoch", self.amount == 1)

    @property
    def label(self) -> str:
        """For a legend."""
        return f"{self.rule}, reach {self.reach}" if self.reach != 1 else self.rule

    @property
    def runs(self) -> "Row":
        """The row whose runs it has: with bp's steps, bp's own; the numbers are the same."""
        if self.rule == CHECKPOINTED and self.budget == "epochs":
            return dataclasses.replace(self, rule="bp")
        return self

    @property
    def name(self) -> str:
        """Of its runs' folders, but for the seed."""
        rule = folder_name(self.runs.rule)
        reach = folder_name(str(self.reach))
        return f"{self.model}-{rule}-r{reach}-{self.amount:g}{self.budget}"

    def folder(self, workdir: pathlib.Path, seed: int) -> pathlib.Path:
        """Of one of its runs."""
        return workdir / "runs" / f"{self.name}-s{seed}"

    def values(self) -> dict[str, Any]:
        """As board.json has it."""
        return dataclasses.asdict(self)


def row_of(values: Mapping[str, Any]) -> Row:
    """The row of an entry of board.json, which has more beside it."""
    return Row(**{field.name: values[field.name] for field in dataclasses.fields(Row)})


def rows_of(
    recipe: TrainConfig,
    models: list[str],
    rules: list[str],
    reaches: list[TypedReach],
    budgets: dict[str, float],
) -> list[Row]:
    """All combinations; a rule without local losses has a reach of 1 alone.

    Raises:
        UserError: an unknown name, or an option out of range.
    """
    asked = [
        Row(model, rule, reach, budget, amount)
        for (budget, amount), model, rule, reach in itertools.product(
            budgets.items(), models, rules, reaches
        )
    ]
    rows = (dataclasses.replace(row, reach=train_config(recipe, row).reach) for row in asked)
    return [*dict.fromkeys(rows)]


def train_config(recipe: TrainConfig, row: Row, **changes: Any) -> TrainConfig:
    """A run's config, without what its rule or its network has no use for.

    Args:
        recipe: what all runs have in common.
        row: which line of the board it belongs to.
        **changes: fields of the config.

    Raises:
        UserError: an unknown name, or an option out of range.
    """
    whole = dataclasses.replace(
        recipe, model=row.model, rule=row.trained_rule, reach=row.reach, **changes
    )
    return several_rules.without_useless(whole)
