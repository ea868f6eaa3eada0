"""Convolutions, forward and back, against loops over taps in float64."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from seeds import random_generator

from lls_jax import platforms
from lls_jax.layers import convolution, products, winograd
from lls_jax.layers import slices as in_slices
from lls_jax.layers.convolution import convolve_3x3
from lls_jax.layers.depthwise import depthwise_3x3
from lls_jax.layers.normalization import Statistics
from lls_jax.layers.pointwise import pointwise
from lls_jax.layers.pooled_normalization import window_sums


def oracle(x, kernel, dy, stride):
    """The output, and the gradients of its product with `dy`."""
    _, rows, columns, _ = dy.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y, d_padded, d_kernel = np.zeros(dy.shape), np.zeros(padded.shape), np.zeros(kernel.shape)
    for i, j in itertools.product(range(3), range(3)):
        at = np.s_[
            :, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride
        ]
        y += padded[at] @ kernel[i, j]
        d_padded[at] += dy @ kernel[i, j].T
        d_kernel[i, j] = np.einsum("bhwc,bhwk->ck", padded[at], dy)
    return y, d_padded[:, 1:-1, 1:-1], d_kernel


def draw(batch, size, channels, features, dtype, stride=1):
    """Random input, kernel and gradient of the output; and what they give in float64."""
    rng = random_generator()
    out = tuple(-(-side // stride) for side in size)
    shapes = ((batch, *size, channels), (3, 3, channels, features), (batch, *out, features))
    given = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return given, oracle(*(np.asarray(value, np.float64) for value in given), stride)


# On a CPU: gathered windows and a product, a product for each row of the kernel, one for each tap,
# Winograd's form forward and back, of sizes that its tiles of two by four do not divide; in
# bfloat16 with factors of both dtypes, whichever this machine would take.
@pytest.mark.parametrize("channels", [3, 8, 20, 70])
@pytest.mark.parametrize(
    ("stride", "size"), [(1, (5, 6)), (1, (3, 7)), (1, (4, 9)), (1, (4, 3)), (2, (6, 5))]
)
@pytest.mark.parametrize(
    ("dtype", "narrow"), [(jnp.float32, True), (jnp.bfloat16, False), (jnp.bfloat16, True)]
)
def test_equals_loops_over_taps(monkeypatch, channels, stride, size, dtype, narrow):
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: narrow)
    given, exact = draw(2, size, channels, 20, dtype, stride)

    @jax.jit
    def both(x, kernel, dy):
        y, pullback = jax.vjp(lambda x, k: convolve_3x3(x, k, stride), x, kernel)
        return y, *pullback(dy)

    # Of the sums' longest, and of the result's own rounding; of Winograd's, which is more.
    terms = max(9 * channels, exact[0].size // 20)
    wide = 3e-6 if stride == 1 and channels >= 20 else 1e-6
    tolerance = (wide if dtype == jnp.float32 else 2e-2) * np.sqrt(terms) * 4
    for ours, expected in zip(both(*given), exact, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.asarray(ours, np.float64), expected, atol=tolerance)


# One slice; two, and an example that is left over; one example each.
@pytest.mark.parametrize("slices", [1, 2, 5])
@pytest.mark.parametrize(
    ("forward", "gradient", "dtype", "rows"),
    [
        # Rows of products: three by two tiles; six rows of two fours of columns, in part.
        (winograd.convolve, winograd.weight_gradient, jnp.float32, 6),
        (
            *(convolution._by_packed_slices, convolution._gradient_by_packed_slices),
            *(jnp.bfloat16, 7),
        ),
    ],
)
def test_slices_equal_loops_over_taps(monkeypatch, slices, forward, gradient, dtype, rows):
    """Which a batch of tiny images is never cut into otherwise."""
    batch, size, channels = 5, (6, 7), 24
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(in_slices, "_SLICE_BYTES", 1)
    monkeypatch.setattr(in_slices, "_FEWEST_ROWS", batch * rows // slices)
    (x, kernel, dy), (y, _, d_kernel) = draw(batch, size, channels, 18, dtype)
    # Factors are as they came, sums are float32: what is rounded is the output.
    wide = 1e-5 if dtype == jnp.float32 else 4e-6
    tolerance = wide * np.sqrt(max(9 * channels, batch * size[0] * size[1]))
    rounding = 2.0**-8 if dtype == jnp.bfloat16 else 0.0
    # Functions that were not compiled before, with another number of slices.
    run = jax.jit(lambda x, kernel: forward(x, kernel))
    ours = np.asarray(run(x, kernel), np.float64)
    np.testing.assert_allclose(ours, y, rtol=rounding, atol=tolerance)
    # All but one slice go through a loop.
    assert ("while" in run.lower(x, kernel).as_text()) == (slices > 1)
    ours = jax.jit(lambda x, dy: gradient(x, dy))(x, dy)
    np.testing.assert_allclose(ours, d_kernel, atol=tolerance)


# Each forward and for both gradients: packed rows' one product, Winograd's sixteen, or 24.
@pytest.mark.parametrize(
    ("channels", "narrow", "factors", "error"),
    [
        (24, True, ["bf16"] * 3, 2.0**-9),
        (40, True, ["bf16"] * 48, 2.0**-7.5),
        (40, False, ["f32"] * 72, 2.0**-9),
    ],
)
def test_factors_are_bfloat16_where_the_machine_multiplies_it(
    monkeypatch, channels, narrow, factors, error
):
    """The results' own rounding is up to 2^-9 of them; Winograd's factors are rounded before."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: narrow)
    given, exact = draw(2, (6, 7), channels, channels, jnp.bfloat16)

    @jax.jit
    def both(x, kernel, dy):
        y, pullback = jax.vjp(lambda x, k: convolution._convolve_on_cpu(x, k, 1), x, kernel)
        return y, *pullback(dy)

    text = both.lower(*given).as_text()
    assert re.findall(r"dot_general .*: \(tensor<[\dx]*x(\w+)>", text) == factors
    for ours, expected in zip(both(*given), exact, strict=True):
        apart = np.asarray(ours, np.float64) - expected
        assert np.std(apart) < error * np.std(expected)


