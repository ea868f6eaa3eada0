"""A network as data: blocks in order, what happens between them, and a classifier."""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from lls_jax.blocks import Classifier, LocalBlock
from lls_jax.rules import Rule
from pallas_kernels.local_loss import adaptive_average_pool

Variables = dict[str, Any]
Kind = Literal["conv", "dense"]


def max_pool(x: jax.Array) -> jax.Array:
    """2x2 maxima at stride 2, ``[batch, height, width, channels]``; an odd last row is dropped."""
    batch, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    # Two maxima of contiguous halves: XLA's window reduction is 10 times slower backward on a CPU.
    pairs = x[:, : 2 * rows, : 2 * columns].reshape(batch, rows, 2, columns, 2 * channels)
    pairs = jnp.maximum(pairs[:, :, 0], pairs[:, :, 1])
    return jnp.maximum(pairs[..., :channels], pairs[..., channels:])


def flatten(x: jax.Array) -> jax.Array:
    """Flatten channel-major, as PyTorch's NCHW does, so that its dense weights fit."""
    return jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One local block of a network, and what follows it.

    Attributes:
        module: the Flax module, called ``module(x, train=...)``.
        pool_size: size to which its local loss pools the activation.
        hidden_dim: width of the feedback matrix, for rules that have one.
        max_pool: whether 2x2 max-pooling follows.
        average_pool: size of the adaptive average pooling that follows, if any.
        flatten: whether the next block takes feature vectors.
        dropout: rate of the dropout that follows the pooling, in [0, 1).
    """

    module: nn.Module
    pool_size: int
    hidden_dim: int | None = None
    max_pool: bool = False
    average_pool: int | None = None
    flatten: bool = False
    dropout: float = 0.0

    def transition(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """From this block's activation to the next block's input.

        Args:
            x: the activation, ``[batch, ...]``.
            dropout_key: random key of the dropout; None leaves it out (evaluation).
        """
        if self.max_pool:
            x = max_pool(x)
        if self.average_pool is not None:
            x = adaptive_average_pool(x, self.average_pool)
        if self.dropout and dropout_key is not None:
            keep = jax.random.bernoulli(dropout_key, 1.0 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1.0 - self.dropout), jnp.zeros_like(x))
        if self.flatten:
            x = flatten(x)
        return x


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of local blocks and a classifier on detached features.

    Attributes:
        name: the model's name.
        num_classes: outputs of the classifier.
        specs: the blocks, in order.
        dtype: of the activations, float32 or bfloat16.
        basis_rows: rows that the published runs give a reduced basis.
        smallest_image: least height and width, in pixels.
    """

    name: str
    num_classes: int
    specs: tuple[BlockSpec, ...]
    dtype: Any = jnp.float32
    basis_rows: int = 20
    smallest_image: int = 1

    @property
    def block_names(self) -> tuple[str, ...]:
        """The blocks' keys in parameters and statistics: ``block_0``, ``block_1``, ..."""
        return tuple(f"block_{i}" for i in range(len(self.specs)))

    def local_blocks(self, rule: Rule) -> tuple[LocalBlock, ...]:
        """The blocks with their local losses."""
        return tuple(
            LocalBlock(spec.module, rule, spec.pool_size, spec.hidden_dim)  # type: ignore[arg-type]
            for spec in self.specs
        )

    def check_image(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless `shape` is that of a batch of large enough images."""
        if len(shape) != 4:
            raise ValueError(
                f"an image batch of shape {shape}; expected [batch, height, width, channels]."
            )
        if min(shape[1:3]) < self.smallest_image:
            raise ValueError(
                f"images of {shape[1]}x{shape[2]} pixels are too small for model {self.name!r}; "
                f"it takes at least {self.smallest_image}x{self.smallest_image}."
            )

    def init(self, rule: Rule, key: jax.Array, image: jax.Array) -> tuple[Variables, Variables]:
        """Draw parameters and BatchNorm statistics.

        Args:
            rule: gives each block its rule's parameters.
            key: random key.
            image: a batch or one image; only its shape counts.

        Returns:
            ``(params, batch_stats)``, both keyed by block name; `params` has ``classifier`` too.

        Raises:
            ValueError: the image is too small for this model.
        """
        shape = (1, *image.shape) if image.ndim == 3 else image.shape
        self.check_image(shape)
        # Shapes alone travel from block to block: nothing is computed on the image.
        x = jax.ShapeDtypeStruct((1, *shape[1:]), self.dtype)
        params: Variables = {}
        batch_stats: Variables = {}
        keys = jax.random.split(key, len(self.specs) + 1)
        named = zip(self.block_names, self.local_blocks(rule), self.specs, keys)
        for name, block, spec, block_key in named:
            variables = jax.jit(block.init)(block_key, jnp.zeros(x.shape, x.dtype))
            params[name] = variables["params"]
            batch_stats[name] = variables["batch_stats"]
            run = functools.partial(block.apply, variables)
            x = jax.eval_shape(lambda x, run=run, spec=spec: spec.transition(run(x), None), x)
        classifier = Classifier(self.num_classes, self.dtype)
        params["classifier"] = classifier.init(keys[-1], jnp.zeros(x.shape, x.dtype))["params"]
        return params, batch_stats

    def apply(
        self,
        params: Variables,
        batch_stats: Variables,
        image: jax.Array,
        *,
        train: bool = False,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Variables]:
        """The whole forward pass, differentiable from end to end.

        Args:
            params: from :meth:`init`.
            batch_stats: from :meth:`init`.
            image: normalised, ``[batch, height, width, channels]``.
            train: whether BatchNorm uses, and averages, this batch's statistics.
            dropout_key: random key of the dropout; None leaves it out.

        Returns:
            Logits, float32 ``[batch, classes]``, and the new statistics.
        """
        x = image.astype(self.dtype)
        new_stats: Variables = {}
        for i, (name, spec) in enumerate(zip(self.block_names, self.specs)):
            variables = {
                "params": params[name]["block"],
                "batch_stats": batch_stats[name]["block"],
            }
            x, updates = spec.module.apply(variables, x, train=train, mutable=["batch_stats"])
            new_stats[name] = {"block": updates["batch_stats"]}
            x = spec.transition(x, fold_in(dropout_key, i))
        return self.classify(params["classifier"], x), new_stats

    def classify(self, params: Variables, features: jax.Array) -> jax.Array:
        """The classifier alone: ``[batch, features]`` to float32 logits ``[batch, classes]``."""
        logits: Any = Classifier(self.num_classes, self.dtype).apply({"params": params}, features)
        return logits


def fold_in(key: jax.Array | None, data: int) -> jax.Array | None:
    """``jax.random.fold_in`` that lets None, no randomness, through."""
    return None if key is None else jax.random.fold_in(key, data)
