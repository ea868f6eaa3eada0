"""Training state, the local step, the backpropagation step, and prediction."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lls_jax import remat
from lls_jax.blocks import LocalBlock, apply_module
from lls_jax.models import BlockSpec, Network
from lls_jax.ordering import token_of, wait_for
from lls_jax.rules import Backpropagation, FeedbackRule, Rule, has_local_losses
from lls_jax.rules.protocol import for_block, merge_fixed, split_fixed

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# The classifier's key in parameters and optimiser states, beside the blocks' names.
CLASSIFIER = "classifier"


class TrainState(NamedTuple):
    """All that a run needs to go on.

    Attributes:
        step: number of updates done, int32 scalar.
        params: parameters by block name, and ``classifier``.
        batch_stats: BatchNorm's running statistics by block name.
        opt_state: one optimiser state a block; one in all for ``bp``.
        key: the run's random key; every draw is ``fold_in(key, step)`` or further down.
    """

    step: jax.Array
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt_state: Any
    key: jax.Array


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def create_train_state(
    model: Network,
    rule: Rule,
    tx: optax.GradientTransformation,
    key: jax.Array,
    example_image: jax.Array,
) -> TrainState:
    """Draw a model's parameters and start its optimiser.

    Args:
        model: from :func:`lls_jax.models.make`.
        rule: from :func:`lls_jax.rules.make`.
        tx: any optax transformation.
        key: random key.
        example_image: a batch ``[batch, height, width, channels]`` or one image; its shape counts.

    Returns:
        The state before the first step.

    Raises:
        ValueError: the image is too small for the model.
    """
    image = jnp.asarray(example_image)

    # One program: each array's zeros, copies and draws would be compiled by themselves.
    @jax.jit
    def draw(key: jax.Array) -> TrainState:
        init_key, run_key = jax.random.split(key)
        params, batch_stats = model.init(rule, init_key, image)
        return state_from_variables(rule, tx, run_key, params, batch_stats)

    return draw(_typed_key(key))


def state_from_variables(
    rule: Rule,
    tx: optax.GradientTransformation,
    key: jax.Array,
    params: dict[str, Any],
    batch_stats: dict[str, Any],
) -> TrainState:
    """A state before the first step, from parameters and statistics that exist already."""
    if isinstance(rule, Backpropagation):
        opt_state = tx.init(params)
    else:
        # One state a block: what couples parameters (a clip by the global norm, a plateau
        # schedule) stays inside the block, as locality asks.
        opt_state = {
            name: tx.init(split_fixed(_rule_of(rule, name), block)[0])
            for name, block in params.items()
        }
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, opt_state, _typed_key(key))


def _rule_of(rule: Rule, name: str) -> Any:
    """The rule of a block by the block's name; None for the classifier."""
    return None if name == CLASSIFIER else for_block(rule, int(name.removeprefix("block_")))


def _typed_key(key: jax.Array) -> jax.Array:
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if is_typed else jax.random.wrap_key_data(key)


def num_local_losses(model: Network, rule: Rule) -> int:
    """Length of the training step's ``layer_loss``."""
    return len(model.specs) - model.joined if has_local_losses(rule) else 0


def classifier_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Plain softmax cross-entropy, the mean over the batch; ``[batch, classes], [batch] -> []``.

    NaN if a label is no class.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    # Optax takes -1 for the last class.
    return jnp.mean(jnp.where((labels >= 0) & (labels < logits.shape[1]), losses, jnp.nan))


class BlockState(NamedTuple):
    """What one block, or the classifier, learns with.

    Attributes:
        params: its parameters, and its rule's.
        batch_stats: its BatchNorm statistics; ``{}`` for the classifier.
        opt_state: its optimiser's.
    """

    params: Any
    batch_stats: Any
    opt_state: Any


def block_state(state: TrainState, name: str) -> BlockState:
    """One block's part of a state with an optimiser a block."""
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


def _updated(
    tx: optax.GradientTransformationExtraArgs,
    state: BlockState,
    trained: Any,
    grads: Any,
    loss: jax.Array,
) -> tuple[Any, Any]:
    """New values of the trained parameters, and of the optimiser's state."""
    # Optax's own transformations mix dtypes (adam raises a float to an integer), which a program
    # that asks JAX for strict promotion need not do without.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = tx.update(grads, state.opt_state, trained, value=loss)
    return optax.apply_updates(trained, updates), opt_state


