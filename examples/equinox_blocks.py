"""Local learning in Equinox: modules of Equinox, losses of lls_jax."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from lls_jax import rules

WIDTH, LAYERS, CLASSES = 64, 3, 10
RULE = rules.make("lls_mxm", num_classes=CLASSES)
OPTIMIZER = optax.sgd(0.5, momentum=0.9)


class Block(eqx.Module):
    """A dense layer and its rule's parameters."""

    linear: eqx.nn.Linear
    rule: dict

    def __init__(self, *, key):
        layer_key, rule_key = jax.random.split(key)
        self.linear = eqx.nn.Linear(WIDTH, WIDTH, key=layer_key)
        self.rule = RULE.init(rule_key, (WIDTH,), WIDTH)

    def __call__(self, x):
        return jax.nn.relu(jax.vmap(self.linear)(jax.lax.stop_gradient(x)))


def local_loss(block, x, labels):
    """The block's own loss, and its activation."""
    activation = block(x)
    return RULE.loss(block.rule, activation, labels, pool_size=WIDTH), activation


@eqx.filter_jit
def train_step(block, opt_state, x, labels):
    """Update one block; returns the activation from before the update too."""
    value_and_grad = eqx.filter_value_and_grad(local_loss, has_aux=True)
    (loss, activation), grads = value_and_grad(block, x, labels)
    updates, opt_state = OPTIMIZER.update(grads, opt_state)
    return eqx.apply_updates(block, updates), opt_state, loss, activation


def train(x, labels, steps):
    """Losses ``[steps, layers]`` on features ``[batch, 64]`` and labels ``[batch]``."""
    blocks = [Block(key=key) for key in jax.random.split(jax.random.key(0), LAYERS)]
    states = [OPTIMIZER.init(eqx.filter(block, eqx.is_array)) for block in blocks]
    history = []
    for _ in range(steps):
        activation, losses = x, []
        for i in range(LAYERS):
            blocks[i], states[i], loss, activation = train_step(
                blocks[i], states[i], activation, labels
            )
            losses.append(loss)
        history.append(jnp.stack(losses))
    return jnp.stack(history)
