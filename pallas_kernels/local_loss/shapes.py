"""The local layers of the published models: shapes to tune, to compile and to measure."""

from collections.abc import Iterator
from typing import NamedTuple

from pallas_kernels.local_loss.config import Problem
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


def problem(layer: Layer, modulation: str, classes: int, dtype: str) -> Problem:
    """A layer's loss as training asks for it: on latents that are pooled already."""
    latents = latent_dim(layer.activation, layer.pool_size)
    return Problem(
        height=0,
        width=0,
        channels=latents,
        pool_size=latents,
        rows=classes,
        classes=classes,
        modulation=modulation,
        dtype=dtype,
    )


def problems(
    models: tuple[str, ...], modulations: tuple[str, ...], classes: int, dtypes: tuple[str, ...]
) -> Iterator[Problem]:
    """Every problem of some models, each once."""
    seen = set()
    for model in models:
        for layer in LAYERS[model]:
            for modulation in modulations:
                for dtype in dtypes:
                    one = problem(layer, modulation, classes, dtype)
                    if one not in seen:
                        seen.add(one)
                        yield one
