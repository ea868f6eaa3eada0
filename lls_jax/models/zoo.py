"""The published models, as data."""

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lls_jax import own_parts
from lls_jax.blocks import (
    ConvBlock,
    ConvPair,
    DenseBlock,
    DepthwiseSeparableBlock,
    ResidualBlock,
    ResidualStem,
    ScaledClassifier,
    WhitenedConvPair,
)
from lls_jax.models.block_spec import BlockSpec
from lls_jax.models.network import Network
from lls_jax.models.whitening import Whitening

# From a published width to that of a wider or narrower network.
Scale = Callable[[int], int]


@dataclasses.dataclass(frozen=True)
class _Design:
    """A model but for its classes, its dtype and how wide it is.

    Attributes:
        blocks: of a dtype and a scale of widths, in order.
        smallest_image: least height and width.
        scaled_classifier: whether the classifier has no bias and is divided by its inputs' number.
        whitening: what is taken from training images.
    """

    blocks: Callable[[Any, Scale], tuple[BlockSpec, ...]]
    smallest_image: int = 1
    scaled_classifier: bool = False
    whitening: Whitening | None = None


def _small_conv(widths: tuple[int, int, int], dense: int, dense_pool: int) -> _Design:
    """Three convolutions and a dense block."""

    def blocks(dtype: Any, scale: Scale) -> tuple[BlockSpec, ...]:
        first, second, third = (ConvBlock(scale(width), dtype) for width in widths)
        return (
            BlockSpec(first, pool_size=4, max_pool=True),
            BlockSpec(second, pool_size=2, max_pool=True),
            BlockSpec(third, pool_size=2, average_pool=2, flatten=True),
            BlockSpec(DenseBlock(scale(dense), dtype), dense_pool),
        )

    return _Design(blocks, smallest_image=4)


def _vgg(
    layers: tuple[int | str, ...],
    average_pool: int,
    dense: tuple[int, ...],
    dense_pool: int,
    *,
    scales_dense: bool = True,
    widest_finely_pooled: int = 0,
) -> _Design:
    """Convolutions by width, "M" where 2x2 max-pooling follows; then dense blocks.

    The losses of the first block, and of those no wider than `widest_finely_pooled`, pool to 4x4,
    the others to 2x2.
    """

    def blocks(dtype: Any, scale: Scale) -> tuple[BlockSpec, ...]:
        specs: list[BlockSpec] = []
        for layer in layers:
            if isinstance(layer, int):
                pool_size = 4 if not specs or layer <= widest_finely_pooled else 2
                specs.append(BlockSpec(ConvBlock(scale(layer), dtype), pool_size))
            else:
                specs[-1] = dataclasses.replace(specs[-1], max_pool=True)
        specs[-1] = dataclasses.replace(specs[-1], average_pool=average_pool, flatten=True)
        for width in dense:
            width = scale(width) if scales_dense else width
            specs.append(BlockSpec(DenseBlock(width, dtype), dense_pool))
        return tuple(specs)

    return _Design(blocks, smallest_image=2 ** layers.count("M"))


def _vgg_b(layers: tuple[int | str, ...]) -> _Design:
    """The networks of Nøkland and Eidnes, whose 2x and 3x widen the convolutions alone.

    Their losses' classifiers pool to 2048 latents at most.
    """
    return _vgg(layers, 2, (1024,), 1024, scales_dense=False, widest_finely_pooled=128)


def _resnet(blocks_a_stage: int) -> _Design:
    """The residual networks for CIFAR: a convolution, then three stages of 16, 32, 64 channels."""

    def blocks(dtype: Any, scale: Scale) -> tuple[BlockSpec, ...]:
        specs = [BlockSpec(ResidualStem(scale(16), dtype), pool_size=8)]
        for stage, (width, pool_size) in enumerate(((16, 8), (32, 4), (64, 4))):
            for index in range(blocks_a_stage):
                stride = 2 if stage and not index else 1
                specs.append(BlockSpec(ResidualBlock(scale(width), stride, dtype), pool_size))
        specs[-1] = dataclasses.replace(specs[-1], average_pool=1, flatten=True)
        return tuple(specs)

    return _Design(blocks)


def _mobilenet(layers: tuple[tuple[int, int, int], ...]) -> _Design:
    """A convolution of stride 2, then depthwise-separable blocks: (width, stride, pool size)."""

    def blocks(dtype: Any, scale: Scale) -> tuple[BlockSpec, ...]:
        first = BlockSpec(ConvBlock(scale(32), dtype, stride=2), pool_size=8)
        rest = [
            BlockSpec(DepthwiseSeparableBlock(scale(width), dtype, stride), pool_size)
            for width, stride, pool_size in layers
        ]
        rest[-1] = dataclasses.replace(rest[-1], average_pool=1, flatten=True)
        return (first, *rest)

    return _Design(blocks)


