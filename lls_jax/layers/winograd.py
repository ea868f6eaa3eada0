"""3x3 convolutions in fewer products: Winograd's form, two by two outputs at a time.

Four by four inputs ``d`` and the kernel ``g`` give two by two outputs

    Y = A ((G g G') * (B d B')) A'

with one product for each of the sixteen elements in the middle instead of 36, and sums around it.
With many channels the middle is sixteen matrix products over ``[tiles, channels]``. The gradient of
the kernel has the same form: ``G' ((A' dY A) * (B d B')) G``.

The matrices hold 0, 1, -1 and a half only, so that rounding is that of the direct form. (Larger
tiles would take fewer products still, and lose two or three digits.) Where the products are of
bfloat16 (:func:`~lls_jax.layers.products.product_dtype`), the sums of inputs and of the kernel are
rounded to it, which the direct form's factors are not: an error of two to three times that of the
output's own rounding to bfloat16.

References:
    Lavin, Gray, "Fast Algorithms for Convolutional Neural Networks",
    https://arxiv.org/abs/1509.09308, section 4.1.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lls_jax.layers.products import product_dtype, sum_over_rows
from lls_jax.layers.slices import count_for_cache, map_slices, sum_slices

Matrix = tuple[tuple[float, ...], ...]

_OF_INPUT: Matrix = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_OF_KERNEL: Matrix = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_OF_OUTPUT: Matrix = ((1, 1, 1, 0), (0, 1, -1, -1))


def _transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix))


def _combine(coefficients: Sequence[float], arrays: Sequence[jax.Array]) -> jax.Array:
    """The sum of some arrays, each times a number; zeros and ones cost nothing."""
    terms = [
        array if number == 1 else -array if number == -1 else number * array
        for number, array in zip(coefficients, arrays)
        if number
    ]
    return functools.reduce(jnp.add, terms)


def _sandwich(matrix: Matrix, grid: Sequence[Sequence[jax.Array]]) -> list[list[jax.Array]]:
    """``matrix grid matrix'``, of a grid of arrays."""
    left = [[_combine(row, column) for column in zip(*grid)] for row in matrix]
    return [[_combine(row, line) for row in matrix] for line in left]


def _as_factors(
    grid: Sequence[Sequence[jax.Array]], dtype: jax.typing.DTypeLike
) -> list[jax.Array]:
    """The arrays of a grid as ``[tiles, channels]``, each written to memory for a product.

    The barrier keeps XLA from fusing the sums into the products, which would take the products out
    of the matrix library.
    """
    rows = [array.reshape(-1, array.shape[-1]) for line in grid for array in line]
    return [jax.lax.optimization_barrier(array.astype(product_dtype(dtype))) for array in rows]


def _as_grid(arrays: Sequence[jax.Array]) -> list[list[jax.Array]]:
    return [list(arrays[4 * i : 4 * i + 4]) for i in range(4)]


def _input_tiles(x: jax.Array) -> list[jax.Array]:
    height, width = x.shape[1:3]
    padded = jnp.pad(
        x.astype(jnp.float32), ((0, 0), (1, 1 + height % 2), (1, 1 + width % 2), (0, 0))
    )
    grid = [[padded[:, i : i + height : 2, j : j + width : 2] for j in range(4)] for i in range(4)]
    return _as_factors(_sandwich(_OF_INPUT, grid), x.dtype)


def _output_tiles(dy: jax.Array) -> list[jax.Array]:
    # Padded even where the tiles fit: up to jaxlib 0.10 XLA fuses all that `dy` comes from into
    # each of the sixteen, barrier or not; padding it does once.
    padded = jnp.pad(dy.astype(jnp.float32), ((0, 0), (0, 1), (0, 1), (0, 0)))
    rows, columns = (-(-size // 2) for size in dy.shape[1:3])
    grid = [
        [padded[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2] for j in range(2)]
        for i in range(2)
    ]
    return _as_factors(_sandwich(_transposed(_OF_OUTPUT), grid), dy.dtype)


def _interleaved(grid: Sequence[Sequence[jax.Array]], shape: tuple[int, ...]) -> jax.Array:
    """Outputs of two by two from their tiles, without what was padded."""
    batch, height, width, features = shape
    tiles = (batch, -(-height // 2), -(-width // 2), features)
    lines = [jnp.stack([array.reshape(tiles) for array in line], axis=3) for line in grid]
    whole = jnp.stack(lines, axis=2).reshape(batch, 2 * tiles[1], 2 * tiles[2], features)
    return whole[:, :height, :width]


def _count_slices(x: jax.Array, features: int) -> int:
    batch, height, width, channels = x.shape
    # Sixteen elements for four are four arrays of the size of the input, and four of the output's.
    between = 4 * 4 * (x.size + x.size // channels * features)
    tiles = batch * -(-height // 2) * -(-width // 2)
    return count_for_cache(batch, between, tiles)


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution of stride 1, zero-padded by one pixel on every side.

    Args:
        x: ``[batch, height, width, channels]``.
        kernel: ``[3, 3, channels, features]``.

    Returns:
        ``[batch, height, width, features]``, in the dtype of `x`; all sums are float32.
    """
    taps = [list(row) for row in kernel.astype(jnp.float32)]
    kernels = _as_factors(_sandwich(_OF_KERNEL, taps), x.dtype)
    features = kernel.shape[-1]

    def convolve_slice(part: jax.Array) -> jax.Array:
        products = [
            jax.lax.optimization_barrier(
                jnp.matmul(tiles, transformed, preferred_element_type=jnp.float32)
            )
            for tiles, transformed in zip(_input_tiles(part), kernels)
        ]
        grid = _sandwich(_OF_OUTPUT, _as_grid(products))
        return _interleaved(grid, (*part.shape[:3], features)).astype(x.dtype)

    x = jax.lax.optimization_barrier(x)
    return map_slices(convolve_slice, (x,), _count_slices(x, features), after=kernels)


def weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient of :func:`convolve` with respect to its kernel.

    Args:
        x: ``[batch, height, width, channels]``.
        dy: ``[batch, height, width, features]``.

    Returns:
        float32 ``[3, 3, channels, features]``.
    """

    def products(x: jax.Array, dy: jax.Array) -> list[jax.Array]:
        return [
            sum_over_rows(below, above) for below, above in zip(_input_tiles(x), _output_tiles(dy))
        ]

    total = sum_slices(products, (x, dy), _count_slices(x, dy.shape[-1]))
    grid = _sandwich(_transposed(_OF_KERNEL), _as_grid(total))
    return jnp.stack([jnp.stack(line) for line in grid])
