"""What a rule costs on a model: parameters, multiply-accumulates, memory; counted, not measured.

All figures are for one image. A multiply-accumulate (MAC) is one product that is added to a sum;
pooling, normalisation, activation functions and losses, which are linear in the activations, are
not counted. Zero padding counts as input.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lls_jax.blocks.costs import BLOCK_COSTS, BlockCost, dense_cost
from lls_jax.models import Group, Network
from lls_jax.rules import (
    LLS,
    AugLocal,
    Backpropagation,
    CenteredLLS,
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
    has_local_losses,
)
from lls_jax.rules.auglocal import copy_stride
from lls_jax.rules.infopro import classifier_stride
from lls_jax.steps.reach_schedule import Reach, brings_own_loss, check_reach, schedule
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
            and back to the activation and the rule's parameters, and with a reach of more than 1
            the gradients to the activation from the losses above it; for ``bp`` the gradient to the
            activation, which is the next layer's; for ``dfa`` and ``drtp`` the projection; for a
            last block that learns with the classifier, the gradient of the classifier's loss.
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
            waits for the output; of the largest block where each learns by itself, or of the
            blocks that wait for the losses which teach them.
    """

    rule: str
    blocks: tuple[Cost, ...]
    peak_activation_bytes: int

    def total(self, field: str) -> int:
        """The sum of one of :class:`Cost`'s fields over the blocks."""
        return sum(getattr(cost, field) for cost in self.blocks)


def _periodic(rule: LLS, activation: Shape, latents: int) -> int:
    del activation
    # Scores and back to the latents; with a matrix also logits, back to the scores, and dM.
    matrix = 3 * rule.rows * rule.num_classes if rule.modulation == "matrix" else 0
    return 2 * rule.rows * latents + matrix


