"""Flax NNX: a block with its local loss, and whole models cut into such blocks.

>>> import jax, jax.numpy as jnp, optax
>>> from flax import nnx
>>> from lls_jax import rules
>>> from lls_jax.frameworks.nnx import LocalBlock, update
>>> rngs, rule = nnx.Rngs(0), rules.make("lls_mxm", num_classes=10)
>>> x, labels = jnp.ones((2, 8)), jnp.array([0, 1])
>>> layer = nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), nnx.relu)
>>> block = LocalBlock(layer, x, rule=rule, pool_size=16, rngs=rngs)
>>> optimizer = nnx.Optimizer(block, optax.adam(1e-2), wrt=nnx.Param)
>>> loss, x = update(block, optimizer, x, labels)
>>> x.shape, loss.shape
((2, 16), ())
"""

from lls_jax.frameworks.nnx.block import Fixed, LocalBlock, update
from lls_jax.frameworks.nnx.localize import localize

__all__ = ["Fixed", "LocalBlock", "localize", "update"]
