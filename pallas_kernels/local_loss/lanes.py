"""A head's arithmetic on padded arrays.

What is computed is said once, here, in terms of the few operations of
:class:`pallas_kernels.local_loss.padded.Ops`; a back end either computes them
(:mod:`pallas_kernels.local_loss.pallas_triton`) or prints them
(:mod:`pallas_kernels.local_loss.triton_source`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pallas_kernels.local_loss.padded import (
    ELEMENTWISE,
    LARGEST_PRODUCT,
    LARGEST_TILE,
    LEAST_SIDE,
    InMemory,
    Ops,
    Outer,
    Padded,
    dot_side,
    is_large,
    padded_shape,
    padded_side,
    refuse,
)


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
        if isinstance(x.value, InMemory | Outer):
            return self._turned(x) if permutation == (1, 0) else x
        wide = [axis for axis in permutation if x.shape[axis] != 1]
        if wide == sorted(wide):
            return self.regroup(x, shape)
        return x._replace(value=self.ops.transpose(self.tile(x), permutation), shape=shape)

    def product(self, a: Padded, b: Padded) -> Padded:
        """``[m, k] @ [k, n]``."""
        if isinstance(a.value, InMemory):
            return self.transpose(
                self.product(*(self.transpose(x, (1, 0)) for x in (b, a))), (1, 0)
            )
        if isinstance(b.value, InMemory):
            return self._walked_product(a, b)
        (m, k), n = a.shape, b.shape[1]
        if k == LEAST_SIDE and is_large((m, n)):
            # A parameter's gradient, as a rule: to be stored.
            return Padded(Outer(self.transpose(a, (1, 0)), b), (m, n), np.dtype(np.float32))
        return self._whole_product(a, b)

    def _whole_product(self, a: Padded, b: Padded) -> Padded:
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

    # --- What is too large for registers.

    def _turned(self, x: Padded) -> Padded:
        shape = x.shape[::-1]
        if isinstance(x.value, Outer):
            return x._replace(value=Outer(x.value.right, x.value.left), shape=shape)
        other = x.value._replace(is_transposed=not x.value.is_transposed)
        return x._replace(value=other, shape=shape)

    def in_registers(self, x: Padded) -> Padded:
        """The array as a tile.

        Raises:
            KernelUnavailableError: it is too large for that.
        """
        if not isinstance(x.value, InMemory | Outer):
            return x
        if isinstance(x.value, InMemory) or math.prod(padded_shape(x.shape)) > LARGEST_TILE:
            raise refuse(f"a parameter as large as {x.shape} but in a product with it")
        left, right = x.value
        return self._whole_product(self.transpose(left, (1, 0)), right)

    def _sixteen(self, value: Any, side: int, chunk: Any) -> Any:
        """Sixteen columns of a float32 tile ``[16, side]``, side at least 16."""
        if side == LEAST_SIDE:
            return value
        kind, sides = np.dtype(np.float32), (LEAST_SIDE, side // LEAST_SIDE, LEAST_SIDE)
        return self.ops.reduce(
            "sum", self._only_at(chunk, self.ops.reshape(value, sides), sides, 1, kind), 1
        )

    def _walked_product(self, a: Padded, b: Padded) -> Padded:
        """``[16, k] @ [k, n]``, the second in memory, sixteen of `k` at a time."""
        (m, k), n = a.shape, b.shape[1]
        width, axis = dot_side(n), int(b.value.is_transposed)
        if m != LEAST_SIDE or m * width > LARGEST_TILE:
            raise refuse(f"a product of {a.shape} and {b.shape}")
        value, kind = self.widened(self.mask(a, (1,), 0)), np.dtype(np.float32)

        def step(chunk: Any, total: Any) -> Any:
            part = self._sixteen(value, dot_side(k), chunk)
            own = self.ops.dot(part, b.value.load(chunk, axis))
            return self.ops.elementwise("add", kind, total, own)

        start = self.ops.broadcast(kind.type(0), (m, width), kind)
        total = self.ops.walk(-(-k // LEAST_SIDE), step, start)
        return Padded(self.narrow(total, (m, width), (m, n)), (m, n), kind)

    def store_outer(self, outer: Outer, store: Callable[[Any, Any], None]) -> None:
        """Form a matrix sixteen rows at a time: ``store(chunk, [16, columns])``."""
        left, right = (self.widened(x) for x in outer)
        side = dot_side(outer.left.shape[1])

        def step(chunk: Any, nothing: Any) -> Any:
            rows = self.ops.transpose(self._sixteen(left, side, chunk), (1, 0))
            store(chunk, self.ops.dot(rows, right))
            return nothing

        self.ops.walk(-(-outer.left.shape[1] // LEAST_SIDE), step, None)

    def widened(self, x: Padded) -> Any:
        """A matrix's tile with sides of 16 at least, zeros behind what it had."""
        value, sides = self.tile(x), padded_shape(x.shape)
        for axis, side in enumerate(sides):
            if side < LEAST_SIDE:
                copies = (*sides[:axis], LEAST_SIDE // side, *sides[axis:])
                one = (*sides[:axis], 1, *sides[axis:])
                spread = self.ops.broadcast(self.ops.reshape(value, one), copies, x.dtype)
                spread = self._only_at(np.int32(0), spread, copies, axis, x.dtype)
                sides = (*sides[:axis], LEAST_SIDE, *sides[axis + 1 :])
                value = self.ops.reshape(spread, sides)
        return value

    def narrow(self, value: Any, sides: tuple[int, ...], shape: tuple[int, ...]) -> Any:
        """The tile of a float32 matrix of `shape`, from one with sides of 16 at least."""
        for axis, side in enumerate(padded_shape(shape)):
            if side < sides[axis]:
                copies = (*sides[:axis], sides[axis] // side, side, *sides[axis + 1 :])
                first = self.ops.reshape(value, copies)
                first = self._only_at(np.int32(0), first, copies, axis, np.dtype(np.float32))
                value = self.ops.reduce("sum", first, axis)
                sides = (*sides[:axis], side, *sides[axis + 1 :])
        return value

    def _only_at(
        self, place: Any, value: Any, sides: tuple[int, ...], axis: int, dtype: np.dtype
    ) -> Any:
        """Zeros but at one place along an axis."""
        kind = np.dtype(bool)
        index = self.ops.iota(tuple(n if at == axis else 1 for at, n in enumerate(sides)), axis)
        is_there = self.ops.elementwise("eq", kind, index, place)
        is_there = self.ops.broadcast(is_there, sides, kind)
        return self.ops.elementwise("select", dtype, is_there, value, np.zeros((), dtype)[()])

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
