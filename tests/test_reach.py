"""Reach: what a block learns from, against gradients of whole losses stopped by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from seeds import random_generator

from lls_jax import models, placement, rules, training
from lls_jax.blocks import ConvBlock, DenseBlock, DepthwiseSeparableBlock, apply_module
from lls_jax.models import BlockSpec, Network
from lls_jax.steps import reach_schedule, slice_plan

CLASSES = 5
# Plain gradient descent: the new parameters show the gradients.
TX = optax.sgd(0.1)


@dataclasses.dataclass(frozen=True)
class Silent(rules.LocalRule):
    """A rule with nothing to say: its loss is 0."""

    def loss(self, params, seen, labels, *, pool_size):
        return 0.0 * jnp.mean(seen)


def make_rule(*names):
    made = [
        Silent() if name == "silent" else rules.make(name, num_classes=CLASSES) for name in names
    ]
    return rules.PerBlock(tuple(made))


def mixed(dropout=0.0, dtype=jnp.float32):
    """Blocks of every kind, with what may be between them."""
    specs = (
        BlockSpec(ConvBlock(6, dtype), pool_size=4, dropout=dropout),
        BlockSpec(ConvBlock(8, dtype), pool_size=2, max_pool=True, dropout=dropout),
        BlockSpec(DepthwiseSeparableBlock(8, dtype), pool_size=2, then=lambda x: 0.5 * x),
        BlockSpec(ConvBlock(6, dtype, stride=2), 2, average_pool=2, flatten=True),
        BlockSpec(DenseBlock(12, dtype), pool_size=8),
    )
    return Network("mixed", CLASSES, specs, dtype)


# What a rule may learn from and with: latents from window means, the activation, fixed parameters.
MIXED_RULES = ("lls_mxm", "predsim", "lls_m_random", "local_classifier", "decoupled")


def make_batch(seed=0, size=6, side=8):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.normal(size=(size, side, side, 3)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, CLASSES, size), jnp.int32),
    }


def start(model, rule, batch, tx=TX):
    return training.create_train_state(model, rule, tx, jax.random.key(0), batch["image"])


def turn_scales(state, seed=3):
    """BatchNorm's scales as they may be in the midst of training: a negative one turns the order of
    its channel's activations round."""
    rng = np.random.default_rng(seed)

    def turned(path, leaf):
        drawn = rng.choice([-1.0, 1.0], leaf.shape) * rng.uniform(0.5, 1.5, leaf.shape)
        return jnp.asarray(drawn, leaf.dtype) if path[-1].key == "scale" else leaf

    return state._replace(params=jax.tree_util.tree_map_with_path(turned, state.params))


def train(model, rule, batch, tx=TX, state=None, **options):
    step = training.make_train_step(model, rule, tx, donate=False, **options)
    return step(start(model, rule, batch, tx) if state is None else state, batch)


def loss_of(index, first, model, rule, state, batch, params):
    """The loss of one block, or of the classifier, by a forward pass of its own, through which a
    gradient reaches block `first` and those above it."""
    x, step_key = batch["image"].astype(model.dtype), jax.random.fold_in(state.key, state.step)
    joined = model.classifier_in_last_group
    rows = zip(model.block_names, model.specs, model.block_rules(rule))
    for i, (name, spec, own_rule) in enumerate(rows):
        if i <= first:
            x = jax.lax.stop_gradient(x)
        key = jax.random.fold_in(step_key, i)
        own, stats = params[name], state.batch_stats[name]["block"]
        x, _ = apply_module(spec.module, own["block"], stats, x, train=True, rngs={"dropout": key})
        if i == index and not (joined and i == len(model.specs) - 1):
            return own_rule.loss(own.get("rule", {}), x, batch["label"], pool_size=spec.pool_size)
        x = spec.transition(x, key).astype(model.dtype)
    if first >= len(model.specs):
        x = jax.lax.stop_gradient(x)
    logits = model.classify(params["classifier"], x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def expected_params(model, rule, state, batch, reach):
    """Every block's parameters after a step, from the sum of the losses that teach it."""
    joined = model.classifier_in_last_group
    count = len(model.specs) + 1 - joined

    def gradient(names, first):
        def total(own):
            params = {**state.params, **own}
            reaches = [reach] * count if isinstance(reach, int) else reach
            losses = [i for i in range(first, count) if i - reaches[i] < first]
            return sum(loss_of(i, first, model, rule, state, batch, params) for i in losses)

        return jax.jit(jax.grad(total))({name: state.params[name] for name in names})

    grads = {}
    for i in range(count):
        last = (*model.block_names[count - 1 :], "classifier")
        grads |= gradient(last if i == count - 1 else model.block_names[i : i + 1], i)
    new = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
    for name, own_rule in zip(model.block_names, model.block_rules(rule)):
        for fixed in own_rule.fixed & new[name].get("rule", {}).keys():
            new[name]["rule"][fixed] = state.params[name]["rule"][fixed]
    return new


def assert_close(ours, theirs, tolerance=2e-4):
    ours, theirs = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (ours, theirs))
    for (path, a), (other, b) in zip(ours, theirs, strict=True):
        assert path == other
        scale = max(np.abs(b).max(initial=0), 1e-2)
        np.testing.assert_allclose(a, b, atol=tolerance * scale, rtol=0, err_msg=str(path))


