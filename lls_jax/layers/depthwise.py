"""3x3 convolutions of each channel by itself, which are fast on CPUs too."""

import functools
import itertools

import jax
import jax.numpy as jnp

from lls_jax.layers.convolution import by_convolution, pad_sides, windows_of
from lls_jax.platforms import by_platform


def _sum_of_windows(padded: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    taps = kernel.reshape(9, 1, 1, 1, -1)
    products = [window * tap for window, tap in zip(windows_of(padded, stride), taps)]
    return functools.reduce(jnp.add, products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise_on_cpu(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return _sum_of_windows(pad_sides(x, stride), kernel, stride)


def _depthwise_forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple:
    # Kept with its padding, so that it is padded once, and by the pass that computes it: what
    # comes before is then not written to memory without.
    padded = pad_sides(x, stride)
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
    (rows, columns), last = counts, outputs - 1

    def product(i: int, j: int) -> jax.Array:
        window = dy[:, last - i : last - i + rows, last - j : last - j + columns]
        return window[:, :, None, :, None] * taps[i, :, j].reshape(1, 1, stride, 1, stride, -1)

    places = itertools.product(range(outputs), range(outputs))
    total = functools.reduce(jnp.add, itertools.starmap(product, places))
    dx = total.reshape(batch, rows * stride, columns * stride, channels)
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
        return by_convolution(x, kernel, stride, stride, groups=x.shape[-1])

    return by_platform(x, kernel, cpu=on_cpu, elsewhere=elsewhere)
