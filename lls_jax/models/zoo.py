"""The published models, as data."""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from lls_jax.blocks import ConvBlock, DenseBlock, DepthwiseSeparableBlock
from lls_jax.models.network import BlockSpec, Network


@dataclasses.dataclass(frozen=True)
class _Design:
    """A model but for its classes and dtype.

    Attributes:
        blocks: of a dtype, in order.
        smallest_image: least height and width.
    """

    blocks: Callable[[Any], tuple[BlockSpec, ...]]
    smallest_image: int = 1


def _small_conv(widths: tuple[int, int, int], dense: int, dense_pool: int) -> _Design:
    """Three convolutions and a dense block."""

    def blocks(dtype: Any) -> tuple[BlockSpec, ...]:
        first, second, third = (ConvBlock(width, dtype) for width in widths)
        return (
            BlockSpec(first, pool_size=4, max_pool=True),
            BlockSpec(second, pool_size=2, max_pool=True),
            BlockSpec(third, pool_size=2, average_pool=2, flatten=True),
            BlockSpec(DenseBlock(dense, dtype), dense_pool),
        )

    return _Design(blocks, smallest_image=4)


def _vgg(
    layers: tuple[int | str, ...], average_pool: int, dense: tuple[int, ...], dense_pool: int
) -> _Design:
    """Convolutions by width, "M" where 2x2 max-pooling follows; then dense blocks."""

    def blocks(dtype: Any) -> tuple[BlockSpec, ...]:
        specs: list[BlockSpec] = []
        for layer in layers:
            if isinstance(layer, int):
                pool_size = 2 if specs else 4
                specs.append(BlockSpec(ConvBlock(layer, dtype), pool_size))
            else:
                specs[-1] = dataclasses.replace(specs[-1], max_pool=True)
        specs[-1] = dataclasses.replace(specs[-1], average_pool=average_pool, flatten=True)
        for width in dense:
            specs.append(BlockSpec(DenseBlock(width, dtype), dense_pool))
        return tuple(specs)

    return _Design(blocks, smallest_image=2 ** layers.count("M"))


def _mobilenet(layers: tuple[tuple[int, int, int], ...]) -> _Design:
    """A convolution of stride 2, then depthwise-separable blocks: (width, stride, pool size)."""

    def blocks(dtype: Any) -> tuple[BlockSpec, ...]:
        first = BlockSpec(ConvBlock(32, dtype, stride=2), pool_size=8)
        rest = [
            BlockSpec(DepthwiseSeparableBlock(width, dtype, stride), pool_size)
            for width, stride, pool_size in layers
        ]
        rest[-1] = dataclasses.replace(rest[-1], average_pool=1, flatten=True)
        return (first, *rest)

    return _Design(blocks)


_MOBILENET_SMALL = (
    (64, 1, 4), (128, 2, 4), (128, 1, 4), (256, 2, 2), (256, 1, 2), (512, 2, 2), (512, 1, 2),
)  # fmt: skip

_MODELS: dict[str, _Design] = {
    "small_conv": _small_conv((32, 64, 128), 512, 512),
    "small_conv_l": _small_conv((96, 192, 512), 1024, 2048),
    "vgg8": _vgg((128, 256, "M", 256, 256, "M", 512, "M", 512), 2, (1024,), 1024),
    "vgg11": _vgg(
        (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512), 8, (4096, 4096), 2048
    ),
    "mobilenet_v1": _mobilenet((*_MOBILENET_SMALL, *[(512, 1, 2)] * 4, (1024, 2, 1), (1024, 1, 1))),
    "mobilenet_v1_small": _mobilenet(_MOBILENET_SMALL),
}

NAMES = tuple(_MODELS)


def make(name: str, *, num_classes: int, dropout: float = 0.0, dtype: Any = jnp.float32) -> Network:
    """Make a model by its name.

    Args:
        name: ``small_conv``, ``small_conv_l``, ``vgg8``, ``vgg11``, ``mobilenet_v1`` or
            ``mobilenet_v1_small``.
        num_classes: outputs of the classifier, at least 2.
        dropout: rate of the dropout after each pooling between blocks, in [0, 1).
        dtype: of the activations, float32 or bfloat16; parameters are float32.

    Returns:
        An immutable, hashable description; :meth:`Network.init` draws its parameters.

    Raises:
        ValueError: an unknown name, or an option out of its range.

    >>> [spec.module.features for spec in make("small_conv", num_classes=10).specs]
    [32, 64, 128, 512]

    References:
        Apolinario, Roy, Roy, https://arxiv.org/abs/2405.15868, section 4.
    """
    if name not in _MODELS:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown model {name!r}; expected one of {', '.join(NAMES)}.{hint}")
    if num_classes < 2:
        raise ValueError(f"`num_classes` is {num_classes}; it must be at least 2.")
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` is {dropout}; it must lie in [0, 1).")
    design = _MODELS[name]
    specs = tuple(
        dataclasses.replace(spec, dropout=dropout)
        if spec.max_pool or spec.average_pool is not None
        else spec
        for spec in design.blocks(dtype)
    )
    return Network(
        name=name,
        num_classes=num_classes,
        specs=specs,
        dtype=dtype,
        smallest_image=design.smallest_image,
    )
