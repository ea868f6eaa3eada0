"""3x3 convolutions of each channel by itself, which are fast on CPUs too."""

import functools
import itertools

import jax
import jax.numpy as jnp

from lls_jax.layers.convolution import by_convolution, pad_sides, windows_of
from lls_jax.layers.ordering import written_out
from lls_jax.layers.passes import add_parts
from lls_jax.platforms import by_platform


def _sum_of_windows(padded: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    taps = kernel.reshape(9, 1, 1, 1, -1).astype(jnp.float32)
    windows = (window.astype(jnp.float32) for window in windows_of(padded, stride))
    total = functools.reduce(jnp.add, [window * tap for window, tap in zip(windows, taps)])
    return total.astype(padded.dtype)


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
    d_kernel = _depthwise_gradient(padded, kernel, dy, stride)
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
    taps = jnp.pad(kernel[:, :, 0].astype(jnp.float32), ((0, left), (0, left), (0, 0)))
    taps = taps.reshape(outputs, stride, outputs, stride, channels)
    (rows, columns), last = counts, outputs - 1

    def product(i: int, j: int) -> jax.Array:
        window = dy[:, last - i : last - i + rows, last - j : last - j + columns]
        window = window.astype(jnp.float32)
        return window[:, :, None, :, None] * taps[i, :, j].reshape(1, 1, stride, 1, stride, -1)

    places = itertools.product(range(outputs), range(outputs))
    total = functools.reduce(jnp.add, itertools.starmap(product, places))
    dx = total.astype(dy.dtype).reshape(batch, rows * stride, columns * stride, channels)
    return dx[:, : sides[0], : sides[1]]


# A row of the kernel in a pass: each element of the output's gradient is read three times, and
# its inputs from a cache near by. (What automatic differentiation makes of the forward pass keeps
# nine products in memory, and one window after the other reads everything nine times.) Milliseconds
# for 32 images on two cores of an Intel Xeon, jax 0.12.0.1 / 0.10.2, of a loop over rows, which has
# one thread, and of passes, by kernel's element, row, and all at once:
#
#                    loop           element        row            all
#   64x64x32         11.3           9.4            8.5            10.4
#   33x33x128        23.2           12.1           10.1           13.6
#   10x10x512        7.0            3.2            3.2            3.9
def _depthwise_gradient(
    padded: jax.Array, kernel: jax.Array, dy: jax.Array, stride: int
) -> jax.Array:
    """The sum of window times output's gradient for each of nine windows, float32."""

    sides = dy.shape[1], dy.shape[2]

    def at(part: slice, offset: int) -> slice:
        return slice(part.start * stride + offset, (part.stop - 1) * stride + offset + 1, stride)

    def pass_over(padded: jax.Array, dy: jax.Array, i: int) -> jax.Array:
        def product(rows: slice, columns: slice, j: int) -> jax.Array:
            window = padded[:, at(rows, i), at(columns, j)].astype(jnp.float32)
            return window * dy[:, rows, columns].astype(jnp.float32)

        taps = (functools.partial(product, j=j) for j in range(3))
        return jnp.stack([add_parts(tap, sides, axes=(1, 2)) for tap in taps], axis=1)

    passes = (functools.partial(pass_over, i=i) for i in range(3))
    rows = [written_out(one, padded, dy, decided_by=kernel) for one in passes]
    return jnp.stack([jnp.sum(row, (0, 2, 3)) for row in rows])


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
