"""Flax Linen blocks, and the wrapper that gives a block its local loss."""

from lls_jax.blocks.linen import (
    Classifier,
    ConvBlock,
    Convolution,
    DenseBlock,
    Depthwise,
    DepthwiseSeparableBlock,
    Linear,
    NormalizeActivate,
    Pointwise,
    PoolingBlock,
    running_average,
)
from lls_jax.blocks.local import LocalBlock, apply_module, call_options, run_block
from lls_jax.blocks.residual import ResidualBlock, ResidualStem
from lls_jax.blocks.speedrun import FROM_IMAGES, ConvPair, ScaledClassifier, WhitenedConvPair

__all__ = [
    "FROM_IMAGES",
    "Classifier",
    "ConvBlock",
    "ConvPair",
    "Convolution",
    "DenseBlock",
    "Depthwise",
    "DepthwiseSeparableBlock",
    "Linear",
    "LocalBlock",
    "NormalizeActivate",
    "Pointwise",
    "PoolingBlock",
    "ResidualBlock",
    "ResidualStem",
    "ScaledClassifier",
    "WhitenedConvPair",
    "apply_module",
    "call_options",
    "run_block",
    "running_average",
]
