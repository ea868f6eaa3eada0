"""Local learning in Flax NNX: a list of local blocks, each with an optimizer of its own."""

import jax.numpy as jnp
import optax
from flax import nnx

from lls_jax import rules
from lls_jax.frameworks.nnx import LocalBlock, update

WIDTH, LAYERS, CLASSES = 64, 3, 10
RULE = rules.make("lls_m", num_classes=CLASSES)


def train(x, labels, steps):
    """Losses ``[steps, layers]`` on features ``[batch, 64]`` and labels ``[batch]``."""
    rngs = nnx.Rngs(0)
    layers = [nnx.Sequential(nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.relu) for _ in range(LAYERS)]
    blocks = [LocalBlock(layer, x, rule=RULE, pool_size=WIDTH, rngs=rngs) for layer in layers]
    optimizers = [nnx.Optimizer(block, optax.adam(1e-2), wrt=nnx.Param) for block in blocks]
    history = []
    for _ in range(steps):
        activation, losses = x, []
        for block, optimizer in zip(blocks, optimizers):
            loss, activation = update(block, optimizer, activation, labels)
            losses.append(loss)
        history.append(jnp.stack(losses))
    return jnp.stack(history)
