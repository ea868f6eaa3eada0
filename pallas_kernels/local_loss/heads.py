"""A head and its gradient, traced once for the examples of one program."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from pallas_kernels.errors import KernelUnavailableError
from pallas_kernels.local_loss.padded import (
    LARGEST_TILE,
    is_large,
    padded_side,
    refuse,
)

Head = Callable[[jax.Array, jax.Array, Any, jax.Array], jax.Array]
# A side of `dot` is at least 16.
EXAMPLES = 16


@dataclasses.dataclass(frozen=True)
class HeadProgram:
    """A head of :data:`EXAMPLES` examples as a jaxpr.

    ``(scores [examples, rows], square [examples], labels [examples], weights [examples],
    *leaves) -> (loss [examples], d_scores, d_square, *d_learned)``; the gradients are those of
    ``sum(weights * loss)``.

    Attributes:
        jaxpr: without its constants.
        consts: arrays that the head holds itself.
        learned: by leaf, whether it has a gradient.
    """

    jaxpr: Any
    consts: tuple[Any, ...]
    learned: tuple[bool, ...]


def is_learned(leaf: Any) -> bool:
    """Whether a parameter has a gradient."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def per_example(head: Head, scores: Any, square: Any, params: Any, labels: Any) -> jax.Array:
    """The head of every example, ``[batch]``; examples may speak over the axis ``"batch"``."""
    return jax.vmap(head, (0, 0, None, 0), axis_name="batch")(scores, square, params, labels)


def live_equations(jaxpr: Any, wanted: Sequence[bool]) -> tuple[list[tuple[Any, list[bool]]], set]:
    """What of a jaxpr its wanted outputs need.

    Args:
        jaxpr: without its constants.
        wanted: which outputs are.

    Returns:
        The equations in order, each with which of its results are needed, and all variables that
        are.
    """
    needed = {v for v, want in zip(jaxpr.outvars, wanted) if want and not isinstance(v, Literal)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        if any(v in needed for v in eqn.outvars):
            live.append((eqn, [v in needed for v in eqn.outvars]))
            needed.update(v for v in eqn.invars if not isinstance(v, Literal))
    return live[::-1], needed


def inspect_head(
    head: Head, rows: int, params: Any, label_dtype: Any
) -> tuple[tuple[bool, ...], bool]:
    """Which leaves of the parameters a head looks at, and whether it looks at other examples.

    A projection's own parameters are no business of the head, and of its kernel.

    Args:
        head: of one example.
        rows: scores of an example.
        params: a pytree of arrays; only shapes and dtypes count.
        label_dtype: integers.

    Returns:
        By leaf, whether the head looks at it; and whether it looks at other examples.

    Raises:
        ValueError: the head does not give a scalar.
    """
    leaves, tree = jax.tree.flatten(params)

    def flat(scores: Any, square: Any, label: Any, *leaves: Any) -> Any:
        return head(scores, square, jax.tree.unflatten(tree, leaves), label)

    shapes = [((rows,), jnp.float32), ((), jnp.float32), ((), label_dtype)]
    shapes += [(leaf.shape, leaf.dtype) for leaf in leaves]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    try:
        closed, couples = jax.make_jaxpr(flat)(*arguments), False
    except NameError:
        closed, couples = jax.make_jaxpr(flat, axis_env=[("batch", 1)])(*arguments), True
    (out, *more) = closed.out_avals
    if more or out.shape or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"`head` gives {closed.out_avals}; expected a scalar float, a loss.")
    _, needed = live_equations(closed.jaxpr, [True])
    return tuple(v in needed for v in closed.jaxpr.invars[3:]), couples


def trace(head: Head, rows: int, params: Any, label_dtype: Any) -> HeadProgram:
    """Trace a head and its gradient.

    Args:
        head: of one example.
        rows: scores of an example.
        params: a pytree of arrays; only shapes and dtypes count.
        label_dtype: integers.

    Raises:
        KernelUnavailableError: the head couples the examples of a batch.
        ValueError: the head holds a traced array that is none of its parameters.
    """
    leaves, tree = jax.tree.flatten(params)
    learned = tuple(map(is_learned, leaves))

    def program(scores: Any, square: Any, labels: Any, weights: Any, *leaves: Any) -> Any:
        def losses(scores: Any, square: Any, chosen: Any) -> Any:
            given = iter(chosen)
            all_leaves = [next(given) if own else leaf for own, leaf in zip(learned, leaves)]
            # No name for the axis: a kernel sees few examples at once.
            return jax.vmap(head, (0, 0, None, 0))(
                scores, square, jax.tree.unflatten(tree, all_leaves), labels
            )

        chosen = [leaf for own, leaf in zip(learned, leaves) if own]
        loss, pullback = jax.vjp(losses, scores, square, chosen)
        d_scores, d_square, d_chosen = pullback(weights)
        return (loss, d_scores, d_square, *d_chosen)

    def shaped(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    if padded_side(rows) * EXAMPLES > LARGEST_TILE:
        raise refuse(f"as many scores as {rows}")
    try:
        closed = jax.make_jaxpr(program)(
            shaped(EXAMPLES, rows),
            shaped(EXAMPLES),
            shaped(EXAMPLES, dtype=label_dtype),
            shaped(EXAMPLES),
            *(shaped(*leaf.shape, dtype=leaf.dtype) for leaf in leaves),
        )
    except NameError as error:
        raise KernelUnavailableError(
            f"a head inside a kernel cannot couple the examples of a batch ({error}); use the "
            "implementation 'split' or 'xla'."
        ) from None
    for array in (*leaves, *closed.consts):
        if is_large(array.shape) and (len(array.shape) != 2 or not is_learned(array)):
            raise refuse(f"a parameter as large as {tuple(array.shape)}")
    if any(isinstance(value, jax.core.Tracer) for value in closed.consts):
        raise ValueError(
            "`head` holds an array that is being differentiated or compiled; pass it in `params`."
        )
    return HeadProgram(closed.jaxpr, tuple(map(np.asarray, closed.consts)), learned)
