"""The op as one Pallas kernel for GPUs, through the Triton lowering.

A program has sixteen examples, so that both products with the projection are products of matrices:

1. Walk the latents in chunks: scores ``s = z W^T`` and squares ``q = |z|^2``.
2. The head and its gradient, interpreted at padded shapes, in registers.
3. Walk the latents again: ``d_z = d_s W + 2 d_q z``.

Nothing passes between threads through memory, so that no barrier is needed. The parameters'
gradients are summed in the program, and its partial sums left to XLA, whose order does not change
between runs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.local_loss import interpreter
from pallas_kernels.local_loss.heads import EXAMPLES, HeadProgram
from pallas_kernels.local_loss.lanes import Lanes
from pallas_kernels.local_loss.padded import (
    LEAST_SIDE,
    InMemory,
    Outer,
    Padded,
    dot_side,
    is_large,
    padded_shape,
)
from pallas_kernels.local_loss.results import Call, Results, collect, prepare, programs_of
from pallas_kernels.local_loss.tiles import Tiles

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "neg": lax.neg, "abs": lax.abs, "exp": lax.exp, "log": lax.log, "sqrt": lax.sqrt,
    "rsqrt": lax.rsqrt, "sin": lax.sin, "cos": lax.cos, "floor": lax.floor,
    "not": jnp.logical_not, "add": lax.add, "sub": lax.sub, "mul": lax.mul, "div": lax.div,
    "rem": lax.rem, "max": lax.max, "min": lax.min, "eq": lax.eq, "ne": lax.ne, "lt": lax.lt,
    "le": lax.le, "gt": lax.gt, "ge": lax.ge, "and": lax.bitwise_and, "or": lax.bitwise_or,
    "select": jnp.where,
}  # fmt: skip
_REDUCTIONS: dict[str, Callable[..., Any]] = {"sum": jnp.sum, "max": jnp.max, "min": jnp.min}


class PallasOps:
    """:class:`pallas_kernels.local_loss.padded.Ops` on the values of a kernel that is traced."""

    def elementwise(self, name: str, dtype: np.dtype, *values: Any) -> Any:
        """See :class:`Ops`."""
        if name == "cast":
            return values[0].astype(dtype)
        if name == "bitcast":
            return lax.bitcast_convert_type(values[0], dtype)
        shape = np.broadcast_shapes(*(np.shape(value) for value in values))
        # Operands of lax functions have one shape.
        same = [
            value if np.shape(value) == shape else jnp.full(shape, value, value.dtype)
            for value in values
        ]
        return _FUNCTIONS[name](*same)

    def iota(self, shape: tuple[int, ...], axis: int) -> Any:
        """See :class:`Ops`."""
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    def broadcast(self, value: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """See :class:`Ops`."""
        return jnp.broadcast_to(jnp.asarray(value, dtype), shape)

    def reshape(self, value: Any, shape: tuple[int, ...]) -> Any:
        """See :class:`Ops`."""
        return jnp.reshape(value, shape)

    def transpose(self, value: Any, permutation: tuple[int, ...]) -> Any:
        """See :class:`Ops`."""
        return jnp.transpose(value, permutation)

    def reduce(self, name: str, value: Any, axis: int) -> Any:
        """See :class:`Ops`."""
        return _REDUCTIONS[name](value, axis=axis)

    def dot(self, a: Any, b: Any) -> Any:
        """See :class:`Ops`."""
        return jnp.dot(a, b, precision="highest", preferred_element_type=jnp.float32)

    def walk(self, count: int, step: Callable[[Any, Any], Any], start: Any) -> Any:
        """See :class:`Ops`."""
        return lax.fori_loop(jnp.int32(0), jnp.int32(count), step, start)


def _chunk(shape: tuple[int, ...], chunk: Any, axis: int) -> tuple[tuple[Any, Any], Any]:
    """Places of a matrix, sixteen along an axis and all along the other; which are inside it."""
    tile = LEAST_SIDE, dot_side(shape[1 - axis])
    along = chunk * LEAST_SIDE + lax.broadcasted_iota(jnp.int32, tile, 0)
    across = lax.broadcasted_iota(jnp.int32, tile, 1)
    places = (along, across) if axis == 0 else (across, along)
    return places, (along < shape[axis]) & (across < shape[1 - axis])


def _indices(shape: Sequence[int]) -> tuple[list[Any], Any]:
    """The places of an array in its tile, an index an axis, and which are inside it."""
    padded, mask = padded_shape(shape), None
    indices = []
    for axis, side in enumerate(shape):
        index = lax.broadcasted_iota(jnp.int32, padded, axis)
        indices.append(index)
        if padded[axis] != side:
            inside = index < side
            mask = inside if mask is None else mask & inside
    return indices, mask


def _load(ref: Any, shape: tuple[int, ...]) -> Padded:
    """A whole array; one without axes comes with one of length 1."""
    dtype = np.dtype(ref.dtype)
    if not shape:
        return Padded(ref[0], shape, dtype)
    if is_large(shape):

        def load(chunk: Any, axis: int) -> Any:
            places, mask = _chunk(shape, chunk, axis)
            return plgpu.load(ref.at[places], mask=mask, other=0).astype(jnp.float32)

        return Padded(InMemory(load), shape, dtype)
    indices, mask = _indices(shape)
    value = plgpu.load(ref.at[tuple(indices)], mask=mask, other=None if mask is None else 0)
    return Padded(value, shape, dtype)


def _store_partial(ref: Any, program: Any, x: Padded, lanes: Lanes) -> None:
    """A program's part of a sum over the batch, ``[programs, ...]``."""
    if isinstance(x.value, Outer):

        def store(chunk: Any, rows: Any) -> None:
            places, mask = _chunk(x.shape, chunk, 0)
            plgpu.store(ref.at[(program, *places)], rows, mask=mask)

        lanes.store_outer(x.value, store)
        return
    if not x.shape:
        ref[program, 0] = jnp.asarray(x.value, jnp.float32)
        return
    indices, mask = _indices(x.shape)
    plgpu.store(ref.at[(program, *indices)], lanes.tile(x).astype(jnp.float32), mask=mask)


