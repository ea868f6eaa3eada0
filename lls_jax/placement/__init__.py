"""Where a training step runs: on one device, block by block on several, or on shards of a batch."""

from lls_jax.placement.batch_shards import data_parallel
from lls_jax.placement.block_pipeline import measure_units, partition, pipeline
from lls_jax.placement.execution import Execution, of_step, single

__all__ = [
    "Execution",
    "data_parallel",
    "measure_units",
    "of_step",
    "partition",
    "pipeline",
    "single",
]
