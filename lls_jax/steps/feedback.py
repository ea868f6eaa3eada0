"""The step of direct feedback: every block gets a random projection of the output's error."""

from typing import Any

import jax
import jax.numpy as jnp

from lls_jax.blocks import apply_module
from lls_jax.models import Network
from lls_jax.rules import DirectFeedback
from lls_jax.steps.block import BlockState, apply_gradients, merge_params, split_params
from lls_jax.steps.local import update_classifier
from lls_jax.steps.state import (
    CLASSIFIER,
    Batch,
    Metrics,
    Optimizer,
    TrainState,
    block_state,
    join_states,
    optimizer_of,
    stack_losses,
)


def feedback_step(
    model: Network, rule: DirectFeedback, tx: Optimizer, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One step of ``dfa`` or ``drtp``; see :func:`lls_jax.training.make_train_step`."""
    x, labels = batch["image"].astype(model.dtype), batch["label"]
    dropout_key = jax.random.fold_in(state.key, state.step)
    activations, pullbacks, batch_stats = [], [], {}
    for i, (name, spec) in enumerate(zip(model.block_names, model.specs)):
        key = jax.random.fold_in(dropout_key, i)

        def run(
            params: Any, x: jax.Array = x, name: str = name, spec: Any = spec, key: Any = key
        ) -> Any:
            x, stats = jax.lax.stop_gradient(x), state.batch_stats[name]["block"]
            return apply_module(spec.module, params, stats, x, train=True, rngs={"dropout": key})

        activation, pullback, stats = jax.vjp(run, state.params[name]["block"], has_aux=True)
        batch_stats[name] = {"block": stats}
        activations.append(activation)
        pullbacks.append(pullback)
        x = spec.transition(activation, key)
    states: dict[str, BlockState] = {}
    states[CLASSIFIER], loss, logits = update_classifier(
        model, optimizer_of(tx, CLASSIFIER), block_state(state, CLASSIFIER), x, labels
    )
    signal = rule.output_signal(logits, labels)
    for name, activation, pullback in zip(model.block_names, activations, pullbacks):
        feedback = state.params[name]["rule"]["feedback"]
        cotangent = jnp.tensordot(signal, feedback, 1, precision="highest")
        (grads,) = pullback(cotangent.astype(activation.dtype))
        trained, fixed = split_params(rule, state.params[name])
        trained, opt_state = apply_gradients(
            optimizer_of(tx, name), state.opt_state[name], trained, {"block": grads}, loss
        )
        states[name] = BlockState(merge_params(trained, fixed), batch_stats[name], opt_state)
    metrics = {"layer_loss": stack_losses([]), "loss": loss, "logits": logits}
    return join_states(states, state.step + 1, state.key), metrics
