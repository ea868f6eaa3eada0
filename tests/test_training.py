"""The steps: isolation, what is computed, optimizers, every rule."""

import dataclasses
import pkgutil
import sys

import cuda
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from seeds import random_generator
from small_models import two_blocks

import lls_jax
from lls_jax import evaluation, models, rules, training
from lls_jax.blocks import (
    ConvBlock,
    DenseBlock,
    DepthwiseSeparableBlock,
    LocalBlock,
    ResidualBlock,
    ResidualStem,
    WhitenedConvPair,
)
from lls_jax.layers.normalization import normalize_activate
from lls_jax.layers.pooled_normalization import normalize_activate_pool
from lls_jax.models import BlockSpec, Network
from pallas_kernels.local_loss import pool_latents

CLASSES = 5
BASELINES = ("bp", "dfa", "drtp")
LOCAL_RULES = [name for name in rules.NAMES if name not in BASELINES]
# Every local rule on a block of the small network, four of them in a program; the baselines; and
# every network that is small enough with one rule.
MIXED = [
    tuple(LOCAL_RULES[(first + i) % len(LOCAL_RULES)] for i in range(4))
    for first in range(0, len(LOCAL_RULES), 4)
]
LEARNING = [
    *((",".join(names), "small_conv") for names in MIXED),
    *((name, "small_conv") for name in BASELINES),
    *(
        pytest.param("lls_mxm", name, marks=pytest.mark.exhaustive)
        for name in ("vgg8", "mobilenet_v1_small")
    ),
]


def make_rule(name):
    if "," in name:
        return rules.PerBlock(tuple(make_rule(one) for one in name.split(",")))
    reduced = {"basis_rows": 3} if name == "lls_mxm_reduced" else {}
    return rules.make(name, num_classes=CLASSES, **reduced)


def make_batch(seed=None, size=8, side=8):
    rng = random_generator(seed)
    return {
        "image": jnp.asarray(rng.normal(size=(size, side, side, 3)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, CLASSES, size), jnp.int32),
    }


def make_state(rule, tx, batch, model=None):
    model = model or models.make("small_conv", num_classes=CLASSES)
    state = training.create_train_state(model, rule, tx, jax.random.key(0), batch["image"])
    return model, state


def as_numpy_broadcasts(function):
    """An oracle, written as in a textbook."""

    def relaxed(*arguments):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*arguments)

    return relaxed


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


@pytest.mark.parametrize(("rule_name", "model_name"), LEARNING)
def test_every_rule_learns_a_batch(rule_name, model_name):
    rule, tx, batch = make_rule(rule_name), optax.adam(3e-3), make_batch()
    model = models.make(model_name, num_classes=CLASSES)
    model, state = make_state(rule, tx, batch, model)
    step = training.make_train_step(model, rule, tx)
    history = []
    for _ in range(12):
        state, metrics = step(state, batch)
        history.append(np.append(metrics["layer_loss"], metrics["loss"]))
    layers = 0 if rule_name in BASELINES else len(model.specs)
    assert metrics["layer_loss"].shape == (layers,)
    assert metrics["logits"].shape == (8, CLASSES)
    assert (history[-1] < history[0]).all()
    assert step._cache_size() == 1
    assert int(state.step) == 12


@pytest.mark.parametrize("rule_name", [",".join(names) for names in MIXED])
def test_a_local_loss_has_no_gradient_in_any_other_block(rule_name):
    rule, batch = make_rule(rule_name), make_batch()
    model, state = make_state(rule, optax.sgd(0.1), batch)
    blocks = local_blocks(model, rule)

    def losses_of(params):
        x, losses = batch["image"], []
        for name, block, spec in zip(model.block_names, blocks, model.specs):
            variables = {"params": params[name], "batch_stats": state.batch_stats[name]}
            told = batch["label"]
            if block.rule.needs_image:
                told = rules.LabeledImages(told, batch["image"])
            (x, loss), _ = block.apply(variables, x, told, train=True, mutable=["batch_stats"])
            losses.append(loss)
            x = spec.transition(x, None)
        return jnp.stack(losses)

    gradient = jax.jit(jax.grad(lambda params, chosen: jnp.vdot(chosen, losses_of(params))))
    for chosen, own in zip(jnp.eye(len(blocks)), model.block_names):
        grads = gradient(state.params, chosen)
        for name in (*model.block_names, "classifier"):
            largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads[name]))
            assert (largest > 0) == (name == own), (own, name)


