"""The baseline's step: one gradient of the classifier's loss through every block."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from lls_jax.models import Network
from lls_jax.rules import Rule
from lls_jax.steps.block import apply_gradients, classifier_loss
from lls_jax.steps.state import Batch, Metrics, Optimizer, TrainState, optimizer_of, stack_losses


def backpropagation_step(
    model: Network,
    rule: Rule,
    tx: Optimizer,
    state: TrainState,
    batch: Batch,
    around: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda run: run,
) -> tuple[TrainState, Metrics]:
    """One step of ``bp``; see :func:`lls_jax.training.make_train_step`.

    `around` is that of :meth:`lls_jax.models.Network.apply`.
    """
    del rule
    labels = batch["label"]
    dropout_key = jax.random.fold_in(state.key, state.step)

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        logits, batch_stats = model.apply(
            params,
            state.batch_stats,
            batch["image"],
            train=True,
            dropout_key=dropout_key,
            around=around,
        )
        return classifier_loss(logits, labels, model.classifier_smoothing), (logits, batch_stats)

    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return update_whole(tx, state, batch_stats, grads, loss, logits)


def update_whole(
    tx: Optimizer,
    state: TrainState,
    batch_stats: Any,
    grads: Any,
    loss: jax.Array,
    logits: jax.Array,
) -> tuple[TrainState, Metrics]:
    """Backpropagation's update of everything.

    Args:
        tx: the optimizer; one in all, or one a block.
        state: before the step, of rule ``bp``.
        batch_stats: the new statistics.
        grads: as ``state.params``.
        loss: the classifier's, a scalar.
        logits: ``[batch, classes]``.

    Returns:
        The state after the step, and the step's metrics.
    """
    if isinstance(tx, optax.GradientTransformation):
        params, opt_state = apply_gradients(tx, state.opt_state, state.params, grads, loss)
    else:
        pairs = {
            name: apply_gradients(
                optimizer_of(tx, name), state.opt_state[name], own, grads[name], loss
            )
            for name, own in state.params.items()
        }
        params, opt_state = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
    metrics = {"layer_loss": stack_losses([]), "loss": loss, "logits": logits}
    return TrainState(state.step + 1, params, batch_stats, opt_state, state.key), metrics
