"""3x3 convolutions that are fast on CPUs too."""

import functools
import itertools

import jax
import jax.numpy as jnp

from lls_jax.layers import winograd
from lls_jax.layers.ordering import slice_after, token_of, wait_for
from lls_jax.platforms import by_platform


def _by_convolution(
    x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int = 1
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _padded(x: jax.Array, padding: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


def _every(x: jax.Array, axis: int, start: int, count: int, stride: int) -> jax.Array:
    """`count` elements along an axis, from `start` on, `stride` apart."""
    return jax.lax.slice_in_dim(x, start, start + (count - 1) * stride + 1, stride, axis)


def _padded_after(token: jax.Array, x: jax.Array, padding: int) -> jax.Array:
    """:func:`_padded`, by zeros that are not known before `token` is.

    Else XLA finds that the forward pass has cut the same windows, and keeps them all meanwhile.
    """
    zero = jnp.where(jnp.isnan(token), 1, 0).astype(x.dtype)
    sides = (padding, padding, 0)
    return jax.lax.pad(x, zero, ((0, 0, 0), sides, sides, (0, 0, 0)))


def _windows(padded: jax.Array, stride: int) -> list[jax.Array]:
    """The nine inputs of every output, ``[batch, out height, out width, channels]`` each."""
    rows, columns = ((size - 3) // stride + 1 for size in padded.shape[1:3])
    return [
        _every(_every(padded, 1, i, rows, stride), 2, j, columns, stride)
        for i, j in itertools.product(range(3), range(3))
    ]


def _by_matmul(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    windows = jnp.concatenate(_windows(_padded(x, 1), stride), axis=-1)
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
    out = windows.reshape(-1, windows.shape[-1]) @ _packed_kernel(kernel)
    batch, height, groups, _ = windows.shape
    return out.reshape(batch, height, groups * _PACKED, -1)[:, :, : x.shape[2]]


def _gradient_by_packed_rows(x: jax.Array, dy: jax.Array) -> jax.Array:
    """``[3, 3, channels, features]``, float32."""
    windows = _packed_windows(wait_for(token_of(dy), x))
    channels, features = x.shape[-1], dy.shape[-1]
    right = windows.shape[2] * _PACKED - dy.shape[2]
    dy = jax.lax.optimization_barrier(jnp.pad(dy, ((0, 0), (0, 0), (0, right), (0, 0))))
    over_windows = (((0,), (0,)), ((), ()))
    product = jax.lax.dot_general(
        windows.reshape(-1, windows.shape[-1]),
        dy.reshape(-1, _PACKED * features),
        over_windows,
        preferred_element_type=jnp.float32,
    ).reshape(3, 2 + _PACKED, channels, _PACKED, features)
    return functools.reduce(jnp.add, [product[:, i : i + 3, :, i] for i in range(_PACKED)])


def _gradient_by_products(x: jax.Array, dy: jax.Array, stride: int, *, a_row: bool) -> jax.Array:
    """``[3, 3, channels, features]`` as matrix products: one a row of the kernel, or one a tap."""
    padded = _padded_after(token_of(dy), x, 1)
    columns = [_every(padded, 2, j, dy.shape[2], stride) for j in range(3)]
    if a_row:
        columns = [jax.lax.optimization_barrier(jnp.concatenate(columns, axis=-1))]
    over_examples = (((0, 1, 2), (0, 1, 2)), ((), ()))
    span = (dy.shape[1] - 1) * stride + 1
    products: list[jax.Array] = []
    for row, column in itertools.product(range(3), columns):
        # Not before the product before: else XLA cuts out all taps first, and keeps them.
        rows = slice_after(token_of(products[-1:]), column, row, span, axis=1)
        # The barrier gives the product to the matrix library.
        tap = jax.lax.optimization_barrier(_every(rows, 1, 0, dy.shape[1], stride))
        products.append(
            jax.lax.dot_general(tap, dy, over_examples, preferred_element_type=jnp.float32)
        )
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
# (PyTorch 2.14 gets through 3x3 convolutions at 100 to 120 GFLOP/s on such cores; 82 ms of the
# third line are 235.)
FEW_CHANNELS = 4
_WINOGRAD_FROM = 16
_SMALL_MAP = 16


def _convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    channels, features = kernel.shape[2:]
    small = x.shape[1] * x.shape[2] <= _SMALL_MAP
    if channels <= FEW_CHANNELS and stride == 1:
        return _by_packed_rows(x, kernel)
    if channels <= FEW_CHANNELS or (small and channels >= _WINOGRAD_FROM):
        return _by_matmul(x, kernel, stride)
    if stride == 1 and min(channels, features) >= _WINOGRAD_FROM:
        return winograd.convolve(x, kernel)
    return _by_convolution(x, kernel, stride, 1)


def _weight_gradient(x: jax.Array, dy: jax.Array, stride: int) -> jax.Array:
    channels = x.shape[-1]
    if channels <= FEW_CHANNELS and stride == 1:
        return _gradient_by_packed_rows(x, dy)
    if channels < _WINOGRAD_FROM:
        return _gradient_by_products(x, dy, stride, a_row=True)
    if stride == 1 and dy.shape[1] * dy.shape[2] > _SMALL_MAP:
        return winograd.weight_gradient(x, dy)
    return _gradient_by_products(x, dy, stride, a_row=False)


def _input_gradient(
    kernel: jax.Array, dy: jax.Array, stride: int, shape: tuple[int, ...]
) -> jax.Array:
    if stride == 1:
        # A convolution of the output's gradient with the kernel turned about.
        return _convolve(dy, jnp.swapaxes(kernel[::-1, ::-1], 2, 3), 1)
    x = jax.ShapeDtypeStruct(shape, dy.dtype)
    transpose = jax.linear_transpose(lambda x: _by_convolution(x, kernel, stride, 1), x)
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
        x: ``[batch, height, width, channels]``.
        kernel: ``[3, 3, channels, features]``, in the dtype of `x`.
        stride: pixels from one output to the next.

    Returns:
        ``[batch, ceil(height / stride), ceil(width / stride), features]``.
    """
    return by_platform(
        *(x, kernel),
        cpu=functools.partial(_convolve_on_cpu, stride=stride),
        elsewhere=functools.partial(_by_convolution, stride=stride, padding=1),
    )


def _sum_of_windows(padded: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    taps = kernel.reshape(9, 1, 1, 1, -1)
    products = [window * tap for window, tap in zip(_windows(padded, stride), taps)]
    return functools.reduce(jnp.add, products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise_on_cpu(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return _sum_of_windows(_padded(x, stride), kernel, stride)


def _depthwise_forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple:
    # Kept with its padding, so that it is padded once, and by the pass that computes it: what
    # comes before is then not written to memory without.
    padded = _padded(x, stride)
    return _sum_of_windows(padded, kernel, stride), (padded, kernel)


def _depthwise_backward(stride: int, residuals: tuple, dy: jax.Array) -> tuple:
    padded, kernel = residuals
    d_kernel = _depthwise_gradient(padded, dy, stride)
    sides = tuple(size - 2 * stride for size in padded.shape[1:3])
    dx = _depthwise_input_gradient(kernel, dy, stride, sides)
    return dx, d_kernel.reshape(kernel.shape).astype(kernel.dtype)


# As a transpose of the sum over windows, XLA computes all that the output's gradient comes from for
# each of nine taps, or writes nine products to memory, as the program goes.
def _depthwise_input_gradient(
    kernel: jax.Array, dy: jax.Array, stride: int, sides: tuple[int, ...]
) -> jax.Array:
    """``dx[s a + p] = sum over j of dy[a + 1 - j] kernel[p + s j]`` along both axes, ``p < s``."""
    batch, *_, channels = dy.shape
    # Outputs that an input is part of, along an axis; inputs a stride apart.
    outputs, counts = -(-3 // stride), [-(-size // stride) for size in sides]
    # A row and a column more than the windows take: else nothing may be padded, and then XLA
    # computes what `dy` comes from for each window; what it pads it writes to memory once.
    around = [(outputs - 2, count + 2 - size, 0) for count, size in zip(counts, dy.shape[1:3])]
    dy = jax.lax.pad(dy, jnp.zeros((), dy.dtype), [(0, 0, 0), *around, (0, 0, 0)])
    left = outputs * stride - 3
    taps = jnp.pad(kernel[:, :, 0], ((0, left), (0, left), (0, 0)))
    taps = taps.reshape(outputs, stride, outputs, stride, channels)
    total = None
    for i, j in itertools.product(range(outputs), range(outputs)):
        window = _every(
            _every(dy, 1, outputs - 1 - i, counts[0], 1), 2, outputs - 1 - j, counts[1], 1
        )
        own = window[:, :, None, :, None] * taps[i, :, j].reshape(1, 1, stride, 1, stride, -1)
        total = own if total is None else total + own
    assert total is not None
    dx = total.reshape(batch, counts[0] * stride, counts[1] * stride, channels)
    return dx[:, : sides[0], : sides[1]]


# What is read nine times is read from a cache near by, row after row of all images. (What automatic
# differentiation makes of the forward pass keeps nine products in memory, and one window after the
# other reads everything nine times.) Milliseconds of CPU time, 32 images on two AVX2 cores, medians
# of seven, jax 0.10.2 / 0.12.0.1, before and after:
#
#   64x64x32               35 / 19    11 / 11
#   64x64x64, stride 2     28 / 15    17 / 13
#   33x33x128              38 / 20    19 / 13
#   18x18x256              20 / 10     8 /  8
#   10x10x512              17 /  7     6 /  5
def _depthwise_gradient(padded: jax.Array, dy: jax.Array, stride: int) -> jax.Array:
    """The sum of window times output's gradient for each of nine windows, float32."""
    batch, rows, columns, channels = dy.shape
    # Two rows at once: fewer sums to read and write.
    together = 2 if rows % 2 == 0 else 1
    span = (batch, 1, (columns - 1) * stride + 1, channels)

    def add_rows(first: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        added = []
        for (i, j), total in zip(itertools.product(range(3), range(3)), sums):
            for row in (first * together + k for k in range(together)):
                # Cut by one operation where it is used: XLA copies a slice of a slice (0.10).
                window = jax.lax.dynamic_slice(padded, (0, row * stride + i, j, 0), span)
                own = jax.lax.dynamic_slice_in_dim(dy, row, 1, axis=1).astype(jnp.float32)
                total = total + window[:, :, ::stride].astype(jnp.float32) * own
            added.append(total)
        return tuple(added)

    zeros = jnp.zeros((batch, 1, columns, channels), jnp.float32)
    sums = jax.lax.fori_loop(0, rows // together, add_rows, (zeros,) * 9)
    return jnp.stack([jnp.sum(total, (0, 1, 2)) for total in sums])


_depthwise_on_cpu.defvjp(_depthwise_forward, _depthwise_backward)


def depthwise_3x3(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """A 3x3 convolution of each channel by itself, zero-padded by `stride` pixels on every side.

    (The padding is that of the published MobileNets, whose checkpoints fit no other.)

    Args:
        x: ``[batch, height, width, channels]``.
        kernel: ``[3, 3, 1, channels]``, in the dtype of `x`.
        stride: pixels from one output to the next, and pixels of padding.

    Returns:
        ``[batch, (height + 2 stride - 3) // stride + 1, ..., channels]``.
    """

    # XLA's CPU backend runs a grouped convolution as that many small ones: 40 times slower than
    # adding up nine shifted products (32 images of 64x64 pixels and 32 channels).
    def on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _depthwise_on_cpu(x, kernel, stride)

    def elsewhere(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _by_convolution(x, kernel, stride, stride, groups=x.shape[-1])

    return by_platform(x, kernel, cpu=on_cpu, elsewhere=elsewhere)
