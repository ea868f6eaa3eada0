"""A model's forward pass as one program with an input of its own at every cut."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from lls_jax.frameworks.slices import Names, dependencies

Arrays = dict[str, jax.Array]
# run(params, state, x, key, train, given) -> (seen, output, state): the model on a batch. At each
# cut it records what comes in, and goes on with what is given of that name, if anything.
Run = Callable[
    [Arrays, Arrays, jax.Array, jax.Array | None, bool, Mapping[str, jax.Array]],
    tuple[Arrays, jax.Array, Arrays],
]
# Kind and name of a program's input; those of kind INPUT are numbered, 0 is the model's own.
Label = tuple[str, Any]
PARAM, STATE, INPUT, KEY = "parameter", "state", "input", "key"


class Cuts:
    """What is called at each cut in one pass.

    Attributes:
        given: values to go on with, by name; what has none goes on as it is.
        seen: what came in, by name.
    """

    def __init__(self, given: Mapping[str, jax.Array]) -> None:
        self.given = given
        self.seen: Arrays = {}

    def __call__(self, name: str, value: jax.Array) -> jax.Array:
        """Record a value that comes in, and give the one to go on with.

        Raises:
            ValueError: the module was called before.
        """
        if name in self.seen:
            raise ValueError(
                f"module {name!r} is called more than once in a forward pass, so that no block can "
                "begin there; cut at a module that is called once."
            )
        self.seen[name] = value
        return self.given.get(name, value)


class Trace(NamedTuple):
    """A forward pass as a program.

    Attributes:
        program: its outputs are what comes in at each cut, the model's output, and the new state.
        inputs: a label of each input.
        seen: shapes and dtypes, of a batch: what comes in at each cut, then the model's output.
        outputs: labels of the inputs that each of these depends on.
        states: likewise of the new state, by name; without what is handed through.
    """

    program: core.ClosedJaxpr
    inputs: list[Label]
    seen: list[jax.ShapeDtypeStruct]
    outputs: list[Names]
    states: dict[str, Names]


def trace_forward(
    run: Run,
    params: Arrays,
    state: Arrays,
    x: jax.ShapeDtypeStruct,
    names: Sequence[str],
    *,
    train: bool,
    random: bool,
) -> Trace:
    """Trace a forward pass.

    Args:
        run: the model.
        params: its parameters, of which the shapes count.
        state: likewise, what it keeps beside them.
        x: shape and dtype of a batch.
        names: the cuts.
        train: whether BatchNorm trains.
        random: whether dropout draws.

    Raises:
        ValueError: a cut is not passed, or passed twice.
    """
    key = jax.random.key(0) if random else None

    def record(params: Arrays, state: Arrays, x: jax.Array, key: Any) -> tuple[Arrays, jax.Array]:
        return run(params, state, x, key, train, {})[:2]

    found, output = jax.eval_shape(record, params, state, x, key)
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"`cut_at` names {', '.join(map(repr, missing))}, which the forward pass does not "
            "call; name modules that it calls, by their path in the model."
        )
    seen = [found[name] for name in names]

    def forward(params: Arrays, state: Arrays, key: Any, inputs: list[jax.Array]) -> Any:
        given = dict(zip(names, inputs[1:]))
        seen, output, new = run(params, state, inputs[0], key, train, given)
        return [*(seen[name] for name in names), output], new

    program = jax.make_jaxpr(forward)(params, state, key, [x, *seen])
    labels: list[Label] = [
        *((PARAM, name) for name in sorted(params)),
        *((STATE, name) for name in sorted(state)),
        *([(KEY, None)] if random else []),
        *((INPUT, i) for i in range(1 + len(names))),
    ]
    needed = dependencies(program.jaxpr, [frozenset([label]) for label in labels])
    variables = dict(zip(labels, program.jaxpr.invars))
    after = dict(zip(sorted(state), program.jaxpr.outvars[1 + len(names) :]))
    states = {
        name: found
        for name, found in zip(sorted(state), needed[1 + len(names) :])
        if after[name] is not variables[STATE, name]
    }
    return Trace(program, labels, [*seen, output], needed[: 1 + len(names)], states)
