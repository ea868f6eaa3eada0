"""The examples of composition: every framework's blocks learn from our losses."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lls_jax import data

FOLDER = pathlib.Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
NEEDS = {"equinox_blocks": "equinox", "equinox_cnn": "equinox", "haiku_blocks": "haiku"}


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "losses", "accuracy"),
    [
        *(("residual", 4, 70), ("vision_transformer", 4, 70)),
        *(("flax_nnx_cnn", 3, 70), ("equinox_cnn", 3, 70)),
    ],
)
def test_networks_of_other_kinds_learn_the_digits_from_local_losses(name, losses, accuracy):
    """Residual blocks, tokens ``[batch, length, channels]``, and models of other frameworks."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    module = load(FOLDER / "networks" / f"{name}.py")
    spec = data.get_spec("digits")
    train, test = (data.load(spec, split, pathlib.Path()) for split in ("train", "test"))
    # A user's program, under JAX's own defaults.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = module.train(train, test, epochs=2)
    records = result.records
    assert records[-1]["test_accuracy"] > accuracy
    assert len(records[0]["layer_loss"]) == losses
    assert (np.array(records[-1]["layer_loss"]) < records[0]["layer_loss"]).all()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_layer_learns(path):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    source = path.read_text()
    for ours in ("lls_jax.models", "lls_jax.training", "lls_jax.blocks", "import models"):
        assert ours not in source
    module = load(path)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(32, module.WIDTH)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, module.CLASSES, 32), jnp.int32)
    # A user's program, under JAX's own defaults.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        history = np.asarray(module.train(x, labels, 60))
    assert history.shape == (60, module.LAYERS)
    assert (history[-1] < history[0] - 0.05).all(), history[[0, -1]]
