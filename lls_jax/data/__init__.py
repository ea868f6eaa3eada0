"""Data sets: what they are, preparing them, loading them, and batches made on the device."""

from lls_jax.data.own import Dataset
from lls_jax.data.specs import SPECS, DatasetSpec, get_spec
from lls_jax.data.storage import Split, load
from lls_jax.errors import DatasetError

__all__ = ["SPECS", "Dataset", "DatasetError", "DatasetSpec", "Split", "get_spec", "load"]
