"""3x3 convolutions that are fast on CPUs too."""

import functools
import itertools

import jax
import jax.numpy as jnp

from lls_jax.ordering import slice_after, token_of

# Input channels up to which a form is the fastest on a CPU. Measured on two AVX2 cores, jax 0.10.2
# and 0.12.0.1, in ms:
#
#   images, size, channels    XLA   three   nine products    (weight gradient)
#   128, 32x32,   3 to  32     37       8      16
#   128, 16x16,  32 to  64     64      26      32
#   128,   8x8,  64 to 128     21      14      13
#    16, 32x32, 128 to 256    352     106     102
#    32, 16x16, 256 to 256    245      99      91
#
# With very few channels XLA's convolution cannot fill its vectors forward either: gathering the
# windows and multiplying matrices is 3 to 5 times faster (3 to 32 channels, 32x32, 128 images).
_FORWARD_BY_MATMUL = 4
_GRADIENT_BY_ROWS = 64


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


def _windows(x: jax.Array, stride: int, padding: int) -> list[jax.Array]:
    """The nine inputs of every output, ``[batch, out height, out width, channels]`` each."""
    padded = _padded(x, padding)
    rows, columns = ((size + 2 * padding - 3) // stride + 1 for size in x.shape[1:3])
    return [
        _every(_every(padded, 1, i, rows, stride), 2, j, columns, stride)
        for i, j in itertools.product(range(3), range(3))
    ]


def _by_matmul(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    windows = jnp.concatenate(_windows(x, stride, 1), axis=-1)
    # The barrier keeps XLA from fusing the gather into the product, which would take the product
    # out of the matrix library.
    rows = jax.lax.optimization_barrier(windows).reshape(-1, 9 * x.shape[-1])
    out = rows @ kernel.reshape(9 * x.shape[-1], -1)
    return out.reshape(*windows.shape[:3], -1)


def _weight_gradient(x: jax.Array, dy: jax.Array, stride: int) -> jax.Array:
    """``[3, 3, channels, features]`` as matrix products: one a row of the kernel, or one a tap."""
    # Zeros that are not known before `dy`: else XLA copies the input in the forward pass already,
    # and keeps what it has copied.
    zero = jnp.where(jnp.isnan(token_of(dy)), 1, 0).astype(x.dtype)
    padded = jax.lax.pad(x, zero, ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)))
    columns = [_every(padded, 2, j, dy.shape[2], stride) for j in range(3)]
    if x.shape[-1] <= _GRADIENT_BY_ROWS:
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve_on_cpu(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    if x.shape[-1] <= _FORWARD_BY_MATMUL:
        return _by_matmul(x, kernel, stride)
    return _by_convolution(x, kernel, stride, 1)


def _convolve_forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple:
    return _convolve_on_cpu(x, kernel, stride), (x, kernel)


def _convolve_backward(stride: int, residuals: tuple, dy: jax.Array) -> tuple:
    x, kernel = residuals
    _, transpose = jax.vjp(lambda x: _by_convolution(x, kernel, stride, 1), x)
    return *transpose(dy), _weight_gradient(x, dy, stride).astype(kernel.dtype)


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
    return jax.lax.platform_dependent(
        *(x, kernel),
        cpu=functools.partial(_convolve_on_cpu, stride=stride),
        default=functools.partial(_by_convolution, stride=stride, padding=1),
    )


def _sum_of_windows(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    taps = kernel.reshape(9, 1, 1, 1, -1)
    products = [window * tap for window, tap in zip(_windows(x, stride, padding), taps)]
    return functools.reduce(jnp.add, products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise_on_cpu(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    return _sum_of_windows(x, kernel, stride, padding)


def _depthwise_forward(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> tuple:
    return _sum_of_windows(x, kernel, stride, padding), (x, kernel)


def _depthwise_backward(stride: int, padding: int, residuals: tuple, dy: jax.Array) -> tuple:
    x, kernel = residuals
    _, transpose = jax.vjp(lambda x: _sum_of_windows(x, kernel, stride, padding), x)
    # Summed window by window, in float32: what automatic differentiation makes of the forward pass
    # keeps nine products in memory, and takes twice as long.
    wide = dy.astype(jnp.float32)
    sums = [jnp.sum(window * wide, (0, 1, 2)) for window in _windows(x, stride, padding)]
    return *transpose(dy), jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)


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
        return _depthwise_on_cpu(x, kernel, stride, stride)

    def elsewhere(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _by_convolution(x, kernel, stride, stride, groups=x.shape[-1])

    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=elsewhere)
