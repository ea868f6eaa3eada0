"""Evaluating a network: with which weights and statistics, and how good they are."""

from lls_jax.runs.evaluate import Evaluation, evaluate
from lls_jax.runs.restore import Restored, restore
from lls_jax.steps.averaging import (
    averaged_params,
    estimate_batch_stats,
    evaluation_state,
    is_schedule_free,
)

__all__ = [
    "Evaluation",
    "Restored",
    "averaged_params",
    "estimate_batch_stats",
    "evaluate",
    "evaluation_state",
    "is_schedule_free",
    "restore",
]
