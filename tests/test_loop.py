"""Launches of many steps: as the program that a GPU would get, and as the steps one by one."""

import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cuda import lower, triton_kernels

from lls_jax import rules, training
from lls_jax.blocks import ConvBlock
from lls_jax.data import Split, batches, get_spec
from lls_jax.data.order import epoch_permutation
from lls_jax.models import BlockSpec, Network
from lls_jax.runs import epoch_sums, launches, source
from lls_jax.runs.run import Compiled
from lls_jax.steps import averaging, loop

SPEC = get_spec("digits")
BATCH, STEPS = 4, 7
RULE = rules.make("lls_mxm", num_classes=10)
MODEL = Network("one", 10, (BlockSpec(ConvBlock(4), 2, average_pool=2, flatten=True),))


def examples(count=BATCH * STEPS):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *SPEC.image_shape), np.uint8)
    return batches.to_device(Split(images, rng.integers(0, 10, count).astype(np.int32)))


def ops(lowered, name):
    """The operations of one kind in a lowered program, wherever they are."""
    found = []

    def visit(op):
        if op.name == name:
            found.append(op)
        from jaxlib.mlir import ir

        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return found


def bound_of(loop_op):
    """The number that a loop's counter is compared with; None where that is no constant."""
    from jaxlib.mlir import ir

    *_, compare, _ = loop_op.regions[0].blocks[0].operations
    owner = compare.operands[1].owner
    if not isinstance(owner, ir.OpView) or owner.operation.name != "stablehlo.constant":
        return None
    return int(np.asarray(ir.DenseElementsAttr(owner.attributes["value"])).reshape(()))


@pytest.fixture(scope="module")
def training_loop():
    tx = optax.sgd(0.05, momentum=0.9)
    step = training.make_train_step(MODEL, RULE, tx)
    made = loop.make_loop(step, epoch_sums.add, SPEC, "flip", BATCH)

    def start():
        state = training.create_train_state(
            MODEL, RULE, tx, jax.random.key(0), jnp.zeros((1, *SPEC.input_shape))
        )
        return state, epoch_sums.empty(MODEL, RULE)

    data, key = examples(), jax.random.key(1)
    return step, made, start, (data, epoch_permutation(key, 0, BATCH * STEPS), key)


def test_a_gpu_is_never_asked_whether_a_loop_goes_on(training_loop):
    """Each loop's length is a constant of the program, and nothing goes to the host inside."""
    _, made, start, drawn = training_loop
    program = lower(made.constant, *start(), *drawn, 0, STEPS)
    loops = ops(program, "stablehlo.while")
    assert STEPS in [bound_of(one) for one in loops]
    assert None not in [bound_of(one) for one in loops]
    for name in ("infeed", "outfeed", "send", "recv"):
        assert not ops(program, f"stablehlo.{name}")
    targets = {
        str(op.attributes["call_target_name"]) for op in ops(program, "stablehlo.custom_call")
    }
    assert not [target for target in targets if "callback" in target], targets
    # The other one is: its length is an argument.
    assert None in [
        bound_of(one)
        for one in ops(lower(made.any_count, *start(), *drawn, 0, STEPS), "stablehlo.while")
    ]


def test_a_gpu_launches_one_kernel_a_layer_in_the_loop(training_loop):
    """In the loop as in the step: the layer's loss and gradient, and no product beside it."""
    _, _, start, drawn = training_loop
    rule = RULE.with_implementation("pallas")
    step = training.make_train_step(MODEL, rule, optax.sgd(0.05, momentum=0.9))
    made = loop.make_loop(step, epoch_sums.add, SPEC, "flip", BATCH)
    program = lower(made.constant, *start(), *drawn, 0, STEPS)
    assert [kernel.name for kernel in triton_kernels(program)] == ["head_loss"]
    # The classifier's products alone, forward and to its weights.
    assert len(ops(program, "stablehlo.dot_general")) == 2


def test_rows_are_taken_without_a_mask(training_loop):
    """Every index of a permutation is in range: no comparison with the number of examples."""
    *_, (data, permutation, _) = training_loop
    program = lower(batches.gather, data, permutation, 2, BATCH)
    assert len(ops(program, "stablehlo.gather")) == 2
    assert not ops(program, "stablehlo.select") or all(
        # Of indices, never of what is gathered.
        "ui8" not in str(op.results[0].type)
        for op in ops(program, "stablehlo.select")
    )


