"""Networks: an ordered list of local blocks, transitions between them, and a classifier."""

from lls_jax.models.block_spec import BlockSpec
from lls_jax.models.group import Group
from lls_jax.models.network import Network
from lls_jax.models.whitening import Whitening
from lls_jax.models.zoo import NAMES, make

__all__ = ["NAMES", "BlockSpec", "Group", "Network", "Whitening", "make"]