# The fourth goes as far down as the second, the fifth as the third; the last teaches no block.
OF_EACH = (1, 2, 2, 4, 3, 1)


@pytest.mark.parametrize(
    "reach", [2, OF_EACH, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 3, 9))]
)
def test_a_block_learns_from_the_losses_that_reach_it(reach):
    model, rule, batch = mixed(dropout=0.3), make_rule(*MIXED_RULES), make_batch()
    state = start(model, rule, batch)
    new, metrics = train(model, rule, batch, state=state, reach=reach)
    assert_close(new.params, expected_params(model, rule, state, batch, reach))
    one, expected = train(model, rule, batch, state=state)
    # The forward pass is the same, and so are the statistics.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), metrics, expected)
    assert_close(new.batch_stats, one.batch_stats)


@pytest.mark.parametrize("reach", [2, (1, 2, 1)])
def test_classifier_and_last_group_reach_down_as_one(reach):
    model, rule = mixed().grouped((2, 1, 3)), make_rule("lls_mxm", "decoupled", "lls_random")
    batch = make_batch()
    # An optimizer with a state for what it trains, and for nothing else.
    state = start(model, rule, batch, optax.sgd(0.1, momentum=0.0))
    new, metrics = train(model, rule, batch, optax.sgd(0.1, momentum=0.0), state, reach=reach)
    assert_close(new.params, expected_params(model, rule, state, batch, reach))
    assert metrics["layer_loss"].shape == (2,)


@pytest.mark.parametrize(
    ("sizes", "reach", "option"),
    [
        ((2, 3), 1, "slice_above"),
        ((3, 1), 2, "remat_above"),
        pytest.param((2, 2), 1, "remat_above", marks=pytest.mark.exhaustive),
        pytest.param((2, 3), 2, "slice_above", marks=pytest.mark.exhaustive),
        pytest.param((5,), 1, "remat_above", marks=pytest.mark.exhaustive),
    ],
)
def test_groups_in_slices_learn_as_one_module_does(sizes, reach, option):
    model = models.make("small_conv", num_classes=CLASSES, dropout=0.2).grouped(sizes)
    rule, batch = make_rule(*["lls_mxm", "predsim"][: len(sizes)]), make_batch(size=7)
    state = turn_scales(start(model, rule, batch))
    ours, whole = (
        train(model, rule, batch, state=state, reach=reach, **{option: above})[0]
        for above in (20 * 1024, 2**40)
    )
    assert_close(ours.params, expected_params(model, rule, state, batch, reach))
    assert_close(ours.batch_stats, whole.batch_stats)
    pairs = zip(jax.tree.leaves(ours.params), jax.tree.leaves(whole.params))
    assert not all(np.array_equal(a, b) for a, b in pairs), "nothing was in slices"


@pytest.mark.parametrize(("sizes", "reach"), [((1, 1, 1), 2), ((2, 1), 1), ((4,), 1)])
def test_members_in_slices_may_compute_in_another_dtype_than_their_network(sizes, reach):
    dtypes = jnp.bfloat16, jnp.float32, jnp.bfloat16
    specs = [BlockSpec(ConvBlock(6, dtype), pool_size=2, max_pool=True) for dtype in dtypes]
    specs[-1] = dataclasses.replace(specs[-1], max_pool=False, flatten=True)
    model = Network("mixed", CLASSES, tuple(specs)).grouped(sizes)
    rule, batch = make_rule(*["lls"] * len(sizes)), make_batch()
    state = start(model, rule, batch)
    new, _ = train(model, rule, batch, reach=reach, state=state, slice_above=1024)
    moved, expected = (
        jax.tree.map(lambda a, b: np.asarray(a - b), state.params, params)
        for params in (new.params, expected_params(model, rule, state, batch, reach))
    )
    # Of bfloat16's rounding through three convolutions.
    assert_close(moved, expected, 8e-2)


class Constant(Silent):
    """A rule whose loss depends on nothing."""

    def loss(self, params, seen, labels, *, pool_size):
        return jnp.zeros(())