def local_blocks(model, rule):
    """The network's blocks as modules of Flax."""
    pairs = zip(model.specs, model.block_rules(rule))
    return [LocalBlock(spec.module, own, spec.pool_size) for spec, own in pairs]


def count_convolutions(rule_name):
    rule, tx, batch = make_rule(rule_name), optax.sgd(0.1), make_batch()
    model, state = make_state(rule, tx, batch)
    step = training.make_train_step(model, rule, tx)
    # Lowered for a GPU, where every convolution is one in the program too.
    return cuda.lower(step, state, batch).as_text().count("stablehlo.convolution")


def test_no_gradient_toward_a_blocks_input_is_computed():
    convolutions = 3
    assert count_convolutions("lls") == 2 * convolutions
    # Backpropagation needs it for all but the first.
    assert count_convolutions("bp") == 3 * convolutions - 1


def test_a_block_learns_what_it_would_learn_alone():
    """The network's step equals an explicit loop over blocks with an optimizer each."""
    rule, tx, batch = make_rule("lls_mxm"), optax.adam(1e-2), make_batch(0)
    model, state = make_state(rule, tx, batch)
    expected, x = {}, batch["image"]
    for name, block, spec in zip(model.block_names, local_blocks(model, rule), model.specs):
        stats = {"batch_stats": state.batch_stats[name]}

        def loss(params, block=block, stats=stats, x=x):
            (activation, loss), _ = block.apply(
                {"params": params, **stats}, x, batch["label"], train=True, mutable=["batch_stats"]
            )
            return loss, activation

        grads, activation = jax.jit(jax.grad(loss, has_aux=True))(state.params[name])
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = tx.update(grads, tx.init(state.params[name]), state.params[name])
        expected[name] = optax.apply_updates(state.params[name], updates)
        x = spec.transition(activation, None)
    new, _ = training.make_train_step(model, rule, tx)(copy(state), batch)
    for name, params in expected.items():
        jax.tree.map(
            # Adam's first update is a sign: where a gradient is nearly 0, rounding may turn it.
            lambda ours, theirs: np.testing.assert_allclose(
                np.mean(np.abs(ours - theirs)), 0, atol=1e-4
            ),
            new.params[name],
            params,
        )


def test_the_step_donates_its_state():
    rule, tx, batch = make_rule("lls"), optax.sgd(0.1), make_batch()
    model, state = make_state(rule, tx, batch)
    training.make_train_step(model, rule, tx)(state, batch)
    assert state.params["block_0"]["block"]["conv"]["kernel"].is_deleted()


