"""Runs a traced head inside a kernel, equation by equation."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from pallas_kernels.local_loss.heads import live_equations
from pallas_kernels.local_loss.indexing import gather, scatter_add
from pallas_kernels.local_loss.lanes import Lanes
from pallas_kernels.local_loss.padded import (
    ELEMENTWISE,
    LARGEST_TILE,
    InMemory,
    Outer,
    Padded,
    padded_shape,
    refuse,
)
from pallas_kernels.local_loss.rewrites import REWRITES
from pallas_kernels.local_loss.structure import STRUCTURAL

_CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
    "checkpoint": "jaxpr", "remat2": "jaxpr", "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}  # fmt: skip
_NOTHING = ("stop_gradient", "copy", "copy_p", "optimization_barrier")
# What takes a matrix that is too large for registers; its result may be another one.
_WALKING = (*_NOTHING, "dot_general", "transpose", "convert_element_type", "gather")
_ALIASES = {"add_any": "add"}
_MOVES: dict[str, Callable[..., Padded]] = {
    **STRUCTURAL,
    "gather": gather,
    "scatter-add": scatter_add,
}


def run(
    lanes: Lanes, jaxpr: Any, consts: Sequence[Padded], args: Sequence[Padded], wanted: Any = None
) -> list[Any]:
    """Run a jaxpr.

    Args:
        lanes: the arithmetic.
        jaxpr: without its constants.
        consts: their values.
        args: the arguments' values.
        wanted: which outputs are; what the others need does not run. None for all.

    Returns:
        The outputs; None for those that are not wanted.

    Raises:
        KernelUnavailableError: the head has something that no kernel has; the message names it.
    """
    wanted = [True] * len(jaxpr.outvars) if wanted is None else list(wanted)
    live, _ = live_equations(jaxpr, wanted)
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(v: Any) -> Padded:
        if not isinstance(v, Literal):
            return known[v]
        literal: Any = v
        scalar = lanes.scalar(literal.val, literal.aval.dtype)
        return scalar._replace(shape=tuple(literal.aval.shape))

    for eqn, outs_wanted in live:
        results = _equation(lanes, eqn, [read(v) for v in eqn.invars], outs_wanted)
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(v) if want else None for v, want in zip(jaxpr.outvars, wanted)]


def _equation(lanes: Lanes, eqn: Any, xs: list[Padded], wanted: list[bool]) -> list[Any]:
    name = _ALIASES.get(eqn.primitive.name, eqn.primitive.name)
    if name in _CALLS:
        inner = eqn.params[_CALLS[name]]
        closed = isinstance(inner, ClosedJaxpr)
        consts = [_constant(lanes, value) for value in (inner.consts if closed else ())]
        return run(lanes, inner.jaxpr if closed else inner, consts, xs, wanted)
    if len(eqn.outvars) != 1:
        raise refuse(f"`{name}`")
    out: Any = eqn.outvars[0]
    shape, dtype = tuple(out.aval.shape), np.dtype(out.aval.dtype)
    if name not in _WALKING:
        xs = [lanes.in_registers(x) for x in xs]
    if any(x.columns for x in xs) and name not in ("gather", "scatter-add"):
        raise refuse(f"`{name}` of integers put side by side")
    if name == "not" and dtype.kind != "b":
        # Of integers it turns every bit; back ends have the logical one.
        raise refuse(f"`not` of {dtype}")
    if name in ELEMENTWISE and name not in ("select", "cast"):
        result = lanes.combine(name, *xs, dtype=dtype)
    elif name in _NOTHING:
        result = xs[0]
    elif name in REWRITES:
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs]
        traced = jax.make_jaxpr(functools.partial(REWRITES[name], eqn.params))(*shapes)
        (result,) = run(lanes, traced.jaxpr, [_constant(lanes, c) for c in traced.consts], xs)
    elif name in _MOVES:
        result = _MOVES[name](lanes, eqn.params, shape, dtype, *xs)
    else:
        raise refuse(f"`{name}`")
    if isinstance(result.value, np.generic):
        result = result._replace(shape=shape)
    is_walked = isinstance(result.value, InMemory | Outer | np.generic)
    if not is_walked and math.prod(padded_shape(shape)) > LARGEST_TILE:
        raise refuse(f"an array as large as {shape}, what `{name}` gives")
    assert result.shape == shape, (name, result.shape, shape)
    return [result]


def _constant(lanes: Lanes, value: Any) -> Padded:
    if np.ndim(value):
        raise refuse(f"a constant of shape {np.shape(value)} inside a compiled function")
    return lanes.scalar(value, np.asarray(value).dtype)