@pytest.mark.parametrize(("sizes", "above"), [((2, 2), 20 * 1024), ((1, 1, 2), 2**40)])
def test_of_a_loss_that_depends_on_nothing_no_block_learns(sizes, above):
    model = models.make("small_conv", num_classes=CLASSES).grouped(sizes)
    rule, batch = rules.PerBlock((Constant(),) * len(sizes)), make_batch(size=7)
    state = start(model, rule, batch)
    new, _ = train(model, rule, batch, state=state, slice_above=above)
    for name in model.block_names:
        jax.tree.map(np.testing.assert_array_equal, new.params[name], state.params[name])


def test_a_block_that_is_twice_in_a_group_shares_its_parameters_in_slices_too():
    twice = BlockSpec(ConvBlock(3), pool_size=2)
    last = BlockSpec(ConvBlock(4), pool_size=2, flatten=True)
    model = Network("twice", CLASSES, (twice, twice, last)).grouped((2, 1))
    rule, batch = make_rule("lls", "lls"), make_batch()
    state = start(model, rule, batch)
    new, _ = train(model, rule, batch, state=state, slice_above=1024)
    assert_close(new.params, expected_params(model, rule, state, batch, 1))


@pytest.mark.parametrize("reach", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_computing_again_in_slices_is_training_as_before(reach):
    model = models.make("small_conv", num_classes=CLASSES, dropout=0.2)
    rule = make_rule("lls_mxm", "lls_random", "local_classifier", "lls")
    batch = make_batch(size=7)
    state = turn_scales(start(model, rule, batch))
    kept, ours = (
        train(model, rule, batch, state=state, reach=reach, remat_above=above)[0]
        for above in (None, 20 * 1024)
    )
    assert_close(ours.params, kept.params)
    pairs = zip(jax.tree.leaves(ours.params), jax.tree.leaves(kept.params))
    assert not all(np.array_equal(a, b) for a, b in pairs), "nothing was computed again"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="done on CPUs")
def test_an_images_own_convolution_is_computed_again_by_default(monkeypatch):
    model = models.make("small_conv", num_classes=CLASSES)
    rule, batch = make_rule("lls_mxm", "lls_random", "local_classifier", "lls"), make_batch(size=7)
    state = turn_scales(start(model, rule, batch))
    # Of seven images, in slices of two and one that is left over.
    monkeypatch.setattr(slice_plan, "CHEAP_SLICE_BYTES", 20 * 1024)
    whole, ours = (
        train(model, rule, batch, state=state, reach=2, slice_above=above)[0]
        for above in (2**40, None)
    )
    assert_close(ours.params, whole.params)
    assert_close(ours.batch_stats, whole.batch_stats)
    kernels = (new.params["block_0"]["block"]["conv"]["kernel"] for new in (ours, whole))
    assert not np.array_equal(*kernels), "nothing was computed again"


@pytest.mark.parametrize("reach", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_gradients_in_slices_are_those_of_the_whole_batch(reach):
    model = models.make("small_conv", num_classes=CLASSES, dropout=0.2)
    rule = make_rule("lls_mxm", "lls_random", "predsim", "lls")
    batch = make_batch(size=7)
    state = turn_scales(start(model, rule, batch))
    whole, ours = (
        train(model, rule, batch, state=state, reach=reach, slice_above=above)[0]
        for above in (None, 20 * 1024)
    )
    assert_close(ours.params, whole.params)
    assert_close(ours.batch_stats, whole.batch_stats)
    pairs = zip(jax.tree.leaves(ours.params), jax.tree.leaves(whole.params))
    assert not all(np.array_equal(a, b) for a, b in pairs), "nothing was sliced"


@pytest.mark.parametrize(
    ("own", "whole"), [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)]
)
def test_blocks_may_compute_in_another_dtype_than_their_network(own, whole):
    specs = (BlockSpec(DenseBlock(8, own), pool_size=4),) * 3
    model, rule = Network("dense", CLASSES, specs, whole), make_rule(*["lls"] * 3)
    batch = make_batch()
    batch["image"] = batch["image"].reshape(6, -1)
    state = start(model, rule, batch)
    new, _ = train(model, rule, batch, reach=2, state=state)
    moved, expected = (
        jax.tree.map(lambda a, b: np.asarray(a - b), state.params, params)
        for params in (new.params, expected_params(model, rule, state, batch, 2))
    )
    assert_close(moved, expected, 5e-2)


def test_a_reach_of_all_without_local_losses_is_backpropagation():
    model, batch = mixed(dropout=0.3), make_batch()
    silent = make_rule(*["silent"] * len(model.specs))
    bp = rules.make("bp", num_classes=CLASSES)
    ours, metrics = train(model, silent, batch, reach=len(model.specs) + 1)
    theirs, expected = train(model, bp, batch)
    assert_close(ours.params, theirs.params)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)