def test_a_state_can_be_drawn_inside_another_program():
    rule, tx, image = make_rule("lls"), optax.adam(1e-3), make_batch()["image"]
    model, state = make_state(rule, tx, make_batch())
    drawn = jax.jit(lambda key: training.create_train_state(model, rule, tx, key, image))(
        jax.random.key(0)
    )
    for ours, theirs in zip(jax.tree.leaves(drawn.params), jax.tree.leaves(state.params)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def test_weights_start_uniform_in_the_fan_in():
    _, state = make_state(make_rule("lls_mxm"), optax.sgd(0.1), make_batch())
    for name, fan_in in (("block_0", 27), ("block_1", 9 * 32), ("block_3", 512)):
        layer = "linear" if name == "block_3" else "conv"
        for leaf in state.params[name]["block"][layer].values():
            assert np.abs(leaf).max() <= fan_in**-0.5
            # Of a uniform distribution.
            if leaf.size > 500:
                np.testing.assert_allclose(np.std(leaf), fan_in**-0.5 / 3**0.5, rtol=0.1)
    modulation = state.params["block_0"]["rule"]["modulation"]
    assert modulation.shape == (CLASSES, CLASSES)
    assert 0.004 < np.std(modulation) < 0.018


@pytest.mark.parametrize("shape", [(64, 5), (4, 6, 5, 3)])
def test_normalization_equals_the_textbook_under_autodiff(shape):
    rng = random_generator()
    x = jnp.asarray(rng.normal(2.0, 3.0, shape), jnp.float32)
    scale, bias = (jnp.asarray(rng.normal(size=shape[-1]), jnp.float32) for _ in range(2))
    cotangent = jnp.asarray(rng.normal(size=shape), jnp.float32)

    @as_numpy_broadcasts
    def textbook(x, scale, bias):
        axes = tuple(range(x.ndim - 1))
        mean = jnp.mean(x, axes)
        variance = jnp.mean((x - mean) ** 2, axes)
        y = (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias
        return jnp.where(y >= 0, y, 0.01 * y)

    def both(function):
        y, pullback = jax.vjp(function, x, scale, bias)
        return y, pullback(cotangent)

    (ours, our_grads), (theirs, their_grads) = jax.jit(
        lambda: (both(lambda *a: normalize_activate(*a)[0]), both(textbook))
    )()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for our, their in zip(our_grads, their_grads):
        np.testing.assert_allclose(our, their, atol=2e-5 * np.sqrt(x.size))


@pytest.mark.parametrize("wanted", ["activation", "pooled", "both"])
def test_pooled_normalization_equals_the_textbook_under_autodiff(wanted):
    rng = random_generator()
    shape, pool_size = (4, 6, 9, 3), 3
    x = jnp.asarray(rng.normal(2.0, 3.0, shape), jnp.float32)
    scale, bias = (jnp.asarray(rng.normal(size=shape[-1]), jnp.float32) for _ in range(2))
    d_y = jnp.asarray(rng.normal(size=shape), jnp.float32)
    d_pooled = jnp.asarray(rng.normal(size=(4, 3, 3, 3)), jnp.float32)

    @as_numpy_broadcasts
    def textbook(x, scale, bias):
        mean = jnp.mean(x, (0, 1, 2))
        variance = jnp.mean((x - mean) ** 2, (0, 1, 2))
        y = (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias
        y = jnp.where(y >= 0, y, 0.01 * y)
        return y, jnp.mean(y.reshape(4, 3, 2, 3, 3, 3), (2, 4))

    def total(function, *arguments):
        y, pooled = function(*arguments)[:2]
        activation = jnp.sum(y * d_y) if wanted != "pooled" else 0.0
        return activation + (jnp.sum(pooled * d_pooled) if wanted != "activation" else 0.0)

    def ours(x, scale, bias):
        return normalize_activate_pool(x, scale, bias, pool_size)

    arrays = x, scale, bias
    for a, b in zip(*jax.jit(lambda: (ours(*arrays), textbook(*arrays)))()):
        np.testing.assert_allclose(a, b, atol=2e-5)
    gradient = jax.jit(jax.grad(total, argnums=(1, 2, 3)), static_argnums=0)
    grads = [gradient(f, *arrays) for f in (ours, textbook)]
    for a, b in zip(*grads):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.sqrt(x.size))


@pytest.mark.parametrize("pool_size", [2, 3])
def test_a_local_block_learns_the_same_from_pooled_and_from_whole_activations(pool_size):
    """Windows of one size fit 2 bins into 8 pixels, and not 3."""
    batch = make_batch()
    rule = make_rule("lls_mxm")
    assert rule.sees == "latents"

    class Whole(rules.LLS):
        """The same rule, which is given the activation and pools it itself."""

        sees = "activation"

        def observe(self, activation, pool_size):
            return pool_latents(activation, pool_size)

    results = []
    for own in (rule, Whole(num_classes=CLASSES, modulation="matrix")):
        block = LocalBlock(ConvBlock(4), rule=own, pool_size=pool_size)
        variables = block.init(jax.random.key(0), batch["image"])

        def loss(params, block=block, variables=variables):
            (activation, loss), updates = block.apply(
                {**variables, "params": params}, batch["image"], batch["label"],
                train=True, mutable=["batch_stats"],
            )  # fmt: skip
            return loss, (activation, updates)

        results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"]))
    for a, b in zip(*(jax.tree.leaves(result) for result in results), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)


def test_a_layers_bias_before_normalisation_moves_the_running_mean_only():
    block, x = ConvBlock(4), make_batch()["image"]
    variables = block.init(jax.random.key(0), x)
    moved = copy(variables)
    moved["params"]["conv"]["bias"] = moved["params"]["conv"]["bias"] + 3.0
    (a, a_stats), (b, b_stats) = (
        block.apply(v, x, train=True, mutable=["batch_stats"]) for v in (variables, moved)
    )
    np.testing.assert_array_equal(a, b)
    difference = b_stats["batch_stats"]["norm"]["mean"] - a_stats["batch_stats"]["norm"]["mean"]
    np.testing.assert_allclose(difference, 0.3, rtol=1e-5)
    # In evaluation the bias counts.
    assert not np.allclose(block.apply(variables, x), block.apply(moved, x))


def test_local_block_without_labels_gives_the_activation():
    block = LocalBlock(DenseBlock(6), rule=make_rule("lls"), pool_size=6)
    x = jnp.ones((3, 4))
    variables = block.init(jax.random.key(0), x)
    assert "rule" not in variables["params"]
    assert block.apply(variables, x).shape == (3, 6)


def test_dropout_follows_the_pooling_and_is_off_in_evaluation():
    rule, tx, batch = make_rule("lls"), optax.sgd(0.0), make_batch()
    dropping = models.make("small_conv", num_classes=CLASSES, dropout=0.5)
    assert [spec.dropout for spec in dropping.specs] == [0.5, 0.5, 0.5, 0.0]
    _, state = make_state(rule, tx, batch, dropping)
    step = training.make_train_step(dropping, rule, tx)
    second, first_metrics = step(copy(state), batch)
    again, again_metrics = step(copy(state), batch)
    np.testing.assert_array_equal(first_metrics["logits"], again_metrics["logits"])
    _, later_metrics = step(second, batch)
    assert first_metrics["layer_loss"][0] == later_metrics["layer_loss"][0]
    assert not np.allclose(first_metrics["logits"], later_metrics["logits"])
    plain = models.make("small_conv", num_classes=CLASSES)
    np.testing.assert_array_equal(
        training.predict(dropping, again, batch["image"]),
        training.predict(plain, again, batch["image"]),
    )


class Rescaled(nn.Module):
    """Halves its input until it is small: a loop that reverse differentiation refuses."""

    @nn.compact
    def __call__(self, x):
        x = jax.lax.while_loop(lambda x: jnp.max(jnp.abs(x)) > 0.1, lambda x: x / 2, x)
        return nn.relu(nn.Conv(4, (3, 3))(x))


def test_a_block_need_not_be_differentiable_in_its_input():
    rule, batch, tx = make_rule("lls"), make_batch(), optax.sgd(0.1)
    specs = (BlockSpec(ConvBlock(4), 2), BlockSpec(Rescaled(), 2, average_pool=1, flatten=True))
    model, state = make_state(rule, tx, batch, Network("loop", CLASSES, specs))
    before = state.params["block_1"]
    after, _ = training.make_train_step(model, rule, tx, donate=False)(state, batch)
    kernels = [one["block"]["Conv_0"]["kernel"] for one in (before, after.params["block_1"])]
    assert not np.allclose(*kernels)
    with pytest.raises(ValueError, match="while_loop"):
        training.make_train_step(model, rule, tx, reach=2)(state, batch)


EVERY_BLOCK = (
    *(ConvBlock(6), DepthwiseSeparableBlock(6), ResidualStem(6), ResidualBlock(8)),
    WhitenedConvPair(6),
)


@pytest.mark.parametrize(
    ("rule_name", "blocks"),
    [
        *((name, EVERY_BLOCK[:1]) for name in rules.NAMES),
        *((name, EVERY_BLOCK) for name in ("lls_mxm", "auglocal", "bp")),
    ],
)
def test_with_64_bit_numbers_everything_is_of_32_bits(rule_name, blocks):
    specs = [BlockSpec(block, pool_size=2) for block in blocks]
    specs[-1] = dataclasses.replace(specs[-1], average_pool=1, flatten=True)
    model = Network("each", CLASSES, (*specs, BlockSpec(DenseBlock(8), pool_size=8)))
    rule, tx, batch = make_rule(rule_name), optax.sgd(0.1), make_batch()
    with jax.enable_x64(True):
        # Shapes and dtypes alone.
        state = jax.eval_shape(lambda: make_state(rule, tx, batch, model)[1])
        after, metrics = jax.eval_shape(training.make_train_step(model, rule, tx), state, batch)
    for leaf in jax.tree.leaves((state.params, state.batch_stats, metrics)):
        assert leaf.dtype == jnp.float32
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


@pytest.mark.parametrize("rule_name", ["lls_mxm", "bp"])
def test_bfloat16_activations_leave_float32_parameters(rule_name):
    rule, tx, batch = make_rule(rule_name), optax.adam(3e-3), make_batch()
    model = models.make("small_conv", num_classes=CLASSES, dtype=jnp.bfloat16)
    model, state = make_state(rule, tx, batch, model)
    step = training.make_train_step(model, rule, tx)
    state, first = step(state, batch)
    for _ in range(9):
        state, metrics = step(state, batch)
    assert metrics["loss"] < first["loss"]
    assert metrics["logits"].dtype == jnp.float32
    for leaf in jax.tree.leaves((state.params, state.batch_stats)):
        assert leaf.dtype == jnp.float32


@pytest.mark.parametrize("rule_name", ["lls_mxm", "bp"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_evaluation_state_averages_and_estimates_statistics_anew(rule_name, wrapped):
    rule, batch = make_rule(rule_name), make_batch()
    tx = optax.contrib.schedule_free_adamw(5e-2)
    if wrapped:
        tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
    model, state = make_state(rule, tx, batch, two_blocks(CLASSES))
    step = training.make_train_step(model, rule, tx)
    for _ in range(3):
        state, _ = step(state, batch)
    images = [make_batch()["image"] for _ in range(2)]
    judged = evaluation.evaluation_state(model, state, images)
    # x = (y - (1 - b1) z) / b1
    inner = state.opt_state["block_0"] if rule_name != "bp" else state.opt_state
    inner = inner[1] if wrapped else inner
    z = inner.z if rule_name != "bp" else inner.z["block_0"]
    expected = jax.tree.map(lambda y, z: (y - (1 - 0.9) * z) / 0.9, state.params["block_0"], z)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), judged.params["block_0"], expected
    )
    # The first layer's statistics, from its own outputs.
    layer = judged.params["block_0"]["block"]["conv"]
    outputs = [
        jax.lax.conv_general_dilated(
            x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        + layer["bias"].reshape(1, 1, 1, -1)
        for x in images
    ]
    stats = judged.batch_stats["block_0"]["block"]["norm"]
    means = np.mean([np.mean(out, (0, 1, 2)) for out in outputs], 0)
    variances = np.mean([np.var(out, (0, 1, 2)) for out in outputs], 0)
    np.testing.assert_allclose(stats["mean"], means, atol=1e-5)
    np.testing.assert_allclose(stats["var"], variances, rtol=1e-4)


def test_baselines_are_told_what_asks_for_nothing():
    for options in ({"slice_above": None, "remat_above": None}, {"slice_above": sys.maxsize}):
        training.make_train_step(two_blocks(CLASSES), make_rule("bp"), optax.sgd(0.1), **options)


def test_every_module_is_found_in_the_package():
    found = {module.name for module in pkgutil.iter_modules(lls_jax.__path__)}
    # Which finds the parts of others.
    assert found - {"own_parts"} == set(lls_jax.__all__) - {"fit", "local_update"}


def test_evaluation_state_of_another_optimizer_is_the_state():
    rule, tx, batch = make_rule("lls"), optax.sgd(0.1), make_batch()
    model, state = make_state(rule, tx, batch)
    assert evaluation.evaluation_state(model, state, iter([])) is state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rules.make("lls_mxn", num_classes=10), "'lls_mxn'.*Did you mean"),
        (lambda: rules.make("lls", num_classes=1), "`num_classes` is 1"),
        (lambda: rules.make("lls", num_classes=10, waveform="saw"), "'saw'.*square, cosine"),
        (lambda: rules.make("lls", num_classes=10, temperature=-1), "`temperature` is -1"),
        (lambda: rules.make("lls", num_classes=10, basis_rows=5), "`basis_rows` is 5.*'lls'"),
        (lambda: rules.make("lls_mxm_reduced", num_classes=10), "`basis_rows` is None"),
        (lambda: models.make("smal_conv", num_classes=10), "'smal_conv'.*'small_conv'"),
        (lambda: models.make("small_conv", num_classes=10, dropout=1.0), "`dropout` is 1.0"),
        (lambda: models.make("small_conv", num_classes=10, dtype=jnp.int32), "`dtype` is int32"),
        (lambda: models.make("small_conv", num_classes=10, dtype="float16"), "`dtype` is float16"),
        (lambda: rules.LLS(num_classes=10, modulation="x"), "`modulation` is 'x'; .* matrix"),
        (lambda: models.make("small_conv", num_classes=10, dtype="foo"), "`dtype` is 'foo'; it"),
        (lambda: rules.RandomLLS(num_classes=10, modulation="x"), "`modulation` is 'x'"),
        (lambda: rules.RandomLLS(num_classes=10, hidden_dim=-1), "`hidden_dim` is -1"),
        (lambda: rules.RandomLLS(num_classes=10, hidden_dim=(8, 0)), r"`hidden_dim` is \(8, 0\)"),
        (lambda: rules.DirectFeedback(num_classes=10, signal="x"), "`signal` is 'x'; .* target"),
        (lambda: rules.PredSim(num_classes=10, similarity_weight=5), "`similarity_weight` is 5"),
        (lambda: rules.Contrastive(num_classes=10, width=0), "`width` is 0"),
        *(
            (
                lambda rule=rule: make_state(rule, optax.sgd(0.1), make_batch()),
                f"rule '{rule.at_block(0).name}' is made for 9 classes, and the model for 5",
            )
            for rule in (
                rules.PredSim(num_classes=9),
                rules.DirectFeedback(num_classes=9, signal="error"),
                rules.PerBlock((rules.MonoForward(num_classes=9),) * 4),
            )
        ),
        (
            lambda: rules.PerBlock([make_rule("lls"), make_rule("bp")]),
            r"`rules` has Backpropagation\(.*\) at 1; give a LocalRule",
        ),
        *(
            (
                lambda rule=rule: rule.init(jax.random.key(0), (8,), pool_size=1),
                r"shape \(8,\) with `pool_size` 1 has one latent",
            )
            for rule in (rules.LLS(num_classes=3), rules.CenteredLLS(num_classes=3))
        ),
        (lambda: models.BlockSpec(DenseBlock(8), 8, dropout=1.0), "`dropout` is 1.0"),
        (lambda: models.BlockSpec(DenseBlock(8), 0), "`pool_size` is 0"),
        (lambda: models.BlockSpec(DenseBlock(8), 8, average_pool=0), "`average_pool` is 0"),
        (
            lambda: models.make("airbench", num_classes=10, dropout=0.5),
            "`dropout` is 0.5, and no pooling .* 'airbench'",
        ),
        (
            lambda: make_state(make_rule("lls"), optax.MultiSteps(optax.sgd(0.1), 2), make_batch()),
            r"`tx` is a MultiSteps; .* its gradient_transformation\(\)",
        ),
        (
            lambda: make_state(make_rule("lls"), optax.sgd(0.1), make_batch(side=3)),
            "3x3 pixels are too small.*'small_conv'.*4x4",
        ),
        *(
            (
                lambda name=name, option=option: training.make_train_step(
                    two_blocks(CLASSES), make_rule(name), optax.sgd(0.1), **option
                ),
                f"`{next(iter(option))}` is .* rule '{name}' has no local losses",
            )
            for name in BASELINES
            for option in ({"remat_above": 9}, {"slice_above": 9})
        ),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
