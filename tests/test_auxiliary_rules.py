"""Rules of other papers against NumPy in float64, and what they ask for beside the activation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy_oracle import convolve, normalize, pool
from seeds import random_generator

from lls_jax import models, placement, rules, training
from lls_jax.accounting import account
from lls_jax.blocks import ConvBlock, DenseBlock, LocalBlock, ResidualBlock
from lls_jax.models import BlockSpec, Network
from lls_jax.rules.auglocal import auxiliary_depth, chosen_blocks

CLASSES = 5
LABELS = np.array([3, 0, 1, 4, 2, 1])
LATER = rules.LaterBlock


def np_cross_entropy(logits, labels=LABELS, smoothing=0.0):
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    target = (1 - smoothing) * np.eye(logits.shape[1])[labels] + smoothing / logits.shape[1]
    return -(target * log_p).sum(1).mean()


def compiled_loss(rule, bins=2):
    """In one program, where each operation would be one by itself."""
    return jax.jit(lambda params, a, told: rule.loss(params, a, told, pool_size=bins))


def relu(x):
    return np.maximum(x, 0)


# --- Heads, and whole activations ----------------------------------------------------------------


def np_mono_forward(rule, p, a):
    return np_cross_entropy(a.reshape(len(a), -1) @ p["projection"].T, smoothing=0.1)


def np_deeper_forward(rule, p, a):
    """Groups of channels: 7 channels for 5 classes are groups of 2, 1, 2, 1, 1."""
    channels = {7: [[0, 1], [2], [3, 4], [5], [6]], 10: [[2 * k, 2 * k + 1] for k in range(5)]}
    if a.ndim == 2:
        a = a.reshape(len(a), 10, -1).mean(2)
    groups = channels[a.shape[-1]]
    goodness = np.stack([a[..., g].reshape(len(a), -1).mean(1) for g in groups], 1)
    return np_cross_entropy(goodness / 0.1, smoothing=0.1)


def np_distance_forward(rule, p, a, bins=2):
    z = pool(a, bins if a.ndim == 4 else 10)
    w = p["prototypes"]
    cosine = (z / np.linalg.norm(z, axis=1, keepdims=True)) @ (
        w / np.linalg.norm(w, axis=1, keepdims=True)
    ).T
    losses = []
    for c, y in zip(cosine, LABELS):
        others = [k for k in range(CLASSES) if k != y]
        losses.append(np.log1p(sum(np.exp((c[k] - c[y] + 0.3) / 0.1) for k in others)))
    return np.mean(losses)


HEADS = {
    "mono_forward": (np_mono_forward, {"label_smoothing": 0.1}),
    "deeper_forward": (np_deeper_forward, {"label_smoothing": 0.1}),
    "distance_forward": (np_distance_forward, {"margin": 0.3}),
}


def wide(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def moved(params, rng, fixed=()):
    """Parameters away from where they start."""
    return {
        name: value
        if name in fixed
        else jax.tree.map(lambda p: p + 0.2 * rng.normal(size=p.shape).astype(np.float32), value)
        for name, value in params.items()
    }


@pytest.mark.parametrize("shape", [(6, 4, 4, 7), (6, 20)])
@pytest.mark.parametrize("name", HEADS)
def test_a_loss_equals_its_numpy_form(name, shape):
    rng = random_generator()
    oracle, options = HEADS[name]
    rule = rules.make(name, num_classes=CLASSES, **options)
    bins = 2 if len(shape) == 4 else 10
    params = moved(rule.init(jax.random.key(0), shape[1:], bins), rng, rule.fixed)
    a = rng.normal(size=shape)
    ours = compiled_loss(rule, bins)(params, jnp.asarray(a, jnp.float32), jnp.asarray(LABELS))
    np.testing.assert_allclose(ours, oracle(rule, wide(params), a), rtol=2e-5, atol=1e-6)


# --- AugLocal ------------------------------------------------------------------------------------


def np_auglocal(p, a, copies):
    """`copies`: of each, its kind and its stride."""
    x = a
    for i, (kind, stride) in enumerate(copies):
        c = p[f"copy_{i}"]
        if kind == "dense":
            x = x.mean((1, 2)) if x.ndim == 4 else x
            x = relu(normalize(x @ c["kernel"], c["norm"]))
            continue
        h = normalize(convolve(x, c["kernel"], stride), c["norm"])
        if kind == "residual":
            h = normalize(convolve(relu(h), c["second"]), c["second_norm"])
            if "shortcut" in c:
                x = normalize(x[:, ::stride, ::stride] @ c["shortcut"], c["shortcut_norm"])
            h = h + x
        x = relu(h)
    x = x.mean((1, 2)) if x.ndim == 4 else x
    if len(copies) <= 1:
        x = normalize(x, p["norm"])
    assert ("norm" in p) == (len(copies) <= 1)
    return np_cross_entropy(x @ p["output"]["kernel"] + p["output"]["bias"])


@pytest.mark.parametrize(
    ("shape", "later", "depth", "copies"),
    [
        # Twice as wide: half the side. Wider by less: not.
        (
            (6, 6, 3),
            [LATER((6, 6, 4)), LATER((3, 3, 8)), LATER((3, 3, 9)), LATER((7,))],
            4,
            [("conv", 1), ("conv", 2), ("conv", 1), ("dense", 0)],
        ),
        (
            (5, 5, 4),
            [LATER((5, 5, 4), True), LATER((3, 3, 8), True)],
            2,
            [("residual", 1), ("residual", 2)],
        ),
        # Only the last one of three.
        ((4, 4, 3), [LATER((4, 4, 3)), LATER((4, 4, 3)), LATER((2, 2, 6))], 1, [("conv", 2)]),
        ((9,), [LATER((7,))], 3, [("dense", 0)]),
        ((9,), [], 3, []),
    ],
)
def test_auglocal_equals_its_numpy_form(shape, later, depth, copies):
    rng = random_generator()
    rule = rules.AugLocal(CLASSES, auxiliary_depth=depth)
    around = rules.Surroundings(0, (8, 8, 3), tuple(later))
    params = moved(rule.in_network(around).init(jax.random.key(0), shape, 2), rng)
    a = rng.normal(size=(6, *shape))
    ours = compiled_loss(rule)(params, jnp.asarray(a, jnp.float32), jnp.asarray(LABELS))
    np.testing.assert_allclose(ours, np_auglocal(wide(params), a, copies), rtol=1e-4, atol=1e-5)


def test_auglocal_chooses_later_blocks_as_published():
    # ResNet-110, d = 6: depth 6 at the first block and 4 (3.5 rounded to even) before the last.
    depths = [auxiliary_depth(6, index, 55) for index in range(54)]
    assert (depths[0], depths[-1]) == (6, 4) and depths == sorted(depths, reverse=True)
    assert chosen_blocks(0, 55, 6) == [9, 18, 27, 36, 45, 54]
    assert chosen_blocks(50, 55, 6) == [51, 52, 53, 54]
    # In a network: the widths of the blocks that are chosen, residual where they are.
    specs = [BlockSpec(ConvBlock(4), 2), *(BlockSpec(ResidualBlock(8, s), 2) for s in (2, 1))]
    specs[-1] = dataclasses.replace(specs[-1], average_pool=1, flatten=True)
    model = Network("small", CLASSES, (*specs, BlockSpec(DenseBlock(6), 6)))
    image = jnp.zeros((1, 8, 8, 3))
    params, _ = jax.eval_shape(
        lambda key: model.init(rules.AugLocal(CLASSES, 3), key, image), jax.random.key(0)
    )
    first = params["block_0"]["rule"]
    assert [first[f"copy_{i}"]["kernel"].shape for i in range(3)] == [
        (3, 3, 4, 8), (3, 3, 8, 8), (8, 6),
    ]  # fmt: skip
    assert [("second" in first[f"copy_{i}"]) for i in range(3)] == [True, True, False]
    assert set(params["block_3"]["rule"]) == {"norm", "output"}
    with pytest.raises(ValueError, match="`auxiliary_depth` is 0"):
        rules.AugLocal(CLASSES, 0)


# --- InfoPro -------------------------------------------------------------------------------------


def np_enlarge(a, size):
    """Bilinear, by the centres of pixels."""
    out = a
    for axis in (1, 2):
        old = out.shape[axis]
        at = (np.arange(size) + 0.5) * old / size - 0.5
        low = np.clip(np.floor(at).astype(int), 0, old - 1)
        high = np.clip(np.floor(at).astype(int) + 1, 0, old - 1)
        share = (at - np.floor(at)).reshape([-1 if i == axis else 1 for i in range(4)])
        out = np.take(out, low, axis) * (1 - share) + np.take(out, high, axis) * share
    return out


def np_infopro(p, a, image, weights, stride):
    c = p["classifier"]
    h = relu(normalize(convolve(a, c["kernel"], stride), c["norm"])).mean((1, 2))
    h = relu(h @ c["hidden"]["kernel"] + c["hidden"]["bias"])
    loss = weights[1] * np_cross_entropy(h @ c["output"]["kernel"] + c["output"]["bias"])
    if not weights[0]:
        assert "decoder" not in p
        return loss
    d = p["decoder"]
    h = relu(normalize(convolve(np_enlarge(a, image.shape[1]), d["kernel"]), d["norm"]))
    decoded = 1 / (1 + np.exp(-(convolve(h, d["output"]) + d["bias"])))
    pixels = np.clip(image * [0.2, 0.3] + [0.5, 0.4], 0, 1)
    bce = -(pixels * np.log(decoded) + (1 - pixels) * np.log(1 - decoded))
    return loss + weights[0] * bce.mean()


@pytest.mark.parametrize(
    ("shape", "index", "weights", "stride"),
    [
        ((10, 10, 3), 0, (5.0, 0.05), 2),
        ((5, 5, 3), 1, (2.6, 0.275), 1),
        ((40,), 2, (0.2, 0.5), 1),
        ((5, 5, 40), 3, (0.0, 1.0), 1),
    ],
)
def test_infopro_equals_its_numpy_form(shape, index, weights, stride):
    rng = random_generator()
    rule = rules.InfoPro(CLASSES, pixel_mean=(0.5, 0.4), pixel_std=(0.2, 0.3))
    rule = rule.at_block(index, 4)
    np.testing.assert_allclose(rule.weights, weights)
    rule = rule.in_network(rules.Surroundings(index, (10, 10, 2), ()))
    params = moved(rule.init(jax.random.key(0), shape, 2), rng)
    width = params["classifier"]["kernel"].shape[-1]
    assert width == min(2 * shape[-1], 64)
    a, image = rng.normal(size=(6, *shape)), rng.normal(size=(6, 10, 10, 2))
    told = rules.LabeledImages(jnp.asarray(LABELS), jnp.asarray(image, jnp.float32))
    ours = compiled_loss(rule)(params, jnp.asarray(a, jnp.float32), told)
    a = a if a.ndim == 4 else a[:, None, None, :]
    theirs = np_infopro(wide(params), a, image, weights, stride)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_infopro_says_what_it_needs():
    rule = rules.InfoPro(CLASSES)
    params = rule.init(jax.random.key(0), (4, 4, 3), 2)
    with pytest.raises(ValueError, match=r"needs the image.*LabeledImages"):
        rule.loss(params, jnp.zeros((6, 4, 4, 3)), jnp.asarray(LABELS), pool_size=2)
    with pytest.raises(ValueError, match=r"reconstructs images.*shape \(9,\)"):
        rule.in_network(rules.Surroundings(0, (9,), ()))
    three = dataclasses.replace(rule, pixel_mean=(0.5,) * 3)
    with pytest.raises(ValueError, match=r"`pixel_mean`.*for images of 1 channels"):
        three.in_network(rules.Surroundings(0, (8, 8, 1), ()))
    with pytest.raises(ValueError, match=r"`last_weights` is \(1\.0,\)"):
        rules.InfoPro(CLASSES, last_weights=(1.0,))
    # In Flax, the same pair beside the activation.
    block = LocalBlock(ConvBlock(4), rule=rule, pool_size=2)
    image = jnp.ones((6, 4, 4, 3))
    told = rules.LabeledImages(jnp.asarray(LABELS), image)
    variables = jax.jit(block.init)(jax.random.key(0), image)
    (_, loss), _ = jax.jit(
        lambda v: block.apply(v, image, told, train=True, mutable=["batch_stats"])
    )(variables)
    assert np.isfinite(loss)


# --- In whole networks ---------------------------------------------------------------------------


def two_blocks():
    specs = (
        BlockSpec(ConvBlock(6), pool_size=2, max_pool=True),
        BlockSpec(ConvBlock(6), pool_size=2, average_pool=1, flatten=True),
    )
    return Network("two", CLASSES, specs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def losses_one_by_one(model, rule, state, batch):
    """Each block's own loss, of its activation and the network's input."""
    losses, x = [], batch["image"]
    for name, own, spec in zip(model.block_names, model.block_rules(rule), model.specs):
        variables = {
            collection: tree[name]["block"]
            for collection, tree in (("params", state.params), ("batch_stats", state.batch_stats))
        }
        a, _ = spec.module.apply(variables, x, train=True, mutable=["batch_stats"])
        told = batch["label"]
        if own.needs_image:
            told = rules.LabeledImages(told, batch["image"])
        losses.append(own.block_loss(state.params[name].get("rule", {}), a, told, pool_size=2))
        x = spec.transition(a, None)
    return jnp.stack(losses)


@pytest.mark.parametrize("way", ["plain", "reach", "pipeline", "several"])
def test_the_image_travels_with_the_activation(way):
    """In a step, with a reach, on several devices, beside a rule that does not ask for it."""
    rng = random_generator()
    model, tx = two_blocks(), optax.sgd(0.1)
    rule = rules.InfoPro(CLASSES)
    if way == "several":
        rule = rules.PerBlock((rules.make("lls", num_classes=CLASSES), rule))
    batch = {
        "image": jnp.asarray(rng.normal(size=(6, 8, 8, 3)), jnp.float32),
        "label": jnp.asarray(LABELS, jnp.int32),
    }
    state = training.create_train_state(model, rule, tx, jax.random.key(0), batch["image"])
    expected = losses_one_by_one(model, rule, state, batch)
    if way == "pipeline":
        run = placement.pipeline(model, rule, tx, [jax.devices()[0]] * 2, (2, 1))
        _, metrics = run.step(run.enter(state), batch)
        np.testing.assert_array_equal(metrics["label"], LABELS)
    else:
        step = training.make_train_step(model, rule, tx, reach=2 if way == "reach" else 1)
        _, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["layer_loss"], expected, rtol=1e-4)


def test_more_classes_than_channels_are_refused():
    rule = rules.make("deeper_forward", num_classes=10)
    with pytest.raises(ValueError, match="block of 6 channels has no group for each of 10"):
        rule.init(jax.random.key(0), (4, 4, 6), 2)
    with pytest.raises(ValueError, match="`margin` is -1"):
        rules.DistanceForward(CLASSES, margin=-1)


@pytest.mark.parametrize("name", ["auglocal", "infopro"])
def test_an_auxiliary_network_costs_what_others_counted(name):
    """Forward MACs of ResNet-32's 16 over the network's, from the authors' code."""
    model = models.make("resnet32", num_classes=10)
    counts = account(model, rules.make(name, num_classes=10), (32, 32, 3))
    forward = counts.total("forward")
    assert forward == pytest.approx(69e6, rel=0.01)
    published = {"auglocal": 1.7, "infopro": 1.2}[name]
    assert counts.total("signal") / 3 / forward == pytest.approx(published, rel=0.1)
