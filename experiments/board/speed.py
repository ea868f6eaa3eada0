"""How fast rows step and what memory that takes, measured apart from training, in turns."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.board.content import Key
from experiments.board.rows import Row, train_config
from experiments.config import TrainConfig
from experiments.setup import make_task
from experiments.suites import report, training
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
    (own_bp,) = (one for row, one in zip(rows, raced) if row.rule == "bp")
    environment = folders.environment()
    measured = {}
    for row, one in zip(rows, raced):
        # Turn by turn: what else the machine did met both sides of a ratio.
        ratios = _turns(own_bp) / _turns(one)
        speed = float(np.median(ratios))
        step_ms = (bp_step_ms or own_bp["step_ms"]) / speed
        measured[row.model, row.rule, row.reach] = {
            "model": row.model,
            "rule": row.rule,
            "reach": row.reach,
            "speed_over_bp": speed,
            "speed_over_bp_quartiles": [float(q) for q in np.quantile(ratios, (0.25, 0.75))],
            "step_ms": step_ms,
            "images_per_second": 1e3 * recipe.batch_size / step_ms,
            "temporary_mb": one["temporary_mb"],
            "temporaries_over_bp": one["temporaries_over_bp"],
            "device": environment["device"],
            "versions": environment["packages"],
        }
    return measured


def _turns(one: report.Row) -> np.ndarray:
    """Milliseconds of each turn."""
    return np.reshape(one["all_step_ms"], (-1, training.STEPS_A_TURN)).sum(axis=1)
