"""The examples of composition: every framework's blocks learn from our losses."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLES = sorted((pathlib.Path(__file__).parents[1] / "examples").glob("*.py"))
NEEDS = {"equinox_blocks": "equinox", "haiku_blocks": "haiku"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_layer_learns(path):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    source = path.read_text()
    for ours in ("lls_jax.models", "lls_jax.training", "lls_jax.blocks", "import models"):
        assert ours not in source
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(32, module.WIDTH)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, module.CLASSES, 32), jnp.int32)
    # A user's program, under JAX's own defaults.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        history = np.asarray(module.train(x, labels, 60))
    assert history.shape == (60, module.LAYERS)
    assert (history[-1] < history[0] - 0.05).all(), history[[0, -1]]
