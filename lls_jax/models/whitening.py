"""What a network takes from training images before its first step."""

import dataclasses
from typing import Any

import jax

from lls_jax.blocks import FROM_IMAGES
from lls_jax.layers.whitening import whitening_filters


@dataclasses.dataclass(frozen=True)
class Whitening:
    """Sets the filters of a :class:`lls_jax.blocks.WhitenedConvPair`, wherever it is.

    Attributes:
        images: how many training images are wanted, at most.
        epsilon: of :func:`lls_jax.layers.whitening.whitening_filters`.
    """

    images: int = 5000
    epsilon: float = 5e-4

    def __call__(self, batch_stats: dict[str, Any], images: jax.Array) -> dict[str, Any]:
        """The statistics of a network with the filters of these images.

        Args:
            batch_stats: by block name, as :meth:`Network.init` draws them.
            images: normalised training images ``[count, height, width, channels]``.
        """

        def replaced(path: Any, leaf: jax.Array) -> jax.Array:
            if not is_from_images(path):
                return leaf
            return whitening_filters(images[: self.images], leaf.shape[0], self.epsilon)

        return jax.tree_util.tree_map_with_path(replaced, batch_stats)


def is_from_images(path: Any) -> bool:
    """Whether a leaf of a network's statistics was taken from images, and is no running average."""
    return jax.tree_util.DictKey(FROM_IMAGES) in path
