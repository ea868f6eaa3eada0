"""A forward pass of any framework, cut into blocks at named modules.

A block begins at each named module: what the module is called with is the activation of the block
before, and what is computed from there to the next cut is the block. The forward pass is arbitrary
Python, so the cut is made in its trace. All named modules are intercepted in one pass; what comes
in at each is recorded, and an input of its own goes on in its place. That pass is traced once, to a
program of many inputs, and each block is the slice of the program that gives its activation.

So a block is a pure function ``(params, state, x, key) -> (activation, state)`` of its own
parameters alone, and everything here works on it as on our own blocks: one update after another,
any ``reach``, the optimizers, ``lls_jax.fit``, evaluation and checkpoints. And locality is proved,
not hoped for: the program says which inputs and parameters each activation depends on. A path that
goes around a cut (a skip connection), or a parameter that two blocks share, is an error that names
it, before anything is trained.

The other way is to replace what comes in at each cut by its ``stop_gradient``, and to take one
gradient of the sum of the local losses. It is as exact where nothing goes around a cut, and the
model is traced as it stands. But it does not notice what does go around, gives the blocks no order
and no optimizer of their own, and leaves it to XLA to free a block's activations before the next
block's are made. What is paid for slices: an input's size is fixed at the cut, a shape of the batch
is traced once more, and a cut cannot lie inside a compiled loop (``nnx.scan``, ``jax.lax.scan``).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from lls_jax.frameworks.slices import Names, dependencies, slice_program

Arrays = dict[str, jax.Array]
# run(params, state, x, key, train, given) -> (seen, output, state): the model on a batch. At each
# cut it records what comes in, and goes on with what is given of that name, if anything.
Run = Callable[
    [Arrays, Arrays, jax.Array, jax.Array | None, bool, Mapping[str, jax.Array]],
    tuple[Arrays, jax.Array, Arrays],
]

_PARAM, _STATE, _INPUT, _KEY = "parameter", "state", "input", "key"


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


class Part(NamedTuple):
    """A block of a cut model, or what follows the last cut.

    Attributes:
        params: names of the parameters that it alone depends on.
        state: names of the state that it alone reads or changes.
        output: of one example.
    """

    params: tuple[str, ...]
    state: tuple[str, ...]
    output: jax.ShapeDtypeStruct


class _Slice(NamedTuple):
    run: Callable[..., list[jax.Array]]
    inputs: list[tuple[str, Any]]
    state: tuple[str, ...]


class _Trace(NamedTuple):
    """A forward pass as a program of all inputs.

    Attributes:
        program: traced with what follows.
        inputs: kind and name of each input.
        shapes: of them.
        outputs: what each input, parameter and state each activation depends on, then the output.
        states: likewise, of the new state by name; without what is handed through.
    """

    program: core.ClosedJaxpr
    inputs: list[tuple[str, Any]]
    shapes: list[Any]
    outputs: list[Names]
    states: dict[str, Names]


class CutModel:
    """A model in parts: blocks in the order in which they run, and what follows the last cut.

    It is hashed by identity, as compiled steps need of it; :meth:`apply` runs a part.

    Attributes:
        params: initial values of all parameters, by name.
        state: likewise of what the model keeps beside them.
        example: the shape and dtype of one input.
        names: the cuts, in the order in which they are passed.
        parts: one more than there are cuts.
    """

    def __init__(
        self,
        run: Run,
        params: Arrays,
        state: Arrays,
        example: jax.ShapeDtypeStruct,
        names: Sequence[str],
        title: str,
    ) -> None:
        """Cut a model.

        Args:
            run: the model; see :data:`Run`.
            params: its parameters.
            state: what it keeps beside them.
            example: the shape and dtype of one input, without the batch.
            names: modules at which a block begins, in any order.
            title: what the model is called in descriptions.

        Raises:
            ValueError: it cannot be cut so; the message says why.
        """
        if not names or len(set(names)) != len(names):
            raise ValueError(
                f"`cut_at` is {list(names)!r}; expected different names of modules, at least one: "
                "the last is where the classifier begins."
            )
        self._run, self.params, self.state, self.example = run, params, state, example
        self.names = tuple(names)
        self._slices: dict[Any, list[_Slice]] = {}
        self.names = self._in_order(self._trace(2, True, True).outputs)
        training, evaluating = self._trace(2, True, True), self._trace(2, False, False)
        self.parts = self._own(training, evaluating)
        self._check_last(training)
        self.title = title

    def __repr__(self) -> str:
        shapes = {name: (value.shape, str(value.dtype)) for name, value in self.params.items()}
        digest = hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest()[:16]
        return (
            f"CutModel({self.title} cut at {', '.join(self.names)}; of {self.example.shape} "
            f"{self.example.dtype}; {len(shapes)} parameters {digest})"
        )

    def apply(
        self,
        index: int,
        params: Arrays,
        state: Arrays,
        x: jax.Array,
        key: jax.Array | None,
        train: bool,
    ) -> tuple[jax.Array, Arrays]:
        """Run a part.

        Args:
            index: which.
            params: its parameters.
            state: its state.
            x: its input, ``[batch, ...]``.
            key: of dropout; None for none.
            train: whether BatchNorm uses, and averages, this batch's statistics.

        Returns:
            Its activation, and its new state.

        Raises:
            ValueError: the input has another shape than the one that the model was cut with.
        """
        expected = self._input_of(index)
        if x.shape[1:] != expected.shape:
            raise ValueError(
                f"an input of shape {x.shape} for a part that was cut to take [batch, "
                f"{', '.join(map(str, expected.shape))}]; cut the model with an example of the "
                "size that it is to take."
            )
        mode = (x.shape[0], train, key is not None)
        if mode not in self._slices:
            self._slices[mode] = self._slice_all(self._trace(*mode))
        part = self._slices[mode][index]
        known: dict[tuple[str, Any], Any] = {
            **{(_PARAM, name): value for name, value in params.items()},
            **{(_STATE, name): value for name, value in state.items()},
            (_INPUT, index): x.astype(expected.dtype),
            (_KEY, None): key,
        }
        # An input that it is given and does not depend on may be anything.
        arguments = [known.get(named, self._zeros(named, x.shape[0])) for named in part.inputs]
        activation, *changed = part.run(*arguments)
        return activation, {**state, **dict(zip(part.state, changed))}

    def _zeros(self, named: tuple[str, Any], batch: int) -> jax.Array:
        kind, name = named
        if kind == _INPUT:
            one = self._input_of(name)
            return jnp.zeros((batch, *one.shape), one.dtype)
        if kind == _KEY:
            return jax.random.key(0)
        return jnp.zeros_like((self.params if kind == _PARAM else self.state)[name])

    def _input_of(self, index: int) -> jax.ShapeDtypeStruct:
        return self.example if index == 0 else self.parts[index - 1].output

    def _trace(self, batch: int, train: bool, random: bool) -> _Trace:
        """The forward pass with an input of its own at every cut."""
        x = jax.ShapeDtypeStruct((batch, *self.example.shape), self.example.dtype)
        key = jax.random.key(0) if random else None

        def record(params: Arrays, state: Arrays, x: jax.Array, key: Any) -> Arrays:
            return self._run(params, state, x, key, train, {})[0]

        seen = jax.eval_shape(record, self.params, self.state, x, key)
        if missing := [name for name in self.names if name not in seen]:
            raise ValueError(
                f"`cut_at` names {', '.join(map(repr, missing))}, which the forward pass does not "
                "call; name modules that it calls, by their path in the model."
            )

        def forward(params: Arrays, state: Arrays, key: Any, inputs: list[jax.Array]) -> Any:
            given = dict(zip(self.names, inputs[1:]))
            seen, output, new = self._run(params, state, inputs[0], key, train, given)
            return [*(seen[name] for name in self.names), output], new

        inputs = [x, *(seen[name] for name in self.names)]
        arguments = (self.params, self.state, key, inputs)
        program = jax.make_jaxpr(forward)(*arguments)
        labels = [
            *((_PARAM, name) for name in sorted(self.params)),
            *((_STATE, name) for name in sorted(self.state)),
            *([(_KEY, None)] if random else []),
            *((_INPUT, i) for i in range(len(inputs))),
        ]
        found = dependencies(program.jaxpr, [frozenset([label]) for label in labels])
        variables = dict(zip(labels, program.jaxpr.invars))
        results = dict(zip(sorted(self.state), range(len(inputs), len(found))))
        states = {
            name: found[i]
            for name, i in results.items()
            if program.jaxpr.outvars[i] is not variables[_STATE, name]
        }
        shapes = jax.tree.leaves(arguments)
        return _Trace(program, labels, shapes, found[: len(inputs)], states)

    def _in_order(self, outputs: list[Names]) -> tuple[str, ...]:
        """The cuts as they follow each other; each activation needs the one before and no other."""
        after: dict[int, int] = {}
        for i, found in enumerate(outputs):
            what = f"what {self.names[i]!r} is called with" if i < len(self.names) else "the output"
            needed = sorted(name for kind, name in found if kind == _INPUT)
            if len(needed) != 1 or needed[0] in after:
                cuts = [("the model's input", *map(repr, self.names))[i] for i in needed]
                reason = (
                    f"depends on {' and on '.join(cuts) or 'no input'} at once: a path (like a "
                    "skip connection) goes around a cut"
                    if len(needed) != 1
                    else f"needs {cuts[0]} and nothing after it, as another cut does: they do not "
                    "follow each other"
                )
                raise ValueError(f"{what} {reason}; cut where everything passes one module.")
            after[needed[0]] = i
        order, at = [], 0
        while (at := after[at]) < len(self.names):
            order.append(self.names[at])
            at += 1
        if len(order) < len(self.names):
            rest = ", ".join(repr(name) for name in self.names if name not in order)
            raise ValueError(f"the output does not depend on what comes in at {rest}.")
        return tuple(order)

    def _own(self, training: _Trace, evaluating: _Trace) -> list[Part]:
        """What each part owns, for which no other part has any use."""
        needs: list[set[tuple[str, Any]]] = [set() for _ in training.outputs]
        for trace in (training, evaluating):
            for own, found in zip(needs, trace.outputs):
                own |= found
            for name, found in trace.states.items():
                users = [i for i, own in enumerate(needs) if (_STATE, name) in own]
                inputs = [i for kind, i in found if kind == _INPUT]
                # What changes by itself, like a count that nobody reads, goes with the first.
                for i in set(inputs) or set(users) or {0}:
                    needs[i] |= found | {(_STATE, name)}
        for i, own in enumerate(needs):
            for other in needs[i + 1 :]:
                for kind, name in sorted((own & other) - {(_KEY, None)}, key=repr):
                    raise ValueError(
                        f"{kind} {name!r} belongs to two blocks, so that neither could learn it by "
                        "itself; cut where no weights are shared across cuts."
                    )
        shapes = [
            *training.shapes[len(training.shapes) - len(self.names) :],
            training.program.out_avals[len(self.names)],
        ]
        return [
            Part(
                *(tuple(sorted(n for k, n in own if k == kind)) for kind in (_PARAM, _STATE)),
                jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype),
            )
            for own, shape in zip(needs, shapes)
        ]

    def _check_last(self, training: _Trace) -> None:
        last, begins = self.parts[-1], self.names[-1]
        if last.state or (_KEY, None) in training.outputs[-1]:
            what = f"keeps {', '.join(last.state)}" if last.state else "draws dropout"
            raise ValueError(
                f"what follows the last cut, {begins!r}, {what}; it is the classifier, which learns "
                "from its logits alone: cut once more after it."
            )
        if len(last.output.shape) != 1:
            raise ValueError(
                f"the output of an example has shape {last.output.shape}; expected logits, "
                "[classes]."
            )

    def _slice_all(self, trace: _Trace) -> list[_Slice]:
        places = {name: len(self.parts) + i for i, name in enumerate(sorted(self.state))}
        slices = []
        for i, part in enumerate(self.parts):
            changed = tuple(name for name in part.state if name in trace.states)
            run, inputs = slice_program(trace.program, [i, *(places[name] for name in changed)])
            slices.append(_Slice(run, [trace.inputs[j] for j in inputs], changed))
        return slices
