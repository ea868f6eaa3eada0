"""The README's example, run as it stands there."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_plain_jax_example_learns():
    (code,) = re.findall(
        r"<!-- example: plain JAX -->\n```python\n(.*?)```", README.read_text(), re.S
    )
    scope = {}
    exec(code, scope)
    rng = np.random.default_rng(0)
    labels = jnp.asarray(rng.integers(0, 10, 32), jnp.int32)
    x = jnp.asarray(rng.normal(size=(32, 64)), jnp.float32)
    layers, losses = scope["layers"], []
    for _ in range(60):
        layers, loss = scope["train_step"](layers, x, labels)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.02
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(layers))
