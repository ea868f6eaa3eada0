"""AugLocal: an auxiliary network a block, built like the blocks that come after it."""

import dataclasses
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp

from lls_jax.rules import auxiliary
from lls_jax.rules.base import LocalRule, check_options
from lls_jax.rules.cross_entropy import smoothed_cross_entropy
from lls_jax.rules.surroundings import LaterBlock, Surroundings

Self = TypeVar("Self", bound="AugLocal")

# How far depths fall toward the network's end: to half, and one.
_FALL = 0.5


def auxiliary_depth(depth: int, index: int, num_blocks: int) -> int:
    """Blocks of the auxiliary network of a block: `depth` at first, about half of it at the end.

    >>> [auxiliary_depth(6, index, 11) for index in range(10)]
    [6, 6, 5, 5, 5, 5, 4, 4, 4, 4]
    """
    fallen = _FALL * index / max(num_blocks - 2, 1)
    return max(1, round(depth * (1.0 - fallen) + fallen))


def chosen_blocks(index: int, num_blocks: int, depth: int) -> list[int]:
    """The later blocks that are copied: spread evenly up to the last one, which is among them.

    >>> chosen_blocks(0, 9, 3), chosen_blocks(7, 9, 3), chosen_blocks(8, 9, 3)
    ([3, 5, 8], [8], [])
    """
    left = num_blocks - 1 - index
    depth = min(depth, left)
    return [round(index + left / depth * i) for i in range(1, depth + 1)]


def copy_stride(kernel: Any) -> int:
    """Of a copy's first convolution: 2, which halves the sides, at twice the width or more.

    Args:
        kernel: an array ``[3, 3, channels, features]``, or its shape and dtype.
    """
    return 2 if kernel.shape[3] >= 2 * kernel.shape[2] else 1


@dataclasses.dataclass(frozen=True)
class AugLocal(LocalRule):
    """A fresh small network, of widths that the blocks after this one have, reads the classes.

    ``loss = CE(W mean(f(a)) + b, y)``, where ``f`` copies the design, never the weights, of
    :func:`auxiliary_depth` later blocks, evenly spread (:func:`chosen_blocks`): a residual block
    for a residual block, else a 3x3 convolution, BatchNorm, ReLU; dense layers where the later
    block takes vectors. A copy halves the sides wherever its width is twice that of what it is
    given, or more. The mean is over the image; where there is one copy at most, BatchNorm follows.

    Attributes:
        num_classes: number of classes, ``K``.
        auxiliary_depth: copies at the first block, ``d``, at least 1.
        label_smoothing: of the cross-entropy, in [0, 1).
        index: of the block; :meth:`in_network` sets it.
        later: the blocks after it, likewise. Outside of a :class:`lls_jax.models.Network` there are
            none, and `f` is nothing, unless you give them.

    References:
        Ma, Wu, Si, Tan, "Scaling Supervised Local Learning with Augmented Auxiliary Networks",
        ICLR 2024, https://arxiv.org/abs/2402.17318.
    """

    compares_examples: ClassVar[bool] = True

    num_classes: int
    auxiliary_depth: int = 2
    label_smoothing: float = 0.0
    index: int = 0
    later: tuple[LaterBlock, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for an option that is out of its range."""
        check_options(self.num_classes, label_smoothing=self.label_smoothing)
        if self.auxiliary_depth < 1:
            raise ValueError(f"`auxiliary_depth` is {self.auxiliary_depth}; it must be at least 1.")

    def in_network(self: Self, surroundings: Surroundings) -> Self:
        """The rule that knows the later blocks' designs; see :meth:`Rule.in_network`."""
        return dataclasses.replace(self, index=surroundings.block_index, later=surroundings.later)

    def init(
        self, key: jax.Array, activation_shape: tuple[int, ...], pool_size: int
    ) -> dict[str, Any]:
        """The copies ``copy_0``, ..., ``output``, and ``norm`` where BatchNorm follows the mean.

        Args are those of :meth:`Rule.init`.
        """
        del pool_size
        count = self.index + 1 + len(self.later)
        depth = auxiliary_depth(self.auxiliary_depth, self.index, count)
        chosen = [self.later[i - self.index - 1] for i in chosen_blocks(self.index, count, depth)]
        keys = jax.random.split(key, len(chosen) + 1)
        width, spatial = activation_shape[-1], len(activation_shape) == 3
        params: dict[str, Any] = {}
        for i, block in enumerate(chosen):
            spatial = spatial and len(block.shape) == 3
            params[f"copy_{i}"] = _init_copy(keys[i], width, block, spatial)
            width = block.shape[-1]
        if len(chosen) <= 1:
            params["norm"] = auxiliary.init_normalization(width)
        params["output"] = auxiliary.init_linear(keys[-1], width, self.num_classes)
        return params

    def loss(
        self,
        params: dict[str, Any],
        seen: jax.Array,
        labels: jax.Array,
        *,
        pool_size: int | None,
    ) -> jax.Array:
        """The local loss, a float32 scalar; see :meth:`LocalRule.loss`."""
        del pool_size
        x = seen.astype(jnp.float32)
        # Which copy is what, its parameters' shapes say.
        copies = [name for name in params if name.startswith("copy_")]
        for i in range(len(copies)):
            x = _apply_copy(params[f"copy_{i}"], x)
        x = auxiliary.average_over_space(x)
        if "norm" in params:
            x = auxiliary.normalize(params["norm"], x)
        logits = auxiliary.linear(params["output"], x)
        return smoothed_cross_entropy(logits, labels, self.label_smoothing)


def _init_copy(key: jax.Array, width: int, block: LaterBlock, spatial: bool) -> dict[str, Any]:
    features = block.shape[-1]
    norm = auxiliary.init_normalization(features)
    if not spatial:
        return {"kernel": auxiliary.init_linear(key, width, features)["kernel"], "norm": norm}
    keys = jax.random.split(key, 3)
    params = {"kernel": auxiliary.init_convolution(keys[0], width, features), "norm": norm}
    if not block.residual:
        return params
    params["second"] = auxiliary.init_convolution(keys[1], features, features)
    params["second_norm"] = auxiliary.init_normalization(features)
    if width != features:
        params["shortcut"] = auxiliary.init_linear(keys[2], width, features)["kernel"]
        params["shortcut_norm"] = auxiliary.init_normalization(features)
    return params


def _apply_copy(params: dict[str, Any], x: jax.Array) -> jax.Array:
    kernel = params["kernel"]
    if kernel.ndim == 2:
        x = auxiliary.average_over_space(x) @ kernel
        return jax.nn.relu(auxiliary.normalize(params["norm"], x))
    stride = copy_stride(kernel)
    h = auxiliary.normalize(params["norm"], auxiliary.convolve(kernel, x, stride))
    if "second" not in params:
        return jax.nn.relu(h)
    h = auxiliary.convolve(params["second"], jax.nn.relu(h))
    h = auxiliary.normalize(params["second_norm"], h)
    if "shortcut" in params:
        x = auxiliary.normalize(
            params["shortcut_norm"], x[:, ::stride, ::stride] @ params["shortcut"]
        )
    return jax.nn.relu(h + x)
