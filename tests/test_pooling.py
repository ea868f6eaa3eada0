"""Pooling between blocks: values, gradients, and the program that a GPU gets."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cuda import lower

from lls_jax import models, rules, training
from lls_jax.layers import pooling
from pallas_kernels.local_loss.pooling import adaptive_average_pool, sum_bins

RNG = np.random.default_rng(0)


def windows(size, bins):
    return [slice(i * size // bins, -(-(i + 1) * size // bins)) for i in range(bins)]


@pytest.mark.parametrize("size", [(7, 7, 2), (8, 5, 3), (2, 3, 4), (6, 4, 2)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_adaptive_means_and_their_gradient(size, dtype):
    height, width, bins = size
    x = jnp.asarray(RNG.normal(size=(2, height, width, 3)), dtype)
    dy = jnp.asarray(RNG.normal(size=(2, bins, bins, 3)), dtype)
    exact, d_exact = np.asarray(x, np.float64), np.zeros(x.shape)
    expected = np.zeros(dy.shape)
    for i, rows in enumerate(windows(height, bins)):
        for j, columns in enumerate(windows(width, bins)):
            window = exact[:, rows, columns]
            expected[:, i, j] = window.mean((1, 2))
            share = np.asarray(dy, np.float64)[:, i, j] / (window.shape[1] * window.shape[2])
            d_exact[:, rows, columns] += share[:, None, None]
    ours, pullback = jax.vjp(lambda x: adaptive_average_pool(x, bins), x)
    (dx,) = pullback(dy)
    assert ours.dtype == dx.dtype == dtype
    # Of sums in float32; a result is rounded once, a gradient for each window that holds it.
    unit = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(ours, np.float64), expected, atol=4 * unit)
    np.testing.assert_allclose(np.asarray(dx, np.float64), d_exact, atol=16 * unit)
    spread = pooling.spread_bins(dy.astype(jnp.float32), x.shape)
    np.testing.assert_allclose(
        np.vdot(np.asarray(spread, np.float64), exact),
        np.vdot(np.asarray(dy, np.float64), sum_bins(x, bins)),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_maxima_and_equal_shares_of_their_gradient(dtype):
    """In all forms; two, three and four are equal somewhere, and an odd last row is dropped."""
    x = jnp.asarray(RNG.integers(0, 3, (4, 7, 5, 8)), dtype)
    dy = jnp.asarray(RNG.normal(size=(4, 3, 2, 8)), dtype)
    windows = np.asarray(x, np.float64)[:, :6, :4].reshape(4, 3, 2, 2, 2, 8)
    expected = windows.max((2, 4), keepdims=True)
    equal = windows == expected
    share = np.asarray(dy, np.float64)[:, :, None, :, None] / equal.sum((2, 4), keepdims=True)
    d_expected = np.zeros(x.shape)
    d_expected[:, :6, :4] = np.where(equal, share, 0.0).reshape(4, 6, 4, 8)
    y, pullback = jax.vjp(pooling.max_pool, x)
    unit = float(jnp.finfo(dtype).eps)
    np.testing.assert_array_equal(y, expected[:, :, 0, :, 0])
    np.testing.assert_array_equal(pooling._max_pool_in_strides(x), y)
    (dx,) = pullback(dy)
    assert dx.dtype == dtype
    np.testing.assert_allclose(np.asarray(dx, np.float64), d_expected, rtol=2 * unit)
    d_strides = pooling._gradient_in_strides(x, dy)
    np.testing.assert_allclose(np.asarray(d_strides, np.float64), d_expected, rtol=2 * unit)
    d_spread = pooling.spread_maxima(x, y, pooling.share_maxima(x, y, dy))
    assert d_spread.dtype == dtype
    np.testing.assert_allclose(np.asarray(d_spread, np.float64), d_expected, rtol=2 * unit)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_no_element_is_asked_to_equal_a_maximum(platform):
    """XLA may find an activation twice, for the maxima and for what is compared with them, and
    round it once otherwise: then no element is the maximum, and the gradient is lost."""
    x, dy = jnp.zeros((2, 6, 6, 4)), jnp.zeros((2, 3, 3, 4))
    gradient = jax.jit(lambda x, dy: jax.vjp(pooling.max_pool, x)[1](dy))
    program = gradient.trace(x, dy).lower(lowering_platforms=(platform,)).as_text()
    compared = [line for line in program.splitlines() if "stablehlo.compare" in line]
    of_floats = [line for line in compared if "FLOAT" in line]
    assert of_floats
    assert not [line for line in of_floats if " EQ," in line]


# What XLA computes while it reads or writes an array, and need not have as an array of its own.
FUSED = {
    *("add", "subtract", "multiply", "divide", "maximum", "compare", "select", "convert", "abs"),
    *("square", "pad", "call", "return"),
    *("negate", "broadcast_in_dim", "reduce", "slice", "reshape", "and", "or", "not", "rsqrt"),
}


def operations(lowered):
    from jaxlib.mlir import ir

    found = []

    def visit(op):
        found.append(op)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return found


@pytest.mark.parametrize("rule_name", ["lls_mxm", "bp"])
def test_a_gpu_has_no_transposed_and_no_widened_activation(rule_name):
    """In bfloat16, with overlapping windows and odd sizes: nothing of an activation's size is
    transposed, or is in float32 where it is not fused into what reads it."""
    batch, side = 8, 30
    model = models.make("small_conv", num_classes=10, dtype=jnp.bfloat16)
    rule, tx = rules.make(rule_name, num_classes=10), optax.sgd(0.1)
    image = jax.ShapeDtypeStruct((batch, side, side, 1), jnp.float32)
    state = jax.eval_shape(
        lambda key: training.create_train_state(
            model, rule, tx, key, jnp.zeros((1, side, side, 1))
        ),
        jax.random.key(0),
    )
    step = training.make_train_step(model, rule, tx)
    examples = {"image": image, "label": jax.ShapeDtypeStruct((batch,), jnp.int32)}
    found = operations(lower(step, state, examples))

    sizes = [batch * 30 * 30 * 32, batch * 15 * 15 * 64, batch * 7 * 7 * 128]

    def activations(op):
        """Types of what it reads or makes, where that has an activation's size."""
        for value in (*op.operands, *op.results):
            kind = re.fullmatch(r"tensor<([\dx]+)x(\w+)>", str(value.type))
            sides = [int(side) for side in kind[1].split("x")] if kind else []
            # The last activation has 7 rows and columns, and 128 channels.
            if math.prod(sides) in sizes:
                yield kind[2]

    by_name = {}
    for op in found:
        by_name.setdefault(op.name.rpartition(".")[2], set()).update(activations(op))
    assert {"bf16"} == by_name["convolution"] and "f32" in by_name["convert"]
    assert not by_name.get("transpose")
    # To merge the channels with another axis is to transpose what is stored by channels.
    merged = [
        (before, after)
        for op in found
        if op.name == "stablehlo.reshape" and list(activations(op))
        for before, after in [(str(op.operands[0].type), str(op.results[0].type))]
        if before.split("x")[-2:] != after.split("x")[-2:]
    ]
    assert not merged
    assert not [name for name, kinds in by_name.items() if "f32" in kinds and name not in FUSED]


@pytest.mark.parametrize("reach", [1, 2])
def test_a_gpu_walks_no_slices_and_asks_its_host_nothing(reach):
    """Where a CPU would, of a first output of 16 MiB: no loop, no branch but by the platform."""
    model = models.make("small_conv", num_classes=10)
    rule, tx = rules.make("lls_mxm", num_classes=10), optax.sgd(0.1)
    image = jnp.zeros((1, 32, 32, 3))
    state = jax.eval_shape(
        lambda key: training.create_train_state(model, rule, tx, key, image), jax.random.key(0)
    )
    examples = {
        "image": jax.ShapeDtypeStruct((128, 32, 32, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((128,), jnp.int32),
    }
    step = training.make_train_step(model, rule, tx, reach=reach)
    program = lower(step, state, examples).as_text()
    assert "stablehlo.while" not in program
    branches = list(re.finditer(r'"stablehlo.case"\((%\w+)\)', program))
    assert branches
    for branch in branches:
        made = program.rindex(f"{branch[1]} = ", 0, branch.start())
        # By the platform: of a constant, or of what such a branch has made of it.
        assert re.compile(r'%\w+ = "?stablehlo.(constant|case)\b').match(program, made)
