"""Sums over rows and columns by passes over memory that all of a CPU's threads share.

XLA's CPU backend writes a product down before it sums it, and runs a small loop over rows on one
thread. An elementwise operation that adds up a few parts of what it reads does neither.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

# What a pass writes is a sixteenth to an eighth of what it reads, and what is compiled is small.
_PARTS = 16


def _cut(size: int, most: int) -> tuple[int, list[slice]]:
    """A length, and parts of it: all of that length but the last, which may be shorter.

    >>> _cut(5, 3)
    (2, [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)])
    """
    length = -(-size // max(1, min(size, most)))
    return length, [slice(at, min(at + length, size)) for at in range(0, size, length)]


def add_parts(
    function: Callable[[slice, slice], jax.Array], sides: tuple[int, int], axes: tuple[int, int]
) -> jax.Array:
    """The sum, element by element, of what a function gives for up to sixteen parts of an image.

    The result is still to be summed over its two axes.

    Args:
        function: of the rows and the columns of a part; gives an array of floats that has as many
            along two of its axes.
        sides: height and width.
        axes: of rows and columns in what the function gives.

    Returns:
        In the shape of the largest part.
    """
    height, rows = _cut(sides[0], _PARTS)
    width, columns = _cut(sides[1], _PARTS // len(rows))

    def whole(at: tuple[slice, slice]) -> jax.Array:
        part = function(*at)
        missing = [(0, 0, 0)] * part.ndim
        for axis, full in zip(axes, (height, width)):
            missing[axis] = (0, full - part.shape[axis], 0)
        return jax.lax.pad(part, jnp.zeros((), part.dtype), missing)

    return functools.reduce(jnp.add, map(whole, itertools.product(rows, columns)))
