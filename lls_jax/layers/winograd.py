"""3x3 convolutions in fewer products: Winograd's form, two by four outputs at a time.

Four by six inputs ``d`` and the kernel ``g`` give two by four outputs

    Y = A_2 ((G_2 g G_4') * (B_2 d B_4')) A_4'

with one product for each of the 24 elements in the middle instead of 72, and sums around it. With
many channels the middle is 24 matrix products over ``[tiles, channels]``. The gradient of the
kernel has the same form: ``G_2' ((A_2' dY A_4) * (B_2 d B_4')) G_4``.

It rounds two to three times as much as the direct form, as its matrices hold up to 8 (on random
inputs of 32 to 256 channels the output's error is 5e-7 to 9e-7 of its deviation, directly 3e-7 to
4e-7; the gradient's 1.3e-6, and 5e-7 with tiles of two by two). Tiles of four by four would take
fewer products still, be no faster on a CPU, whose memory the sums around keep busy, and round twice
as much again.

Tiles are of two by two, whose matrices hold 0, 1, -1 and a half and round as the direct form does,
where a program asks for that (:func:`~lls_jax.layers.products.wants_least_rounding`), where columns
are few, and where products are of bfloat16 (:func:`~lls_jax.layers.products.product_dtype`): sums
of inputs and of the kernel are rounded to it then, which the direct form's factors are not, for an
error of two to three times that of the output's own rounding to bfloat16.

References:
    Lavin, Gray, "Fast Algorithms for Convolutional Neural Networks",
    https://arxiv.org/abs/1509.09308, sections 4.1 and 4.3 (whose matrices these are).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lls_jax.layers.products import product_dtype, sum_over_rows, wants_least_rounding
from lls_jax.layers.slices import count_for_cache, map_slices, sum_slices

Matrix = tuple[tuple[float, ...], ...]
Grid = list[list[jax.Array]]


class Axis(NamedTuple):
    """The matrices of one axis of a tile, of m outputs from m + 2 inputs.

    Attributes:
        of_input: ``B``, ``[m + 2, m + 2]``.
        of_kernel: ``G``, ``[m + 2, 3]``.
        of_output: ``A``, ``[m, m + 2]``.
    """

    of_input: Matrix
    of_kernel: Matrix
    of_output: Matrix

    @property
    def elements(self) -> int:
        """Of its inputs, and in the middle."""
        return len(self.of_input)

    @property
    def outputs(self) -> int:
        """Whose inputs overlap with the next tile's by two."""
        return len(self.of_output)


