"""A network of two blocks, for tests that are about runs: ``--model small_models:two_blocks``."""

import dataclasses

from lls_jax.blocks import ConvBlock
from lls_jax.models import BlockSpec, Network


def two_blocks(num_classes, width=1.0, dropout=0.0):
    """Ten channels, each block pooled after; what follows it is dropped out."""
    spec = BlockSpec(ConvBlock(round(10 * width)), pool_size=2, max_pool=True, dropout=dropout)
    last = dataclasses.replace(spec, max_pool=False, average_pool=2, flatten=True)
    return Network("two_blocks", num_classes, (spec, last))
