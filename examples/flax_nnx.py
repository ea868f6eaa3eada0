"""Local learning in Flax NNX: modules and optimizers of NNX, losses of lls_jax."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lls_jax import rules

WIDTH, LAYERS, CLASSES = 64, 3, 10
RULE = rules.make("lls_m", num_classes=CLASSES)


class Block(nnx.Module):
    """A dense layer and its rule's parameters."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.rule = nnx.Param(RULE.init(rngs.params(), (WIDTH,), WIDTH)["modulation"])

    def __call__(self, x):
        return nnx.relu(self.linear(jax.lax.stop_gradient(x)))


def local_loss(block, x, labels):
    """The block's own loss, and its activation."""
    activation = block(x)
    params = {"modulation": block.rule[...]}
    return RULE.loss(params, activation, labels, pool_size=WIDTH), activation


@nnx.jit
def train_step(block, optimizer, x, labels):
    """Update one block; returns its loss and the activation from before the update."""
    value_and_grad = nnx.value_and_grad(local_loss, has_aux=True)
    (loss, activation), grads = value_and_grad(block, x, labels)
    optimizer.update(block, grads)
    return loss, activation


def train(x, labels, steps):
    """Losses ``[steps, layers]`` on features ``[batch, 64]`` and labels ``[batch]``."""
    rngs = nnx.Rngs(0)
    blocks = [Block(rngs) for _ in range(LAYERS)]
    optimizers = [nnx.Optimizer(block, optax.adam(1e-2), wrt=nnx.Param) for block in blocks]
    history = []
    for _ in range(steps):
        activation, losses = x, []
        for block, optimizer in zip(blocks, optimizers):
            loss, activation = train_step(block, optimizer, activation, labels)
            losses.append(loss)
        history.append(jnp.stack(losses))
    return jnp.stack(history)
