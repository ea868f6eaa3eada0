"""What a run trains: a state for each block, and one for the classifier."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lls_jax.models import Network
from lls_jax.rules import Backpropagation, LabeledImages, LocalRule, Rule, Targets, has_local_losses
from lls_jax.steps.block import BlockState, split_params

# What runs once need not be fast: the same bits after a third to half of the time to compile.
_ONCE = {"xla_backend_optimization_level": 1}
# JAX's own option for less than that, which stands before it.
_COMPILE_LEAST = "jax_disable_most_optimizations"

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# One for all blocks, one by block name, or a function of the name.
Optimizer: TypeAlias = (
    optax.GradientTransformation
    | Mapping[str, optax.GradientTransformation]
    | Callable[[str], optax.GradientTransformation]
)
# The classifier's key in parameters and optimizer states, beside the blocks' names.
CLASSIFIER = "classifier"


class TrainState(NamedTuple):
    """All that a run needs to go on.

    Attributes:
        step: number of updates done, int32 scalar.
        params: parameters by block name, and ``classifier``.
        batch_stats: BatchNorm's running statistics by block name.
        opt_state: one optimizer state a block; for ``bp`` with one optimizer, one in all.
        key: the run's random key; every draw is ``fold_in(key, step)`` or further down.
    """

    step: jax.Array
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt_state: Any
    key: jax.Array


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def optimizer_of(tx: Optimizer, name: str) -> optax.GradientTransformation:
    """The optimizer of one block, or of the classifier.

    Args:
        tx: one for all, a mapping from names, or a function of the name.
        name: ``block_0``, ``block_1``, ..., or ``classifier``.

    Raises:
        ValueError: the mapping has none of that name, or `tx` is none of these.
    """
    if isinstance(tx, optax.GradientTransformation):
        return tx
    if isinstance(tx, Mapping):
        if name not in tx:
            raise ValueError(f"`tx` has no optimizer for {name!r}; it has {', '.join(tx)}.")
        return tx[name]
    if not callable(tx):
        raise ValueError(
            f"`tx` is a {type(tx).__name__}; give an optax.GradientTransformation (of "
            "optax.MultiSteps its gradient_transformation()), or one a block."
        )
    return tx(name)


def create_train_state(
    model: Network, rule: Rule, tx: Optimizer, key: jax.Array, example_image: jax.Array
) -> TrainState:
    """Draw a model's parameters and start its optimizer.

    Args:
        model: from :func:`lls_jax.models.make`.
        rule: from :func:`lls_jax.rules.make`.
        tx: any optax transformation; or one a block, by name (``block_0``, ..., ``classifier``) or
            by a function of the name.
        key: random key.
        example_image: a batch ``[batch, height, width, channels]`` or one image; its shape counts.
            A model with a `whitening` takes that from it: give it normalised training images, a few
            thousand if you can (:func:`lls_jax.fit` does).

    Returns:
        The state before the first step.

    Raises:
        ValueError: the image is too small for the model.
    """
    image = jnp.asarray(example_image)

    def draw(key: jax.Array, image: jax.Array) -> TrainState:
        init_key, run_key = jax.random.split(key)
        params, batch_stats = model.init(rule, init_key, image)
        return state_from_variables(rule, tx, run_key, params, batch_stats)

    key = _typed_key(key)
    # One program: each array's zeros, copies and draws would be compiled by themselves. Inside
    # another program JAX takes no options.
    takes_none = isinstance(key, jax.core.Tracer) or jax.config.read(_COMPILE_LEAST)
    options = None if takes_none else _ONCE
    return jax.jit(draw, compiler_options=options)(key, image)


def state_from_variables(
    rule: Rule,
    tx: Optimizer,
    key: jax.Array,
    params: dict[str, Any],
    batch_stats: dict[str, Any],
) -> TrainState:
    """A state before the first step, from parameters and statistics that exist already."""
    if isinstance(rule, Backpropagation) and isinstance(tx, optax.GradientTransformation):
        opt_state: Any = tx.init(params)
    else:
        # One state a block: what couples parameters (a clip by the global norm, a plateau
        # schedule) stays inside the block, as locality asks.
        opt_state = {
            name: optimizer_of(tx, name).init(split_params(_rule_of(rule, name), block)[0])
            for name, block in params.items()
        }
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, opt_state, _typed_key(key))


def _rule_of(rule: Rule, name: str) -> Rule | None:
    """The rule of a block by the block's name; None for the classifier."""
    return None if name == CLASSIFIER else rule.at_block(int(name.removeprefix("block_")))


def _typed_key(key: jax.Array) -> jax.Array:
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if is_typed else jax.random.wrap_key_data(key)


def num_local_losses(model: Network, rule: Rule) -> int:
    """Length of the training step's ``layer_loss``."""
    return len(model.specs) - model.classifier_in_last_group if has_local_losses(rule) else 0


def targets_of(model: Network, rule: Rule, batch: Batch) -> Targets:
    """What the blocks are told of a batch's examples: their labels, and the images if one asks."""
    own_rules = model.block_rules(rule)
    asks = any(isinstance(own, LocalRule) and own.needs_image for own in own_rules)
    return LabeledImages(batch["label"], batch["image"]) if asks else batch["label"]


def block_state(state: TrainState, name: str) -> BlockState:
    """One block's part of a state with an optimizer a block."""
    return BlockState(state.params[name], state.batch_stats.get(name, {}), state.opt_state[name])


def join_states(states: dict[str, BlockState], step: jax.Array, key: jax.Array) -> TrainState:
    """A whole state from its blocks' and the classifier's."""
    return TrainState(
        step,
        {name: state.params for name, state in states.items()},
        {name: state.batch_stats for name, state in states.items() if name != CLASSIFIER},
        {name: state.opt_state for name, state in states.items()},
        key,
    )


def stack_losses(layer_loss: list[jax.Array]) -> jax.Array:
    """The local losses as one array, ``[local layers]``; empty where there are none."""
    return jnp.stack(layer_loss) if layer_loss else jnp.zeros((0,), jnp.float32)