@dataclasses.dataclass(frozen=True)
class _MaximumOverImage:
    """``[batch, height, width, channels]`` to each channel's maximum, ``[batch, channels]``."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.max(x, axis=(1, 2))


def _airbench() -> _Design:
    """The speed-run network: whitening, three pairs of convolutions, a scaled classifier.

    A pair is a local block. On 32x32 pixels the last max-pooling is over all of its 3x3.
    """

    def blocks(dtype: Any, scale: Scale) -> tuple[BlockSpec, ...]:
        return (
            BlockSpec(WhitenedConvPair(scale(64), dtype), pool_size=4),
            BlockSpec(ConvPair(scale(256), dtype), pool_size=2),
            BlockSpec(ConvPair(scale(256), dtype), pool_size=1, then=_MaximumOverImage()),
        )

    # One pixel goes to the whitening's patches; then the sides are halved three times.
    return _Design(blocks, smallest_image=9, scaled_classifier=True, whitening=Whitening())


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
    "vgg8b": _vgg_b((128, 256, "M", 256, 512, "M", 512, "M", 512, "M")),
    "vgg11b": _vgg_b((128, 128, 128, 256, "M", 256, 512, "M", 512, 512, "M", 512, "M")),
    "resnet32": _resnet(5),
    "resnet110": _resnet(18),
    "airbench": _airbench(),
}

NAMES = tuple(_MODELS)


def make(
    name: str,
    *,
    num_classes: int,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
    width: float = 1.0,
    classifier_smoothing: float = 0.0,
) -> Network:
    """Make a model by its name.

    Args:
        name: ``small_conv``, ``small_conv_l``, ``vgg8``, ``vgg11``, ``mobilenet_v1``,
            ``mobilenet_v1_small``, ``vgg8b``, ``vgg11b``, ``resnet32``, ``resnet110`` or
            ``airbench``; or your own, ``"package.module:function"``: the function is called with
            those of the options below that it has parameters for, and returns a
            :class:`Network`; one that it has none for must be left at its default.
        num_classes: outputs of the classifier, at least 2.
        dropout: rate of the dropout after each pooling between blocks, in [0, 1).
        dtype: of the activations, float32 or bfloat16; parameters are float32.
        width: factor of the blocks' published widths, positive; of ``vgg8b`` and ``vgg11b`` those
            of the convolutions alone, as their authors widened them.
        classifier_smoothing: share of the classifier's target spread evenly over the classes, in
            [0, 1).

    Returns:
        An immutable, hashable description; :meth:`Network.init` draws its parameters.

    Raises:
        ValueError: an unknown name, an option out of its range or of no use to a function of your
            own, or what that returns is no such network.

    >>> [spec.module.features for spec in make("small_conv", num_classes=10).specs]
    [32, 64, 128, 512]
    >>> [spec.module.features for spec in make("small_conv", num_classes=10, width=0.25).specs]
    [8, 16, 32, 128]

    References:
        Apolinario, Roy, Roy, https://arxiv.org/abs/2405.15868, section 4.
        Nøkland, Eidnes, https://arxiv.org/abs/1901.06656 (``vgg8b``, ``vgg11b``).
        He, Zhang, Ren, Sun, https://arxiv.org/abs/1512.03385, section 4.2 (``resnet32``,
        ``resnet110``; shortcuts across stages are 1x1 convolutions).
        Jordan, https://arxiv.org/abs/2404.00498 (``airbench``: the network of airbench94, whose
        whitening filters are taken from training images).
    """
    if name not in _MODELS and not own_parts.is_own(name):
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"unknown model {name!r}; expected one of {', '.join(NAMES)}, or your own as "
            f"package.module:function.{hint}"
        )
    if num_classes < 2:
        raise ValueError(f"`num_classes` is {num_classes}; it must be at least 2.")
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` is {dropout}; it must lie in [0, 1).")
    _check_dtype(dtype)
    if not 0 < width < math.inf:
        raise ValueError(f"`width` is {width}; it must be positive.")
    if own_parts.is_own(name):
        return _make_own(name, num_classes, dropout, dtype, width, classifier_smoothing)
    design = _MODELS[name]
    specs = design.blocks(dtype, lambda published: max(1, round(width * published)))
    is_pooled = [spec.max_pool or spec.average_pool is not None for spec in specs]
    if dropout and not any(is_pooled):
        raise ValueError(
            f"`dropout` is {dropout}, and no pooling for it to follow lies between the blocks of "
            f"{name!r}; leave it out."
        )
    specs = tuple(
        dataclasses.replace(spec, dropout=dropout) if pooled else spec
        for spec, pooled in zip(specs, is_pooled)
    )
    return Network(
        name=name,
        num_classes=num_classes,
        specs=specs,
        dtype=dtype,
        smallest_image=design.smallest_image,
        classifier=ScaledClassifier(num_classes, dtype) if design.scaled_classifier else None,
        classifier_smoothing=classifier_smoothing,
        whitening=design.whitening,
    )


def _check_dtype(dtype: Any) -> None:
    """Raise ValueError for a dtype that activations cannot have, or that there is not."""
    try:
        found: Any = jnp.dtype(dtype)
    except TypeError:
        found = repr(dtype)
    if found not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"`dtype` is {found}; it must be float32 or bfloat16.")


def _make_own(
    name: str,
    num_classes: int,
    dropout: float,
    dtype: Any,
    width: float,
    classifier_smoothing: float,
) -> Network:
    own = own_parts.find("model", name)
    options = {
        "dropout": dropout,
        "dtype": dtype,
        "width": width,
        "classifier_smoothing": classifier_smoothing,
    }
    plain = {"dropout": 0, "dtype": jnp.float32, "width": 1, "classifier_smoothing": 0}
    own.check_used({option: v for option, v in options.items() if v != plain[option]})
    return own.make_hashable(
        {"num_classes": num_classes, **options},
        Network,
        "lls_jax.models.Network; return one, made of BlockSpecs.",
    )