class Dropping(nn.Module):
    """Dropout inside a block: of each batch its own."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return ConvBlock(4)(nn.Dropout(0.5, deterministic=not train)(x), train=train)


def test_statistics_are_one_launch_of_constant_length():
    specs = (BlockSpec(Dropping(), 2, average_pool=2, flatten=True),)
    model, data = dataclasses.replace(MODEL, specs=specs), examples()
    params, stats = model.init(RULE, jax.random.key(0), jnp.zeros((1, *SPEC.input_shape)))
    key = jax.random.key(3)
    drawn = (data, epoch_permutation(key, 5, BATCH * STEPS), key)
    estimate = loop.make_statistics_loop(model, SPEC, "flip", BATCH)
    bounds = [
        bound_of(op) for op in ops(lower(estimate, params, stats, *drawn, 5), "stablehlo.while")
    ]
    assert 5 in bounds and None not in bounds
    read = batches.make_reader(SPEC, "flip", BATCH)
    images = [batch["image"] for batch in read(drawn[0], drawn[1], 0, key)][:5]
    expected = averaging.estimate_batch_stats(model, params, stats, images)
    ours = estimate(params, stats, *drawn, 5)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(jax.tree.leaves(ours)[0])).max() > 1e-3


def test_many_steps_are_the_single_steps_however_they_are_cut(training_loop):
    step, made, start, (data, permutation, key) = training_loop
    state, sums = start()
    read = batches.make_reader(SPEC, "flip", BATCH)
    for batch in read(data, permutation, 0, key):
        state, metrics = step(state, batch)
        sums = epoch_sums.add(sums, {**metrics, "label": batch["label"]})
    cut = []
    # A whole epoch; a full launch, and a rest that is cut by a checkpoint after one step.
    for parts in (
        [(made.constant, 7)],
        [(made.constant, 4), (made.any_count, 1), (made.any_count, 2)],
    ):
        ours, index = start(), 0
        for launch, count in parts:
            ours = launch(*ours, data, permutation, key, index, count)
            index += count
        cut.append(jax.tree.leaves((ours[0].params, ours[0].opt_state, ours[1])))
        assert int(ours[0].step) == STEPS
    for other in cut[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, cut[0])
    singles = jax.tree.leaves((state.params, state.opt_state, sums))
    for ours, theirs in zip(cut[0], singles, strict=True):
        # Seven steps of float32, summed in another order.
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 24, 25, 49, 50, 51, 97, 100, 390, 781])
def test_epochs_are_cut_into_launches_of_two_lengths_at_most(steps):
    length = loop.launch_length(steps, 50)
    assert 1 <= length <= 50
    assert length == steps or steps > 50
    if steps > 50 and any(steps % even == 0 for even in range(25, 51)):
        assert steps % length == 0
    elif steps > 50:
        assert length == 50


def cuts(steps, every, start=0, until=None):
    """The launches of an epoch of ``steps``: whether of constant length, first step, steps."""
    taken = []

    def launch(constant):
        def noted(running, sums, data, order, key, index, count):
            taken.append((constant, index, count))
            return running, sums

        return noted

    data = source.OnDevices(None, lambda epoch: None, None, None, None)
    compiled = Compiled(loop.Loop(launch(True), launch(False)), None, data)
    run = types.SimpleNamespace(
        compiled=compiled,
        checkpoint_every=every,
        source=types.SimpleNamespace(steps_per_epoch=steps),
    )
    launching, step = launches.Launches(run, 0, start), start
    while step < (until or steps):
        *_, count = launching(None, None, step, steps)
        step += count
    return taken


@pytest.mark.parametrize(("steps", "every"), [(390, 0), (97, 0), (51, 0), (390, 100), (97, 7)])
def test_a_resumed_epoch_is_cut_where_it_would_have_been(steps, every):
    whole = cuts(steps, every)
    assert [index for _, index, _ in whole] == [
        sum(count for *_, count in whole[:i]) for i in range(len(whole))
    ]
    assert sum(count for *_, count in whole) == steps
    for i in range(1, len(whole)):
        assert cuts(steps, every, start=whole[i][1]) == whole[i:]
    # One program, or two, of constant length; none of a single step; else the one for any number.
    lengths = {count for constant, _, count in whole if constant}
    assert len(lengths) <= 2 and 1 not in lengths
    if not every:
        assert all(constant or count == 1 for constant, _, count in whole)
    else:
        ends = {index + count for _, index, count in whole}
        assert set(range(every, steps, every)) <= ends