# Forward and both ways back. Tiles of two by four are fewer products than two by two where there
# are columns enough, and more rounding. Of small maps, one gathered product, nine, one.
@pytest.mark.parametrize(
    ("precision", "size", "channels", "count"),
    [
        *((None, (8, 8), 32, 3 * 24), (None, (8, 7), 32, 3 * 24), (None, (8, 6), 32, 3 * 16)),
        *(("highest", (8, 8), 32, 3 * 16), ("float32", (8, 8), 32, 3 * 16)),
        *((None, (4, 4), 64, 3 * 24), (None, (4, 4), 63, 11), (None, (3, 3), 64, 11)),
    ],
)
def test_a_form_for_each_shape_unless_a_program_asks_for_less_rounding(
    precision, size, channels, count
):
    given, exact = draw(2, size, channels, channels, jnp.float32)

    @jax.jit
    def both(x, kernel, dy):
        y, pullback = jax.vjp(lambda x, k: convolution._convolve_on_cpu(x, k, 1), x, kernel)
        return y, *pullback(dy)

    with jax.default_matmul_precision(precision):
        assert both.lower(*given).as_text().count("stablehlo.dot_general") == count
        results = both(*given)
    for ours, expected in zip(results, exact, strict=True):
        apart = np.std(np.asarray(ours, np.float64) - expected) / np.std(expected)
        assert apart < (2.0**-18.5 if count == 3 * 24 else 2.0**-20)


@pytest.mark.parametrize(
    ("text", "multiplies"),
    [
        ("processor: 0\nflags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\n", True),
        ("processor: 0\nflags\t\t: fpu avx512_bf16 amx_bf16x\n", False),
        ("processor: 0\nFeatures\t: fp asimd bf16\n", False),
        (None, False),
    ],
)
def test_asks_the_cpu_for_products_of_bfloat16(monkeypatch, tmp_path, text, multiplies):
    info = tmp_path / "cpuinfo"
    if text is not None:
        info.write_text(text)
    monkeypatch.setattr(platforms, "_CPU_INFO", info)
    monkeypatch.setattr(platforms, "_has_bfloat16_units", platforms._has_bfloat16_units.__wrapped__)
    assert platforms.multiplies_bfloat16() == multiplies
    # Several processes may have unlike CPUs, and need one program.
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert not platforms.multiplies_bfloat16()


