"""Rules: against NumPy forms of their own, by block, in groups, and one of a user's own."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import cuda
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy_oracle import convolve
from seeds import random_generator
from small_models import two_blocks

from experiments import command_line, evaluate, setup, train
from experiments.config import TrainConfig
from lls_jax import models, rules, training
from lls_jax.blocks import ConvBlock, LocalBlock, apply_module
from lls_jax.errors import UserError
from lls_jax.models import BlockSpec, Network
from lls_jax.optimizers import schedule_free_adamw

ROOT = pathlib.Path(__file__).parents[1]
CLASSES = 5
TX = optax.sgd(0.05, momentum=0.9)


def make_rule(name, **options):
    reduced = {"basis_rows": 3} if name == "lls_mxm_reduced" else {}
    return rules.make(name, num_classes=CLASSES, **reduced, **options)


def make_batch(size=8, side=8, seed=None):
    rng = random_generator(seed)
    return {
        "image": jnp.asarray(rng.normal(size=(size, side, side, 3)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, CLASSES, size), jnp.int32),
    }


def start(model, rule, batch):
    return training.create_train_state(model, rule, TX, jax.random.key(0), batch["image"])


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


# --- Every rule, and every kind of model ----------------------------------------------------------


# One of each kind of block; the others have more of the same. And of rule: latents, something
# fixed, channels in groups, the activation, the image, the blocks above, and baselines.
KINDS_OF_MODEL = ("vgg8", "mobilenet_v1_small", "resnet32", "airbench")
KINDS_OF_RULE = (
    *("lls_mxm", "lls_m_random", "deeper_forward", "predsim", "infopro", "auglocal", "bp", "dfa"),
)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("model_name", "names"),
    [("small_conv", rules.NAMES), *((name, KINDS_OF_RULE) for name in KINDS_OF_MODEL)],
)
def test_every_kind_of_rule_takes_a_step_on_every_kind_of_model(model_name, names):
    """Traced, with every shape checked; `test_training` runs them where they are small."""
    model = models.make(model_name, num_classes=CLASSES)
    side = max(8, model.smallest_image)
    image = jax.ShapeDtypeStruct((4, side, side, 3), jnp.float32)
    label = jax.ShapeDtypeStruct((4,), jnp.int32)
    for name in names:
        rule = make_rule(name)
        state = jax.eval_shape(
            lambda key, rule=rule: training.create_train_state(
                model, rule, TX, key, jnp.zeros((1, side, side, 3))
            ),
            jax.random.key(0),
        )
        step = training.make_train_step(model, rule, TX)
        after, metrics = jax.eval_shape(step, state, {"image": image, "label": label})
        assert jax.tree.structure(after) == jax.tree.structure(state), name
        assert jax.tree.map(lambda leaf: leaf.shape, after) == jax.tree.map(
            lambda leaf: leaf.shape, state
        )
        local = 0 if name in ("bp", "dfa", "drtp") else len(model.specs)
        assert metrics["layer_loss"].shape == (local,)
        assert metrics["logits"].shape == (4, CLASSES)


# --- Against NumPy -------------------------------------------------------------------------------


def np_softmax_loss(logits, labels):
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return -log_p[np.arange(len(labels)), labels].mean()


def np_latents(a, bins):
    """Where `bins` divides the size."""
    if a.ndim == 2:
        return a.reshape(len(a), bins, -1).mean(2)
    batch, height, width, channels = a.shape
    pooled = a.reshape(batch, bins, height // bins, bins, width // bins, channels).mean((2, 4))
    return pooled.transpose(0, 3, 1, 2).reshape(batch, -1)


def np_similarity(x):
    x = x - x.mean(1, keepdims=True)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T


def np_predsim(p, a, labels, bins):
    if a.ndim == 4:
        features = convolve(a, p["similarity"]).std((1, 2))
    else:
        features = a @ p["similarity"]
    target = np_similarity(np.eye(CLASSES)[labels])
    similarity = ((np_similarity(features) - target) ** 2).mean()
    logits = np_latents(a, bins) @ p["kernel"] + p["bias"]
    return 0.01 * np_softmax_loss(logits, labels) + 0.99 * similarity


def np_contrastive(p, a, labels, bins):
    z = np_latents(a, bins) @ p["projection"]
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    scores = np.exp(z @ z.T / 0.1)
    losses = []
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        positive = [j for j in others if labels[j] == labels[i]]
        total = sum(scores[i, j] for j in others)
        if positive:
            losses.append(-np.mean([np.log(scores[i, j] / total) for j in positive]))
    return np.mean(losses)


def np_decoupled(p, a, labels, bins):
    kernel = p["hidden"]["kernel"]
    hidden = convolve(a, kernel) if a.ndim == 4 else a @ kernel
    hidden = np.maximum(hidden + p["hidden"]["bias"], 0)
    logits = np_latents(hidden, bins) @ p["output"]["kernel"] + p["output"]["bias"]
    return np_softmax_loss(logits, labels)


def np_random(p, a, labels, bins):
    latents = np_latents(a, bins)
    feedback = p["feedback"].reshape(CLASSES, latents.shape[1], -1).mean(2)
    m = p.get("modulation")
    if m is not None:
        feedback = m[:, None] * feedback if m.ndim == 1 else m @ feedback
    return np_softmax_loss(latents @ feedback.T / 0.5, labels)


def np_centered(p, a, labels, bins):
    """Sines of 100 frequencies, of which the square wave keeps the sign."""
    z = np_latents(a, bins)
    z = z - z.mean(0)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    phase = np.float32(np.linspace(50, 512, 100))[:, None] * np.arange(z.shape[1], dtype=np.float32)
    wave = np.sign(np.sin(phase.astype(np.float64)))
    return np_softmax_loss(z @ wave.T @ p["modulation"] / 0.5, labels)


NUMPY = {
    "lls_centered": np_centered,
    "predsim": np_predsim,
    "contrastive": np_contrastive,
    "decoupled": np_decoupled,
    **dict.fromkeys(
        ("lls_random", "lls_m_random", "lls_mxm_random", "local_classifier"), np_random
    ),
}


@pytest.mark.parametrize("shape", [(6, 4, 4, 3), (6, 8)])
@pytest.mark.parametrize("name", NUMPY)
def test_the_loss_equals_its_numpy_form(name, shape):
    rng = random_generator()
    rule, bins = make_rule(name), 2 if len(shape) == 4 else 4
    key = jax.random.key(int(rng.integers(2**31)))
    latents = shape[-1] * bins**2 if len(shape) == 4 else bins
    if "hidden_dim" in rules.options_of(name):
        rule = dataclasses.replace(rule, hidden_dim=3 * latents)
    params = rule.init(key, shape[1:], bins)
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)
    activation = rng.normal(size=shape).astype(np.float32)
    labels = rng.permutation(np.arange(6) % CLASSES)
    ours = rule.loss(params, jnp.asarray(activation), jnp.asarray(labels), pool_size=bins)
    wide = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    theirs = NUMPY[name](wide, activation.astype(np.float64), labels, bins)
    # A loss near 0 is a difference of logits of 10 and more.
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=3e-6)


@pytest.mark.parametrize(("name", "sign"), [("dfa", False), ("dfa", True), ("drtp", False)])
def test_direct_feedback_is_a_projection_of_the_error_or_the_target(name, sign):
    # Of one seed: of others an activation may fall on the other side of LeakyReLU's bend.
    model, batch = models.make("small_conv", num_classes=CLASSES), make_batch(seed=0)
    rule, tx = make_rule(name, sign=sign), optax.sgd(1.0)
    state = training.create_train_state(model, rule, tx, jax.random.key(1), batch["image"])
    after, metrics = training.make_train_step(model, rule, tx)(copy(state), batch)
    target = np.eye(CLASSES)[np.asarray(batch["label"])]
    error = np.asarray(jax.nn.softmax(metrics["logits"])) - target
    signal = {"dfa": np.sign(error) if sign else error, "drtp": target}[name] / len(target)
    x = batch["image"]
    for block_name, spec in zip(model.block_names, model.specs):
        feedback = np.asarray(state.params[block_name]["rule"]["feedback"])

        def run(params, x=x, spec=spec, block_name=block_name):
            stats = state.batch_stats[block_name]["block"]
            variables = {"params": params, "batch_stats": stats}
            return spec.module.apply(variables, x, train=True, mutable=["batch_stats"])[0]

        def both(params, cotangent, run=run):
            activation, pullback = jax.vjp(run, params)
            return activation, pullback(cotangent)[0]

        sent = jnp.asarray(np.tensordot(signal, feedback, 1), jnp.float32)
        activation, grads = jax.jit(both)(state.params[block_name]["block"], sent)
        moved = jax.tree.map(
            lambda old, new: old - new,
            state.params[block_name]["block"],
            after.params[block_name]["block"],
        )
        for ours, theirs in zip(jax.tree.leaves(moved), jax.tree.leaves(grads)):
            assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs) + 1e-5
        np.testing.assert_array_equal(after.params[block_name]["rule"]["feedback"], feedback)
        x = spec.transition(activation, None)


@pytest.mark.parametrize("name", ["lls_random", "lls_m_random", "lls_mxm_random", "dfa"])
def test_a_fixed_matrix_is_neither_trained_nor_decayed(name):
    model, batch, rule = two_blocks(CLASSES), make_batch(), make_rule(name)
    tx = schedule_free_adamw(1e-2, weight_decay=0.1)
    state = training.create_train_state(model, rule, tx, jax.random.key(0), batch["image"])
    step = training.make_train_step(model, rule, tx)
    after = copy(state)
    for _ in range(3):
        after, _ = step(after, batch)
    for block in model.block_names:
        old, new = state.params[block]["rule"], after.params[block]["rule"]
        np.testing.assert_array_equal(old["feedback"], new["feedback"])
        assert ("modulation" in new) == (name in ("lls_m_random", "lls_mxm_random"))
        if "modulation" in new:
            assert not np.array_equal(old["modulation"], new["modulation"])


def test_a_fixed_matrix_is_no_parameter_of_a_block_in_anybodys_loop():
    """AdamW decays whatever is a parameter; a random basis is none."""
    batch = make_batch()
    block = LocalBlock(ConvBlock(4), rule=make_rule("lls_m_random"), pool_size=2)
    variables = block.init(jax.random.key(0), batch["image"])
    assert set(variables["params"]["rule"]) == {"modulation"}
    assert set(variables["fixed"]["rule"]) == {"feedback"}

    def loss(params):
        (_, loss), _ = block.apply(
            {**variables, "params": params}, batch["image"], batch["label"],
            train=True, mutable=["batch_stats"],
        )  # fmt: skip
        return loss

    tx = optax.adamw(1e-2, weight_decay=0.5)
    params, opt_state = variables["params"], tx.init(variables["params"])

    @jax.jit
    def step(params, opt_state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    values = []
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(10):
            params, opt_state, value = step(params, opt_state)
            values.append(float(value))
    assert values[-1] < values[0]
    # In a loop of plain JAX the two are taken apart by hand.
    rule = make_rule("lls_m_random")
    trained, fixed = rules.split_fixed(rule, rule.init(jax.random.key(0), (8,), 8))
    assert (list(trained), list(fixed)) == (["modulation"], ["feedback"])
    assert rules.split_fixed(make_rule("lls_mxm"), {"modulation": 1}) == ({"modulation": 1}, {})


HEADS = [name for name in rules.NAMES if isinstance(make_rule(name), rules.HeadRule)]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.2, "label_smoothing": 0.1}])
@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_the_loss(name, options):
    """What a head says of one example is what the op computes of a batch, gradients too."""
    rng = random_generator()
    takes = rules.options_of(name)
    rule = make_rule(name, **{k: value for k, value in options.items() if k in takes})
    activation = jnp.asarray(rng.normal(size=(6, 4, 4, 6)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, CLASSES, 6), jnp.int32)
    params = rule.init(jax.random.key(0), (4, 4, 6), 2)
    params = jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape).astype(np.float32), params)

    def by_hand(params, a):
        latents = rule.observe(a, 2)
        scores = jnp.matmul(latents, rule.projection(params, 24).T, precision="highest")
        square = jnp.sum(jnp.square(latents), axis=1)
        return jnp.mean(jax.vmap(rule.head, (0, 0, None, 0))(scores, square, params, labels))

    def of(loss):
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, activation)

    ours, theirs = of(lambda params, a: rule.loss(params, a, labels, pool_size=2)), of(by_hand)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    # Latents that are pooled already, and without a size.
    latents = rule.observe(activation, 2)
    assert latents.shape == (6, 24)
    pooled = rule.loss(params, latents, labels, pool_size=None)
    np.testing.assert_allclose(pooled, ours[0], rtol=1e-5)


def test_a_rule_is_named_as_it_is_made():
    assert [make_rule(name).name for name in rules.NAMES] == list(rules.NAMES)


# One of each class; the others have more of the same.
OF_CLASSES = {
    type(rule): rule.name
    for rule in map(make_rule, rules.NAMES)
    if isinstance(rule, rules.LocalRule) and rule.classes
}


@pytest.mark.parametrize("name", OF_CLASSES.values())
def test_a_label_that_is_no_class_is_refused_and_nan_inside_a_compiled_function(name):
    rule, activation = make_rule(name), jnp.asarray(np.random.default_rng(0).normal(size=(3, 10)))
    params = rule.init(jax.random.key(0), (10,), 10)

    def loss(activation, labels):
        image = jnp.ones((3, 2, 2, 3))
        told = rules.LabeledImages(labels, image) if rule.needs_image else labels
        return rule.loss(params, activation, told, pool_size=10)

    compiled = jax.jit(loss)
    for wrong in (-1, CLASSES):
        labels = jnp.array([0, wrong, 1])
        with pytest.raises(ValueError, match=f"`labels` holds {wrong}; expected indices of 5"):
            loss(activation, labels)
        assert np.isnan(compiled(activation, labels))
    assert np.isfinite(compiled(activation, jnp.array([0, CLASSES - 1, 1])))


@pytest.mark.parametrize("name", ["predsim", "decoupled"])
def test_a_rule_that_pools_says_that_it_needs_a_size(name):
    rule = make_rule(name)
    params = rule.init(jax.random.key(0), (10,), 10)
    with pytest.raises(ValueError, match=f"`pool_size` is None; rule '{name}' pools.*give the num"):
        rule.loss(params, jnp.ones((2, 10)), jnp.array([0, 1]), pool_size=None)


class Pools(nn.Module):
    """A block with fields of names that a library might probe for."""

    pools: tuple = (2, 2)
    init_for: int = 1

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Conv(4, self.pools)(x))


def test_rules_are_classes_and_blocks_may_have_any_fields():
    assert rules.LLS(num_classes=CLASSES, modulation="matrix") == make_rule("lls_mxm")
    assert rules.PredSim(CLASSES, similarity_weight=0.5) == make_rule(
        "predsim", similarity_weight=0.5
    )
    batch = make_batch()
    # A rule that sees latents, and one that sees the activation.
    for rule in (make_rule("lls_mxm"), rules.PredSim(CLASSES)):
        block = LocalBlock(Pools(), rule=rule, pool_size=2)
        variables = block.init(jax.random.key(0), batch["image"])
        activation, loss = block.apply(variables, batch["image"], batch["label"], train=True)
        assert activation.shape == (8, 8, 8, 4) and np.isfinite(loss)
    for wrong, message in (
        (lambda: rules.LLS(num_classes=1), "`num_classes` is 1"),
        (lambda: rules.LLS(CLASSES, temperature=0.0), "`temperature` is 0.0"),
        (lambda: rules.LLS(CLASSES, waveform="round"), "unknown waveform 'round'"),
        (lambda: rules.LLS(CLASSES, basis_rows=3), "`basis_rows` is 3 with modulation 'none'"),
        (lambda: rules.CenteredLLS(CLASSES, basis_rows=0), "`basis_rows` is 0"),
        (lambda: rules.CenteredLLS(CLASSES, waveform="round"), "unknown waveform 'round'"),
        (lambda: rules.Decoupled(CLASSES, label_smoothing=1.0), "`label_smoothing` is 1.0"),
        (lambda: rules.RandomLLS(CLASSES, hidden_dim=(4, 4)).at_block(0, 3), "2 widths of the"),
        (lambda: rules.RandomLLS(CLASSES, hidden_dim=(4, 4)).init(None, (4,), 4), "one a block"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            wrong()


@pytest.mark.parametrize("name", ["lls_mxm", "lls_m_random", "predsim"])
def test_the_update_of_one_block_in_plain_jax_is_the_step_of_a_network(name):
    """Tokens, features: whatever `apply` gives. The network has one block, of the same weights."""
    rule, tx = make_rule(name), optax.adam(1e-2)
    model = Network("one", CLASSES, (BlockSpec(nn.Dense(6, use_bias=False), pool_size=6),))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)), jnp.float32)
    labels = jnp.arange(8) % CLASSES
    state = training.create_train_state(model, rule, tx, jax.random.key(0), x)
    own = state.params["block_0"]

    def apply(params, batch_stats, x, key):
        return training.BlockOutput(x @ params["kernel"])

    block = training.start_block(rule, tx, jax.random.key(1), own["block"], (6,), pool_size=6)
    block = block._replace(params=own)
    update = jax.jit(training.local_update(apply, rule, tx, pool_size=6))
    step = training.make_train_step(model, rule, tx, donate=False)
    for _ in range(3):
        block, loss, passed_on = update(block, x, labels)
        state, metrics = step(state, {"image": x, "label": labels})
        np.testing.assert_allclose(loss, metrics["layer_loss"][0], rtol=1e-6)
    assert passed_on.shape == (8, 6)
    for a, b in zip(jax.tree.leaves(block.params), jax.tree.leaves(state.params["block_0"])):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


# --- By block, in groups -------------------------------------------------------------------------


def test_blocks_may_differ_in_their_rules():
    model, batch = models.make("small_conv", num_classes=CLASSES), make_batch()
    names = ("lls", "predsim", "lls_mxm", "local_classifier")
    rule = rules.PerBlock(tuple(make_rule(name) for name in names))
    assert rule.name == ",".join(names)
    state = start(model, rule, batch)

    @jax.jit
    def by_block(params, batch_stats):
        x, losses = batch["image"], []
        for name, block, spec in zip(names, model.block_names, model.specs):
            own, stats = params[block], batch_stats[block]["block"]
            activation, _ = apply_module(spec.module, own["block"], stats, x, train=True)
            losses.append(
                make_rule(name).loss(
                    own.get("rule", {}), activation, batch["label"], pool_size=spec.pool_size
                )
            )
            x = spec.transition(activation, None)
        return jnp.stack(losses)

    expected = by_block(state.params, state.batch_stats)
    _, metrics = training.make_train_step(model, rule, TX)(state, batch)
    np.testing.assert_allclose(metrics["layer_loss"], expected, rtol=1e-4)
    with pytest.raises(ValueError, match="2 rules, one a block, for 4 blocks"):
        start(model, rules.PerBlock(rule.rules[:2]), batch)


def test_everything_in_one_group_is_backpropagation():
    model, batch = models.make("small_conv", num_classes=CLASSES), make_batch()
    grouped = model.grouped((len(model.specs) + 1,))
    bp, lls = make_rule("bp"), make_rule("lls")
    plain, state = start(model, bp, batch), start(grouped, lls, batch)

    def put(tree, collection):
        inside = {f"blocks_{i}": tree[n]["block"] for i, n in enumerate(model.block_names)}
        out = {"block_0": {"block": inside}}
        return {**out, "classifier": tree["classifier"]} if collection == "params" else out

    state = training.state_from_variables(
        lls, TX, state.key, put(plain.params, "params"), put(plain.batch_stats, "batch_stats")
    )
    steps = [training.make_train_step(*pair, TX) for pair in ((model, bp), (grouped, lls))]
    state, plain = copy(state), copy(plain)
    for _ in range(4):
        plain, theirs = steps[0](plain, batch)
        state, ours = steps[1](state, batch)
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)
        assert ours["layer_loss"].shape == (0,)
    expected = put(plain.params, "params")
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + 1e-6


def test_a_group_has_one_loss_and_one_gradient_through_its_blocks():
    model, batch = models.make("small_conv", num_classes=CLASSES, dropout=0.3), make_batch()
    grouped, rule = model.grouped((2, 1, 1)), make_rule("lls_m")
    state = start(grouped, rule, batch)
    after, metrics = training.make_train_step(grouped, rule, TX)(copy(state), batch)
    assert metrics["layer_loss"].shape == (3,)
    old, new = (s.params["block_0"]["block"] for s in (state, after))
    for member in ("blocks_0", "blocks_1"):
        assert not np.array_equal(old[member]["conv"]["kernel"], new[member]["conv"]["kernel"])
    assert training.predict(grouped, after, batch["image"]).shape == (8, CLASSES)
    ones = model.grouped((1, 1, 1, 1))
    assert ones == model
    assert model.grouped((1, 1, 1, 1, 1)) == model
    for sizes in ((2, 1), (6,), (0, 4), ()):
        with pytest.raises(ValueError, match="must add up to 4, or to 5"):
            model.grouped(sizes)


def test_a_last_group_with_the_classifier_leaves_what_its_rule_keeps_fixed():
    model, batch = models.make("small_conv", num_classes=CLASSES, width=0.25), make_batch()
    grouped, rule, tx = model.grouped((2, 3)), make_rule("lls_random"), optax.adam(1e-2)
    state = training.create_train_state(grouped, rule, tx, jax.random.key(0), batch["image"])
    after, _ = training.make_train_step(grouped, rule, tx)(copy(state), batch)
    old, new = state.params["block_1"], after.params["block_1"]
    jax.tree.map(np.testing.assert_array_equal, old["rule"], new["rule"])
    assert jax.tree.leaves(old["rule"])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), old["block"], new["block"])
    assert any(jax.tree.leaves(moved))


# --- A rule of one's own -------------------------------------------------------------------------


def own_rule():
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"<!-- example: own rule -->\n```python\n(.*?)```", readme, re.S)
    assert len(code.splitlines()) <= 30
    return code


def test_the_rule_of_the_readme_trains_from_the_command_line(tmp_path, monkeypatch, capsys):
    """By a whole process: it starts, starts again with huge pages, trains and exits."""
    package = tmp_path / "mypackage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "myrule.py").write_text(own_rule())
    run = tmp_path / "run"

    options = (
        *("--rule", "mypackage.myrule:Prototypes", "--temperature", "0.2", "--batch-size", "32"),
        *("--train-examples", "320", "--epochs", "2", "--workdir", str(run)),
    )
    ended = subprocess.run(
        [sys.executable, "-m", "experiments.digits", *options],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("epoch 2/2") == 1
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(records[-1]["layer_loss"]) == 4
    assert (np.array(records[-1]["layer_loss"]) < records[0]["layer_loss"]).all()
    assert (run / "curves.png").stat().st_size > 1000
    # What one process has trained, another finds.
    monkeypatch.syspath_prepend(str(tmp_path))
    assert train.train_and_evaluate(command_line.parse_training("digits", "", options)) == 0
    assert "resumed at step 20, epoch 2 done" in capsys.readouterr().out
    assert evaluate.evaluate(evaluate.EvaluateConfig(str(run), json=True)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rule"] == "mypackage.myrule:Prototypes"
    assert report["accuracy"] == pytest.approx(
        max(record["test_accuracy"] for record in records), abs=0.3
    )


def test_the_rule_of_the_readme_works_from_python():
    scope = {"__name__": "own"}
    exec(own_rule(), scope)
    rule = scope["Prototypes"](CLASSES, 0.5)
    model, batch = models.make("small_conv", num_classes=CLASSES), make_batch()
    step, state = training.make_train_step(model, rule, optax.adam(1e-2)), None
    state = training.create_train_state(
        model, rule, optax.adam(1e-2), jax.random.key(0), batch["image"]
    )
    assert state.params["block_0"]["rule"]["prototypes"].shape == (CLASSES, 512)
    first = None
    for _ in range(15):
        state, metrics = step(state, batch)
        first = metrics["layer_loss"] if first is None else first
    assert (metrics["layer_loss"] < first).all()
    block = LocalBlock(ConvBlock(4), rule=rule, pool_size=2)
    variables = block.init(jax.random.key(0), batch["image"])
    assert variables["params"]["rule"]["prototypes"].shape == (CLASSES, 16)
    # Its kernel, which it says nothing of: the same numbers, and one launch on a GPU.
    params = rule.init(jax.random.key(1), (8,), 8)
    latents = jax.random.normal(jax.random.key(2), (5, 8))

    def loss(params, latents, rule):
        return rule.loss(params, latents, jnp.arange(5) % CLASSES)

    both = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    expected = both(params, latents, rule)
    for form in ("split", "pallas"):
        ours = both(params, latents, rule.with_implementation(form).interpreted())
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    lowered = cuda.lower(both, params, latents,
                         rule.with_implementation("pallas"))  # fmt: skip
    assert [kernel.name for kernel in cuda.triton_kernels(lowered)] == ["head_loss"]


@dataclasses.dataclass(frozen=True)
class OwnRule(rules.LocalRule):
    num_classes: int
    temperature: float

    def loss(self, params, seen, labels, *, pool_size):
        return jnp.mean(seen) / self.temperature


def make_own(num_classes, temperature=0.2):
    return OwnRule(num_classes, temperature)


def make_of_anything(**options):
    return OwnRule(options["num_classes"], options.get("temperature", 0.3))


@pytest.mark.parametrize(
    ("name", "options", "temperature"),
    [
        # What is not given is the rule's own.
        ("test_rules:make_own", {}, 0.2),
        ("test_rules:make_own", {"temperature": 0.7}, 0.7),
        ("test_rules:make_of_anything", {}, 0.3),
        ("test_rules:make_of_anything", {"temperature": 0.7, "waveform": "square"}, 0.7),
        ("contrastive", {}, 0.1),
        ("contrastive", {"temperature": 0.7}, 0.7),
        ("lls_mxm", {}, 0.5),
    ],
)
def test_an_option_that_is_not_given_is_the_rules_own(name, options, temperature):
    rule = rules.make(name, num_classes=CLASSES, **options)
    assert rule.temperature == temperature
    # And from the command line.
    task = setup.make_task(TrainConfig(dataset="digits", rule=name, **options))
    assert task.rule.temperature == temperature


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("predsim", {"temperature": 0.2}, "--temperature 0.2"),
        ("decoupled", {"temperature": 0.5}, "--temperature 0.5"),
        ("contrastive", {"label_smoothing": 0.1}, "--label-smoothing 0.1"),
        ("lls_random", {"waveform": "square"}, "--waveform square"),
        ("bp", {"temperature": 0.5}, "--temperature 0.5"),
        ("lls", {"basis_rows": 20}, "--basis-rows 20"),
        ("lls", {"feedback_sign": True}, "--feedback-sign True"),
        ("predsim", {"kernels": "xla"}, "--kernels xla"),
        ("test_rules:make_own", {"waveform": "square"}, "--waveform square"),
        ("predsim,bp,dfa,drtp", {"temperature": 0.2}, "--temperature 0.2"),
    ],
)
def test_an_option_of_no_use_is_refused(rule, options, message):
    with pytest.raises(UserError, match=f"{message} is of no use to --rule {rule}"):
        setup.make_task(TrainConfig(dataset="digits", rule=rule, **options))
    if "," not in rule:
        name = {"feedback_sign": "sign", "kernels": "implementation"}
        own = {name.get(option, option): value for option, value in options.items()}
        with pytest.raises(ValueError, match="has no use for it"):
            rules.make(rule, num_classes=CLASSES, **own)


def test_of_several_rules_each_takes_what_it_has_a_use_for():
    config = TrainConfig(dataset="digits", rule="lls,predsim,lls_mxm,contrastive", temperature=0.2)
    made = setup.make_task(config).rule.rules
    assert [made[index].temperature for index in (0, 2, 3)] == [0.2] * 3


@dataclasses.dataclass(frozen=True)
class Unhashable(rules.LocalRule):
    weights: list


def make_unhashable():
    return Unhashable([1.0])


def make_nothing():
    return 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package.rule:make", "'no_such_package.rule' cannot be imported"),
        ("test_rules:no_such_function", "has no 'no_such_function'"),
        ("test_rules:make_nothing", "is a int, which is no rule"),
        ("test_rules:make_unhashable", "cannot be hashed .*immutable"),
    ],
)
def test_a_wrong_rule_of_ones_own_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        rules.make(name, num_classes=3)
