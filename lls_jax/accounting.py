"""What a rule costs on a model: parameters, multiply-accumulates, memory; counted, not measured.

All figures are for one image. A multiply-accumulate (MAC) is one product that is added to a sum;
pooling, normalisation, activation functions and losses, which are linear in the activations, are
not counted. Zero padding counts as input.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lls_jax.blocks import (
    ConvBlock,
    ConvPair,
    DenseBlock,
    DepthwiseSeparableBlock,
    ResidualBlock,
    ResidualStem,
    WhitenedConvPair,
)
from lls_jax.models import Network
from lls_jax.rules import (
    LLS,
    AugLocal,
    Backpropagation,
    Contrastive,
    Decoupled,
    DeeperForward,
    DirectFeedback,
    DistanceForward,
    InfoPro,
    LocalClassifier,
    MonoForward,
    PredSim,
    RandomLLS,
    Rule,
)
from pallas_kernels.local_loss import latent_dim

Shape = tuple[int, ...]


class Cost(NamedTuple):
    """Counts of one block, or of the classifier, for one image.

    Attributes:
        name: the block's.
        params: its own parameters.
        rule_params: those that its rule adds.
        forward: MACs of the forward pass.
        weight_gradient: MACs of the gradient from its activation to its own weights.
        signal: MACs of making the signal that it learns from: for a local rule its loss, forward
            and back to the activation and the rule's parameters; for ``bp`` the gradient to the
            activation, which is the next layer's; for ``dfa`` and ``drtp`` the projection.
        activation_bytes: of float32 activations that are kept until the block's update.
    """

    name: str
    params: int
    rule_params: int
    forward: int
    weight_gradient: int
    signal: int
    activation_bytes: int


class Account(NamedTuple):
    """A rule's costs on a model.

    Attributes:
        rule: its name.
        blocks: one entry a block, then the classifier's.
        peak_activation_bytes: kept at once, for one image: of all blocks together where a gradient
            waits for the output, of the largest block where each learns by itself.
    """

    rule: str
    blocks: tuple[Cost, ...]
    peak_activation_bytes: int

    def total(self, field: str) -> int:
        """The sum of one of :class:`Cost`'s fields over the blocks."""
        return sum(getattr(cost, field) for cost in self.blocks)


class _Block(NamedTuple):
    """Of one block: MACs forward, of its own gradient, and on to its input; elements kept."""

    forward: int
    gradient: int
    to_input: int
    kept: int


def _conv(x: Shape, out: Shape) -> _Block:
    macs = 9 * x[-1] * math.prod(out)
    return _Block(macs, macs, macs, math.prod(x) + math.prod(out))


def _dense(x: Shape, out: Shape) -> _Block:
    macs = x[-1] * out[-1]
    return _Block(macs, macs, macs, x[-1] + out[-1])


def _separable(x: Shape, out: Shape) -> _Block:
    middle = math.prod(out[:-1]) * x[-1]
    forward = 9 * middle + middle * out[-1]
    # Inside the block the gradient passes the pointwise layer; kept are the inputs of two
    # convolutions and of two normalisations.
    gradient = forward + middle * out[-1]
    return _Block(forward, gradient, 9 * middle, math.prod(x) + 2 * middle + math.prod(out))


def _residual(x: Shape, out: Shape) -> _Block:
    area, width = math.prod(out[:-1]), out[-1]
    first, second = 9 * area * x[-1] * width, 9 * area * width * width
    shortcut = area * x[-1] * width if x != out else 0
    forward = first + second + shortcut
    # Inside the block the gradient passes the second convolution. Kept are the inputs of the
    # convolutions, of the normalisations, and of the last ReLU.
    kept = math.prod(x) + (5 if shortcut else 4) * math.prod(out)
    return _Block(forward, forward + second, first + shortcut, kept)


def _pair(x: Shape, out: Shape) -> _Block:
    width = out[-1]
    first, second = 9 * math.prod(x) * width, 9 * math.prod(out) * width
    kept = math.prod(x) + math.prod(x[:-1]) * width + 4 * math.prod(out)
    return _Block(first + second, first + 2 * second, first, kept)