_TWO = Axis(
    of_input=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    of_kernel=((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    of_output=((1, 1, 1, 0), (0, 1, -1, -1)),
)
_FOUR = Axis(
    of_input=(
        *((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0)),
        *((0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1)),
    ),
    of_kernel=(
        *((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6)),
        *((1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1)),
    ),
    of_output=((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
)


class Tile(NamedTuple):
    """Outputs that are computed together.

    Attributes:
        rows: their first axis.
        columns: their second.
    """

    rows: Axis
    columns: Axis

    def counts(self, height: int, width: int) -> tuple[int, int]:
        """How many are next to each other in an image, along each axis."""
        return -(-height // self.rows.outputs), -(-width // self.columns.outputs)


def _tile_for(x: jax.Array) -> Tile:
    width = x.shape[2]
    may_round = product_dtype(x.dtype) == jnp.float32 and not wants_least_rounding()
    # Columns of four leave more of the last tile empty: no fewer products up to six columns.
    pays = -(-width // 4) * _FOUR.elements < -(-width // 2) * _TWO.elements
    return Tile(_TWO, _FOUR if may_round and pays else _TWO)


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


def _sandwich(left: Matrix, grid: Sequence[Sequence[jax.Array]], right: Matrix) -> Grid:
    """``left grid right'``, of a grid of arrays."""
    lines = [[_combine(row, column) for column in zip(*grid)] for row in left]
    return [[_combine(row, line) for row in right] for line in lines]


def _cut(padded: jax.Array, tile: Tile, size: tuple[int, int], elements: tuple[int, int]) -> Grid:
    """The same element of every tile, ``[batch, tile rows, tile columns, channels]``, for each.

    Args:
        padded: ``[batch, height, width, channels]``, large enough for the last tile.
        tile: from one to the next it is as far as there are outputs.
        size: height and width of the outputs.
        elements: of a tile, along each axis.
    """
    steps = tile.rows.outputs, tile.columns.outputs
    ends = [(count - 1) * step + 1 for count, step in zip(tile.counts(*size), steps)]
    return [
        [
            padded[:, i : i + ends[0] : steps[0], j : j + ends[1] : steps[1]]
            for j in range(elements[1])
        ]
        for i in range(elements[0])
    ]


def _as_factors(
    grid: Sequence[Sequence[jax.Array]], dtype: jax.typing.DTypeLike
) -> list[jax.Array]:
    """The arrays of a grid as ``[tiles, channels]``, each written to memory for a product.

    The barrier keeps XLA from fusing the sums into the products, which would take the products out
    of the matrix library.
    """
    rows = [array.reshape(-1, array.shape[-1]) for line in grid for array in line]
    return [jax.lax.optimization_barrier(array.astype(product_dtype(dtype))) for array in rows]


def _as_grid(arrays: Sequence[jax.Array], tile: Tile) -> Grid:
    columns = tile.columns.elements
    return [list(arrays[i : i + columns]) for i in range(0, len(arrays), columns)]


def _padding(size: tuple[int, int], tile: Tile) -> list[int]:
    """Rows and columns that the last tiles' outputs have beyond the image."""
    counts = tile.counts(*size)
    return [n * axis.outputs - side for n, axis, side in zip(counts, tile, size)]


def _input_tiles(x: jax.Array, tile: Tile) -> list[jax.Array]:
    size = x.shape[1], x.shape[2]
    rows, columns = _padding(size, tile)
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (1, 1 + rows), (1, 1 + columns), (0, 0)))
    grid = _cut(padded, tile, size, (tile.rows.elements, tile.columns.elements))
    return _as_factors(_sandwich(tile.rows.of_input, grid, tile.columns.of_input), x.dtype)


def _output_tiles(dy: jax.Array, tile: Tile) -> list[jax.Array]:
    size = dy.shape[1], dy.shape[2]
    rows, columns = _padding(size, tile)
    # Padded even where the tiles fit: up to jaxlib 0.10 XLA fuses all that `dy` comes from into
    # each of these, barrier or not; padding it does once.
    padded = jnp.pad(dy.astype(jnp.float32), ((0, 0), (0, 1 + rows), (0, 1 + columns), (0, 0)))
    grid = _cut(padded, tile, size, (tile.rows.outputs, tile.columns.outputs))
    left, right = (_transposed(axis.of_output) for axis in tile)
    return _as_factors(_sandwich(left, grid, right), dy.dtype)


def _interleaved(grid: Grid, tile: Tile, shape: tuple[int, ...]) -> jax.Array:
    """Outputs in order from those of each tile, without what was padded."""
    batch, height, width, features = shape
    rows, columns = tile.counts(height, width)
    lines = [
        jnp.stack([array.reshape(batch, rows, columns, features) for array in line], axis=3)
        for line in grid
    ]
    whole = jnp.stack(lines, axis=2)
    whole = whole.reshape(batch, rows * len(grid), columns * len(grid[0]), features)
    return whole[:, :height, :width]


def _count_slices(x: jax.Array, features: int, tile: Tile) -> int:
    batch, height, width, channels = x.shape
    rows, columns = tile.counts(height, width)
    tiles = batch * rows * columns
    # In float32; of bfloat16 the products' factors are half of that.
    between = 4 * tile.rows.elements * tile.columns.elements * tiles * (channels + features)
    return count_for_cache(batch, between, tiles)


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution of stride 1, zero-padded by one pixel on every side.

    Args:
        x: ``[batch, height, width, channels]``.
        kernel: ``[3, 3, channels, features]``.

    Returns:
        ``[batch, height, width, features]``, in the dtype of `x`; all sums are float32.
    """
    return _convolve(x, kernel, summed=0)


def input_gradient(kernel: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient of :func:`convolve` with respect to its input.

    That is a convolution of `dy` with the kernel turned about, its channels in the place of its
    features. These change places in the products, not in memory: of 512 channels and features, for
    32 images of 8x8 pixels, it takes 25 ms so, and 73 with a kernel that is transposed first (two
    cores of an Intel Xeon, jax 0.12.0.1; 26 and 78 on 0.10.2; of 256, 16x16 pixels, 37 and 43).

    Args:
        kernel: ``[3, 3, channels, features]``.
        dy: ``[batch, height, width, features]``.

    Returns:
        ``[batch, height, width, channels]``, in the dtype of `dy`; all sums are float32.
    """
    return _convolve(dy, kernel[::-1, ::-1], summed=1)


def _convolve(x: jax.Array, kernel: jax.Array, summed: int) -> jax.Array:
    """A convolution that sums over the first or the second of the kernel's last two axes."""
    tile = _tile_for(x)
    taps = [list(row) for row in kernel.astype(jnp.float32)]
    grid = _sandwich(tile.rows.of_kernel, taps, tile.columns.of_kernel)
    kernels = _as_factors(grid, x.dtype)
    features = kernel.shape[3 - summed]
    over = (((1,), (summed,)), ((), ()))

    def convolve_slice(part: jax.Array) -> jax.Array:
        products = [
            jax.lax.optimization_barrier(
                jax.lax.dot_general(factor, weights, over, preferred_element_type=jnp.float32)
            )
            for factor, weights in zip(_input_tiles(part, tile), kernels)
        ]
        middle = _as_grid(products, tile)
        grid = _sandwich(tile.rows.of_output, middle, tile.columns.of_output)
        return _interleaved(grid, tile, (*part.shape[:3], features)).astype(x.dtype)

    x = jax.lax.optimization_barrier(x)
    return map_slices(convolve_slice, (x,), _count_slices(x, features, tile), after=kernels)


def weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient of :func:`convolve` with respect to its kernel.

    Args:
        x: ``[batch, height, width, channels]``.
        dy: ``[batch, height, width, features]``.

    Returns:
        float32 ``[3, 3, channels, features]``.
    """
    tile = _tile_for(x)

    def products(x: jax.Array, dy: jax.Array) -> list[jax.Array]:
        pairs = zip(_input_tiles(x, tile), _output_tiles(dy, tile))
        return [sum_over_rows(below, above) for below, above in pairs]

    total = sum_slices(products, (x, dy), _count_slices(x, dy.shape[-1], tile))
    left, right = (_transposed(axis.of_kernel) for axis in tile)
    grid = _sandwich(left, _as_grid(total, tile), right)
    return jnp.stack([jnp.stack(line) for line in grid])
