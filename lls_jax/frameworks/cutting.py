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
block's are made. A step's temporaries with 3, 6 and 12 equal blocks (convolution, BatchNorm, ReLU
of NNX; lls_mxm, SGD; CPU, jax 0.10.2 and 0.12.0.1 alike) were 8.0, 8.0 and 8.0 activations in
slices, 10.2, 16.1 and 17.0 with one gradient of the summed losses, and 10.2, 19.2 and 37.2 with
backpropagation.

What is paid for slices: an input's size is fixed at the cut, each new batch size is traced once
more, and a cut cannot lie inside a compiled loop (``nnx.scan``, ``jax.lax.scan``).
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lls_jax.frameworks.slices import Names, slice_program
from lls_jax.frameworks.tracing import (
    INPUT,
    KEY,
    PARAM,
    STATE,
    Arrays,
    Label,
    Run,
    Trace,
    trace_forward,
)


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
    inputs: list[Label]
    state: tuple[str, ...]


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
        self.names = self._in_order(self._trace(2, False, False).outputs)
        training, evaluating = self._trace(2, True, True), self._trace(2, False, False)
        self._in_order(training.outputs)
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
        known: dict[Label, Any] = {
            **{(PARAM, name): value for name, value in params.items()},
            **{(STATE, name): value for name, value in state.items()},
            (INPUT, index): x.astype(expected.dtype),
            (KEY, None): key,
        }
        # An input that it is given and does not depend on may be anything.
        arguments = [known.get(named, self._zeros(named, x.shape[0])) for named in part.inputs]
        activation, *changed = part.run(*arguments)
        return activation, {**state, **dict(zip(part.state, changed))}

    def _zeros(self, named: Label, batch: int) -> jax.Array:
        kind, name = named
        if kind == INPUT:
            one = self._input_of(name)
            return jnp.zeros((batch, *one.shape), one.dtype)
        if kind == KEY:
            return jax.random.key(0)
        return jnp.zeros_like((self.params if kind == PARAM else self.state)[name])

    def _input_of(self, index: int) -> jax.ShapeDtypeStruct:
        return self.example if index == 0 else self.parts[index - 1].output

    def _trace(self, batch: int, train: bool, random: bool) -> Trace:
        x = jax.ShapeDtypeStruct((batch, *self.example.shape), self.example.dtype)
        of = (self._run, self.params, self.state, x, self.names)
        return trace_forward(*of, train=train, random=random)

    def _in_order(self, outputs: list[Names]) -> tuple[str, ...]:
        """The cuts as they follow each other; each activation needs the one before and no other."""
        after: dict[int, int] = {}
        for i, found in enumerate(outputs):
            what = f"what {self.names[i]!r} is called with" if i < len(self.names) else "the output"
            needed = sorted(name for kind, name in found if kind == INPUT)
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

    def _own(self, training: Trace, evaluating: Trace) -> list[Part]:
        """What each part owns, for which no other part has any use."""
        needs: list[set[Label]] = [set() for _ in training.outputs]
        for trace in (training, evaluating):
            for own, found in zip(needs, trace.outputs):
                own |= found
            for name, found in trace.states.items():
                for i in (i for kind, i in found if kind == INPUT):
                    needs[i] |= found | {(STATE, name)}
        for name in training.states:
            # What changes whatever comes in, like a count: who reads it, or else the first.
            if not any((STATE, name) in own for own in needs):
                needs[0].add((STATE, name))
        for i, own in enumerate(needs):
            for other in needs[i + 1 :]:
                for kind, name in sorted((own & other) - {(KEY, None)}, key=repr):
                    raise ValueError(
                        f"{kind} {name!r} belongs to two blocks, so that neither could learn it by "
                        "itself; cut where no weights are shared across cuts."
                    )

        def names(own: set[Label], wanted: str) -> tuple[str, ...]:
            return tuple(sorted(name for kind, name in own if kind == wanted))

        return [
            Part(
                names(own, PARAM),
                names(own, STATE),
                jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype),
            )
            for own, shape in zip(needs, training.seen)
        ]

    def _check_last(self, training: Trace) -> None:
        last, begins = self.parts[-1], self.names[-1]
        if last.state or (KEY, None) in training.outputs[-1]:
            what = f"keeps {', '.join(last.state)}" if last.state else "draws dropout"
            raise ValueError(
                f"what follows the last cut, {begins!r}, {what}; it is the classifier, and may "
                "have parameters only: cut once more after it."
            )
        if len(last.output.shape) != 1:
            raise ValueError(
                f"the output of an example has shape {last.output.shape}; expected logits, "
                "[classes]."
            )

    def _slice_all(self, trace: Trace) -> list[_Slice]:
        places = {name: len(self.parts) + i for i, name in enumerate(sorted(self.state))}
        slices = []
        for i, part in enumerate(self.parts):
            changed = tuple(name for name in part.state if name in trace.states)
            run, inputs = slice_program(trace.program, [i, *(places[name] for name in changed)])
            slices.append(_Slice(run, [trace.inputs[j] for j in inputs], changed))
        return slices