def _kernel(
    *refs: Any,
    program: HeadProgram,
    shapes: tuple[tuple[int, ...], ...],
    tiles: Tiles,
    wants_gradient: bool,
    wants_scores: bool,
) -> None:
    latents_ref, projection_ref, labels_ref, weights_ref, *rest = refs
    held, given = rest[: len(program.consts)], rest[len(program.consts) : len(shapes)]
    loss_ref, *out_refs = rest[len(shapes) :]
    batch, num_latents = latents_ref.shape
    num_rows, wide = projection_ref.shape[0], dot_side(projection_ref.shape[0])
    block = tiles.block_latents
    place = pl.program_id(0) * EXAMPLES + lax.broadcasted_iota(jnp.int32, (EXAMPLES,), 0)
    is_example = place < batch
    # Behind the batch stands its last example once more, with a weight of 0: a head is given only
    # what is an example.
    example = jnp.minimum(place, batch - 1)
    row = lax.broadcasted_iota(jnp.int32, (wide,), 0)
    lane = lax.broadcasted_iota(jnp.int32, (block,), 0)

    def latents_tile(latent: Any) -> Any:
        inside = jnp.broadcast_to((latent < num_latents)[None, :], (EXAMPLES, block))
        at = latents_ref.at[example[:, None], latent[None, :]]
        return plgpu.load(at, mask=inside, other=0.0).astype(jnp.float32)

    def projection_tile(latent: Any) -> Any:
        inside = (row < num_rows)[:, None] & (latent < num_latents)[None, :]
        at = projection_ref.at[row[:, None], latent[None, :]]
        return plgpu.load(at, mask=inside, other=0.0).astype(jnp.float32)

    def product(a: Any, b: Any) -> Any:
        return jnp.dot(a, b, precision="highest", preferred_element_type=jnp.float32)

    # --- 1. Latents to scores.
    def project(step: Any, sums: tuple[Any, Any]) -> tuple[Any, Any]:
        scores, square = sums
        latent = step * block + lane
        z = latents_tile(latent)
        return scores + product(z, projection_tile(latent).T), square + jnp.sum(z * z, axis=1)

    steps = jnp.int32(pl.cdiv(num_latents, block))
    start = (jnp.zeros((EXAMPLES, wide), jnp.float32), jnp.zeros((EXAMPLES,), jnp.float32))
    scores, square = lax.fori_loop(jnp.int32(0), steps, project, start)

    # --- 2. Scores to loss, and back.
    lanes = Lanes(PallasOps())
    float32 = np.dtype(np.float32)
    labels = plgpu.load(labels_ref.at[example])
    weights = plgpu.load(weights_ref.at[example], mask=is_example, other=0.0)
    arrays = [_load(ref, shape) for ref, shape in zip((*held, *given), shapes)]
    outputs = 3 + sum(program.learned) if wants_gradient else 1
    loss, *gradients = interpreter.run(
        lanes,
        program.jaxpr,
        arrays[: len(held)],
        [
            Padded(
                lanes.narrow(scores, (EXAMPLES, wide), (EXAMPLES, num_rows)),
                (EXAMPLES, num_rows),
                float32,
            ),
            Padded(square, (EXAMPLES,), float32),
            Padded(labels, (EXAMPLES,), np.dtype(labels.dtype)),
            Padded(weights, (EXAMPLES,), float32),
            *arrays[len(held) :],
        ],
        [index < outputs for index in range(len(program.jaxpr.outvars))],
    )
    plgpu.store(loss_ref.at[place], lanes.tile(loss), mask=is_example)
    if not wants_gradient:
        return
    d_scores, d_square, *d_learned = gradients
    d_scores = lanes.widened(lanes.mask(d_scores, (1,), 0))
    d_latents_ref, *out_refs = out_refs
    if wants_scores:
        d_scores_ref, *out_refs = out_refs
        inside = is_example[:, None] & (row < num_rows)[None, :]
        at = d_scores_ref.at[place[:, None], row[None, :]]
        plgpu.store(at, d_scores, mask=inside)
    for ref, gradient in zip(out_refs, d_learned, strict=True):
        _store_partial(ref, pl.program_id(0), gradient, lanes)

    # --- 3. Back to the latents.
    d_square = lanes.tile(d_square)

    def back(step: Any, carry: Any) -> Any:
        latent = step * block + lane
        d_z = product(d_scores, projection_tile(latent))
        d_z = d_z + 2.0 * d_square[:, None] * latents_tile(latent)
        inside = is_example[:, None] & (latent < num_latents)[None, :]
        at = d_latents_ref.at[place[:, None], latent[None, :]]
        plgpu.store(at, d_z.astype(d_latents_ref.dtype), mask=inside)
        return carry

    lax.fori_loop(jnp.int32(0), steps, back, jnp.int32(0))


def launch(call: Call) -> Results:
    """Launch the kernel once; see :class:`pallas_kernels.local_loss.results.Call`."""
    prepared, tiles = prepare(call), call.tiles
    # A reference without axes cannot be read.
    readable = [array.reshape(array.shape or (1,)) for array in prepared.arrays]
    outputs = pl.pallas_call(
        functools.partial(
            _kernel,
            program=prepared.program,
            shapes=tuple(tuple(array.shape) for array in prepared.arrays),
            tiles=tiles,
            wants_gradient=call.weights is not None,
            wants_scores=call.wants_scores,
        ),
        out_shape=prepared.outputs,
        grid=(programs_of(call.latents.shape[0]),),
        interpret=call.interpret,
        name="head_loss",
        # Given, it chooses the Triton lowering; without it newer versions take another one.
        compiler_params=plgpu.CompilerParams(
            num_warps=tiles.num_warps, num_stages=tiles.num_stages
        ),
    )(call.latents, call.projection, call.labels, prepared.weights, *readable)
    return collect(call, prepared, outputs)
