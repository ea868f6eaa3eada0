"""How fast rows step and what memory that takes, measured apart from training, in turns."""

from collections.abc import Sequence
from typing import Any

from experiments.board.content import Key
from experiments.board.rows import Row, train_config
from experiments.config import TrainConfig
from experiments.setup import make_task
from experiments.suites import training
from lls_jax.runs import folder as folders


def measure(
    recipe: TrainConfig, rows: Sequence[Row], turns: int, bp_step_ms: float | None
) -> dict[Key, dict[str, Any]]:
    """Let rows of one network take turns of a few steps, ``bp`` among them.

    Args:
        recipe: what all runs have in common.
        rows: of one network, each once.
        turns: that each takes.
        bp_step_ms: what ``bp`` took in an earlier race of this board, whose clock all rows go by:
            the machine may be in another mood today. None where there was none.

    Returns:
        Figures by model, rule and reach.
    """
    if not any(row.rule == "bp" for row in rows):
        # What the others are compared to.
        rows = [Row(rows[0].model, "bp", 1, rows[0].budget, rows[0].amount), *rows]
    entrants = [training.Entrant(train_config(recipe, row), row.baseline) for row in rows]
    raced = training.race(entrants, turns, recipe.seed, make=make_task)
    (own_bp,) = (one["step_ms"] for row, one in zip(rows, raced) if row.rule == "bp")
    clock = (bp_step_ms or own_bp) / own_bp
    environment = folders.environment()
    return {
        (row.model, row.rule, row.reach): {
            "model": row.model,
            "rule": row.rule,
            "reach": row.reach,
            "step_ms": clock * one["step_ms"],
            "images_per_second": one["images_per_second"] / clock,
            "speed_over_bp": one["speed_over_bp"],
            "temporary_mb": one["temporary_mb"],
            "temporaries_over_bp": one["temporaries_over_bp"],
            "device": environment["device"],
            "versions": environment["packages"],
        }
        for row, one in zip(rows, raced)
    }
