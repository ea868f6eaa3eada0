"""What a rule may ask for beside its block's activation: the network around it, and the image."""

from typing import NamedTuple, TypeAlias

import jax


class LaterBlock(NamedTuple):
    """The design of a block further up: nothing that it has learned.

    Attributes:
        shape: of its activation for one example: ``(height, width, channels)``, ``(length,
            channels)`` or ``(features,)``.
        residual: whether it is a residual block.
    """

    shape: tuple[int, ...]
    residual: bool = False


class Surroundings(NamedTuple):
    """The network that a rule's block stands in.

    Attributes:
        block_index: of the block, from 0.
        image_shape: of one example of the network's input.
        later: the blocks after it, in order.
    """

    block_index: int
    image_shape: tuple[int, ...]
    later: tuple[LaterBlock, ...]


class LabeledImages(NamedTuple):
    """The labels, and the images that they are of, for a rule that needs both.

    Attributes:
        labels: integers ``[batch]``.
        image: the network's input, normalised, ``[batch, height, width, channels]``.
    """

    labels: jax.Array
    image: jax.Array


# What a block is told of its examples: integers ``[batch]``, or these with the images.
Targets: TypeAlias = jax.Array | LabeledImages


def labels_of(targets: Targets) -> jax.Array:
    """The labels alone, ``[batch]``."""
    return targets.labels if isinstance(targets, LabeledImages) else targets
