"""A batch walked in slices by a loop, so that what is in between stays small, in a near cache.

A slice takes every n-th example: where the batch is sharded over devices that divide a slice, each
device cuts its own rows; only what is summed travels, once a slice. The loop is compiled once,
whatever the number of slices. (XLA's CPU backend runs convolutions in loops without its threads,
but products and sums with them.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lls_jax.layers.ordering import token_of

# What a slice of the batch takes in between, in a near cache.
_SLICE_BYTES = 8 * 2**20
# Rows of a slice's products, of which the matrix library wants some hundreds.
_FEWEST_ROWS = 512


def choose_count(batch: int, count: int) -> int:
    """How many slices: `count` or more, up to twice as many, that the batch divides into.

    Where there is no such number, one for which the examples that are left over, a slice of their
    own, are fewer than a slice.

    >>> choose_count(128, 6), choose_count(128, 0), choose_count(7, 3), choose_count(127, 43)
    (8, 1, 3, 63)
    """
    count = max(1, min(batch, count))
    fewest_left = batch // (batch // count)
    return next((n for n in range(count, 2 * count + 1) if batch % n == 0), fewest_left)


def count_for_cache(batch: int, between: int, rows: int) -> int:
    """How many slices, for what is in between to stay in a near cache.

    Args:
        batch: examples.
        between: bytes of all that is in between, for the whole batch.
        rows: of the products, for the whole batch; slices are not so small that these are few.
    """
    return choose_count(batch, min(-(-between // _SLICE_BYTES), rows // _FEWEST_ROWS))


def _bodies(arrays: Any, count: int) -> Any:
    """Each array as ``[size, count, ...]``, without the examples that are left over."""

    def body(x: jax.Array) -> jax.Array:
        size = x.shape[0] // count
        return x[: size * count].reshape(size, count, *x.shape[1:])

    return jax.tree.map(body, arrays)


def _rests(arrays: Any, count: int) -> Any:
    """What is left over of each array; None where nothing is."""
    batch = jax.tree.leaves(arrays)[0].shape[0]
    left = batch % count
    return jax.tree.map(lambda x: x[batch - left :], arrays) if left else None


def _slice(bodies: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False), bodies)


def _apply(function: Callable[..., Any], bodies: Any, i: jax.Array) -> Any:
    # The barrier: what XLA's CPU backend fuses into the update of what a loop carries, it computes
    # on one thread.
    return jax.lax.optimization_barrier(function(*_slice(bodies, i)))


def _zeros_after(arrays: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros that no compiler knows before the arrays; they are none (NaN) if the arrays are.

    What a loop starts from is made when the loop is due, and takes no memory before.
    """
    lost = jnp.isnan(token_of(arrays))
    other = jnp.nan if jnp.issubdtype(dtype, jnp.floating) else 0
    start = jnp.where(lost, jnp.asarray(other, dtype), jnp.zeros((), dtype))
    return jnp.full(shape, start, dtype)


def walk_slices(
    function: Callable[..., tuple[Any, Any]], arrays: tuple[Any, ...], count: int, after: Any = None
) -> tuple[Any, Any]:
    """Of ``function(*slices)`` over `count` slices, a pair: the sum of one, the other as a whole.

    Args:
        function: of a slice of each array; gives a tree of floats to sum, and a tree of arrays
            ``[size of the slice, ...]`` to put together.
        arrays: trees of arrays ``[batch, ...]``.
        count: slices; the batch need not divide into them.
        after: arrays that `function` closes over, if these may be known later than `arrays`.

    Returns:
        The sum, as of :func:`sum_slices`, and the whole, as of :func:`map_slices`.
    """
    if count == 1:
        return function(*arrays)
    bodies, rests = _bodies(arrays, count), _rests(arrays, count)

    def add_slice(i: jax.Array, carried: tuple[Any, Any]) -> tuple[Any, Any]:
        (total, wholes), (summed, mapped) = carried, _apply(function, bodies, i)
        wholes = jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, i, 1),
            wholes,
            mapped,
        )
        return jax.tree.map(jnp.add, total, summed), wholes

    summed, mapped = jax.eval_shape(function, *_slice(bodies, 0))
    start = jax.tree.map(lambda own: _zeros_after((arrays, after), own.shape, own.dtype), summed)
    wholes = jax.tree.map(
        lambda own: _zeros_after((arrays, after), (own.shape[0], count, *own.shape[1:]), own.dtype),
        mapped,
    )
    total, wholes = jax.lax.fori_loop(0, count, add_slice, (start, wholes))
    wholes = jax.tree.map(lambda whole: whole.reshape(-1, *whole.shape[2:]), wholes)
    if rests is None:
        return total, wholes
    summed, mapped = function(*rests)
    return (
        jax.tree.map(jnp.add, total, summed),
        jax.tree.map(lambda *parts: jnp.concatenate(parts), wholes, mapped),
    )


def sum_slices(function: Callable[..., Any], arrays: tuple[Any, ...], count: int) -> Any:
    """The sum of ``function(*slices)`` over `count` slices of the batch.

    Args:
        function: of a slice of each array; gives a tree of floats.
        arrays: trees of arrays ``[batch, ...]``.
        count: slices; the batch need not divide into them.

    Returns:
        In the shapes and dtypes that `function` gives.
    """
    return walk_slices(lambda *slices: (function(*slices), ()), arrays, count)[0]


def map_slices(
    function: Callable[..., Any], arrays: tuple[Any, ...], count: int, after: Any = None
) -> Any:
    """``function(*slices)`` of `count` slices of the batch, put together again.

    Args:
        function: of a slice of each array; gives a tree of arrays ``[size of the slice, ...]``.
        arrays: trees of arrays ``[batch, ...]``.
        count: slices; the batch need not divide into them.
        after: arrays that `function` closes over, if these may be known later than `arrays`.

    Returns:
        A tree of arrays ``[batch, ...]``, in the order of the batch.
    """
    return walk_slices(lambda *slices: ((), function(*slices)), arrays, count, after)[1]
