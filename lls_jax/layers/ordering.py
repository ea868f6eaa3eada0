"""What is computed before what: so that memory is free again before it is needed again.

Without it a compiler may run a block's forward pass while the gradient of the block below is not
taken yet, and keep the activations of both. An optimisation barrier says the same, but is gone
before XLA's CPU backend decides on an order (jaxlib 0.10).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lls_jax.platforms import by_platform


def _is_float(leaf: jax.Array) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def token_of(tree: Any) -> jax.Array:
    """A float32 scalar that is known when all float arrays of a tree are."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if _is_float(leaf) and leaf.size]
    firsts = [leaf[(0,) * leaf.ndim].astype(jnp.float32) for leaf in leaves]
    return functools.reduce(jnp.add, firsts, jnp.float32(0.0))


def wait_for(token: jax.Array, tree: Any) -> Any:
    """The same values, but no float among them is known before `token` is.

    They are none (NaN) if the token is: a dependence that no compiler can rule out.

    Args:
        token: from :func:`token_of`.
        tree: arrays.
    """
    lost = jnp.isnan(token)

    def waiting(leaf: jax.Array) -> jax.Array:
        return jnp.where(lost, jnp.asarray(jnp.nan, leaf.dtype), leaf) if _is_float(leaf) else leaf

    return jax.tree.map(waiting, tree)


def written_out(
    function: Callable[..., jax.Array], *arrays: jax.Array, decided_by: jax.Array | None = None
) -> jax.Array:
    """``function(*arrays)``, an array of floats that no CPU's compiler fuses into what reads it.

    For what is slow to find element by element and read more than once. (XLA's CPU backend looks
    through an optimisation barrier when it fuses, up to jaxlib 0.10, but not through a branch,
    for which a GPU would have to ask its host.)

    Args:
        function: pure.
        *arrays: floats.
        decided_by: floats whose first element decides on the branch: the result is NaN if it is.
            By default the arrays are; where these are shards of a batch all devices have to ask
            the one with the first element, so name something that each of them has.
    """
    shape = jax.eval_shape(function, *arrays)

    def lost(*arrays: jax.Array) -> jax.Array:
        return jnp.full(shape.shape, jnp.nan, shape.dtype)

    def chosen(*arrays: jax.Array) -> jax.Array:
        decides = arrays if decided_by is None else decided_by
        return jax.lax.cond(jnp.isnan(token_of(decides)), lost, function, *arrays)

    return by_platform(*arrays, cpu=chosen, elsewhere=function)


def slice_after(token: jax.Array, x: jax.Array, start: int, size: int, axis: int = 0) -> jax.Array:
    """``x[start : start + size]``, along any axis, but not before `token` is known.

    Args:
        token: from :func:`token_of`; what is cut is of no use if it is none (NaN).
        x: any array.
        start: first index.
        size: length.
        axis: that is cut.
    """
    # The barrier: else XLA fuses the token, sums and all, into each element of what is cut.
    first = jax.lax.optimization_barrier(start + jnp.isnan(token).astype(jnp.int32))
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis)
