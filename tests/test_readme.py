"""The README's example, run as it stands there."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_the_fit_example_trains_and_predicts():
    (code,) = re.findall(r"<!-- example: fit -->\n```python\n(.*?)```", README.read_text(), re.S)
    rng = np.random.default_rng(0)
    # Bright and dark images, more or less.
    labels, test_labels = rng.integers(0, 10, 400), rng.integers(0, 10, 50)
    images, test_images = (
        (20 * own[:, None, None, None] + rng.integers(0, 60, (len(own), 8, 8, 3))).astype(np.uint8)
        for own in (labels, test_labels)
    )
    scope = {
        **{"images": images, "labels": labels, "floats": jnp.ones((2, 8, 8, 3))},
        **{"test_images": test_images, "test_labels": test_labels},
    }
    exec(code, scope)
    assert scope["logits"].shape == (2, 10)
    records = scope["result"].records
    assert len(records) == 5 and records[-1]["train_loss"] < records[0]["train_loss"]
    assert {"validation_accuracy", "test_accuracy"} <= set(records[0])


def test_the_page_on_other_frameworks_runs_from_top_to_bottom():
    """A page's blocks of code are one program, under JAX's own defaults."""
    pytest.importorskip("equinox")
    page = (README.parent / "docs" / "frameworks.md").read_text()
    scope = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for code in re.findall(r"```python\n(.*?)```", page, re.S):
            exec(code, scope)
    records = scope["result"].records
    assert (np.array(records[-1]["layer_loss"]) < records[0]["layer_loss"]).all()
    assert scope["logits"].shape == (2, 10) and scope["x"].shape == (4, 64)
