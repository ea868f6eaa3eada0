"""A traced head run inside a kernel, at shapes whose sides are powers of two.

A kernel's tiles have sides that are powers of two. So every array of the head lies in
the corner of a larger tile. What the lanes behind it hold is never looked at: a reduction or a
contraction masks them with its identity first, and a store masks them away.

What is computed is said once, here, in terms of the few operations of :class:`Ops`; a back end
either computes them (:mod:`pallas_kernels.local_loss.pallas_triton`) or prints them
(:mod:`pallas_kernels.local_loss.triton_source`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from pallas_kernels.errors import KernelUnavailableError

# What registers hold without spilling, at the warps of `default_tiles`: of any array of a head, and
# of a parameter, whose gradient has the same size.
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


class Padded(NamedTuple):
    """An array in the corner of a tile.

    Attributes:
        value: the back end's, of the padded shape; or a NumPy scalar.
        shape: its own.
        dtype: its dtype.
        columns: the arrays side by side that it consists of, where only an index reads it.
    """

    value: Any
    shape: tuple[int, ...]
    dtype: np.dtype
    columns: tuple[Any, ...] = ()


def refuse(what: str) -> KernelUnavailableError:
    """The error for something in a head that no kernel has."""
    return KernelUnavailableError(
        f"a head inside a kernel cannot have {what}; write the head without it, or use the "
        "implementation 'split' or 'xla', which take any head."
    )


# What back ends know, by the primitive's name; NumPy's function folds constants.
ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "neg": np.negative, "abs": np.abs, "exp": np.exp, "log": np.log, "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x), "sin": np.sin, "cos": np.cos, "floor": np.floor,
    "not": np.logical_not,
    "add": np.add, "sub": np.subtract, "mul": np.multiply,
    "div": lambda x, y: x / y if np.issubdtype(np.result_type(x, y), np.floating) else x // y,
    "rem": np.fmod, "max": np.maximum, "min": np.minimum,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "and": np.bitwise_and, "or": np.bitwise_or,
    "select": lambda mask, a, b: a if mask else b, "cast": lambda x: x,
}  # fmt: skip


class Lanes:
    """Arithmetic on padded arrays, by a back end's operations."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops

    # --- Small steps.

    def apply(self, name: str, *xs: Padded, dtype: Any = None) -> Padded:
        """One of :data:`ELEMENTWISE`, of arrays of one shape and of scalars."""
        kind = np.dtype(dtype or xs[-1].dtype)
        shape = next((x.shape for x in xs if x.shape), ())
        if all(isinstance(x.value, np.generic) for x in xs):
            with np.errstate(all="ignore"):
                folded = np.asarray(ELEMENTWISE[name](*(x.value for x in xs)))
            return Padded(folded.astype(kind)[()], shape, kind)
        return Padded(self.ops.elementwise(name, kind, *(x.value for x in xs)), shape, kind)

    def scalar(self, value: Any, dtype: Any) -> Padded:
        """A constant."""
        return Padded(np.asarray(value, dtype)[()], (), np.dtype(dtype))

    def tile(self, x: Padded) -> Any:
        """The value itself, of the padded shape even if it is a constant."""
        if x.shape and isinstance(x.value, np.generic):
            return self.ops.broadcast(x.value, padded_shape(x.shape), x.dtype)
        return x.value

    def index(self, shape: tuple[int, ...], axis: int) -> Padded:
        """The index along an axis; of length 1 along the others."""
        only = tuple(size if at == axis else 1 for at, size in enumerate(shape))
        return Padded(self.ops.iota(padded_shape(only), axis), only, np.dtype(np.int32))

    def spread(self, x: Padded, shape: tuple[int, ...]) -> Padded:
        """Sides of 1 to those of `shape`."""
        if x.shape == shape or isinstance(x.value, np.generic):
            return x._replace(shape=shape)
        return x._replace(
            value=self.ops.broadcast(x.value, padded_shape(shape), x.dtype), shape=shape
        )

    def combine(self, name: str, *xs: Padded, dtype: Any = None) -> Padded:
        """:meth:`apply` of arrays whose sides of 1 are spread."""
        shape = np.broadcast_shapes(*(x.shape for x in xs))
        return self.apply(
            name, *(self.spread(x, shape) if x.shape else x for x in xs), dtype=dtype
        )._replace(shape=shape)

    def mask(self, x: Padded, axes: Sequence[int], fill: Any) -> Padded:
        """Put `fill` into the lanes behind the array, along some axes."""
        for axis in axes:
            if padded_side(x.shape[axis]) != x.shape[axis]:
                inside = self.combine(
                    "lt", self.index(x.shape, axis), self.scalar(x.shape[axis], np.int32),
                    dtype=bool,
                )  # fmt: skip
                x = self.combine("select", inside, x, self.scalar(fill, x.dtype), dtype=x.dtype)
        return x

    def regroup(self, x: Padded, shape: tuple[int, ...]) -> Padded:
        """The same array with sides of 1 added or taken away."""
        if x.shape == shape or isinstance(x.value, np.generic):
            return x._replace(shape=shape)
        return x._replace(value=self.ops.reshape(x.value, padded_shape(shape)), shape=shape)

    def reduce(self, name: str, x: Padded, axes: Sequence[int]) -> Padded:
        """``"sum"``, ``"max"`` or ``"min"`` over axes."""
        info: Any = np.iinfo if np.issubdtype(x.dtype, np.integer) else None
        least, most = (
            (info(x.dtype).min, info(x.dtype).max) if info else (-float("inf"), float("inf"))
        )
        x = self.mask(x, axes, {"sum": 0, "max": least, "min": most}[name])
        value, shape = self.tile(x), list(x.shape)
        for axis in sorted(axes, reverse=True):
            if shape[axis] == 1 and len(shape) > 1:
                value = self.ops.reshape(value, padded_shape([*shape[:axis], *shape[axis + 1 :]]))
            else:
                value = self.ops.reduce(name, value, axis)
            del shape[axis]
        return Padded(value, tuple(shape), x.dtype)

    def transpose(self, x: Padded, permutation: tuple[int, ...]) -> Padded:
        """Axes in another order."""
        shape = tuple(x.shape[axis] for axis in permutation)
        wide = [axis for axis in permutation if x.shape[axis] != 1]
        if wide == sorted(wide):
            return self.regroup(x, shape)
        return x._replace(value=self.ops.transpose(self.tile(x), permutation), shape=shape)

    def product(self, a: Padded, b: Padded) -> Padded:
        """``[m, k] @ [k, n]``."""
        (m, k), n = a.shape, b.shape[1]
        a, b = self.mask(a, (1,), 0), self.mask(b, (0,), 0)
        if min(m, k, n) > 1:
            value = self.ops.dot(*(self.widened(x) for x in (a, b)))
            sides = tuple(max(LEAST_SIDE, side) for side in padded_shape((m, n)))
            return Padded(self.narrow(value, sides, (m, n)), (m, n), np.dtype(np.float32))
        if math.prod(padded_shape((m, k, n))) > LARGEST_PRODUCT:
            raise refuse(f"a product of {a.shape} and {b.shape}")
        # The sides of 1 make the transpose a matter of shape.
        wide = self.combine(
            "mul", self.regroup(a, (m, k, 1)), self.regroup(b, (1, k, n)), dtype=np.float32
        )
        return self.reduce("sum", wide, (1,))

    def widened(self, x: Padded) -> Any:
        """A matrix's tile with sides of 16 at least, zeros behind what it had."""
        value, sides = self.tile(x), padded_shape(x.shape)
        for axis, side in enumerate(sides):
            if side < LEAST_SIDE:
                copies = (*sides[:axis], LEAST_SIDE // side, *sides[axis:])
                one = (*sides[:axis], 1, *sides[axis:])
                spread = self.ops.broadcast(self.ops.reshape(value, one), copies, x.dtype)
                spread = self._only_first(spread, copies, axis, x.dtype)
                sides = (*sides[:axis], LEAST_SIDE, *sides[axis + 1 :])
                value = self.ops.reshape(spread, sides)
        return value

    def narrow(self, value: Any, sides: tuple[int, ...], shape: tuple[int, ...]) -> Any:
        """The tile of a float32 matrix of `shape`, from one with sides of 16 at least."""
        for axis, side in enumerate(padded_shape(shape)):
            if side < sides[axis]:
                copies = (*sides[:axis], sides[axis] // side, side, *sides[axis + 1 :])
                first = self.ops.reshape(value, copies)
                first = self._only_first(first, copies, axis, np.dtype(np.float32))
                value = self.ops.reduce("sum", first, axis)
                sides = (*sides[:axis], side, *sides[axis + 1 :])
        return value

    def _only_first(self, value: Any, sides: tuple[int, ...], axis: int, dtype: np.dtype) -> Any:
        """Zeros but at the first place along an axis."""
        kind = np.dtype(bool)
        index = self.ops.iota(tuple(n if at == axis else 1 for at, n in enumerate(sides)), axis)
        is_first = self.ops.elementwise("eq", kind, index, np.int32(0))
        is_first = self.ops.broadcast(is_first, sides, kind)
        return self.ops.elementwise("select", dtype, is_first, value, np.zeros((), dtype)[()])

    def select_lanes(
        self,
        x: Padded,
        inner: tuple[int, ...],
        outer: tuple[int, ...],
        matches: Callable[[list[Padded], list[Padded]], Padded],
    ) -> Padded:
        """Put trailing axes in a new order or number, as a product with zeros and ones.

        Args:
            x: whose last axes are `inner`, behind at most one other.
            inner: those axes.
            outer: what is there instead.
            matches: from both places, one index an axis, whether the one goes to the other.
        """
        lead = x.shape[: len(x.shape) - len(inner)]
        flat, wide = (math.prod(padded_shape(sides)) for sides in (inner, outer))
        if len(lead) > 1 or flat * wide > LARGEST_PRODUCT or flat == 1:
            raise refuse(f"an array of shape {x.shape} cut up along {inner}")
        places = []
        for axis, sides in enumerate((inner, outer)):
            index = self.index((flat, wide), axis)
            coordinates, rest = [], math.prod(padded_shape(sides))
            for side in sides:
                rest //= padded_side(side)
                by, size = (self.scalar(n, np.int32) for n in (rest, padded_side(side)))
                coordinates.append(self.apply("rem", self.apply("div", index, by), size))
            places.append(coordinates)
        moved = matches(*places)
        for sides, coordinates in zip((inner, outer), places):
            for side, at in zip(sides, coordinates):
                inside = self.apply("lt", at, self.scalar(side, np.int32), dtype=bool)
                moved = self.combine("and", moved, inside, dtype=bool)
        moved = self.spread(moved, (flat, wide))
        x = self.mask(x, range(len(lead), len(x.shape)), 0)
        rows = x._replace(
            value=self.ops.reshape(self.tile(x), (*padded_shape(lead), flat)), shape=(*lead, flat)
        )
        one, zero = self.scalar(1, x.dtype), self.scalar(0, x.dtype)
        if lead and np.issubdtype(x.dtype, np.floating):
            matrix = self.apply("select", moved, one, zero, dtype=x.dtype)
            chosen = self.product(rows, matrix)
        elif not lead:
            column = self.regroup(rows, (flat, 1))
            chosen = self.reduce("sum", self.combine("select", moved, column, zero), (0,))
        else:
            raise refuse(f"integers of shape {x.shape} cut up along {inner}")
        shape = (*lead, *outer)
        return chosen._replace(
            value=self.ops.reshape(chosen.value, padded_shape(shape)), shape=shape
        )
