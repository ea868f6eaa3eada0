"""Counts against XLA's own, where it counts the same thing."""

import json

import jax
import jax.numpy as jnp
import pytest

from experiments import accounting as command
from lls_jax import models, rules
from lls_jax.accounting import account
from lls_jax.blocks import ConvBlock, DepthwiseSeparableBlock
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
    "name", ["lls", "lls_m", "lls_mxm", "local_classifier", "lls_random", "lls_mxm_random"]
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
    lls = account(
        models.make("vgg8", num_classes=CLASSES),
        rules.make("lls", num_classes=CLASSES),
        (32, 32, 3),
    )
    assert bp.total("signal") == bp.total("forward") - bp.blocks[0].forward
    assert bp.total("rule_params") == lls.total("rule_params") == 0
    kept = [cost.activation_bytes for cost in lls.blocks]
    assert (lls.peak_activation_bytes, bp.peak_activation_bytes) == (max(kept), sum(kept))
    params, _ = models.make("vgg8", num_classes=CLASSES).init(
        rules.make("lls", num_classes=CLASSES), jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    )
    assert lls.total("params") == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_the_command_prints_every_rule_and_block(capsys):
    config = command.AccountingConfig(rules=["lls", "dfa"], json=True)
    assert command.accounting(config) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["rule"] for row in report["totals"]] == ["lls", "dfa", "local_classifier", "bp"]
    assert len(report["blocks"]) == 4 * 5
    assert command.accounting(command.AccountingConfig(rules=["lls"])) == 0
    assert "| lls | block_0 |" in capsys.readouterr().out
    with pytest.raises(UserError, match="'lsl'"):
        command.accounting(command.AccountingConfig(rules=["lsl"]))
