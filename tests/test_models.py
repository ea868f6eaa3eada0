"""Networks beside the published ones of LLS: sizes, shapes, blocks against NumPy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy_oracle import convolve, normalize
from seeds import random_generator

from lls_jax import models, rules, training
from lls_jax.blocks import DenseBlock, ResidualBlock

CLASSES = 10


@functools.cache
def one_block(module, shape):
    """Parameters and activation of a block; a network has many of one kind."""
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    a, variables = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x), x)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"])), a


def shapes_of(model, side=32):
    """The number of parameters, and the shape of each block's activation."""
    size, shape, activations = 0, (side, side, 3), []
    for spec in model.specs:
        own, a = one_block(spec.module, shape)
        size += own
        activations.append(a.shape[1:])
        shape = jax.eval_shape(lambda a, spec=spec: spec.transition(a, None), a).shape[1:]
    return size + (shape[0] + 1) * model.num_classes, activations


# Millions of parameters as their authors give them: Nøkland and Eidnes' README; He et al., table 6;
# 0.467 is ResNet-32 with 1x1 convolutions across stages, in the code of InfoPro and of AugLocal.
@pytest.mark.parametrize(
    ("name", "width", "millions", "tolerance", "blocks"),
    [
        ("vgg8b", 1, 8.9, 0.05, 7),
        ("vgg11b", 1, 11.6, 0.05, 10),
        ("vgg11b", 2, 42.0, 0.05, 10),
        ("vgg11b", 3, 91.3, 0.05, 10),
        ("resnet32", 1, 0.467, 0.0005, 16),
        ("resnet110", 1, 1.73, 0.005, 55),
    ],
)
def test_networks_have_their_published_sizes(name, width, millions, tolerance, blocks):
    model = models.make(name, num_classes=CLASSES, width=width)
    size, activations = shapes_of(model)
    assert size / 1e6 == pytest.approx(millions, abs=tolerance)
    assert len(activations) == blocks
    if name.startswith("resnet"):
        third = (blocks - 1) // 3
        sides = [(32, 32, 16)] * (third + 1) + [(16, 16, 32)] * third + [(8, 8, 64)] * third
        assert activations == sides
    elif width == 1:
        convolutions = {
            "vgg8b": [(32, 128), (32, 256), (16, 256), (16, 512), (8, 512), (4, 512)],
            "vgg11b": [
                *[(32, 128)] * 3, (32, 256), (16, 256), (16, 512), (8, 512), (8, 512), (4, 512),
            ],
        }[name]  # fmt: skip
        assert activations == [*((side, side, c) for side, c in convolutions), (1024,)]
        # A loss's classifier reads 2048 latents at most.
        pooled = [c * spec.pool_size**2 for (_, c), spec in zip(convolutions, model.specs)]
        assert max(pooled) == 2048


@pytest.mark.parametrize("name", ["small_conv", "mobilenet_v1", "vgg8", "vgg8b", "resnet32"])
def test_a_width_scales_every_convolution(name):
    wide, narrow = (models.make(name, num_classes=CLASSES, width=w) for w in (1, 0.25))
    side = max(32, wide.smallest_image)
    pairs = list(zip(shapes_of(wide, side)[1], shapes_of(narrow, side)[1], strict=True))
    images = [(a, b) for a, b in pairs if len(a) == 3]
    assert all(a[:2] == b[:2] and a[-1] == 4 * b[-1] for a, b in images)
    dense = [(a[0], b[0]) for a, b in pairs if len(a) == 1]
    assert all(a == (b if name.endswith("b") else 4 * b) for a, b in dense)


@pytest.mark.parametrize(("features", "stride"), [(3, 1), (5, 1), (6, 2)])
def test_a_residual_block_equals_its_numpy_form(features, stride):
    rng = random_generator()
    block, x = ResidualBlock(features, stride), rng.normal(size=(4, 6, 6, 3))
    variables = block.init(jax.random.key(0), jnp.asarray(x, jnp.float32))
    params = jax.tree.map(
        lambda p: p + 0.3 * rng.normal(size=p.shape).astype(np.float32), variables["params"]
    )
    ours, _ = block.apply(
        {**variables, "params": params}, jnp.asarray(x, jnp.float32),
        train=True, mutable=["batch_stats"],
    )  # fmt: skip
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    h = normalize(convolve(x, p["conv_0"]["kernel"], stride), p["norm_0"])
    h = normalize(convolve(np.maximum(h, 0), p["conv_1"]["kernel"], 1), p["norm_1"])
    assert ("shortcut_conv" in p) == (features != 3)
    if "shortcut_conv" in p:
        x = convolve(x, p["shortcut_conv"]["kernel"], stride)
        x = normalize(x, p["shortcut_norm"])
    np.testing.assert_allclose(ours, np.maximum(h + x, 0), atol=2e-5)


class MeanOfFeatures(nn.Module):
    """A classifier without parameters: each class's share of the features."""

    @nn.compact
    def __call__(self, x):
        return jnp.mean(x.reshape(len(x), CLASSES, -1), axis=-1).astype(jnp.float32)


def test_a_classifier_may_have_no_parameters():
    specs = (models.BlockSpec(DenseBlock(2 * CLASSES), pool_size=4),)
    model = models.Network("shares", CLASSES, specs, classifier=MeanOfFeatures())
    rule, tx, image = rules.make("lls", num_classes=CLASSES), optax.sgd(0.1), jnp.ones((4, 5))
    state = training.create_train_state(model, rule, tx, jax.random.key(0), image)
    assert state.params["classifier"] == {}
    step = training.make_train_step(model, rule, tx)
    state, metrics = step(state, {"image": image, "label": jnp.arange(4)})
    assert np.isfinite(metrics["loss"])
    assert training.predict(model, state, image).shape == (4, CLASSES)


# Blocks of their kinds are trained by other tests: `test_training`, `test_examples`.
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "width"), [("vgg8b", 1 / 32), ("vgg11b", 1 / 32), ("resnet32", 0.25)]
)
def test_a_local_step_of_a_narrow_network_runs(name, width):
    model = models.make(name, num_classes=CLASSES, width=width)
    rule, tx = rules.make("lls_mxm", num_classes=CLASSES), optax.sgd(0.05)
    rng = random_generator()
    batch = {
        "image": jnp.asarray(rng.normal(size=(4, 16, 16, 3)), jnp.float32),
        "label": jnp.arange(4),
    }
    state = training.create_train_state(model, rule, tx, jax.random.key(0), batch["image"])
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = training.make_train_step(model, rule, tx)(state, batch)
    assert metrics["layer_loss"].shape == (len(model.specs),)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(metrics))
    for block in model.block_names:
        # No block stands still.
        moved = jax.tree.map(lambda a, b: np.any(a != b), before[block], dict(state.params[block]))
        assert any(jax.tree.leaves(moved["block"])), block