def _whitened_pair(x: Shape, out: Shape) -> _Block:
    patch = 4 * x[-1]
    whitened = (x[0] - 1, x[1] - 1, 2 * patch)
    pair = _pair(whitened, out)
    # The filters are frozen; their bias takes a gradient to the pair's input.
    forward = pair.forward + math.prod(whitened) * patch
    kept = pair.kept + math.prod(whitened)
    return _Block(forward, pair.gradient + pair.to_input, math.prod(whitened) * patch, kept)


_BLOCKS: dict[type, Callable[[Shape, Shape], _Block]] = {
    ResidualStem: _conv,
    ResidualBlock: _residual,
    ConvPair: _pair,
    WhitenedConvPair: _whitened_pair,
    ConvBlock: _conv,
    DenseBlock: _dense,
    DepthwiseSeparableBlock: _separable,
}


def _periodic(rule: LLS, activation: Shape, latents: int) -> int:
    del activation
    # Scores and back to the latents; with a matrix also logits, back to the scores, and dM.
    matrix = 3 * rule.rows * rule.num_classes if rule.modulation == "matrix" else 0
    return 2 * rule.rows * latents + matrix


def _linear(rule: RandomLLS, activation: Shape, latents: int) -> int:
    del activation
    matrix = 3 * rule.num_classes**2 if rule.modulation == "matrix" else 0
    return (2 if rule.fixed else 3) * rule.num_classes * latents + matrix


def _hidden(activation: Shape) -> int:
    """A layer as wide as the activation: forward, to its input, to its weights."""
    taps = 9 if len(activation) == 3 else 1
    return 3 * taps * activation[-1] * math.prod(activation)


def _predsim(rule: PredSim, activation: Shape, latents: int) -> int:
    # The similarities of a batch depend on its size, and are left out.
    return _hidden(activation) + 3 * rule.num_classes * latents


def _decoupled(rule: Decoupled, activation: Shape, latents: int) -> int:
    return _hidden(activation) + 3 * rule.num_classes * latents


def _contrastive(rule: Contrastive, activation: Shape, latents: int) -> int:
    del activation
    return 3 * rule.width * latents


_SIGNALS: dict[type, Callable[[Any, Shape, int], int]] = {
    MonoForward: lambda rule, activation, latents: 3 * rule.num_classes * math.prod(activation),
    DeeperForward: lambda rule, activation, latents: 2 * rule.num_classes * latents,
    DistanceForward: lambda rule, activation, latents: 3 * rule.num_classes * latents,
    LLS: _periodic,
    RandomLLS: _linear,
    LocalClassifier: _linear,
    PredSim: _predsim,
    Decoupled: _decoupled,
    Contrastive: _contrastive,
    DirectFeedback: lambda rule, activation, latents: rule.num_classes * math.prod(activation),
}


class _Auxiliary(NamedTuple):
    """Of an auxiliary network: MACs forward, and elements that its layers give."""

    forward: int
    kept: int


