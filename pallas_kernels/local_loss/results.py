"""What a form of the op is given, and what it gives."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.local_loss.heads import EXAMPLES, Head, HeadProgram, trace
from pallas_kernels.local_loss.tiles import Tiles


class Results(NamedTuple):
    """The losses of a batch, and the gradients of their weighted sum.

    Attributes:
        loss: float32 ``[batch]``.
        d_latents: ``[batch, latents]``; None, like the rest, where no gradient is asked for.
        d_scores: float32 ``[batch, rows]``; None where the projection has no gradient.
        d_learned: one a parameter that has a gradient, float32.
    """

    loss: jax.Array
    d_latents: jax.Array | None
    d_scores: jax.Array | None
    d_learned: tuple[jax.Array, ...]


class Call(NamedTuple):
    """What a form of the op is given.

    Attributes:
        head: of one example.
        params: a pytree of arrays.
        latents: ``[batch, latents]``, any float dtype.
        projection: ``[rows, latents]``, any float dtype.
        labels: integers ``[batch]``.
        weights: float32 ``[batch]``, of the sum whose gradients are wanted; None for the losses
            alone.
        wants_scores: whether the gradient of the scores is wanted.
        tiles: sizes of the kernel's program.
        interpret: whether to interpret the kernel, on any device, slowly.
    """

    head: Head
    params: Any
    latents: jax.Array
    projection: jax.Array
    labels: jax.Array
    weights: jax.Array | None
    wants_scores: bool
    tiles: Tiles
    interpret: bool = False


Form = Callable[[Call], Results]


class Launch(NamedTuple):
    """What a kernel with the head inside reads and writes.

    Attributes:
        program: the head.
        arrays: its constants, then the parameters' leaves.
        weights: float32 ``[batch]``; ones where nobody looks at them.
        learned: shapes of the parameters that have a gradient.
        outputs: what the kernel writes.
    """

    program: HeadProgram
    arrays: list[jax.Array]
    weights: jax.Array
    learned: list[tuple[int, ...]]
    outputs: list[jax.ShapeDtypeStruct]


def prepare(call: Call) -> Launch:
    """Trace the head, and lay out what its kernel reads and writes.

    Raises:
        KernelUnavailableError: the head has something that no kernel has.
    """
    batch, rows = call.latents.shape[0], call.projection.shape[0]
    program = trace(call.head, rows, call.params, call.labels.dtype)
    leaves = jax.tree.leaves(call.params)
    learned = [leaf.shape for own, leaf in zip(program.learned, leaves) if own]
    outputs = [jax.ShapeDtypeStruct((batch,), jnp.float32)]
    weights = call.weights
    if weights is None:
        weights = jnp.ones(batch, jnp.float32)
    else:
        outputs += _gradient_shapes(call.latents, rows, learned, call.wants_scores)
    return Launch(program, [*map(jnp.asarray, program.consts), *leaves], weights, learned, outputs)


def programs_of(batch: int) -> int:
    """How many programs share a batch."""
    return -(-batch // EXAMPLES)


def _gradient_shapes(
    latents: jax.Array, rows: int, learned: Sequence[tuple[int, ...]], wants_scores: bool
) -> list[jax.ShapeDtypeStruct]:
    """What a kernel writes beside the losses; a parameter's gradient is one part a program.

    Args:
        latents: ``[batch, latents]``.
        rows: of the projection.
        learned: shapes of the parameters that have a gradient; one without axes gets one.
        wants_scores: whether the gradient of the scores is wanted.
    """
    batch = latents.shape[0]
    scores = [jax.ShapeDtypeStruct((batch, rows), jnp.float32)] if wants_scores else []
    return [
        jax.ShapeDtypeStruct(latents.shape, latents.dtype),
        *scores,
        *(
            jax.ShapeDtypeStruct((programs_of(batch), *(shape or (1,))), jnp.float32)
            for shape in learned
        ),
    ]


def collect(call: Call, launch: Launch, outputs: Sequence[jax.Array]) -> Results:
    """A kernel's outputs as results: the programs' parts are added, by XLA in a fixed order."""
    loss, *gradients = outputs
    if not gradients:
        return Results(loss, None, None, ())
    d_latents, *parts = gradients
    d_scores = parts.pop(0) if call.wants_scores else None
    sums = tuple(jnp.sum(p, axis=0).reshape(shape) for p, shape in zip(parts, launch.learned))
    return Results(loss, d_latents, d_scores, sums)
