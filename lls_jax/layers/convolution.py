"""3x3 convolutions that are fast on CPUs too."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp

from lls_jax.layers import winograd
from lls_jax.layers.ordering import slice_after, token_of, wait_for
from lls_jax.layers.products import product_dtype, sum_over_rows
from lls_jax.layers.slices import count_for_cache, map_slices, sum_slices
from lls_jax.platforms import by_platform


def by_convolution(
    x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int = 1
) -> jax.Array:
    """XLA's own convolution, ``[batch, height, width, channels]`` to features.

    Args:
        x: ``[batch, height, width, channels]``.
        kernel: ``[height, width, channels / groups, features]``.
        stride: pixels from one output to the next.
        padding: pixels of zeros on every side.
        groups: into how many the channels are cut, each convolved by itself.
    """
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def pad_sides(x: jax.Array, padding: int) -> jax.Array:
    """`x`, ``[batch, height, width, channels]``, with zeros around each image."""
    return jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


def _every(x: jax.Array, axis: int, start: int, count: int, stride: int) -> jax.Array:
    """`count` elements along an axis, from `start` on, `stride` apart."""
    return jax.lax.slice_in_dim(x, start, start + (count - 1) * stride + 1, stride, axis)


def _padded_after(token: jax.Array, x: jax.Array, padding: int) -> jax.Array:
    """:func:`pad_sides`, by zeros that are not known before `token` is.

    Else XLA finds that the forward pass has cut the same windows, and keeps them all meanwhile.
    """
    zero = jnp.where(jnp.isnan(token), 1, 0).astype(x.dtype)
    sides = (padding, padding, 0)
    return jax.lax.pad(x, zero, ((0, 0, 0), sides, sides, (0, 0, 0)))


def windows_of(padded: jax.Array, stride: int) -> list[jax.Array]:
    """The nine inputs of every output, ``[batch, out height, out width, channels]`` each."""
    rows, columns = ((size - 3) // stride + 1 for size in padded.shape[1:3])
    return [
        _every(_every(padded, 1, i, rows, stride), 2, j, columns, stride)
        for i, j in itertools.product(range(3), range(3))
    ]


def _by_matmul(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    windows = jnp.concatenate(windows_of(pad_sides(x, 1), stride), axis=-1)
    # The barrier keeps XLA from fusing the gather into the product, which would take the product
    # out of the matrix library.
    rows = jax.lax.optimization_barrier(windows).reshape(-1, 9 * x.shape[-1])
    out = rows @ kernel.reshape(9 * x.shape[-1], -1)
    return out.reshape(*windows.shape[:3], -1)


# Outputs of a row that one row of the product below gives. More are more zeros in its matrix, and
# fewer bytes to gather: 18 of 54 elements, against 27 for each output, at four of three channels.
_PACKED = 4


def _packed_windows(x: jax.Array) -> jax.Array:
    """The inputs of every four outputs of a row: ``[batch, height, width / 4, 3 * 6 * channels]``.

    The last columns reach into zeros where four do not divide the width.
    """
    batch, height, width, channels = x.shape
    groups = -(-width // _PACKED)
    right = (groups + 1) * _PACKED - width - 1
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, right), (0, 0)))
    blocks = padded.reshape(batch, height + 2, groups + 1, _PACKED * channels)
    six = jnp.concatenate([blocks[:, :, :-1], blocks[:, :, 1:, : 2 * channels]], axis=-1)
    # The barrier keeps XLA from fusing the gather into the product, which would take the product
    # out of the matrix library.
    return jax.lax.optimization_barrier(
        jnp.concatenate([six[:, i : i + height] for i in range(3)], axis=-1)
    )


def _packed_kernel(kernel: jax.Array) -> jax.Array:
    """``[3 * 6 * channels, 4 * features]``: the kernel four times, each a column further."""
    shifted = [
        jnp.pad(kernel, ((0, 0), (i, _PACKED - 1 - i), (0, 0), (0, 0))) for i in range(_PACKED)
    ]
    return jnp.stack(shifted, axis=3).reshape(-1, _PACKED * kernel.shape[-1])


def _by_packed_rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
    windows = _packed_windows(x)
    rows = windows.reshape(-1, windows.shape[-1])
    out = jnp.matmul(rows, _packed_kernel(kernel), preferred_element_type=jnp.float32)
    batch, height, groups, _ = windows.shape
    return out.astype(x.dtype).reshape(batch, height, groups * _PACKED, -1)[:, :, : x.shape[2]]


def _by_packed_slices(x: jax.Array, kernel: jax.Array) -> jax.Array:
    convolve_slice = functools.partial(_by_packed_rows, kernel=kernel)
    # Written before the loop, which else finds it a slice at a time, on one thread.
    x = jax.lax.optimization_barrier(x)
    return map_slices(convolve_slice, (x,), _count_packed_slices(x, kernel.shape[-1]), after=kernel)


def _count_packed_slices(x: jax.Array, features: int) -> int:
    batch, height, width, channels = x.shape
    # A pixel has 18 / 4 packed inputs, twice with their transpose, and its sums in float32.
    between = x.dtype.itemsize * batch * height * width * (9 * channels + 2 * features)
    return count_for_cache(batch, between, batch * height * width // _PACKED)


def _gradient_by_packed_rows(x: jax.Array, dy: jax.Array) -> jax.Array:
    """``[3, 3, channels, features]``, float32."""
    windows = _packed_windows(wait_for(token_of(dy), x))
    channels, features = x.shape[-1], dy.shape[-1]
    right = windows.shape[2] * _PACKED - dy.shape[2]
    dy = jax.lax.optimization_barrier(jnp.pad(dy, ((0, 0), (0, 0), (0, right), (0, 0))))
    product = sum_over_rows(
        windows.reshape(-1, windows.shape[-1]), dy.reshape(-1, _PACKED * features)
    ).reshape(3, 2 + _PACKED, channels, _PACKED, features)
    return functools.reduce(jnp.add, [product[:, i : i + 3, :, i] for i in range(_PACKED)])


def _gradient_by_packed_slices(x: jax.Array, dy: jax.Array) -> jax.Array:
    """``[3, 3, channels, features]``, float32."""
    return sum_slices(_gradient_by_packed_rows, (x, dy), _count_packed_slices(x, dy.shape[-1]))


def _gradient_by_products(x: jax.Array, dy: jax.Array, stride: int, *, a_row: bool) -> jax.Array:
    """``[3, 3, channels, features]`` as matrix products: one a row of the kernel, or one a tap."""
    padded = _padded_after(token_of(dy), x, 1)
    columns = [_every(padded, 2, j, dy.shape[2], stride) for j in range(3)]
    if a_row:
        columns = [jax.lax.optimization_barrier(jnp.concatenate(columns, axis=-1))]
    dy_rows = dy.reshape(-1, dy.shape[-1])
    span = (dy.shape[1] - 1) * stride + 1
    products: list[jax.Array] = []
    for row, column in itertools.product(range(3), columns):
        # Not before the product before: else XLA cuts out all taps first, and keeps them.
        rows = slice_after(token_of(products[-1:]), column, row, span, axis=1)
        # The barrier gives the product to the matrix library.
        tap = jax.lax.optimization_barrier(_every(rows, 1, 0, dy.shape[1], stride))
        products.append(sum_over_rows(tap.reshape(-1, tap.shape[-1]), dy_rows))
    return jnp.stack(products).reshape(3, 3, x.shape[-1], dy.shape[-1])


# Forms on a CPU, of which the first that fits is taken. Measured on two AVX2 cores (AMD EPYC),
# jax 0.10.2 / 0.12.0.1, milliseconds, medians of seven:
#
#                               XLA        gathered    rows        taps       Winograd
#   forward
#   128, 16x16,  32 to  64    20 /  12    14 /  18      -           -         10 /  10
#   128,   8x8,  64 to 128    18 /  11    13 /  12      -           -          8 /   8
#    32, 32x32, 128 to 256   127 / 170   154 / 229      -           -         82 /  83
#    32, 16x16, 256 to 256   118 /  90    92 / 103      -           -         48 /  48
#    32,   8x8, 256 to 512    44 /  54    35 /  46      -           -         29 /  29
#    32,   4x4, 512 to 512    26 /  29    19 /  18      -           -         25 /  37
#   gradient of the kernel
#   128, 32x32,   3 to  32    29 /  21      -          7 /   8    16 /  16    20 /  24
#   128, 16x16,  32 to  64    56 /  36      -         22 /  22    25 /  31    25 /  25
#   128,   8x8,  64 to 128    19 /  31      -         13 /  13    13 /  13    10 /  10
#    32, 32x32, 128 to 256  1873 /1784      -        176 / 224   176 / 187   107 / 153
#    32, 16x16, 256 to 256   172 / 172      -         91 /  82    82 /  70    49 /  44
#    32,   8x8, 256 to 512    46 /  68      -         39 /  33    42 /  36    24 /  23
#    32,   4x4, 512 to 512    30 /  33      -         21 /  20    18 /  20    32 /  26
#
# Since then Winograd's slices are walked by a loop, in a near cache; so its gradient is ahead
# from 16 channels on (another such machine; rows in slices, Winograd):
#
#   128, 32x32,  16 to  16                           22 /  21      -         10 /  20
#   128, 32x32,  32 to  32                           50 /  36      -         16 /  18
#   128, 16x16,  32 to  64                           21 /  16      -          9 /  11
#
# On two AVX-512 cores, jax 0.12.0.1, memory in huge pages (experiments/startup.py): XLA, Winograd
# forward; XLA, taps, Winograd for the gradient. It depends on the machine below 64 channels, and
# where maps are small:
#
#   128, 32x32,  16 to  16    6, 10         8,  18, 13
#   128, 16x16,  32 to  64   12, 14        12,  19, 11
#   128,   8x8,  64 to 128    7,  6        10,  10,  6
#    32, 32x32, 128 to 256  103, 62       570, 149, 80
#    32,   4x4, 512 to 512   14,  9        30,  26, 15
#
# In bfloat16 by AMX (two cores of an Intel Xeon, jax 0.12.0.1; Winograd in float32 beside it).
# Packed rows are for fewer than 32 channels: a gather of nine windows is as fast here and there,
# and takes twice their memory.
#
#                           float32    Winograd   packed    gathered   XLA / taps
#   forward
#   500, 31x31,  24 to  64    168        180        116        109        123
#   500, 31x31,  64 to  24    171        102        119        146        175
#   500, 15x15,  64 to  64     71         37         -          33         46
#   500,   7x7, 256 to 256    151         54         -          68        275
#   128, 16x16,  32 to  64      9.8        7.3       -           6.1        7.4
#   gradient of the kernel
#   500, 31x31,  24 to  64    205        243        113        144        367
#   500, 15x15,  64 to  64    108         52         -          76        100
#   500,   7x7, 256 to 256    159         89         -         109        125
#   128, 16x16,  32 to  64     16         13         -          10         18
#
# Tiles of two by four outputs in place of two by two, two cores of an Intel Xeon, jax 0.12.0.1 /
# 0.10.2, medians of five to seven, in turns:
#
#                              forward                      gradient of the kernel
#                              two by two    two by four    two by two     two by four
#   128, 16x16,  32 to  64     10.6 / 11.0    7.6 /  9.8    15.2 / 15.5    11.9 / 12.4
#   128,   8x8,  64 to 128      5.6 /  7.3    5.7 /  5.8     8.1 /  8.8     7.3 /  6.9
#    32, 32x32, 128 to 256       68 / 67       52 / 55        94 / 80        68 / 64
#    32,   8x8, 256 to 512       12.5          10.5           15.4           13.8
#
# (One axis alone by four, three rows as one factor: level with two by two. Four by two: slower than
# two by four. The sums in two passes each: no faster.)
#
# (PyTorch 2.14 gets through 3x3 convolutions at 100 to 120 GFLOP/s on such cores; 82 ms of the
# first table's fourth line are 235.)
#
# Maps of four by four, whose Winograd's form compiles for seconds longer, which few channels do not
# give back; the same machine, 0.12.0.1 / 0.10.2, float32 but for the last line:
#
#                              forward                      gradient of the kernel
#                              gathered       Winograd      taps           Winograd
#    64,  4x4,  32 to  64       1.2 /  3.0    1.0 /  1.0     1.1 /  1.0    1.1 /  0.8
#   128,  4x4,  64 to 128       4.5 /  8.6    2.9 /  2.8     5.5 /  5.8    4.2 /  4.1
#    32,  4x4, 512 to 512      18.8 / 26.9   12.1 / 11.8    18.8 / 20.1   12.3 / 12.6
#    32,  2x2, 512 to 512       5.1           5.6            5.9 /  6.0    5.3 /  8.5
#    the third in bfloat16      8.3 / 21.1    7.1 /  7.2     7.9 / 11.1    7.8 / 13.0
FEW_CHANNELS = 4
# Channels from which one tap is enough for a product of its own, and a small map is gathered.
_A_TAP_FROM = 16
_BFLOAT16_WINOGRAD_FROM = 32
_SMALL_MAP = 16
# Channels and features from which Winograd's form is taken, of maps up to so many pixels.
_WINOGRAD_FROM = {9: math.inf, _SMALL_MAP: 64, math.inf: 16}


def _pixels(x: jax.Array) -> int:
    return x.shape[1] * x.shape[2]


def _packs_slices(x: jax.Array, stride: int) -> bool:
    few = stride == 1 and x.shape[-1] < _BFLOAT16_WINOGRAD_FROM
    return few and _pixels(x) > _SMALL_MAP and product_dtype(x.dtype) == jnp.bfloat16


def _takes_winograd(x: jax.Array, features: int, stride: int) -> bool:
    enough = next(count for pixels, count in _WINOGRAD_FROM.items() if _pixels(x) <= pixels)
    return stride == 1 and min(x.shape[-1], features) >= enough and not _packs_slices(x, stride)


def _convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    channels, features = kernel.shape[2:]
    if _takes_winograd(x, features, stride):
        return winograd.convolve(x, kernel)
    if channels <= FEW_CHANNELS and stride == 1:
        return _by_packed_rows(x, kernel)
    if channels <= FEW_CHANNELS or (channels >= _A_TAP_FROM and _pixels(x) <= _SMALL_MAP):
        return _by_matmul(x, kernel, stride)
    if _packs_slices(x, stride):
        return _by_packed_slices(x, kernel)
    return by_convolution(x, kernel, stride, 1)


def _weight_gradient(x: jax.Array, dy: jax.Array, stride: int) -> jax.Array:
    channels = x.shape[-1]
    if _takes_winograd(x, dy.shape[-1], stride):
        return winograd.weight_gradient(x, dy)
    if channels <= FEW_CHANNELS and stride == 1:
        return _gradient_by_packed_rows(x, dy)
    if _packs_slices(x, stride):
        return _gradient_by_packed_slices(x, dy)
    return _gradient_by_products(x, dy, stride, a_row=channels < _A_TAP_FROM)


def _input_gradient(
    kernel: jax.Array, dy: jax.Array, stride: int, shape: tuple[int, ...]
) -> jax.Array:
    if _takes_winograd(dy, kernel.shape[2], stride):
        return winograd.input_gradient(kernel, dy)
    if stride == 1:
        # A convolution of the output's gradient with the kernel turned about.
        return _convolve(dy, jnp.swapaxes(kernel[::-1, ::-1], 2, 3), 1)
    x = jax.ShapeDtypeStruct(shape, dy.dtype)
    transpose = jax.linear_transpose(lambda x: by_convolution(x, kernel, stride, 1), x)
    return transpose(dy)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve_on_cpu(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return _convolve(x, kernel, stride)


def _convolve_forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple:
    return _convolve(x, kernel, stride), (x, kernel)


def _convolve_backward(stride: int, residuals: tuple, dy: jax.Array) -> tuple:
    x, kernel = residuals
    dx = _input_gradient(kernel, dy, stride, x.shape)
    return dx, _weight_gradient(x, dy, stride).astype(kernel.dtype)


_convolve_on_cpu.defvjp(_convolve_forward, _convolve_backward)


def convolve_3x3(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """A 3x3 convolution, zero-padded by one pixel on every side.

    Differentiable in reverse.

    Args:
        x: ``[batch, height, width, channels]``, float32 or bfloat16.
        kernel: ``[3, 3, channels, features]``, in the dtype of `x`.
        stride: pixels from one output to the next.

    Returns:
        ``[batch, ceil(height / stride), ceil(width / stride), features]``.
    """
    return by_platform(
        *(x, kernel),
        cpu=functools.partial(_convolve_on_cpu, stride=stride),
        elsewhere=functools.partial(by_convolution, stride=stride, padding=1),
    )
