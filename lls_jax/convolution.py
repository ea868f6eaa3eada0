"""3x3 convolutions that are fast on CPUs too."""

import functools

import jax
import jax.numpy as jnp

# With this few input channels XLA's CPU convolution cannot fill its vectors; gathering the windows
# and multiplying matrices is 3 to 5 times faster, forward and weight gradient (3 -> 32 channels,
# 32x32 pixels, batch 128). With more channels the copies cost more than they save.
_FEW_CHANNELS = 4


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


def _windows(x: jax.Array, stride: int, padding: int) -> list[jax.Array]:
    """The nine inputs of every output, ``[batch, out height, out width, channels]`` each."""
    batch, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = ((size + 2 * padding - 3) // stride + 1 for size in (height, width))
    return [
        jax.lax.slice(
            padded,
            (0, i, j, 0),
            (batch, i + (rows - 1) * stride + 1, j + (columns - 1) * stride + 1, channels),
            (1, stride, stride, 1),
        )
        for i in range(3)
        for j in range(3)
    ]


def _by_matmul(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    windows = jnp.concatenate(_windows(x, stride, padding), axis=-1)
    # The barrier keeps XLA from fusing the gather into the product, which would take the product
    # out of the matrix library.
    rows = jax.lax.optimization_barrier(windows).reshape(-1, 9 * x.shape[-1])
    out = rows @ kernel.reshape(9 * x.shape[-1], -1)
    return out.reshape(*windows.shape[:3], -1)


def convolve_3x3(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """A 3x3 convolution, zero-padded by one pixel on every side.

    Args:
        x: ``[batch, height, width, channels]``.
        kernel: ``[3, 3, channels, features]``, in the dtype of `x`.
        stride: pixels from one output to the next.

    Returns:
        ``[batch, ceil(height / stride), ceil(width / stride), features]``.
    """
    general = functools.partial(_by_convolution, stride=stride, padding=1)
    if x.shape[-1] > _FEW_CHANNELS:
        return general(x, kernel)
    on_cpu = functools.partial(_by_matmul, stride=stride, padding=1)
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=general)


def _sum_of_windows(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    taps = kernel.reshape(9, -1)
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
