"""What in a traced program depends on what, and the part of it that gives some of its results."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

Names = frozenset[Any]

# Equations that run one program on all their operands, once: what an output depends on can be
# followed into them. Of any other equation each output is taken to depend on every operand.
_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "checkpoint", "custom_jvp_call"})


def dependencies(jaxpr: core.Jaxpr, given: Sequence[Names]) -> list[Names]:
    """Names of the inputs whose values each output of a program can depend on.

    Never too few; too many where an equation is no plain call but has programs inside (a scan).

    Args:
        jaxpr: the program.
        given: names of each of its inputs.
    """
    known: dict[Any, Names] = dict(zip(jaxpr.invars, given))

    def of(value: Any) -> Names:
        return frozenset() if isinstance(value, core.Literal) else known.get(value, frozenset())

    for eqn in jaxpr.eqns:
        operands = [of(value) for value in eqn.invars]
        inner = _program_of(eqn)
        if inner is None:
            results = [frozenset().union(*operands)] * len(eqn.outvars)
        else:
            results = dependencies(inner, operands)
        known |= zip(eqn.outvars, results)
    return [of(value) for value in jaxpr.outvars]


def _program_of(eqn: core.JaxprEqn) -> core.Jaxpr | None:
    """The program that a call runs on its operands as they stand; None for other equations."""
    if eqn.primitive.name not in _CALLS:
        return None
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    program = inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
    fits = program is not None and len(program.invars) == len(eqn.invars)
    return program if fits else None


def slice_program(
    program: core.ClosedJaxpr, outputs: Sequence[int]
) -> tuple[Callable[..., list[jax.Array]], list[int]]:
    """The part of a program that some of its outputs need.

    Args:
        program: the whole.
        outputs: which of its outputs are wanted.

    Returns:
        A function of those inputs that the part takes, and which inputs they are.
    """
    jaxpr = program.jaxpr
    wanted = [jaxpr.outvars[i] for i in outputs]
    needed = {value for value in wanted if not isinstance(value, core.Literal)}
    eqns = []
    for eqn in reversed(jaxpr.eqns):
        if needed.isdisjoint(eqn.outvars):
            continue
        eqns.append(eqn)
        needed |= {value for value in eqn.invars if not isinstance(value, core.Literal)}
    inputs = [i for i, value in enumerate(jaxpr.invars) if value in needed]
    part = jaxpr.replace(
        eqns=eqns[::-1],
        outvars=wanted,
        invars=[jaxpr.invars[i] for i in inputs],
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(part, program.consts)), inputs
