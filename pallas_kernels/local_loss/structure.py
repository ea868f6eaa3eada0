"""What moves a head's elements about, by the primitive's name.

Each function takes the arithmetic, the equation's parameters, the result's shape and dtype, and the
operands.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pallas_kernels.local_loss.lanes import Lanes
from pallas_kernels.local_loss.padded import (
    LARGEST_PRODUCT,
    InMemory,
    Outer,
    Padded,
    padded_shape,
    refuse,
)


def _cast(lanes: Lanes, params: Any, shape: Any, dtype: Any, x: Padded) -> Padded:
    if isinstance(x.value, InMemory | Outer):
        # Read in float32, and stored so.
        return x._replace(dtype=dtype)
    return x if x.dtype == dtype else lanes.apply("cast", x, dtype=dtype)


def _bitcast(lanes: Lanes, params: Any, shape: Any, dtype: Any, x: Padded) -> Padded:
    if x.dtype.itemsize != dtype.itemsize:
        raise refuse(f"`bitcast_convert_type` from {x.dtype} to {dtype}")
    if isinstance(x.value, np.generic):
        return x._replace(value=x.value.view(dtype), dtype=dtype)
    return x._replace(value=lanes.ops.elementwise("bitcast", dtype, x.value), dtype=dtype)


def _select(lanes: Lanes, params: Any, shape: Any, dtype: Any, *xs: Padded) -> Padded:
    which, *cases = xs
    if len(cases) != 2 or which.dtype != bool:
        raise refuse("`select_n` of more than two")
    # A scalar chooses among whole arrays.
    which = lanes.spread(which, shape) if not which.shape and shape else which
    return lanes.apply("select", which, cases[1], cases[0], dtype=dtype)


def _broadcast(lanes: Lanes, params: Any, shape: Any, dtype: Any, x: Padded) -> Padded:
    dimensions = params["broadcast_dimensions"]
    sides = [1] * len(shape)
    for axis, side in zip(dimensions, x.shape):
        sides[axis] = side
    if not x.shape:
        return lanes.spread(x, shape)
    return lanes.spread(lanes.regroup(x, tuple(sides)), shape)


def _iota(lanes: Lanes, params: Any, shape: Any, dtype: Any) -> Padded:
    index = lanes.index(shape, params["dimension"])
    return lanes.spread(_cast(lanes, params, shape, dtype, index), shape)


def _reshape(lanes: Lanes, params: Any, shape: Any, dtype: Any, x: Padded) -> Padded:
    before, after = ([side for side in sides if side != 1] for sides in (x.shape, shape))
    if before == after:
        return lanes.regroup(x, shape)
    if padded_shape(x.shape) == x.shape and padded_shape(shape) == shape:
        return x._replace(value=lanes.ops.reshape(lanes.tile(x), shape), shape=shape)
    common = int(bool(before and after and before[0] == after[0]))
    x = lanes.regroup(x, tuple(before))

    def same_place(inner: list[Padded], outer: list[Padded]) -> Padded:
        flat = [lanes.scalar(0, np.int32)] * 2
        for which, (places, sides) in enumerate(
            ((inner, before[common:]), (outer, after[common:]))
        ):
            for place, side in zip(places, sides):
                wide = lanes.apply("mul", flat[which], lanes.scalar(side, np.int32))
                flat[which] = lanes.combine("add", wide, place)
        return lanes.combine("eq", *flat, dtype=bool)

    result = lanes.select_lanes(x, tuple(before[common:]), tuple(after[common:]), same_place)
    return lanes.regroup(result, shape)


def _along_last(
    lanes: Lanes, x: Padded, shape: tuple[int, ...], source: Callable[[Padded], Padded]
) -> Padded:
    """The last axis rearranged: `source` gives the place that each place's element comes from."""
    if x.shape[:-1] != shape[:-1]:
        raise refuse(f"a cut through {x.shape} to {shape} but along the last axis")
    if x.shape == shape == (1,) * len(shape):
        return x
    return lanes.select_lanes(
        x,
        x.shape[-1:],
        shape[-1:],
        lambda inner, outer: lanes.combine("eq", inner[0], source(outer[0]), dtype=bool),
    )


def _moved(lanes: Lanes, x: Padded, shape: tuple[int, ...], by: int) -> Padded:
    """The last axis moved up, with zeros before and behind."""
    offset = lanes.scalar(by, np.int32)
    return _along_last(lanes, x, shape, lambda at: lanes.combine("sub", at, offset))


def _slice(lanes: Lanes, params: Any, shape: Any, dtype: Any, x: Padded) -> Padded:
    start = lanes.scalar(params["start_indices"][-1], np.int32)
    step = lanes.scalar((params["strides"] or (1,))[-1], np.int32)
    return _along_last(
        lanes, x, shape, lambda at: lanes.combine("add", lanes.combine("mul", at, step), start)
    )


