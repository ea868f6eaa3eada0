"""Equinox: a block with its local loss, and whole models cut into such blocks.

Equinox's layers take one example and have channels first; blocks here take batches, and put the
channels last for rules alone.

>>> import equinox as eqx, jax, jax.numpy as jnp, optax
>>> from lls_jax import rules
>>> from lls_jax.frameworks.equinox import LocalBlock, start, update
>>> key, rule = jax.random.key(0), rules.make("lls_mxm", num_classes=10)
>>> x, labels, tx = jnp.ones((2, 8)), jnp.array([0, 1]), optax.adam(1e-2)
>>> layer = eqx.nn.Sequential([eqx.nn.Linear(8, 16, key=key), eqx.nn.Lambda(jax.nn.relu)])
>>> block = LocalBlock(layer, x, rule=rule, pool_size=16, key=key)
>>> learner = start(block, tx)
>>> learner, loss, x = update(learner, tx, x, labels)
>>> x.shape, loss.shape
((2, 16), ())
"""

try:
    import equinox  # noqa: F401
except ImportError as error:
    raise ImportError(
        "lls_jax.frameworks.equinox needs Equinox, which is not installed: `pip install equinox`, "
        "or lls_jax with its extra, `pip install 'lls_jax[equinox]'`."
    ) from error


from lls_jax.frameworks.equinox.block import Learner, LocalBlock, split, start, update
from lls_jax.frameworks.equinox.localize import localize

__all__ = ["Learner", "LocalBlock", "localize", "split", "start", "update"]
