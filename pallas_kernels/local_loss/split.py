"""The op in three: a kernel for the scores, the head by XLA, a kernel for the way back.

For any head, with any number of parameters; one that couples the examples of a batch too.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.local_loss.heads import EXAMPLES, is_learned, per_example
from pallas_kernels.local_loss.padded import dot_side
from pallas_kernels.local_loss.results import Call, Results, programs_of
from pallas_kernels.local_loss.tiles import Tiles


def _product(a: Any, b: Any) -> Any:
    return jnp.dot(a, b, precision="highest", preferred_element_type=jnp.float32)


def _tile(ref: Any, first: Any, size: int, latent: Any) -> Any:
    """Rows from `first` on, at some latents, float32; zeros where there are none."""
    row = first + lax.broadcasted_iota(jnp.int32, (size,), 0)
    inside = (row < ref.shape[0])[:, None] & (latent < ref.shape[1])[None, :]
    at = ref.at[row[:, None], latent[None, :]]
    return plgpu.load(at, mask=inside, other=0.0).astype(jnp.float32)


def _scores_kernel(
    latents_ref: Any, projection_ref: Any, scores_ref: Any, square_ref: Any, *, tiles: Tiles
) -> None:
    batch, num_latents = latents_ref.shape
    num_rows, block = projection_ref.shape[0], tiles.block_latents
    wide = dot_side(num_rows)
    first = pl.program_id(0) * EXAMPLES

    def project(step: Any, sums: tuple[Any, Any]) -> tuple[Any, Any]:
        scores, square = sums
        latent = step * block + lax.broadcasted_iota(jnp.int32, (block,), 0)
        z = _tile(latents_ref, first, EXAMPLES, latent)
        w = _tile(projection_ref, 0, wide, latent)
        return scores + _product(z, w.T), square + jnp.sum(z * z, axis=1)

    start = (jnp.zeros((EXAMPLES, wide), jnp.float32), jnp.zeros((EXAMPLES,), jnp.float32))
    steps = jnp.int32(pl.cdiv(num_latents, block))
    scores, square = lax.fori_loop(jnp.int32(0), steps, project, start)
    example = first + lax.broadcasted_iota(jnp.int32, (EXAMPLES,), 0)
    row = lax.broadcasted_iota(jnp.int32, (wide,), 0)
    inside = (example < batch)[:, None] & (row < num_rows)[None, :]
    plgpu.store(scores_ref.at[example[:, None], row[None, :]], scores, mask=inside)
    plgpu.store(square_ref.at[example], square, mask=example < batch)


def _back_kernel(
    latents_ref: Any,
    projection_ref: Any,
    d_scores_ref: Any,
    d_square_ref: Any,
    d_latents_ref: Any,
    *,
    tiles: Tiles,
) -> None:
    batch, num_latents = latents_ref.shape
    block, wide = tiles.block_latents, dot_side(projection_ref.shape[0])
    first = pl.program_id(0) * EXAMPLES
    example = first + lax.broadcasted_iota(jnp.int32, (EXAMPLES,), 0)
    latent = pl.program_id(1) * block + lax.broadcasted_iota(jnp.int32, (block,), 0)
    d_scores = _tile(d_scores_ref, first, EXAMPLES, lax.broadcasted_iota(jnp.int32, (wide,), 0))
    d_square = plgpu.load(d_square_ref.at[example], mask=example < batch, other=0.0)
    d_z = _product(d_scores, _tile(projection_ref, 0, wide, latent))
    d_z = d_z + 2.0 * d_square[:, None] * _tile(latents_ref, first, EXAMPLES, latent)
    inside = (example < batch)[:, None] & (latent < num_latents)[None, :]
    at = d_latents_ref.at[example[:, None], latent[None, :]]
    plgpu.store(at, d_z.astype(d_latents_ref.dtype), mask=inside)


def launch(call: Call) -> Results:
    """Launch both kernels; see :class:`pallas_kernels.local_loss.results.Call`."""
    latents, projection, tiles = call.latents, call.projection, call.tiles
    (batch, num_latents), num_rows = latents.shape, projection.shape[0]
    # Given, they choose the Triton lowering; without them newer versions take another one.
    compiler = plgpu.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    scores, square = pl.pallas_call(
        functools.partial(_scores_kernel, tiles=tiles),
        out_shape=[
            jax.ShapeDtypeStruct((batch, num_rows), jnp.float32),
            jax.ShapeDtypeStruct((batch,), jnp.float32),
        ],
        grid=(programs_of(batch),),
        interpret=call.interpret,
        name="head_loss_scores",
        compiler_params=compiler,
    )(latents, projection)
    leaves, tree = jax.tree.flatten(call.params)
    learned = [leaf for leaf in leaves if is_learned(leaf)]

    def losses(scores: jax.Array, square: jax.Array, learned: list[jax.Array]) -> jax.Array:
        given = iter(learned)
        everything = [next(given) if is_learned(leaf) else leaf for leaf in leaves]
        params = jax.tree.unflatten(tree, everything)
        return per_example(call.head, scores, square, params, call.labels).astype(jnp.float32)

    if call.weights is None:
        return Results(losses(scores, square, learned), None, None, ())
    loss, pullback = jax.vjp(losses, scores, square, learned)
    d_scores, d_square, d_learned = pullback(call.weights)
    d_latents = pl.pallas_call(
        functools.partial(_back_kernel, tiles=tiles),
        out_shape=jax.ShapeDtypeStruct(latents.shape, latents.dtype),
        grid=(programs_of(batch), pl.cdiv(num_latents, tiles.block_latents)),
        interpret=call.interpret,
        name="head_loss_back",
        compiler_params=compiler,
    )(latents, projection, d_scores, d_square)
    return Results(loss, d_latents, d_scores if call.wants_scores else None, tuple(d_learned))
