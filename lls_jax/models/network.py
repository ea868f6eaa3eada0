"""A network as data: blocks in order, what happens between them, and a classifier."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lls_jax.blocks import Classifier, LocalBlock, ResidualBlock, apply_module, call_options
from lls_jax.models.block_spec import BlockSpec
from lls_jax.models.group import Group
from lls_jax.models.whitening import Whitening
from lls_jax.rules import LaterBlock, Rule, Surroundings
from lls_jax.rules.base import check_classes

Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of local blocks and a classifier on detached features.

    Attributes:
        name: the model's name.
        num_classes: outputs of the classifier.
        specs: the blocks, in order.
        dtype: of the activations, float32 or bfloat16.
        smallest_image: least height and width, in pixels; None: any, and feature vectors too.
        takes_tokens: whether an input is ``[length, channels]``, a sequence and not an image.
        classifier_in_last_group: whether the last block has no loss of its own, and learns from the
            classifier's.
        classifier: a module ``[batch, features] -> [batch, classes]``, float32 logits; None for a
            dense layer with its bias.
        classifier_smoothing: share of the classifier's target that is spread evenly over the
            classes, in [0, 1).
        whitening: what is taken from training images before the first step; None for nothing.
    """

    name: str
    num_classes: int
    specs: tuple[BlockSpec, ...]
    dtype: Any = jnp.float32
    smallest_image: int | None = None
    takes_tokens: bool = False
    classifier_in_last_group: bool = False
    classifier: nn.Module | None = None
    classifier_smoothing: float = 0.0
    whitening: Whitening | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a smoothing that is none."""
        if not 0 <= self.classifier_smoothing < 1:
            raise ValueError(
                f"`classifier_smoothing` is {self.classifier_smoothing}; it must lie in [0, 1)."
            )

    @property
    def block_names(self) -> tuple[str, ...]:
        """The blocks' keys in parameters and statistics: ``block_0``, ``block_1``, ..."""
        return tuple(f"block_{i}" for i in range(len(self.specs)))

    @property
    def num_units(self) -> int:
        """How many learn for themselves: the blocks, and the classifier if not with the last."""
        return len(self.specs) + 1 - self.classifier_in_last_group

    def grouped(self, sizes: tuple[int, ...]) -> "Network":
        """The same network with consecutive blocks put together, each group with one loss.

        Groups of one block each are the published method; all blocks and the classifier in one
        group are backpropagation.

        Args:
            sizes: blocks a group, in order. They add up to the number of blocks, or to one more:
                then the classifier belongs to the last group, and its loss is that group's.

        Returns:
            A network whose blocks are the groups.

        Raises:
            ValueError: the sizes do not add up.

        >>> from lls_jax import models
        >>> len(models.make("small_conv", num_classes=10).grouped((2, 2)).specs)
        2
        """
        count = len(self.specs)
        if min(sizes, default=0) < 1 or sum(sizes) not in (count, count + 1):
            raise ValueError(
                f"groups of {', '.join(map(str, sizes))} blocks; model {self.name!r} has {count} "
                f"blocks, so that they must add up to {count}, or to {count + 1} with the "
                "classifier in the last one."
            )
        with_classifier = sum(sizes) == count + 1
        specs, start = [], 0
        for size in sizes:
            members = self.specs[start : start + size]
            start += size
            if len(members) > 1:
                module = Group(tuple(spec.module for spec in members), members)
                specs.append(dataclasses.replace(members[-1], module=module))
            else:
                # Empty where the classifier is a group by itself, which it always was.
                specs += members
                with_classifier = with_classifier and bool(members)
        return dataclasses.replace(
            self, specs=tuple(specs), classifier_in_last_group=with_classifier
        )

    def block_rules(self, rule: Rule) -> tuple[Any, ...]:
        """The rule of each block.

        Raises:
            ValueError: there are more or fewer rules than blocks, one is made for another number of
                classes, or it is no rule at all.
        """
        if not isinstance(rule, Rule):
            raise ValueError(
                f"`rule` is {rule!r}; expected a rule, like `lls_jax.rules.make('lls_mxm', "
                f"num_classes={self.num_classes})`, or one of your own that derives from "
                "`lls_jax.rules.LocalRule`."
            )
        own = tuple(rule.at_block(i, len(self.specs)) for i in range(len(self.specs)))
        check_classes(own, self.num_classes)
        return own

    def check_image(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless `shape` is that of a batch that this model takes."""
        if self.smallest_image is None:
            if len(shape) not in (2, 3, 4):
                raise ValueError(
                    f"a batch of shape {shape}; expected [batch, height, width, channels], "
                    "[batch, length, channels] or [batch, features]."
                )
            if len(shape) == 3 and not self.takes_tokens:
                raise ValueError(
                    f"a batch of shape {shape}; expected [batch, height, width, channels] or "
                    "[batch, features]. Images of one channel have that axis too: "
                    "`images[..., None]`; for sequences [batch, length, channels] give the network "
                    "`takes_tokens=True`."
                )
            return
        if len(shape) != 4:
            raise ValueError(
                f"an image batch of shape {shape}; expected [batch, height, width, channels]. "
                "Images of one channel have that axis too: `images[..., None]`."
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
            image: a batch or one image, or feature vectors; only its shape counts, but for a model
                with a `whitening`, which is taken from it: normalised training images. A batch of
                tokens ``[batch, length, channels]`` where the model says that it takes tokens.

        Returns:
            ``(params, batch_stats)``, both keyed by block name; `params` has ``classifier`` too.

        Raises:
            ValueError: the image is too small for this model.
        """
        one = (1, 2) if self.takes_tokens else (1, 3)
        shape = (1, *image.shape) if image.ndim in one else image.shape
        self.check_image(shape)
        # One program: block by block, every draw of every block would be compiled by itself.
        params, batch_stats = jax.jit(functools.partial(self._draw, rule, (1, *shape[1:])))(key)
        if self.whitening is not None:
            batch_stats = self.whitening(batch_stats, image.reshape(shape))
        return params, batch_stats

    def _draw(
        self, rule: Rule, shape: tuple[int, ...], key: jax.Array
    ) -> tuple[Variables, Variables]:
        inputs, activations, features = self._shapes(shape)
        params: Variables = {}
        batch_stats: Variables = {}
        keys = jax.random.split(key, len(self.specs) + 1)
        blocks = [
            LaterBlock(tuple(activation.shape[1:]), isinstance(spec.module, ResidualBlock))
            for activation, spec in zip(activations, self.specs)
        ]
        named = zip(self.block_names, self.block_rules(rule), self.specs, keys, inputs)
        for i, (name, own_rule, spec, block_key, x) in enumerate(named):
            around = Surroundings(i, shape[1:], tuple(blocks[i + 1 :]))
            block = LocalBlock(spec.module, own_rule.in_network(around), spec.pool_size)
            variables = block.init(block_key, jnp.zeros(x.shape, x.dtype))
            # A block may have no parameters, or no statistics, of its own.
            params[name] = {"block": {}, **variables.get("params", {})}
            if "fixed" in variables:
                learned = params[name].get("rule", {})
                params[name]["rule"] = {**learned, **variables["fixed"]["rule"]}
            batch_stats[name] = {"block": {}, **variables.get("batch_stats", {})}
        variables = self._classifier.init(keys[-1], jnp.zeros(features.shape, features.dtype))
        params["classifier"] = variables.get("params", {})
        return params, batch_stats

    def _shapes(self, shape: tuple[int, ...]) -> tuple[list[Any], list[Any], Any]:
        """Inputs and activations of the blocks, and the classifier's input, for an image's shape.

        Shapes alone travel from block to block: nothing is computed on the image.
        """
        x = jax.ShapeDtypeStruct(shape, self.dtype)
        inputs, activations = [], []
        for spec in self.specs:

            def run(x: jax.Array, module: nn.Module = spec.module) -> jax.Array:
                options = call_options(module, train=False)
                return module.init_with_output(jax.random.key(0), x, **options)[0]

            inputs.append(x)
            activations.append(jax.eval_shape(run, x))
            x = jax.eval_shape(lambda a, spec=spec: spec.transition(a, None), activations[-1])
        return inputs, activations, x

    def apply(
        self,
        params: Variables,
        batch_stats: Variables,
        image: jax.Array,
        *,
        train: bool = False,
        dropout_key: jax.Array | None = None,
        around: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda run: run,
    ) -> tuple[jax.Array, Variables]:
        """The whole forward pass, differentiable from end to end.

        Args:
            params: from :meth:`init`.
            batch_stats: from :meth:`init`.
            image: normalised, ``[batch, height, width, channels]``.
            train: whether BatchNorm uses, and averages, this batch's statistics.
            dropout_key: random key of the dropout; None leaves it out.
            around: of each block's function, like ``jax.checkpoint``.

        Returns:
            Logits, float32 ``[batch, classes]``, and the new statistics.
        """
        x = image.astype(self.dtype)
        new_stats: Variables = {}
        for i, (name, spec) in enumerate(zip(self.block_names, self.specs)):

            def run(own: Any, stats: Any, x: jax.Array, key: Any, spec: Any = spec) -> Any:
                rngs = {} if key is None else {"dropout": key}
                x, stats = apply_module(spec.module, own, stats, x, train=train, rngs=rngs)
                return spec.transition(x, key), stats

            own, stats = params[name]["block"], batch_stats[name]["block"]
            x, stats = around(run)(own, stats, x, fold_in(dropout_key, i))
            new_stats[name] = {"block": stats}
        return self.classify(params["classifier"], x), new_stats

    def classify(self, params: Variables, features: jax.Array) -> jax.Array:
        """The classifier alone: ``[batch, features]`` to float32 logits ``[batch, classes]``."""
        logits: Any = self._classifier.apply({"params": params}, features)
        return logits

    @property
    def _classifier(self) -> nn.Module:
        return self.classifier or Classifier(self.num_classes, self.dtype)


def fold_in(key: jax.Array | None, data: int) -> jax.Array | None:
    """``jax.random.fold_in`` that lets None, no randomness, through."""
    return None if key is None else jax.random.fold_in(key, data)
