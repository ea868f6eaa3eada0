"""Arrays inside a kernel, at shapes whose sides are powers of two.

A kernel's tiles have sides that are powers of two. So every array of the head lies in
the corner of a larger tile. What the lanes behind it hold is never looked at: a reduction or a
contraction masks them with its identity first, and a store masks them away.

A matrix that is too large for registers stays in memory, or is not formed at all, and is walked in
chunks.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from pallas_kernels.errors import KernelUnavailableError

# What registers hold without spilling, at the warps of `default_tiles`: of any array of a head, and
# of a parameter, whose gradient has the same size. A larger one stays in memory.
LARGEST_TILE = 1 << 13
LARGEST_PARAMETER = 1 << 12
# A product without `dot`, or a selection of lanes, multiplies in a tile of this size at most.
LARGEST_PRODUCT = 1 << 14
# The least side of a matrix in `dot`.
LEAST_SIDE = 16


class Ops(Protocol):
    """What a back end does with its own values, all of them of padded shapes.

    A value may also be a NumPy scalar, which goes with any shape.
    """

    def elementwise(self, name: str, dtype: np.dtype, *values: Any) -> Any:
        """One of :data:`ELEMENTWISE`, or ``"bitcast"``; its result has the given dtype."""

    def iota(self, shape: tuple[int, ...], axis: int) -> Any:
        """The index along an axis, int32, with a length of 1 along the others."""

    def broadcast(self, value: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """A value of the same number of axes, or a scalar, to a shape."""

    def reshape(self, value: Any, shape: tuple[int, ...]) -> Any:
        """The same elements in the same order."""

    def transpose(self, value: Any, permutation: tuple[int, ...]) -> Any:
        """Axes in another order."""

    def reduce(self, name: str, value: Any, axis: int) -> Any:
        """``"sum"``, ``"max"`` or ``"min"`` along an axis, which goes."""

    def dot(self, a: Any, b: Any) -> Any:
        """``[m, k] @ [k, n]`` in float32, rounded as float32 is."""

    def walk(self, count: int, step: Callable[[Any, Any], Any], start: Any) -> Any:
        """A loop in the kernel: ``step(index, total) -> total``, from `start` on."""


def padded_side(size: int) -> int:
    """The side of the tile that a side lies in.

    >>> [padded_side(size) for size in (1, 2, 5, 17)]
    [1, 2, 8, 32]
    """
    return 1 << (size - 1).bit_length()


def dot_side(size: int) -> int:
    """The same of a matrix in `dot`."""
    return max(LEAST_SIDE, padded_side(size))


def padded_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the tile that an array lies in."""
    return tuple(map(padded_side, shape))


def is_large(shape: Sequence[int]) -> bool:
    """Whether a parameter stays in memory."""
    return math.prod(padded_shape(shape)) > LARGEST_PARAMETER


class Padded(NamedTuple):
    """An array in the corner of a tile.

    Attributes:
        value: the back end's, of the padded shape; or a NumPy scalar, :class:`InMemory` or
            :class:`Outer`.
        shape: its own.
        dtype: its dtype.
        columns: the arrays side by side that it consists of, where only an index reads it.
    """

    value: Any
    shape: tuple[int, ...]
    dtype: np.dtype
    columns: tuple[Any, ...] = ()


class InMemory(NamedTuple):
    """The value of a matrix that stays in memory.

    Attributes:
        load: ``load(chunk, axis)``: in float32 ``[16, other side]``, sides of 16 at least, the
            sixteen places along an axis from ``16 chunk`` on; zeros behind the matrix.
        is_transposed: whether it is read as the other's transpose.
    """

    load: Callable[[Any, int], Any]
    is_transposed: bool = False


class Outer(NamedTuple):
    """The value ``left^T right`` of a matrix that is not formed.

    Attributes:
        left: ``[16, m]``, an example a row.
        right: ``[16, n]``.
    """

    left: "Padded"
    right: "Padded"


def refuse(what: str) -> KernelUnavailableError:
    """The error for something in a head that no kernel has."""
    return KernelUnavailableError(
        f"a head inside a kernel cannot have {what}; write the head without it, or use the "
        "implementation 'split' or 'xla', which take any head."
    )


def _quotient(x: Any, y: Any) -> Any:
    """What `lax.div` gives: integers rounded toward zero, where NumPy's ``//`` rounds down."""
    return x / y if np.issubdtype(np.result_type(x, y), np.floating) else (x - np.fmod(x, y)) // y


# What back ends know, by the primitive's name; NumPy's function folds constants.
ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "neg": np.negative, "abs": np.abs, "exp": np.exp, "log": np.log, "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x), "sin": np.sin, "cos": np.cos, "floor": np.floor,
    "not": np.logical_not,
    "add": np.add, "sub": np.subtract, "mul": np.multiply,
    "div": _quotient, "rem": np.fmod, "max": np.maximum, "min": np.minimum,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "and": np.bitwise_and, "or": np.bitwise_or,
    "select": lambda mask, a, b: a if mask else b, "cast": lambda x: x,
}  # fmt: skip