def update_block(
    block: LocalBlock,
    spec: BlockSpec,
    tx: optax.GradientTransformationExtraArgs,
    state: BlockState,
    x: jax.Array,
    labels: jax.Array,
    dropout_key: jax.Array,
    remat_above: int | None = None,
) -> tuple[BlockState, jax.Array, jax.Array]:
    """A block's own update, which needs nothing of the blocks above it.

    Args:
        block: the block with its rule.
        spec: of the block.
        tx: the optimiser.
        state: the block's.
        x: its input, ``[batch, ...]``.
        labels: integers ``[batch]``.
        dropout_key: the block's own, of this step.
        remat_above: bytes above which a convolution's output is not kept: :mod:`lls_jax.remat`.

    Returns:
        The new state, the local loss, and the next block's input: from the activation that was
        computed before the update.
    """
    trained, fixed = split_fixed(block.rule, state.params)
    plan = remat.plan_block(block, spec, x, remat_above)

    def plain_loss(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        (activation, loss), updates = block.apply(
            variables, x, labels, train=True, mutable=["batch_stats"], rngs={"dropout": dropout_key}
        )
        stats = {"block": {}, **updates.get("batch_stats", {})}
        return loss, (spec.downsample(activation), stats)

    def sliced_loss(plan: remat.Plan, params: Any) -> tuple[jax.Array, Any]:
        downsampled, pooled, stats = remat.apply_block(
            plan, params["block"], state.batch_stats["block"], x
        )
        loss = block.rule.loss(params.get("rule", {}), pooled, labels, pool_size=block.pool_size)
        return loss, (downsampled, {"block": stats})

    def block_loss(trained: Any) -> tuple[jax.Array, Any]:
        params = merge_fixed(trained, fixed)
        return plain_loss(params) if plan is None else sliced_loss(plan, params)

    value_and_grad = jax.value_and_grad(block_loss, has_aux=True)
    (loss, (activation, batch_stats)), grads = value_and_grad(trained)
    trained, opt_state = _updated(tx, state, trained, grads, loss)
    new = BlockState(merge_fixed(trained, fixed), batch_stats, opt_state)
    return new, loss, spec.after_pooling(activation, dropout_key)


def update_classifier(
    model: Network,
    tx: optax.GradientTransformationExtraArgs,
    state: BlockState,
    features: jax.Array,
    labels: jax.Array,
) -> tuple[BlockState, jax.Array, jax.Array]:
    """The classifier's update on detached features: its new state, its loss, the logits."""

    def logits_loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.classify(params, features)
        return classifier_loss(logits, labels), logits

    (loss, logits), grads = jax.value_and_grad(logits_loss, has_aux=True)(state.params)
    params, opt_state = _updated(tx, state, state.params, grads, loss)
    return BlockState(params, {}, opt_state), loss, logits


def update_joined(
    model: Network,
    tx: optax.GradientTransformationExtraArgs,
    states: tuple[BlockState, BlockState],
    x: jax.Array,
    labels: jax.Array,
    dropout_key: jax.Array,
) -> tuple[tuple[BlockState, BlockState], jax.Array, jax.Array]:
    """The last block's and the classifier's update from the classifier's loss."""
    spec = model.specs[-1]
    block, classifier = states

    def logits_loss(params: Any) -> tuple[jax.Array, Any]:
        own, classifier_params = params
        activation, stats = apply_module(
            spec.module,
            own["block"],
            block.batch_stats["block"],
            jax.lax.stop_gradient(x),
            train=True,
            rngs={"dropout": dropout_key},
        )
        logits = model.classify(classifier_params, spec.transition(activation, dropout_key))
        return classifier_loss(logits, labels), (logits, {"block": stats})

    own = {"block": block.params["block"]}
    (loss, (logits, stats)), grads = jax.value_and_grad(logits_loss, has_aux=True)(
        (own, classifier.params)
    )
    # Its rule's parameters, which no loss reaches, get gradients of 0.
    grads_block = {**jax.tree.map(jnp.zeros_like, block.params), **grads[0]}
    params, opt_state = _updated(tx, block, block.params, grads_block, loss)
    new_block = BlockState(params, stats, opt_state)
    params, opt_state = _updated(tx, classifier, classifier.params, grads[1], loss)
    return (new_block, BlockState(params, {}, opt_state)), loss, logits


def _local_step(
    model: Network,
    rule: Rule,
    tx: optax.GradientTransformationExtraArgs,
    state: TrainState,
    batch: Batch,
    *,
    remat_above: int | None = None,
    in_order: bool = True,
) -> tuple[TrainState, Metrics]:
    x, labels = batch["image"].astype(model.dtype), batch["label"]
    dropout_key = jax.random.fold_in(state.key, state.step)
    states: dict[str, BlockState] = {}
    layer_loss = []
    blocks = list(zip(model.block_names, model.local_blocks(rule), model.specs))
    for i, (name, block, spec) in enumerate(blocks[:-1] if model.joined else blocks):
        block_key = jax.random.fold_in(dropout_key, i)
        own = block_state(state, name)
        if in_order and i:
            # The block below has its gradient, and what it was taken from is free again.
            below = token_of(states[model.block_names[i - 1]].params)
            own = own._replace(params=wait_for(below, own.params))
        states[name], loss, x = update_block(
            block, spec, tx, own, x, labels, block_key, remat_above
        )
        layer_loss.append(loss)
    classifier = block_state(state, CLASSIFIER)
    if model.joined:
        last = model.block_names[-1]
        block_key = jax.random.fold_in(dropout_key, len(blocks) - 1)
        (states[last], states[CLASSIFIER]), loss, logits = update_joined(
            model, tx, (block_state(state, last), classifier), x, labels, block_key
        )
    else:
        states[CLASSIFIER], loss, logits = update_classifier(model, tx, classifier, x, labels)
    metrics = {"layer_loss": _stacked(layer_loss), "loss": loss, "logits": logits}
    return join_states(states, state.step + 1, state.key), metrics


def _stacked(layer_loss: list[jax.Array]) -> jax.Array:
    return jnp.stack(layer_loss) if layer_loss else jnp.zeros((0,), jnp.float32)


def _feedback_step(
    model: Network,
    rule: FeedbackRule,
    tx: optax.GradientTransformationExtraArgs,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """Every block gets a random projection of the output's error, or of the target."""
    x, labels = batch["image"].astype(model.dtype), batch["label"]
    dropout_key = jax.random.fold_in(state.key, state.step)
    activations, pullbacks, batch_stats = [], [], {}
    for i, (name, spec) in enumerate(zip(model.block_names, model.specs)):

        def run(params: Any, x: jax.Array = x, name: str = name, spec: Any = spec) -> Any:
            stats = state.batch_stats[name]["block"]
            return apply_module(spec.module, params, stats, jax.lax.stop_gradient(x), train=True)

        activation, pullback, stats = jax.vjp(run, state.params[name]["block"], has_aux=True)
        batch_stats[name] = {"block": stats}
        activations.append(activation)
        pullbacks.append(pullback)
        x = spec.transition(activation, jax.random.fold_in(dropout_key, i))
    states: dict[str, BlockState] = {}
    states[CLASSIFIER], loss, logits = update_classifier(
        model, tx, block_state(state, CLASSIFIER), x, labels
    )
    signal = rule.output_signal(logits, labels)
    for name, activation, pullback in zip(model.block_names, activations, pullbacks):
        feedback = state.params[name]["rule"]["feedback"]
        cotangent = jnp.tensordot(signal, feedback, 1, precision="highest")
        (grads,) = pullback(cotangent.astype(activation.dtype))
        trained, fixed = split_fixed(rule, state.params[name])
        trained, opt_state = _updated(tx, block_state(state, name), trained, {"block": grads}, loss)
        states[name] = BlockState(merge_fixed(trained, fixed), batch_stats[name], opt_state)
    metrics = {"layer_loss": _stacked([]), "loss": loss, "logits": logits}
    return join_states(states, state.step + 1, state.key), metrics


def _backpropagation_step(
    model: Network,
    rule: Rule,
    tx: optax.GradientTransformationExtraArgs,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    del rule
    labels = batch["label"]
    dropout_key = jax.random.fold_in(state.key, state.step)

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        logits, batch_stats = model.apply(
            params, state.batch_stats, batch["image"], train=True, dropout_key=dropout_key
        )
        return classifier_loss(logits, labels), (logits, batch_stats)

    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return update_whole(tx, state, batch_stats, grads, loss, logits)


def update_whole(
    tx: optax.GradientTransformationExtraArgs,
    state: TrainState,
    batch_stats: Any,
    grads: Any,
    loss: jax.Array,
    logits: jax.Array,
) -> tuple[TrainState, Metrics]:
    """Backpropagation's update of everything with one optimiser.

    Args:
        tx: the optimiser.
        state: before the step, of rule ``bp``.
        batch_stats: the new statistics.
        grads: as ``state.params``.
        loss: the classifier's, a scalar.
        logits: ``[batch, classes]``.

    Returns:
        The state after the step, and the step's metrics.
    """
    own = BlockState(state.params, batch_stats, state.opt_state)
    params, opt_state = _updated(tx, own, state.params, grads, loss)
    metrics = {"layer_loss": _stacked([]), "loss": loss, "logits": logits}
    return TrainState(state.step + 1, params, batch_stats, opt_state, state.key), metrics


def make_train_step(
    model: Network,
    rule: Rule,
    tx: optax.GradientTransformation,
    *,
    remat_above: int | None = None,
    in_order: bool = True,
) -> TrainStep:
    """The jit-compiled update of a whole network; it donates its state.

    With a local rule it walks block by block: the gradient of the block's own loss with respect to
    the block's own parameters, their update, then the next block, on the activation computed
    before that update. No gradient toward a block's input is ever computed. With ``bp`` one
    gradient of the classifier's loss updates everything; with ``dfa`` and ``drtp`` every block gets
    a random projection of the output's error or of the target.

    Args:
        model: from :func:`lls_jax.models.make`.
        rule: from :func:`lls_jax.rules.make`, or your own.
        tx: the optax transformation that the state was created with.
        remat_above: bytes; a convolution whose output takes more is computed again, in slices of
            the batch, instead of keeping it (:mod:`lls_jax.remat`). None keeps every one. Local
            rules only.
        in_order: whether a local block waits for the gradient of the block below, so that its
            memory is free. Without, sums of gradients over devices may go on meanwhile.

    Returns:
        ``step(state, batch) -> (state, metrics)``. `batch` has ``image``, normalised
        ``[batch, height, width, channels]``, and ``label``, integers ``[batch]``. `metrics` has
        ``layer_loss`` ``[local blocks]`` (none for baselines), ``loss``, the classifier's, and
        ``logits`` ``[batch, classes]``.

    >>> from lls_jax import models, rules
    >>> model = models.make("small_conv", num_classes=10)
    >>> rule, tx = rules.make("lls", num_classes=10), optax.sgd(0.1)
    >>> images, labels = jnp.ones((4, 8, 8, 3)), jnp.arange(4)
    >>> state = create_train_state(model, rule, tx, jax.random.key(0), images)
    >>> state, metrics = make_train_step(model, rule, tx)(state, {"image": images, "label": labels})
    >>> int(state.step), metrics["layer_loss"].shape
    (1, (4,))
    """
    step: Any = functools.partial(_local_step, remat_above=remat_above, in_order=in_order)
    if isinstance(rule, Backpropagation):
        step = _backpropagation_step
    elif isinstance(rule, FeedbackRule):
        step = _feedback_step
    with_extra = optax.with_extra_args_support(tx)
    return jax.jit(functools.partial(step, model, rule, with_extra), donate_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _predict(model: Network, params: Any, batch_stats: Any, image: jax.Array) -> jax.Array:
    return model.apply(params, batch_stats, image)[0]


def predict(model: Network, state: TrainState, image: jax.Array) -> jax.Array:
    """Logits in evaluation mode, from the state's own weights and running statistics.

    With a schedule-free optimiser those are the weights at which gradients are taken; the ones to
    report are those of :func:`lls_jax.evaluation.evaluation_state`.

    Args:
        model: the state's model.
        state: any state with `params` and `batch_stats`.
        image: normalised, ``[batch, height, width, channels]``.

    Returns:
        float32 ``[batch, classes]``.
    """
    model.check_image(image.shape)
    return _predict(model, state.params, state.batch_stats, image)
