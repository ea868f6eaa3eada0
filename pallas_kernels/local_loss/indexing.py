"""Indices inside a head: a vector or a matrix at an index a lane, as a comparison and a sum.

No kernel here can gather. But the one index that heads have, the label, picks from a few classes:
``v[i] = sum over k of (k == i) v[k]``, and likewise the way back.
"""

from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

from pallas_kernels.local_loss.lanes import Lanes
from pallas_kernels.local_loss.padded import Padded, refuse


def _chosen_axis(name: str, array: Padded, numbers: Any, single: list[int]) -> tuple[int, int]:
    """The axis that is indexed, and the index vector's column for it."""
    axes = [axis for axis in single if array.shape[axis] > 1] or single[:1]
    if len(axes) != 1:
        raise refuse(f"`{name}` by {len(axes)} indices at once")
    return axes[0], list(numbers).index(axes[0])


def _one_hot(lanes: Lanes, name: str, size: int, index: Padded, column: int, mode: Any) -> Padded:
    """Whether a place is the one that is indexed: bool ``[batch, size]``."""
    index = index.columns[column] if index.columns else index
    if index.shape[1:] != (1,) * (len(index.shape) - 1) or not index.shape:
        raise refuse(f"`{name}` by an index of shape {index.shape}")
    # Of one index for all, the only axis is that of its parts.
    index = lanes.regroup(index, (index.shape[0] if len(index.shape) > 1 else 1, 1))
    if mode != GatherScatterMode.FILL_OR_DROP:
        zero, last = (lanes.scalar(value, index.dtype) for value in (0, size - 1))
        index = lanes.combine("min", lanes.combine("max", index, zero), last)
    index = index if index.dtype == np.int32 else lanes.apply("cast", index, dtype=np.int32)
    places = lanes.index((1, size), 1)
    return lanes.combine("eq", places, index, dtype=bool)


def _as_floats(lanes: Lanes, mask: Padded) -> Padded:
    one, zero = (lanes.scalar(value, np.float32) for value in (1, 0))
    return lanes.combine("select", mask, one, zero, dtype=np.float32)


def gather(
    lanes: Lanes, params: Any, shape: Any, dtype: Any, array: Padded, index: Padded
) -> Padded:
    """An element, or a row, of an array for each lane; see :mod:`structure` for the arguments."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    batched = tuple(numbers.operand_batching_dims)
    mapped = tuple(numbers.start_index_map)
    single = [axis for axis in mapped if sizes[axis] == 1]
    axis, column = _chosen_axis("gather", array, mapped, single)
    if any(
        sizes[a] != array.shape[a] for a in range(len(array.shape)) if a not in (*batched, axis)
    ):
        raise refuse(f"`gather` of slices {sizes} from {array.shape}")
    chosen = _one_hot(lanes, "gather", array.shape[axis], index, column, params["mode"])
    zero = lanes.scalar(0, array.dtype)
    if len(array.shape) == 1 or (batched == (0,) and len(array.shape) == 2):
        rows = lanes.regroup(array, (1, array.shape[0])) if len(array.shape) == 1 else array
        found = lanes.reduce("sum", lanes.combine("select", chosen, rows, zero), (1,))
    elif len(array.shape) == 2 and not batched and array.dtype == np.float32:
        found = lanes.product(
            _as_floats(lanes, chosen), array if axis == 0 else lanes.transpose(array, (1, 0))
        )
    else:
        raise refuse(f"`gather` from {array.shape}")
    return lanes.regroup(found, shape)


def scatter_add(
    lanes: Lanes,
    params: Any,
    shape: Any,
    dtype: Any,
    array: Padded,
    index: Padded,
    updates: Padded,
) -> Padded:
    """The gradient of :func:`gather`, added to an array."""
    numbers = params["dimension_numbers"]
    batched = tuple(numbers.operand_batching_dims)
    mapped = tuple(numbers.scatter_dims_to_operand_dims)
    # The axes of a window's updates are, in order, those of the array that are neither inserted
    # nor batched.
    windows = [
        axis
        for axis in range(len(array.shape))
        if axis not in (*numbers.inserted_window_dims, *batched)
    ]
    width = {axis: updates.shape[at] for axis, at in zip(windows, numbers.update_window_dims)}
    single = [axis for axis in mapped if width.get(axis, 1) == 1]
    axis, column = _chosen_axis("scatter-add", array, mapped, single)
    mode = params["mode"]
    chosen = _one_hot(lanes, "scatter-add", array.shape[axis], index, column, mode)
    rows, zero = chosen.shape[0], lanes.scalar(0, array.dtype)
    if batched == (0,) and len(array.shape) == 2:
        one_each = lanes.regroup(updates, (rows, 1))
        added = lanes.combine("select", chosen, one_each, zero, dtype=dtype)
    elif len(array.shape) == 1:
        one_each = lanes.regroup(updates, (rows, 1))
        added = lanes.reduce("sum", lanes.combine("select", chosen, one_each, zero), (0,))
    elif len(array.shape) == 2 and not batched and array.dtype == np.float32:
        row_each = lanes.regroup(updates, (rows, array.shape[1 - axis]))
        added = lanes.product(lanes.transpose(_as_floats(lanes, chosen), (1, 0)), row_each)
        added = added if axis == 0 else lanes.transpose(added, (1, 0))
    else:
        raise refuse(f"`scatter-add` to {array.shape}")
    if isinstance(array.value, np.generic) and not array.value:
        return added
    return lanes.combine("add", array, added, dtype=dtype)
