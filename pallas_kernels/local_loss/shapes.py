"""The local layers of the published models: shapes to tune, to compile and to measure."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.local_loss.cross_entropy import cross_entropy
from pallas_kernels.local_loss.pooling import latent_dim

MODULATIONS = ("none", "vector", "matrix")


class Layer(NamedTuple):
    """A local layer.

    Attributes:
        activation: of one example, ``(height, width, channels)`` or ``(features,)``.
        pool_size: bins along each spatial axis, or along the features.
    """

    activation: tuple[int, ...]
    pool_size: int


# Images of 32x32 pixels; 128x128 for MobileNet. Layers of equal shape are listed once.
LAYERS: dict[str, tuple[Layer, ...]] = {
    "small_conv": (
        Layer((32, 32, 32), 4),
        Layer((16, 16, 64), 2),
        Layer((8, 8, 128), 2),
        Layer((512,), 512),
    ),
    "vgg8": (
        Layer((32, 32, 128), 4),
        Layer((32, 32, 256), 2),
        Layer((16, 16, 256), 2),
        Layer((8, 8, 512), 2),
        Layer((4, 4, 512), 2),
        Layer((1024,), 1024),
    ),
    "mobilenet_v1": (
        Layer((64, 64, 32), 8),
        Layer((64, 64, 64), 4),
        Layer((33, 33, 128), 4),
        Layer((18, 18, 256), 2),
        Layer((10, 10, 512), 2),
        Layer((6, 6, 1024), 1),
    ),
}


class Problem(NamedTuple):
    """The local loss of a layer, on latents that are pooled already.

    Attributes:
        latents: of an example.
        rows: of the projection.
        classes: number of logits.
        modulation: one of :data:`MODULATIONS`.
    """

    latents: int
    rows: int
    classes: int
    modulation: str

    @property
    def params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The head's parameters."""
        shapes = {"vector": (self.rows,), "matrix": (self.rows, self.classes)}
        if self.modulation == "none":
            return {}
        return {"modulation": jax.ShapeDtypeStruct(shapes[self.modulation], jnp.float32)}

    def head(
        self, scores: jax.Array, square: jax.Array, params: dict[str, jax.Array], label: jax.Array
    ) -> jax.Array:
        """The softmax cross-entropy."""
        return cross_entropy(scores, square, params.get("modulation"), label)


def problems(
    layers: Iterable[Layer], modulations: Sequence[str], classes: int, rows: int | None = None
) -> list[Problem]:
    """The local losses of layers, each once.

    Args:
        layers: some.
        modulations: of :data:`MODULATIONS`.
        classes: number of logits.
        rows: of a reduced basis, with a matrix alone; None for as many as classes.
    """
    return list(
        dict.fromkeys(
            Problem(
                latent_dim(layer.activation, layer.pool_size),
                rows if rows and modulation == "matrix" else classes,
                classes,
                modulation,
            )
            for layer in layers
            for modulation in modulations
        )
    )
