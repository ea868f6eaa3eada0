"""Training state, the local step, the backpropagation step, and prediction."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lls_jax.models import Network
from lls_jax.models.network import fold_in
from lls_jax.rules import Backpropagation, Rule

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that a run needs to go on.

    Attributes:
        step: number of updates done, int32 scalar.
        params: parameters by block name, and ``classifier``.
        batch_stats: BatchNorm's running statistics by block name.
        opt_state: one optimiser state a block for a local rule; one in all for ``bp``.
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
    key = _typed_key(key)
    init_key, run_key = jax.random.split(key)
    params, batch_stats = model.init(rule, init_key, jnp.asarray(example_image))
    return state_from_variables(rule, tx, run_key, params, batch_stats)


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
        opt_state = {name: tx.init(block) for name, block in params.items()}
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, opt_state, _typed_key(key))


def _typed_key(key: jax.Array) -> jax.Array:
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if is_typed else jax.random.wrap_key_data(key)


def classifier_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Plain softmax cross-entropy, the mean over the batch; ``[batch, classes], [batch] -> []``."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return jnp.mean(losses)


def _local_step(
    model: Network,
    rule: Rule,
    tx: optax.GradientTransformationExtraArgs,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    x, labels = batch["image"].astype(model.dtype), batch["label"]
    dropout_key = jax.random.fold_in(state.key, state.step)
    params, batch_stats, opt_state, layer_loss = {}, {}, {}, []

    def update(name: str, grads: Any, loss: jax.Array) -> None:
        updates, opt_state[name] = tx.update(
            grads, state.opt_state[name], state.params[name], value=loss
        )
        params[name] = optax.apply_updates(state.params[name], updates)

    blocks = zip(model.block_names, model.local_blocks(rule), model.specs)
    for i, (name, block, spec) in enumerate(blocks):

        def block_loss(
            block_params: Any, x: jax.Array = x, name: str = name, block: Any = block
        ) -> tuple[jax.Array, Any]:
            variables = {"params": block_params, "batch_stats": state.batch_stats[name]}
            (activation, loss), updates = block.apply(
                variables, x, labels, train=True, mutable=["batch_stats"]
            )
            return loss, (activation, updates["batch_stats"])

        value_and_grad = jax.value_and_grad(block_loss, has_aux=True)
        (loss, (activation, batch_stats[name])), grads = value_and_grad(state.params[name])
        update(name, grads, loss)
        layer_loss.append(loss)
        # The next block takes the activation computed before the update. The barrier makes it
        # wait for this block's gradient, whose residuals are then free.
        activation, params[name] = jax.lax.optimization_barrier((activation, params[name]))
        x = spec.transition(activation, fold_in(dropout_key, i))

    def logits_loss(classifier_params: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.classify(classifier_params, x)
        return classifier_loss(logits, labels), logits

    (loss, logits), grads = jax.value_and_grad(logits_loss, has_aux=True)(
        state.params["classifier"]
    )
    update("classifier", grads, loss)
    metrics = {"layer_loss": jnp.stack(layer_loss), "loss": loss, "logits": logits}
    return TrainState(state.step + 1, params, batch_stats, opt_state, state.key), metrics


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
    updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
    params = optax.apply_updates(state.params, updates)
    metrics = {"layer_loss": jnp.zeros((0,), jnp.float32), "loss": loss, "logits": logits}
    return TrainState(state.step + 1, params, batch_stats, opt_state, state.key), metrics


def make_train_step(model: Network, rule: Rule, tx: optax.GradientTransformation) -> TrainStep:
    """The jit-compiled update of a whole network; it donates its state.

    With a local rule it walks block by block: the gradient of the block's own loss with respect to
    the block's own parameters, their update, then the next block, on the activation computed
    before that update. No gradient toward a block's input is ever computed. With ``bp`` one
    gradient of the classifier's loss updates everything.

    Args:
        model: from :func:`lls_jax.models.make`.
        rule: from :func:`lls_jax.rules.make`, or your own.
        tx: the optax transformation that the state was created with.

    Returns:
        ``step(state, batch) -> (state, metrics)``. `batch` has ``image``, normalised
        ``[batch, height, width, channels]``, and ``label``, integers ``[batch]``. `metrics` has
        ``layer_loss`` ``[local blocks]`` (none for ``bp``), ``loss``, the classifier's, and
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
    step = _backpropagation_step if isinstance(rule, Backpropagation) else _local_step
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
