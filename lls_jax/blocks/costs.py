"""Multiply-accumulates and memory of each kind of block, for one image."""

import math
from collections.abc import Callable
from typing import NamedTuple

from lls_jax.blocks.linen import ConvBlock, DenseBlock, DepthwiseSeparableBlock
from lls_jax.blocks.residual import ResidualBlock, ResidualStem
from lls_jax.blocks.speedrun import ConvPair, WhitenedConvPair

Shape = tuple[int, ...]


class BlockCost(NamedTuple):
    """Of one block: MACs forward, of its own gradient, and on to its input; elements kept.

    `within` are those of its own gradient that a second way down through the block takes again.
    """

    forward: int
    gradient: int
    to_input: int
    kept: int
    within: int = 0

    def followed_by(self, other: "BlockCost") -> "BlockCost":
        """Of this block and another, through both of which one gradient goes."""
        return BlockCost(
            forward=self.forward + other.forward,
            gradient=self.gradient + other.gradient + other.to_input,
            to_input=self.to_input,
            kept=self.kept + other.kept,
            within=self.within + other.within + other.to_input,
        )


def _conv(x: Shape, out: Shape) -> BlockCost:
    macs = 9 * x[-1] * math.prod(out)
    return BlockCost(macs, macs, macs, math.prod(x) + math.prod(out))


def dense_cost(x: Shape, out: Shape) -> BlockCost:
    """Of a layer that multiplies with a matrix."""
    macs = x[-1] * out[-1]
    return BlockCost(macs, macs, macs, x[-1] + out[-1])


def _separable(x: Shape, out: Shape) -> BlockCost:
    middle = math.prod(out[:-1]) * x[-1]
    forward = 9 * middle + middle * out[-1]
    # Inside the block the gradient passes the pointwise layer; kept are the inputs of two
    # convolutions and of two normalisations.
    gradient = forward + middle * out[-1]
    kept = math.prod(x) + 2 * middle + math.prod(out)
    return BlockCost(forward, gradient, 9 * middle, kept, within=middle * out[-1])


def _residual(x: Shape, out: Shape) -> BlockCost:
    area, width = math.prod(out[:-1]), out[-1]
    first, second = 9 * area * x[-1] * width, 9 * area * width * width
    shortcut = area * x[-1] * width if x != out else 0
    forward = first + second + shortcut
    # Inside the block the gradient passes the second convolution. Kept are the inputs of the
    # convolutions, of the normalisations, and of the last ReLU.
    kept = math.prod(x) + (5 if shortcut else 4) * math.prod(out)
    return BlockCost(forward, forward + second, first + shortcut, kept, within=second)


def _pair(x: Shape, out: Shape) -> BlockCost:
    width = out[-1]
    first, second = 9 * math.prod(x) * width, 9 * math.prod(out) * width
    # Inputs of the convolutions, of the maxima, and of BatchNorm and GELU, which keep no more.
    kept = math.prod(x) + math.prod(x[:-1]) * width + 3 * math.prod(out)
    return BlockCost(first + second, first + 2 * second, first, kept, within=second)


def _whitened_pair(x: Shape, out: Shape) -> BlockCost:
    patch = 4 * x[-1]
    whitened = (x[0] - 1, x[1] - 1, 2 * patch)
    pair = _pair(whitened, out)
    # The filters are frozen; their bias takes a gradient to the pair's input.
    forward = pair.forward + math.prod(whitened) * patch
    kept = pair.kept + math.prod(whitened)
    within = pair.within + pair.to_input
    to_input = math.prod(whitened) * patch
    return BlockCost(forward, pair.gradient + pair.to_input, to_input, kept, within)


BLOCK_COSTS: dict[type, Callable[[Shape, Shape], BlockCost]] = {
    ResidualStem: _conv,
    ResidualBlock: _residual,
    ConvPair: _pair,
    WhitenedConvPair: _whitened_pair,
    ConvBlock: _conv,
    DenseBlock: dense_cost,
    DepthwiseSeparableBlock: _separable,
}
