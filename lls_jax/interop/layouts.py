"""Kernels' layouts, ours and PyTorch's; and arrays in nested dicts, by their paths."""

from collections.abc import Mapping
from typing import Any

import numpy as np

Path = tuple[str, ...]

# By number of axes, those that take a kernel from our layout to PyTorch's, and back.
TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
_TO_OURS = {4: (2, 3, 1, 0), 2: (1, 0)}


def to_torch(array: np.ndarray) -> np.ndarray:
    """A kernel in PyTorch's layout: OIHW of HWIO, or ``[out, in]``; any other array as it is."""
    return array.transpose(TO_TORCH[array.ndim]) if array.ndim in TO_TORCH else array


def to_ours(array: np.ndarray) -> np.ndarray:
    """The inverse of :func:`to_torch`."""
    return array.transpose(_TO_OURS[array.ndim]) if array.ndim in _TO_OURS else array


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """What shape a kernel of ours has in PyTorch's layout; any other array its own."""
    return tuple(shape[axis] for axis in TO_TORCH.get(len(shape), range(len(shape))))


def get(tree: Mapping[str, Any], path: Path) -> Any:
    """What is at a path."""
    found: Any = tree
    for key in path:
        found = found[key]
    return found


def put(tree: dict[str, Any], path: Path, value: Any) -> None:
    """Put a value at a path, into dicts that are made where there are none."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
