"""Local learning in Equinox: a list of local blocks, each with an optimizer of its own."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from lls_jax import rules
from lls_jax.frameworks.equinox import LocalBlock, start, update

WIDTH, LAYERS, CLASSES = 64, 3, 10
RULE = rules.make("lls_mxm", num_classes=CLASSES)
OPTIMIZER = optax.sgd(0.5, momentum=0.9)


def make_block(key, x):
    layer_key, rule_key = jax.random.split(key)
    linear = eqx.nn.Linear(WIDTH, WIDTH, key=layer_key)
    layer = eqx.nn.Sequential([linear, eqx.nn.Lambda(jax.nn.relu)])
    return LocalBlock(layer, x, rule=RULE, pool_size=WIDTH, key=rule_key)


def train(x, labels, steps):
    """Losses ``[steps, layers]`` on features ``[batch, 64]`` and labels ``[batch]``."""
    keys = jax.random.split(jax.random.key(0), LAYERS)
    learners = [start(make_block(key, x), OPTIMIZER) for key in keys]
    history = []
    for _ in range(steps):
        activation, losses = x, []
        for i, learner in enumerate(learners):
            learners[i], loss, activation = update(learner, OPTIMIZER, activation, labels)
            losses.append(loss)
        history.append(jnp.stack(losses))
    return jnp.stack(history)