def _pad(lanes: Lanes, params: Any, shape: Any, dtype: Any, x: Padded, fill: Padded) -> Padded:
    low, _, interior = params["padding_config"][-1]
    if interior or not isinstance(fill.value, np.generic) or fill.value != 0:
        raise refuse("`pad` but with zeros around")
    return _moved(lanes, x, shape, low)


def _concatenate(lanes: Lanes, params: Any, shape: Any, dtype: Any, *xs: Padded) -> Padded:
    if np.issubdtype(dtype, np.integer) and all(x.shape[-1] == 1 for x in xs):
        return Padded(None, shape, dtype, tuple(xs))
    if params["dimension"] != len(shape) - 1:
        raise refuse("`concatenate` but along the last axis")
    total, start = lanes.scalar(0, dtype), 0
    for x in xs:
        part = _moved(lanes, x, shape, start)
        total = lanes.combine("add", total, part, dtype=dtype)
        start += x.shape[-1]
    return total


def _reduce(name: str) -> Any:
    def reduce(lanes: Lanes, params: Any, shape: Any, dtype: Any, x: Padded) -> Padded:
        return lanes.reduce(name, x, tuple(int(axis) for axis in params["axes"]))

    return reduce


def _reduce_bool(name: str) -> Any:
    def reduce(lanes: Lanes, params: Any, shape: Any, dtype: Any, x: Padded) -> Padded:
        number = lanes.apply("cast", x, dtype=np.int32)
        least = lanes.reduce(name, number, tuple(int(axis) for axis in params["axes"]))
        return lanes.apply("ne", least, lanes.scalar(0, np.int32), dtype=bool)

    return reduce


def _arg(name: str) -> Any:
    def arg(lanes: Lanes, params: Any, shape: Any, dtype: Any, x: Padded) -> Padded:
        (axis,) = params["axes"]
        kept = tuple(1 if at == axis else side for at, side in enumerate(x.shape))
        best = lanes.regroup(lanes.reduce(name, x, (axis,)), kept)
        is_best = lanes.combine("eq", x, best, dtype=bool)
        index = lanes.spread(lanes.index(x.shape, axis), x.shape)
        behind = lanes.scalar(x.shape[axis], np.int32)
        first = lanes.reduce("min", lanes.combine("select", is_best, index, behind), (axis,))
        return _cast(lanes, params, shape, dtype, first)

    return arg


def _transpose(lanes: Lanes, params: Any, shape: Any, dtype: Any, x: Padded) -> Padded:
    return lanes.transpose(x, tuple(params["permutation"]))


def _dot_general(lanes: Lanes, params: Any, shape: Any, dtype: Any, a: Padded, b: Padded) -> Padded:
    (a_sums, b_sums), (a_batch, b_batch) = params["dimension_numbers"]
    ranks = (len(a.shape), len(b.shape))
    if ranks == (2, 2) and len(a_sums) == 1 and not a_batch:
        a = a if a_sums == (1,) else lanes.transpose(a, (1, 0))
        b = b if b_sums == (0,) else lanes.transpose(b, (1, 0))
        return lanes.product(a, b)
    # Anything else: multiply what is spread over all axes, and add up.
    a_free = [at for at in range(ranks[0]) if at not in (*a_sums, *a_batch)]
    b_free = [at for at in range(ranks[1]) if at not in (*b_sums, *b_batch)]
    a = lanes.transpose(a, (*a_batch, *a_free, *a_sums))
    b = lanes.transpose(b, (*b_batch, *b_free, *b_sums))
    batch, sums = a.shape[: len(a_batch)], a.shape[len(a.shape) - len(a_sums) :]
    a_sides = a.shape[len(batch) : len(batch) + len(a_free)]
    b_sides = b.shape[len(batch) : len(batch) + len(b_free)]
    if math.prod(padded_shape((*batch, *a_sides, *b_sides, *sums))) > LARGEST_PRODUCT:
        raise refuse(f"a product of {a.shape} and {b.shape}")
    a = lanes.regroup(a, (*batch, *a_sides, *(1 for _ in b_sides), *sums))
    b = lanes.regroup(b, (*batch, *(1 for _ in a_sides), *b_sides, *sums))
    wide = lanes.combine("mul", a, b, dtype=dtype)
    first = len(wide.shape) - len(sums)
    return lanes.reduce("sum", wide, tuple(range(first, len(wide.shape)))) if sums else wide


STRUCTURAL: dict[str, Callable[..., Padded]] = {
    "convert_element_type": _cast,
    "bitcast_convert_type": _bitcast,
    "select_n": _select,
    "broadcast_in_dim": _broadcast,
    "iota": _iota,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "slice": _slice,
    "pad": _pad,
    "concatenate": _concatenate,
    "transpose": _transpose,
    "dot_general": _dot_general,
    "reduce_sum": _reduce("sum"),
    "reduce_max": _reduce("max"),
    "reduce_min": _reduce("min"),
    "reduce_or": _reduce_bool("max"),
    "reduce_and": _reduce_bool("min"),
    "argmax": _arg("max"),
    "argmin": _arg("min"),
}