# In parts of one row or of two, and of one at last; of columns likewise.
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("batch", "height", "stride"), [(16, 6, 1), (2, 6, 2), (3, 7, 2), (2, 17, 1), (2, 7, 3)]
)
def test_depthwise_equals_loops_over_taps(batch, height, stride, dtype):
    width, channels = 5, 4
    rng = random_generator()
    rows, columns = ((side + 2 * stride - 3) // stride + 1 for side in (height, width))
    given = [
        jnp.asarray(rng.normal(size=shape), dtype)
        for shape in (
            (batch, height, width, channels),
            (3, 3, 1, channels),
            (batch, rows, columns, channels),
        )
    ]
    x, kernel, dy = (np.asarray(value, np.float64) for value in given)
    padded = np.pad(x, ((0, 0), (stride, stride), (stride, stride), (0, 0)))
    y, d_padded, d_kernel = np.zeros(dy.shape), np.zeros(padded.shape), np.zeros(kernel.shape)
    for i, j in itertools.product(range(3), range(3)):
        at = np.s_[
            :, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride
        ]
        y += padded[at] * kernel[i, j, 0]
        d_padded[at] += dy * kernel[i, j, 0]
        d_kernel[i, j, 0] = np.sum(padded[at] * dy, (0, 1, 2))
    d_x = d_padded[:, stride:-stride, stride:-stride]

    @jax.jit
    def both(x, kernel, dy):
        y, pullback = jax.vjp(lambda x, k: depthwise_3x3(x, k, stride), x, kernel)
        return y, *pullback(dy)

    tolerance = 4e-6 * np.sqrt(max(9, batch * rows * columns))
    # All sums are float32: what is rounded is the result.
    rounding = 2.0**-8 if dtype == jnp.bfloat16 else 0.0
    for ours, expected in zip(both(*given), (y, d_x, d_kernel), strict=True):
        assert ours.dtype == dtype
        ours = np.asarray(ours, np.float64)
        np.testing.assert_allclose(ours, expected, rtol=rounding, atol=tolerance)


def test_pointwise_equals_products():
    rng = random_generator()
    x, kernel, dy = (rng.normal(size=shape) for shape in ((3, 5, 4, 6), (6, 7), (3, 5, 4, 7)))
    expected = (x @ kernel, dy @ kernel.T, np.einsum("bhwc,bhwk->ck", x, dy))

    @jax.jit
    def both(x, kernel, dy):
        y, pullback = jax.vjp(pointwise, x, kernel)
        return y, *pullback(dy)

    narrow = (jnp.asarray(value, jnp.float32) for value in (x, kernel, dy))
    for ours, theirs in zip(both(*narrow), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=4e-6 * np.sqrt(60))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("height", "width", "pool_size"),
    # Windows of one size; that overlap, that differ, that repeat.
    [(8, 4, 2), (6, 9, 3), (2, 2, 2), (34, 6, 2), (4, 38, 2), (7, 7, 2), (8, 5, 3), (2, 3, 4)],
)
def test_window_sums_equal_sums_over_windows(height, width, pool_size, dtype):
    rng = random_generator()
    # On a grid, so that no element is rounded, and none's sign depends on it.
    x = rng.integers(-8, 8, size=(3, height, width, 5)) + 0.5
    mean, variance, scale, bias = np.zeros(5), np.ones(5) - 1e-5, np.ones(5), np.zeros(5)
    m = np.where(x >= 0, 1.0, 0.01)
    expected = [np.zeros((3, pool_size, pool_size, 5)) for _ in range(2)]
    for i, j in np.ndindex(pool_size, pool_size):
        rows, columns = (
            slice(at * size // pool_size, -(-(at + 1) * size // pool_size))
            for at, size in ((i, height), (j, width))
        )
        for sums, values in zip(expected, (m, m * x)):
            sums[:, i, j] = values[:, rows, columns].sum((1, 2))
    statistics = Statistics(*(jnp.float32(v) for v in (mean, variance, scale, bias)))
    for ours, theirs in zip(window_sums(jnp.asarray(x, dtype), statistics, pool_size), expected):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6 * 8 * height * width)
