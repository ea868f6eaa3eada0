"""Counts against XLA's own, where it counts the same thing."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import optax
import pytest

from experiments import accounting as command
from lls_jax import models, rules, training
from lls_jax.accounting import account
from lls_jax.blocks import ConvBlock, DenseBlock, DepthwiseSeparableBlock
from lls_jax.errors import UserError

CLASSES = 10


def macs(function, *shapes):
    """XLA's floating-point operations, halved."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return analysis["flops"] / 2


def convolve(x, kernel, groups=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip


def one_block(module, image_shape, pool_size=1, rule_name="lls", **options):
    rule = rules.make(rule_name, num_classes=CLASSES, **options)
    spec = models.BlockSpec(module, pool_size, flatten=len(image_shape) == 3, average_pool=None)
    model = models.Network("one", CLASSES, (spec,))
    return account(model, rule, image_shape)


def test_convolutions_are_counted_as_xla_does():
    # Wide enough that XLA's leaving out of products with padding is small: (1 - 2/96)^2.
    cost = one_block(ConvBlock(16), (96, 96, 8)).blocks[0]
    forward = macs(convolve, (1, 96, 96, 8), (3, 3, 8, 16))
    assert cost.forward == pytest.approx(forward, rel=0.05)

    def gradient(x, kernel, dy):
        return jax.vjp(lambda k: convolve(x, k), kernel)[1](dy)

    backward = macs(gradient, (1, 96, 96, 8), (3, 3, 8, 16), (1, 96, 96, 16))
    assert cost.weight_gradient == pytest.approx(backward, rel=0.05)


def test_separable_blocks_are_counted_as_xla_does():
    cost = one_block(DepthwiseSeparableBlock(32), (96, 96, 8)).blocks[0]

    def forward(x, depthwise, pointwise):
        return convolve(convolve(x, depthwise, groups=8), pointwise)

    shapes = (1, 96, 96, 8), (3, 3, 1, 8), (1, 1, 8, 32)
    assert cost.forward == pytest.approx(macs(forward, *shapes), rel=0.05)
    through = macs(lambda x, k, dy: jax.vjp(convolve, x, k)[1](dy),
                   (1, 96, 96, 8), (1, 1, 8, 32), (1, 96, 96, 32))  # fmt: skip
    # XLA counts a depthwise weight gradient as if every channel met every other.
    depthwise = 9 * 96 * 96 * 8
    assert cost.weight_gradient - depthwise == pytest.approx(through, rel=0.05)


@pytest.mark.parametrize(
    "name",
    [
        *("lls", "lls_m", "lls_mxm", "lls_centered"),
        *("local_classifier", "lls_random", "lls_mxm_random"),
    ],
)
def test_the_signal_is_counted_as_xla_does(name):
    """On pooled latents of one image a row, so that nothing else is to be counted."""
    classes, features, batch = 300, 2048, 64
    rule = rules.make(name, num_classes=classes)
    params = rule.init(jax.random.key(0), (features,), features)
    spec = models.BlockSpec(ConvBlock(features), pool_size=1, flatten=True)
    ours = account(models.Network("one", classes, (spec,)), rule, (1, 1, 1)).blocks[0].signal
    learned = {k: v for k, v in params.items() if k not in getattr(rule, "fixed", ())}
    fixed = {k: v for k, v in params.items() if k not in learned}

    def signal(activation, labels, *values):
        def loss(values, activation):
            own = {**fixed, **dict(zip(learned, values))}
            return rule.loss(own, activation, labels.astype(jnp.int32), pool_size=features)

        return jax.grad(loss, argnums=(0, 1))(values, activation)

    theirs = macs(signal, (batch, features), (batch,), *(v.shape for v in learned.values()))
    assert ours == pytest.approx(theirs / batch, rel=0.05)


def test_backpropagations_signal_is_the_gradient_to_activations():
    bp = account(
        models.make("vgg8", num_classes=CLASSES), rules.make("bp", num_classes=CLASSES), (32, 32, 3)
    )
    rule = rules.make("lls", num_classes=CLASSES)
    lls = account(models.make("vgg8", num_classes=CLASSES), rule, (32, 32, 3))
    assert bp.total("signal") == bp.total("forward") - bp.blocks[0].forward
    assert bp.total("rule_params") == lls.total("rule_params") == 0
    kept = [cost.activation_bytes for cost in lls.blocks]
    assert (lls.peak_activation_bytes, bp.peak_activation_bytes) == (max(kept), sum(kept))
    init = functools.partial(models.make("vgg8", num_classes=CLASSES).init, rule)
    params, _ = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert lls.total("params") == sum(leaf.size for leaf in jax.tree.leaves(params))


def step_macs(model, rule, image_shape, batch, reach):
    """XLA's operations of a whole step, halved, for one image."""
    image = jnp.zeros((batch, *image_shape))
    tx = optax.sgd(0.1)
    state = jax.eval_shape(
        lambda: training.create_train_state(model, rule, tx, jax.random.key(0), image)
    )
    step = training.make_train_step(model, rule, tx, reach=reach)
    lowered = step.lower(state, {"image": image, "label": jnp.zeros(batch, jnp.int32)})
    return lowered.compile().cost_analysis()["flops"] / 2 / batch


@pytest.mark.parametrize(
    ("module", "image_shape", "flatten", "reaches"),
    [
        # Several ways down, some that end and some that do not; then one way for all.
        (DenseBlock(256), (256,), False, (2, 3, 5, (1, 2, 1, 3, 1))),
        # Two ways through the layer within each block.
        (DepthwiseSeparableBlock(256), (4, 4, 256), True, (2,)),
    ],
)
def test_what_comes_from_above_is_counted_as_xla_does(module, image_shape, flatten, reaches):
    specs = [models.BlockSpec(module, pool_size=2) for _ in range(4)]
    specs[-1] = dataclasses.replace(specs[-1], average_pool=1 if flatten else None, flatten=flatten)
    model, rule = (
        models.Network("straight", CLASSES, tuple(specs)),
        rules.make("lls", num_classes=CLASSES),
    )
    batch = 64 if not flatten else 8
    alone = account(model, rule, image_shape).total("signal")
    theirs_alone = step_macs(model, rule, image_shape, batch, 1)
    for reach in reaches:
        ours = account(model, rule, image_shape, reach).total("signal") - alone
        theirs = step_macs(model, rule, image_shape, batch, reach) - theirs_alone
        assert ours == pytest.approx(theirs, rel=0.1), reach


@pytest.mark.parametrize(
    ("groups", "reach", "kept"),
    [
        # A layer keeps 512 elements, the classifier 256: it is with the last block or blocks, or
        # by itself.
        ((1, 1, 1, 2), 2, 512 + 512 + 256),
        ((2, 3), 1, 2 * 512 + 256),
        ((2, 1, 2), (1, 2, 1), 2 * 512 + 512),
        ((1, 3), 2, 512 + 3 * 512),
    ],
)
def test_groups_are_counted_as_xla_does(groups, reach, kept):
    specs = (models.BlockSpec(DenseBlock(256), pool_size=2),) * 4
    model = models.Network("straight", CLASSES, specs)
    rule = rules.make("lls", num_classes=CLASSES)

    def both(model, reach):
        counted = account(model, rule, (256,), reach)
        ours = sum(map(counted.total, ("forward", "weight_gradient", "signal")))
        return counted, ours, step_macs(model, rule, (256,), 64, reach)

    _, ours_alone, theirs_alone = both(model, 1)
    counted, ours, theirs = both(model.grouped(groups), reach)
    # A way down through a layer more or less is 65,536 of them.
    assert ours - ours_alone == pytest.approx(theirs - theirs_alone, rel=0.1)
    assert counted.peak_activation_bytes == 4 * kept


@pytest.mark.parametrize("name", ["small_conv", "mobilenet_v1_small", "resnet32", "airbench"])
def test_all_in_one_group_costs_what_backpropagation_does(name):
    model = models.make(name, num_classes=CLASSES)
    whole = model.grouped((len(model.specs) + 1,))
    ours, bp = (
        account(one, rules.make(rule, num_classes=CLASSES), (32, 32, 3))
        for one, rule in ((whole, "lls"), (model, "bp"))
    )
    fields = ("forward", "weight_gradient", "signal")
    assert sum(map(ours.total, fields)) == sum(map(bp.total, fields))
    assert ours.peak_activation_bytes == bp.peak_activation_bytes


def test_a_row_of_blocks_is_kept_until_their_losses_have_come():
    model, rule = models.make("vgg8", num_classes=CLASSES), rules.make("lls", num_classes=CLASSES)
    bp = account(model, rules.make("bp", num_classes=CLASSES), (32, 32, 3))
    kept = [cost.activation_bytes for cost in bp.blocks]
    for reach in (1, 2, 3):
        rows = [sum(kept[i : i + reach]) for i in range(len(kept) - reach + 1)]
        ours = account(model, rule, (32, 32, 3), reach)
        assert ours.peak_activation_bytes == max(rows)
    # The second block waits for the fourth's loss.
    uneven = account(model, rule, (32, 32, 3), (1, 1, 1, 3, *(1,) * (len(kept) - 4)))
    assert uneven.peak_activation_bytes == max(kept[0], sum(kept[1:4]), *kept[4:])
    far = account(model, rule, (32, 32, 3), 99)
    assert far.peak_activation_bytes == bp.peak_activation_bytes
    own = account(model, rule, (32, 32, 3)).total("signal")
    assert far.total("signal") == bp.total("signal") + own
    with pytest.raises(ValueError, match="'bp' has no local losses"):
        account(model, rules.make("bp", num_classes=CLASSES), (32, 32, 3), 2)


def test_auxiliary_networks_are_counted_with_the_rules_own_strides(monkeypatch):
    model = models.make("small_conv", num_classes=CLASSES)

    def signal(name):
        rule = rules.make(name, num_classes=CLASSES)
        return account(model, rule, (32, 32, 3)).total("signal")

    before = {name: signal(name) for name in ("infopro", "auglocal")}
    monkeypatch.setattr("lls_jax.rules.infopro._HALVES_ABOVE", 32)
    monkeypatch.setattr("lls_jax.accounting.copy_stride", lambda kernel: 1)
    assert all(signal(name) > cost for name, cost in before.items())


def test_the_command_prints_every_rule_and_block(capsys):
    config = command.AccountingConfig(rules=["lls", "dfa"], json=True)
    assert command.accounting(config) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["rule"] for row in report["totals"]] == ["lls", "dfa", "local_classifier", "bp"]
    assert len(report["blocks"]) == 4 * 5
    shared = command.AccountingConfig(rules=["lls"], groups="2,3", reach=[2], json=True)
    assert command.accounting(shared) == 0
    blocks = json.loads(capsys.readouterr().out)["blocks"]
    # Backpropagation's network has no losses to share.
    assert [sum(row["rule"] == rule for row in blocks) for rule in ("lls", "bp")] == [3, 5]
    two = command.AccountingConfig(rules=["lls"], reach=[2, 1], json=True)
    assert command.accounting(two) == 0
    totals = json.loads(capsys.readouterr().out)["totals"]
    named = [(row["rule"], row["reach"]) for row in totals]
    assert named[:2] == [("lls", 2), ("lls", 1)] and ("bp", 1) in named and ("bp", 2) not in named
    assert totals[0]["memory"] > totals[1]["memory"]
    with pytest.raises(ValueError, match="--reach is 0"):
        command.AccountingConfig(reach=[0])
    assert command.accounting(command.AccountingConfig(rules=["lls"])) == 0
    assert "| lls | 1 | block_0 |" in capsys.readouterr().out
    with pytest.raises(UserError, match="'lsl'"):
        command.accounting(command.AccountingConfig(rules=["lsl"]))
