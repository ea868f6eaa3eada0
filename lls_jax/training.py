"""Training a network: its state, its step, its predictions.

``lls_jax.fit`` is the whole of it; this is what a loop of your own is made from.
"""

from lls_jax.steps.block import BlockOutput, BlockState, classifier_loss, local_update, start_block
from lls_jax.steps.make import make_train_step, predict
from lls_jax.steps.reach_schedule import Reach
from lls_jax.steps.state import (
    Batch,
    Metrics,
    Optimizer,
    TrainState,
    TrainStep,
    create_train_state,
    num_local_losses,
    optimizer_of,
    state_from_variables,
)

__all__ = [
    "Batch",
    "BlockOutput",
    "BlockState",
    "Metrics",
    "Optimizer",
    "Reach",
    "TrainState",
    "TrainStep",
    "classifier_loss",
    "create_train_state",
    "local_update",
    "make_train_step",
    "num_local_losses",
    "optimizer_of",
    "predict",
    "start_block",
    "state_from_variables",
]