def _centered(rule: CenteredLLS, activation: Shape, latents: int) -> int:
    del activation
    return 2 * rule.rows * latents + 3 * rule.rows * rule.num_classes


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
    CenteredLLS: _centered,
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
        else:
            stride = copy_stride(copy["kernel"])
            sides = tuple(-(-side // stride) for side in sides)
        kernels = [copy[k] for k in ("kernel", "second", "shortcut") if k in copy]
        forward += math.prod(sides) * sum(kernel.size for kernel in kernels)
        kept += math.prod(sides) * sum(kernel.shape[-1] for kernel in kernels)
    return _Auxiliary(forward, kept)


def _infopro(params: Any, activation: Shape, image: Shape) -> _Auxiliary:
    classifier = params["classifier"]
    sides = activation[:-1] if len(activation) == 3 else (1, 1)
    stride = classifier_stride(sides[0])
    area = math.prod(-(-side // stride) for side in sides)
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


def _from_above(blocks: list[BlockCost], reach: Reach) -> list[int]:
    """MACs of the gradients that come to each unit's activation from the losses above it.

    Args:
        blocks: the units, the classifier at last.
        reach: how many of them a loss teaches, or each loss.
    """
    passes = [move for move in schedule(len(blocks), reach) if move.kind == "pass"]
    macs = [0] * len(blocks)
    for move in passes:
        block = blocks[move.unit]
        arriving = {other.loss for other in passes if other.unit == move.unit + 1}
        # Of the same sum as the block's own update, the way inside the block is taken once.
        is_whole = brings_own_loss(move, len(blocks), reach) and arriving <= {move.loss}
        macs[move.unit - 1] += block.to_input + (0 if is_whole else block.within)
    return macs


def _peak(sizes: list[int], reach: Reach) -> int:
    """The most that units which have run, and have still to learn, keep at once.

    Args:
        sizes: what each keeps, the classifier at last.
        reach: how many of them a loss teaches, or each loss.
    """
    kept, peak = 0, 0
    for move in schedule(len(sizes), reach):
        if move.kind == "run":
            kept += sizes[move.unit]
            peak = max(peak, kept)
        elif move.kind == "update":
            kept -= sizes[move.unit]
    return peak


def _of_rule(
    own: Rule, params: Any, shape: Shape, pool_size: int, image_shape: Shape
) -> tuple[int, int]:
    """MACs of a block's own loss and its gradient, and what they keep beside the block's own."""
    if isinstance(own, Backpropagation):
        return 0, 0
    if type(own) in _AUXILIARIES:
        network = _AUXILIARIES[type(own)](params, shape, image_shape)
        return 3 * network.forward, network.kept
    if type(own) not in _SIGNALS:
        raise ValueError(f"the operations of rule {own.name!r} are not known here.")
    # Rules with a layer of their own keep its output too.
    kept = math.prod(shape) if isinstance(own, PredSim | Decoupled) else 0
    return _SIGNALS[type(own)](own, shape, latent_dim(shape, pool_size)), kept


def _count(module: nn.Module, x: jax.ShapeDtypeStruct) -> tuple[BlockCost, jax.ShapeDtypeStruct]:
    """What a block costs, and its activation.

    Args:
        module: a block, or a group of them.
        x: its input, a batch of one.
    """
    if isinstance(module, Group):
        costs = []
        for block, spec in zip(module.blocks, module.specs):
            own, activation = _count(block, x)
            costs.append(own)
            x = jax.eval_shape(lambda a, spec=spec: spec.transition(a, None), activation)
        return functools.reduce(BlockCost.followed_by, costs), activation
    if type(module) not in BLOCK_COSTS:
        raise ValueError(f"the operations of a {type(module).__name__} are not known here.")
    activation = jax.eval_shape(
        lambda key, x: module.init_with_output(key, x)[0], jax.random.key(0), x
    )
    return BLOCK_COSTS[type(module)](x.shape[1:], activation.shape[1:]), activation


def account(model: Network, rule: Rule, image_shape: Shape, reach: Reach = 1) -> Account:
    """Count what training an image costs.

    Args:
        model: one of the published models, its blocks in groups or not.
        rule: one of this library's rules.
        image_shape: ``(height, width, channels)``.
        reach: as of :func:`lls_jax.training.make_train_step`.

    Raises:
        ValueError: a block or a rule whose operations are not known here; or `reach` is no number
            of blocks, or not one a loss, or the rule has no losses that could reach.

    >>> from lls_jax import models, rules
    >>> vgg8 = models.make("vgg8", num_classes=10)
    >>> counts = account(vgg8, rules.make("lls", num_classes=10), (32, 32, 3))
    >>> counts.blocks[0].forward, counts.blocks[0].signal
    (3538944, 40960)
    """
    reach = check_reach(model, rule, reach)
    params, _ = jax.eval_shape(
        lambda key: model.init(rule, key, jnp.zeros((1, *image_shape))), jax.random.key(0)
    )
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    costs: list[Cost] = []
    blocks: list[BlockCost] = []
    # The block that learns from the classifier's loss alone, if there is one, and not from its own.
    is_joined = model.classifier_in_last_group and has_local_losses(rule)
    silent = len(model.specs) - 1 if is_joined else None
    for index, (name, spec) in enumerate(zip(model.block_names, model.specs)):
        own = rule.at_block(index, len(model.specs))
        counts, activation = _count(spec.module, x)
        shape = activation.shape[1:]
        blocks.append(counts)
        rule_params = params[name].get("rule", {})
        signal, kept = 0, 0
        if index != silent:
            signal, kept = _of_rule(own, rule_params, shape, spec.pool_size, image_shape)
        costs.append(
            Cost(
                name=name,
                params=_size(params[name]["block"]),
                rule_params=_size(rule_params),
                forward=counts.forward,
                weight_gradient=counts.gradient,
                signal=signal,
                activation_bytes=4 * (counts.kept + kept),
            )
        )
        x = jax.eval_shape(lambda a, spec=spec: spec.transition(a, None), activation)
    counts = dense_cost((x.shape[-1],), (model.num_classes,))
    blocks.append(counts)
    size = _size(params["classifier"])
    costs.append(Cost("classifier", size, 0, counts.forward, counts.gradient, 0, 4 * x.shape[-1]))
    sizes = [cost.activation_bytes for cost in costs]
    if is_joined:
        costs[-2] = costs[-2]._replace(signal=counts.to_input)
        blocks[-2:] = [blocks[-2].followed_by(counts)]
        sizes[-2:] = [sum(sizes[-2:])]
    # Backpropagation's gradient goes all the way down.
    from_above = _from_above(blocks, len(blocks) if isinstance(rule, Backpropagation) else reach)
    if is_joined:
        from_above.append(0)
    costs = [
        cost._replace(signal=cost.signal + above)
        for cost, above in zip(costs, from_above, strict=True)
    ]
    # Until when a block keeps what its update needs: all, where it needs the classifier's error.
    waits: Reach = reach
    if not has_local_losses(rule):
        waits = 1 if isinstance(rule, DirectFeedback) and rule.signal != "error" else len(blocks)
    return Account(rule.name, tuple(costs), _peak(sizes, waits))
