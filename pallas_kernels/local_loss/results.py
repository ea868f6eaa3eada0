"""What every form of the op computes, and how it gives it."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.local_loss.heads import EXAMPLES, Head
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


class Form(Protocol):
    """A way to compute the op."""

    def __call__(
        self,
        head: Head,
        params: Any,
        latents: jax.Array,
        projection: jax.Array,
        labels: jax.Array,
        weights: jax.Array | None,
        *,
        wants_scores: bool,
        tiles: Tiles,
        interpret: bool,
    ) -> Results:
        """Compute it.

        Args:
            head: of one example.
            params: a pytree of arrays.
            latents: ``[batch, latents]``.
            projection: ``[rows, latents]``.
            labels: integers ``[batch]``.
            weights: float32 ``[batch]``, of the sum whose gradients are wanted; None for the
                losses alone.
            wants_scores: whether the gradient of the scores is wanted.
            tiles: sizes of the kernel's program.
            interpret: whether to interpret the kernel, on any device, slowly.
        """


def programs_of(batch: int) -> int:
    """How many programs share a batch."""
    return -(-batch // EXAMPLES)


def gradient_shapes(
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


def collect(
    loss: jax.Array,
    gradients: Sequence[jax.Array],
    learned: Sequence[tuple[int, ...]],
    wants_scores: bool,
) -> Results:
    """A kernel's outputs as results: the programs' parts are added, by XLA in a fixed order."""
    if not gradients:
        return Results(loss, None, None, ())
    d_latents, *rest = gradients
    d_scores = rest.pop(0) if wants_scores else None
    sums = tuple(jnp.sum(part, axis=0).reshape(shape) for part, shape in zip(rest, learned))
    return Results(loss, d_latents, d_scores, sums)
