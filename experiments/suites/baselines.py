"""Backpropagation as a user would save its memory: blocks computed again, and micro-batches."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lls_jax import training
from lls_jax.layers.ordering import token_of, wait_for
from lls_jax.models import Network
from lls_jax.rules import Backpropagation
from lls_jax.steps.backpropagation import backpropagation_step, update_whole


def _accumulating_step(
    model: Network,
    parts: int,
    tx: optax.GradientTransformation,
    state: training.TrainState,
    batch: training.Batch,
) -> tuple[training.TrainState, training.Metrics]:
    count = batch["label"].shape[0]
    if count % parts:
        raise ValueError(f"a batch of {count} has no {parts} equal parts.")
    dropout_key = jax.random.fold_in(state.key, state.step)

    def loss_fn(params: Any, batch_stats: Any, part: training.Batch, key: Any) -> Any:
        logits, batch_stats = model.apply(
            params, batch_stats, part["image"], train=True, dropout_key=key
        )
        loss = training.classifier_loss(logits, part["label"], model.classifier_smoothing)
        return loss, (logits, batch_stats)

    grads: Any = jax.tree.map(jnp.zeros_like, state.params)
    batch_stats, losses, all_logits = state.batch_stats, [], []
    size = count // parts
    for i in range(parts):
        part = {name: array[i * size : (i + 1) * size] for name, array in batch.items()}
        if i:
            # The part before has its gradient, and what it was taken from is free again.
            part["image"] = wait_for(token_of(grads), part["image"])
        (loss, (logits, batch_stats)), own = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, batch_stats, part, jax.random.fold_in(dropout_key, i)
        )
        grads = jax.tree.map(jnp.add, grads, own)
        losses.append(loss)
        all_logits.append(logits)
    grads = jax.tree.map(lambda leaf: leaf / parts, grads)
    loss = jnp.mean(jnp.stack(losses))
    return update_whole(tx, state, batch_stats, grads, loss, jnp.concatenate(all_logits))


def make_checkpointed_step(model: Network, tx: optax.GradientTransformation) -> training.TrainStep:
    """The step of ``bp`` that keeps each block's input alone, and computes the rest again.

    Args:
        model: from :func:`lls_jax.models.make`.
        tx: the optax transformation that the state was created with, for rule ``bp``.

    Returns:
        ``step(state, batch) -> (state, metrics)`` as of :func:`lls_jax.training.make_train_step`,
        with the same numbers; jit-compiled, it donates its state.
    """
    rule = Backpropagation(model.num_classes)
    step = functools.partial(backpropagation_step, model, rule, tx, around=jax.checkpoint)
    return jax.jit(step, donate_argnums=0)


def make_accumulating_step(
    model: Network, tx: optax.GradientTransformation, parts: int
) -> training.TrainStep:
    """The step of ``bp`` from the mean of its micro-batches' gradients, one after the other.

    BatchNorm's statistics are those of each micro-batch.

    Args:
        model: from :func:`lls_jax.models.make`.
        tx: the optax transformation that the state was created with, for rule ``bp``.
        parts: micro-batches a batch, of equal size.

    Returns:
        ``step(state, batch) -> (state, metrics)`` as of :func:`lls_jax.training.make_train_step`;
        jit-compiled, it donates its state.
    """
    return jax.jit(functools.partial(_accumulating_step, model, parts, tx), donate_argnums=0)