def _auglocal(params: Any, activation: Shape, image: Shape) -> _Auxiliary:
    del image
    sides, forward, kept = activation[:-1], _size(params["output"]["kernel"]), 0
    for name in sorted(name for name in params if name.startswith("copy_")):
        copy = params[name]
        if copy["kernel"].ndim == 2:
            sides = ()
        elif copy["kernel"].shape[3] >= 2 * copy["kernel"].shape[2]:
            sides = tuple(-(-side // 2) for side in sides)
        kernels = [copy[k] for k in ("kernel", "second", "shortcut") if k in copy]
        forward += math.prod(sides) * sum(kernel.size for kernel in kernels)
        kept += math.prod(sides) * sum(kernel.shape[-1] for kernel in kernels)
    return _Auxiliary(forward, kept)


def _infopro(params: Any, activation: Shape, image: Shape) -> _Auxiliary:
    classifier = params["classifier"]
    sides = activation[:-1] if len(activation) == 3 else (1, 1)
    area = math.prod(-(-side // 2) if sides[0] > 8 else side for side in sides)
    forward = area * classifier["kernel"].size
    forward += classifier["hidden"]["kernel"].size + classifier["output"]["kernel"].size
    kept = area * classifier["kernel"].shape[-1]
    if "decoder" in params:
        kernels = [params["decoder"][name] for name in ("kernel", "output")]
        forward += math.prod(image[:2]) * sum(kernel.size for kernel in kernels)
        kept += math.prod(image[:2]) * sum(kernel.shape[2] for kernel in kernels)
    return _Auxiliary(forward, kept)


# Counted by their parameters. A layer costs its forward pass three times: forward, to its input,
# to its weights.
_AUXILIARIES: dict[type, Callable[[Any, Shape, Shape], _Auxiliary]] = {
    AugLocal: _auglocal,
    InfoPro: _infopro,
}


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def account(model: Network, rule: Rule, image_shape: Shape) -> Account:
    """Count what training an image costs.

    Args:
        model: one of the published models, without groups.
        rule: one of this library's rules.
        image_shape: ``(height, width, channels)``.

    Raises:
        ValueError: a block or a rule whose operations are not known here.

    >>> from lls_jax import models, rules
    >>> vgg8 = models.make("vgg8", num_classes=10)
    >>> counts = account(vgg8, rules.make("lls", num_classes=10), (32, 32, 3))
    >>> counts.blocks[0].forward, counts.blocks[0].signal
    (3538944, 40960)
    """
    params, _ = jax.eval_shape(
        lambda key: model.init(rule, key, jnp.zeros((1, *image_shape))), jax.random.key(0)
    )
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    costs: list[Cost] = []
    to_input: list[int] = []
    for index, (name, spec) in enumerate(zip(model.block_names, model.specs)):
        module: nn.Module = spec.module
        if type(module) not in _BLOCKS:
            raise ValueError(f"the operations of a {type(module).__name__} are not known here.")
        own = rule.at_block(index, len(model.specs))
        activation = jax.eval_shape(
            lambda key, x, m=module: m.init_with_output(key, x)[0], jax.random.key(0), x
        )
        shape = activation.shape[1:]
        counts = _BLOCKS[type(module)](x.shape[1:], shape)
        to_input.append(counts.to_input)
        # Rules with a layer of their own keep its output too.
        kept = counts.kept + isinstance(own, PredSim | Decoupled) * math.prod(shape)
        latents = latent_dim(shape, spec.pool_size)
        signal = 0
        if type(own) in _AUXILIARIES:
            own_params = params[name].get("rule", {})
            network = _AUXILIARIES[type(own)](own_params, shape, image_shape)
            signal, kept = 3 * network.forward, kept + network.kept
        elif not isinstance(own, Backpropagation):
            if type(own) not in _SIGNALS:
                raise ValueError(f"the operations of rule {own.name!r} are not known here.")
            signal = _SIGNALS[type(own)](own, shape, latents)
        costs.append(
            Cost(
                name=name,
                params=_size(params[name]["block"]),
                rule_params=_size(params[name].get("rule", {})),
                forward=counts.forward,
                weight_gradient=counts.gradient,
                signal=signal,
                activation_bytes=4 * kept,
            )
        )
        x = jax.eval_shape(lambda a, spec=spec: spec.transition(a, None), activation)
    macs = x.shape[-1] * model.num_classes
    kept = 4 * x.shape[-1]
    costs.append(Cost("classifier", _size(params["classifier"]), 0, macs, macs, 0, kept))
    sizes = [cost.activation_bytes for cost in costs]
    waits = isinstance(rule, Backpropagation) or (
        isinstance(rule, DirectFeedback) and rule.signal == "error"
    )
    if isinstance(rule, Backpropagation):
        # A block's signal is the gradient to the next one's input.
        above = [*to_input[1:], macs]
        costs = [cost._replace(signal=count) for cost, count in zip(costs, above)] + costs[-1:]
    return Account(rule.name, tuple(costs), sum(sizes) if waits else max(sizes))
