"""Where a training step runs: on one device, block by block on several, or on shards of a batch."""

from lls_jax.placement.batch_shards import data_parallel
from lls_jax.placement.block_pipeline import measure_moves, measure_units, pipeline
from lls_jax.placement.execution import Execution, of_step, single
from lls_jax.placement.stages import Order, by_unit, order, partition

__all__ = [
    "Execution",
    "Order",
    "by_unit",
    "data_parallel",
    "measure_moves",
    "measure_units",
    "of_step",
    "order",
    "partition",
    "pipeline",
    "single",
]
