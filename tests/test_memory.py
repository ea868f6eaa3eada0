"""The memory of a local step: what is computed again, and in which order."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from seeds import random_generator

from lls_jax import models, rules, training
from lls_jax.blocks import ConvBlock
from lls_jax.layers.ordering import token_of, wait_for
from lls_jax.layers.slices import choose_count, map_slices, sum_slices, walk_slices
from lls_jax.models import BlockSpec, Network
from lls_jax.steps import slice_plan

CLASSES = 5
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="measured on CPUs")


def make_batch(size, side, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.normal(size=(size, side, side, 3)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, CLASSES, size), jnp.int32),
    }


def train(model, rule, batch, **options):
    # Plain gradient descent: Adam's first updates are signs, which rounding may turn.
    tx = optax.sgd(0.05, momentum=0.9)
    state = training.create_train_state(model, rule, tx, jax.random.key(0), batch["image"])
    step = training.make_train_step(model, rule, tx, **options)
    for _ in range(2):
        state, metrics = step(state, batch)
    return state._replace(key=jax.random.key_data(state.key)), metrics


# Rules, side and size of a batch that slices of 20 KiB do not divide, and of one with a slice for
# each example.
UNEVEN = ("lls_mxm", "contrastive", "lls_m_random", "lls"), 8, 7
SINGLE = ("local_classifier", "lls", "lls_mxm", "lls_m"), 12, 6


@pytest.mark.parametrize(
    ("names", "side", "batch_size", "option"),
    [
        (*UNEVEN, "remat_above"),
        (*SINGLE, "slice_above"),
        pytest.param(*UNEVEN, "slice_above", marks=pytest.mark.exhaustive),
        pytest.param(*SINGLE, "remat_above", marks=pytest.mark.exhaustive),
    ],
)
def test_slices_are_training_as_before(names, side, batch_size, option):
    model = models.make("small_conv", num_classes=CLASSES, dropout=0.2)
    rule = rules.PerBlock(tuple(rules.make(name, num_classes=CLASSES) for name in names))
    batch = make_batch(batch_size, side)
    kept, ours = (train(model, rule, batch, **{option: above}) for above in (None, 20 * 1024))
    differing = 0
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(ours), strict=True):
        scale = np.abs(np.asarray(a, np.float64)).max(initial=0)
        # Sums over batch and pixels in another order, through two steps.
        np.testing.assert_allclose(a, b, atol=1e-4 * scale, rtol=0)
        differing += not np.array_equal(a, b)
    assert differing, "nothing was in slices"


@pytest.mark.parametrize("name", ["predsim", "decoupled"])
def test_what_sees_the_activation_itself_is_computed_once(name):
    """The program is the same."""
    model, rule = (
        models.make("small_conv", num_classes=CLASSES),
        rules.make(name, num_classes=CLASSES),
    )
    tx, batch = optax.sgd(0.05), make_batch(7, 8)
    state = jax.eval_shape(
        lambda: training.create_train_state(model, rule, tx, jax.random.key(0), batch["image"])
    )
    kept, ours = (
        training.make_train_step(model, rule, tx, remat_above=above).lower(state, batch).as_text()
        for above in (None, 20 * 1024)
    )
    assert kept == ours


def test_a_slice_is_as_large_as_allowed():
    assert slice_plan.count_slices((128, 32, 32, 256), jnp.float32, 2**25) == 4
    assert slice_plan.count_slices((128, 32, 32, 256), jnp.bfloat16, 2**25) == 2
    assert slice_plan.count_slices((3, 32, 32, 256), jnp.float32, 1) == 3
    for batch, wanted in itertools.product(range(1, 200), range(1, 60)):
        count = choose_count(batch, wanted)
        assert min(batch, wanted) <= count <= 2 * wanted, (batch, wanted)
        # No slice is larger than asked for, and what is left over is smaller.
        assert batch % count < batch // count <= -(-batch // min(batch, wanted)), (batch, wanted)


@on_cpu
def test_outputs_that_are_not_computed_again_are_in_slices_by_default():
    module, rule = ConvBlock(32), rules.make("lls", num_classes=10)
    spec, x = BlockSpec(module, pool_size=4), jax.ShapeDtypeStruct((128, 32, 32, 3), jnp.float32)
    plans = [
        slice_plan.plan_block(spec, rule, x, slice_plan.Cuts(*above))
        for above in ((None, None), (2**30, None), (2**22, None), (None, 2**22), (None, 2**40))
    ]
    shown = [plan and (plan.slices, plan.keeps_output, plan.only_on_cpu) for plan in plans]
    default = (8, True, True)
    assert shown == [default, default, (4, False, False), (4, True, False), None]
    # Few channels are cheap to compute again: done, in larger slices, where that saves memory.
    of_features = jax.ShapeDtypeStruct((128, 32, 32, 32), jnp.float32)
    pooled = dataclasses.replace(spec, max_pool=True)
    plans = [
        slice_plan.plan_block(pooled, rule, own, slice_plan.Cuts(*above), from_above=True)
        for own, above in (
            (x, (None, None)), (x, (2**30, None)), (x, (None, 2**22)), (of_features, (None, None))
        )
    ]  # fmt: skip
    shown = [(plan.slices, plan.keeps_output, plan.only_on_cpu) for plan in plans]
    assert shown == [(4, False, True), default, (4, True, False), default]
    assert [plan.keeps_maxima for plan in plans] == [True, False, False, False]


def temporaries(model, rule_name, side, batch_size=128, **options):
    rule, tx = rules.make(rule_name, num_classes=10), optax.contrib.schedule_free_adamw(5e-3)
    image = jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.float32)
    state = jax.eval_shape(
        lambda: training.create_train_state(
            model, rule, tx, jax.random.key(0), jnp.zeros((1, side, side, 3))
        )
    )
    batch = {"image": image, "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}
    step = training.make_train_step(model, rule, tx, **options)
    return step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes


def straight(depth):
    """Blocks of one size."""
    specs = tuple(BlockSpec(ConvBlock(16), pool_size=2) for _ in range(depth))
    last = dataclasses.replace(specs[-1], average_pool=2, flatten=True)
    return Network("straight", 10, (*specs[:-1], last))


def added_by_two_blocks(name, above=None):
    """Temporaries, in activations of one block. (Of three blocks not all are there at once.)"""
    shallow, deep = (
        temporaries(straight(depth), name, 32, 64, remat_above=above) for depth in (4, 6)
    )
    return (deep - shallow) / (64 * 32 * 32 * 16 * 4)


@on_cpu
@pytest.mark.parametrize("above", [None, 2**20])
def test_temporaries_do_not_grow_with_depth(above):
    # None at all (jax 0.10.2, 0.12.0.1).
    assert added_by_two_blocks("lls_mxm", above) < 0.4


@on_cpu
def test_temporaries_of_backpropagation_grow_by_two_activations_a_block():
    assert added_by_two_blocks("bp") > 0.95 * 2 * 2


@on_cpu
@pytest.mark.parametrize(
    ("name", "groups", "side", "options", "most"),
    [
        # 0.45 (jax 0.12.0.1) and 0.48 (0.10.2); 0.73 if the next block's input is not written out.
        ("small_conv", (1, 1, 1, 1), 32, {}, 0.54),
        # 0.60 and 0.64; whole groups 1.02 and more.
        ("small_conv", (2, 3), 32, {}, 0.7),
        pytest.param(
            *("vgg8", (1,) * 7, 32, {"remat_above": 2**23}, 0.42), marks=pytest.mark.exhaustive
        ),
        pytest.param("mobilenet_v1", (1,) * 14, 128, {}, 0.47, marks=pytest.mark.exhaustive),
    ],
)
def test_the_local_step_takes_less_memory_than_backpropagation(name, groups, side, options, most):
    model = models.make(name, num_classes=10)
    ours = temporaries(model.grouped(groups), "lls_mxm", side, **options)
    assert ours < most * temporaries(model, "bp", side)


@on_cpu
def test_a_function_of_ones_own_is_in_slices_too():
    def sorted_four_times(x):
        return jnp.mean(jnp.sort(jnp.concatenate([x] * 4, axis=-1), axis=-1), axis=(1, 2))

    specs = (BlockSpec(ConvBlock(32), 4, then=sorted_four_times),)
    model = Network("own", 10, specs)
    output = 128 * 32 * 32 * 32 * 4
    # 1.8 (jax 0.12.0.1 and 0.10.2); 6.0 of the whole batch at once.
    assert temporaries(model, "lls", 32) < 2.5 * output


@on_cpu
def test_the_classifiers_group_waits_for_the_block_below():
    model = models.make("small_conv", num_classes=10)
    alone, grouped = (
        temporaries(model.grouped(sizes), "lls_mxm", 32) for sizes in ((1, 1, 1, 1), (1, 1, 3))
    )
    # 1.00 (jax 0.12.0.1, 0.10.2); without the wait 1.2.
    assert grouped < 1.1 * alone


# Slices of one size; of two, with examples left over; one example each; the whole.
@pytest.mark.parametrize(("batch", "count"), [(6, 3), (7, 3), (4, 4), (5, 1)])
def test_slices_give_what_the_whole_batch_gives(batch, count):
    rng = random_generator()
    x, y = rng.normal(size=(batch, 3)), rng.normal(size=(batch, 2, 2))

    def products(x, pair):
        return {"outer": jnp.einsum("bi,bjk->ijk", x, pair[0]), "squares": jnp.sum(x * x, 0)}

    def rows(x, pair):
        return {"scaled": pair[0] * x[:, :1, None], "signs": x > 0}

    arrays = jnp.asarray(x, jnp.float32), (jnp.asarray(y, jnp.float32), None)
    total = jax.jit(lambda *arrays: sum_slices(products, arrays, count))(*arrays)
    np.testing.assert_allclose(total["outer"], np.einsum("bi,bjk->ijk", x, y), atol=1e-5)
    np.testing.assert_allclose(total["squares"], np.sum(x * x, 0), atol=1e-5)
    mapped = jax.jit(lambda *arrays: map_slices(rows, arrays, count))(*arrays)
    np.testing.assert_allclose(mapped["scaled"], y * x[:, :1, None], atol=1e-6)
    np.testing.assert_array_equal(mapped["signs"], x > 0)
    both = jax.jit(
        lambda *arrays: walk_slices(lambda *own: (products(*own), rows(*own)), arrays, count)
    )(*arrays)
    jax.tree.map(np.testing.assert_array_equal, both, (total, mapped))


def test_waiting_changes_no_value():
    tree = {"a": jnp.arange(3.0), "b": jnp.arange(3), "c": jnp.ones(2, jnp.bfloat16)}
    waited = jax.jit(wait_for)(token_of({"x": jnp.ones((2, 2)), "y": jnp.arange(2)}), tree)
    jax.tree.map(np.testing.assert_array_equal, waited, tree)
    assert jax.tree.map(lambda leaf: leaf.dtype, waited) == jax.tree.map(lambda x: x.dtype, tree)
    lost = wait_for(token_of(jnp.array([jnp.nan])), tree)
    assert np.isnan(lost["a"]).all() and lost["b"].tolist() == [0, 1, 2]