def temporaries(depth, reach, **options):
    specs = tuple(BlockSpec(ConvBlock(16), pool_size=2) for _ in range(depth))
    last = dataclasses.replace(specs[-1], average_pool=2, flatten=True)
    model = Network("straight", CLASSES, (*specs[:-1], last))
    rule, batch = rules.make("lls_mxm", num_classes=CLASSES), make_batch(size=64, side=32)
    state = jax.eval_shape(lambda: start(model, rule, batch))
    step = training.make_train_step(model, rule, TX, reach=reach, **options)
    return step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.exhaustive
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="measured on CPUs")
def test_temporaries_are_those_of_the_blocks_within_reach():
    least, shallow, deep = (temporaries(depth, 2) for depth in (3, 5, 7))
    activation = 64 * 32 * 32 * 16 * 4
    # None at all (jax 0.10.2, 0.12.0.1); backpropagation keeps two activations for each block.
    assert deep - shallow < 0.4 * activation
    # Of three blocks not all are there at once yet: one or two activations less.
    assert deep - least < 3 * activation


@pytest.mark.exhaustive
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="measured on CPUs")
def test_slices_take_less_memory_than_the_whole_batch():
    model = models.make("small_conv", num_classes=CLASSES)
    rule = rules.make("lls_mxm", num_classes=CLASSES)
    batch = make_batch(size=128, side=32)
    state = jax.eval_shape(lambda: start(model, rule, batch))
    sliced, whole = (
        training.make_train_step(model, rule, TX, reach=2, slice_above=above)
        .lower(state, batch)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for above in (None, 2**40)
    )
    # 0.59 of it (jax 0.12.0.1).
    assert sliced < 0.7 * whole


@pytest.mark.parametrize(
    ("rule", "reach", "message"),
    [
        ("lls", 0, "`reach` is 0"),
        ("lls", 1.5, "`reach` is 1.5"),
        ("lls", "2", "`reach` is '2'"),
        ("lls", (1, 2, 0, 1, 1, 1), r"`reach\[2\]` is 0"),
        (
            "lls",
            [1, 2],
            r"has 2 numbers \(1, 2\), and model 'mixed' has 5 blocks and .* give 6 num",
        ),
        ("bp", OF_EACH, "has no local losses"),
        *((name, 2, "has no local losses") for name in ("bp", "dfa", "drtp")),
    ],
)
def test_a_reach_that_cannot_be_is_refused(rule, reach, message):
    with pytest.raises(ValueError, match=message):
        training.make_train_step(mixed(), rules.make(rule, num_classes=CLASSES), TX, reach=reach)


def test_slices_are_of_outputs_that_are_kept():
    rule = rules.make("lls", num_classes=CLASSES)
    with pytest.raises(ValueError, match="`slice_above` is 4 and `remat_above` is 8"):
        training.make_train_step(mixed(), rule, TX, slice_above=4, remat_above=8)
    for name in ("slice_above", "remat_above"):
        for make in (
            lambda options: training.make_train_step(mixed(), rule, TX, **options),
            lambda options: placement.pipeline(
                mixed(), rule, TX, jax.devices()[:1], [6], **options
            ),
        ):
            with pytest.raises(ValueError, match=f"`{name}` is 0; it must be a number of bytes"):
                make({name: 0})


def follow(moves):
    """How many units are kept at once, and by unit the losses whose gradients come to it."""
    kept, most, arrived = set(), 0, {}
    for move in moves:
        if move.kind == "run":
            kept.add(move.unit)
        assert move.unit in kept, "of what has not run, or is gone"
        if move.kind == "pass":
            arrived.setdefault(move.unit - 1, set()).add(move.loss)
        most = max(most, len(kept))
        if move.kind == "update":
            kept.remove(move.unit)
    assert not kept, "did not learn"
    return most, arrived


def test_a_schedule_teaches_each_unit_once_and_keeps_no_more_than_it_must():
    rng = random_generator()
    for _ in range(200):
        units = int(rng.integers(1, 8))
        reach = tuple(int(own) for own in rng.integers(1, units + 2, units))
        most, arrived = follow(reach_schedule.schedule(units, reach))
        lowest = [max(loss - own + 1, 0) for loss, own in enumerate(reach)]
        last = [max(i for i in range(unit, units) if lowest[i] <= unit) for unit in range(units)]
        waiting = [sum(unit <= now <= last[unit] for unit in range(units)) for now in range(units)]
        assert most == max(waiting), reach
        for unit in range(units):
            # By way of the highest loss of those that stop at the same unit.
            above = {
                max(i for i in range(units) if lowest[i] == lowest[one])
                for one in range(unit + 1, units)
                if lowest[one] <= unit
            }
            assert arrived.get(unit, set()) == above, reach
