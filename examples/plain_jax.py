"""Local learning in plain JAX: three dense layers, each with its own loss and optimizer."""

import jax
import jax.numpy as jnp
import optax

from lls_jax import rules

WIDTH, LAYERS, CLASSES = 64, 3, 10
RULE = rules.make("lls_mxm", num_classes=CLASSES)
OPTIMIZER = optax.adam(1e-2)


def init(key):
    """Parameters and optimizer state of each layer."""
    layers = []
    for layer_key in jax.random.split(key, LAYERS):
        weight_key, rule_key = jax.random.split(layer_key)
        weight = jax.random.normal(weight_key, (WIDTH, WIDTH)) / WIDTH**0.5
        params = {"weight": weight, "rule": RULE.init(rule_key, (WIDTH,), WIDTH)}
        layers.append((params, OPTIMIZER.init(params)))
    return layers


def local_loss(params, x, labels):
    """A layer's activation and its own loss; nothing flows into the layer below."""
    activation = jax.nn.relu(jax.lax.stop_gradient(x) @ params["weight"])
    return RULE.loss(params["rule"], activation, labels, pool_size=WIDTH), activation


@jax.jit
def train_step(layers, x, labels):
    """Update every layer; returns them and their losses."""
    updated, losses = [], []
    for params, opt_state in layers:
        (loss, x), grads = jax.value_and_grad(local_loss, has_aux=True)(params, x, labels)
        updates, opt_state = OPTIMIZER.update(grads, opt_state)
        updated.append((optax.apply_updates(params, updates), opt_state))
        losses.append(loss)
    return updated, jnp.stack(losses)


def train(x, labels, steps):
    """Losses ``[steps, layers]`` on features ``[batch, 64]`` and labels ``[batch]``."""
    layers, history = init(jax.random.key(0)), []
    for _ in range(steps):
        layers, losses = train_step(layers, x, labels)
        history.append(losses)
    return jnp.stack(history)
