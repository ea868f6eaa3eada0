"""Local learning in Haiku: one transformed function a block, losses of lls_jax."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from lls_jax import rules

WIDTH, LAYERS, CLASSES = 64, 3, 10
RULE = rules.make("local_classifier", num_classes=CLASSES)
OPTIMIZER = optax.adamw(1e-2)


@hk.without_apply_rng
@hk.transform
def block(x):
    """A dense layer that learns alone."""
    return jax.nn.relu(hk.Linear(WIDTH)(jax.lax.stop_gradient(x)))


def local_loss(params, x, labels):
    """The block's own loss, and its activation."""
    activation = block.apply(params["block"], x)
    return RULE.loss(params["rule"], activation, labels, pool_size=WIDTH), activation


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, opt_state, x, labels):
    """Update one block; returns the activation from before the update too."""
    (loss, activation), grads = jax.value_and_grad(local_loss, has_aux=True)(params, x, labels)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss, activation


def train(x, labels, steps):
    """Losses ``[steps, layers]`` on features ``[batch, 64]`` and labels ``[batch]``."""
    stack = []
    for key in jax.random.split(jax.random.key(0), LAYERS):
        block_key, rule_key = jax.random.split(key)
        params = {"block": block.init(block_key, x), "rule": RULE.init(rule_key, (WIDTH,), WIDTH)}
        stack.append((params, OPTIMIZER.init(params)))
    history = []
    for _ in range(steps):
        activation, losses = x, []
        for i, (params, opt_state) in enumerate(stack):
            params, opt_state, loss, activation = train_step(params, opt_state, activation, labels)
            stack[i] = (params, opt_state)
            losses.append(loss)
        history.append(jnp.stack(losses))
    return jnp.stack(history)
