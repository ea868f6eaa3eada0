"""The local loss as one Pallas kernel for GPUs, through the Triton lowering.

One program an example, one launch for the loss and its gradient:

1. Walk the activation once, pooling a chunk of channels of one bin at a time; keep running sums of
   squares and of products with the projection; park the latents in the gradient's output buffer.
2. Scores, modulation, softmax, loss, and the gradient back to the scores, from registers.
3. Walk the latents again and overwrite each with its gradient.

The gradient is taken for a cotangent of 1; the loss is linear in its cotangent, so the backward
pass is a product, which XLA fuses with the spreading over the pooling windows into what comes next.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.local_loss.config import Config, Problem, next_power_of_2, widest_window
from pallas_kernels.local_loss.gradient import KernelOutputs, LossOptions, output_shapes
from pallas_kernels.local_loss.reference import NORM_FLOOR_SQUARED


def _bounds(index: Any, size: int, bins: int) -> tuple[Any, Any]:
    """First element of an adaptive pooling bin, and the first one behind it."""
    # `//` on traced integers mixes widths in the Triton lowering; these are never negative.
    bins_32 = jnp.int32(bins)
    start = lax.div(index * jnp.int32(size), jnp.full_like(index, bins_32))
    stop = lax.div(
        (index + 1) * jnp.int32(size) + jnp.int32(bins - 1), jnp.full_like(index, bins_32)
    )
    return start, stop


def _pool_window(
    activation_ref: Any, example: Any, at: Any, channel: Any, problem: Problem, config: Config
) -> Any:
    """The latents of one bin and one chunk of channels, float32 ``[block_channels]``."""
    bins = jnp.int32(problem.pool_size)
    top, bottom = _bounds(lax.div(at, bins), problem.height, problem.pool_size)
    left, right = _bounds(lax.rem(at, bins), problem.width, problem.pool_size)
    offsets = lax.broadcasted_iota(jnp.int32, (config.block_columns, config.block_channels), 0)
    is_channel = (channel < problem.channels)[None, :]
    window = widest_window(problem.width, problem.pool_size)

    def add_row(row: Any, total: Any) -> Any:
        for first in range(0, window, config.block_columns):
            column = left + first + offsets
            total += plgpu.load(
                activation_ref.at[example, row, column, channel[None, :]],
                mask=(column < right) & is_channel,
                other=0.0,
            ).astype(jnp.float32)
        return total

    zeros = jnp.zeros((config.block_columns, config.block_channels), jnp.float32)
    total = jnp.sum(lax.fori_loop(top, bottom, add_row, zeros), axis=0)
    return total / ((bottom - top) * (right - left)).astype(jnp.float32)


def _pool_features(activation_ref: Any, example: Any, latent: Any, problem: Problem) -> Any:
    """One chunk of latents of a feature vector, float32 ``[block_channels]``."""
    start, stop = _bounds(latent, problem.channels, problem.pool_size)

    def add(offset: Any, total: Any) -> Any:
        feature = start + offset
        inside = (feature < stop) & (latent < problem.pool_size)
        value = plgpu.load(activation_ref.at[example, feature], mask=inside, other=0.0)
        return total + value.astype(jnp.float32)

    window = widest_window(problem.channels, problem.pool_size)
    zeros = jnp.zeros(latent.shape, jnp.float32)
    total = lax.fori_loop(jnp.int32(0), jnp.int32(window), add, zeros)
    return total / (stop - start).astype(jnp.float32)


def _local_loss_kernel(
    *refs: Any, problem: Problem, config: Config, statics: LossOptions, interpret: bool
) -> None:
    activation_ref, projection_ref, label_ref, *rest = refs
    modulation_ref: Any = rest.pop(0) if problem.modulation != "none" else None
    loss_ref, latents_ref, scores_ref, d_logits_ref, d_scores_ref, *saved_ref = rest

    def barrier() -> None:
        """What any thread has stored, every thread loads from here on."""
        if not interpret:  # Which runs one operation after the other, and knows no barrier.
            plgpu.debug_barrier()

    example = pl.program_id(0)
    bins = problem.pool_size**2 if problem.is_spatial else 1
    latents_a_bin = problem.channels if problem.is_spatial else problem.pool_size
    chunks = pl.cdiv(latents_a_bin, config.block_channels)
    rows = next_power_of_2(max(problem.rows, 16))
    classes = next_power_of_2(max(problem.classes, 16))
    row = lax.broadcasted_iota(jnp.int32, (rows,), 0)
    lane = lax.broadcasted_iota(jnp.int32, (config.block_channels,), 0)

    def projection_tile(at: Any, latent: Any) -> Any:
        return plgpu.load(
            projection_ref.at[at, row[:, None], latent[None, :]],
            mask=(row < problem.rows)[:, None] & (latent < latents_a_bin)[None, :],
            other=0.0,
        ).astype(jnp.float32)

    def position(step: Any) -> tuple[Any, Any]:
        """Bin and latents of a step of the walk: the chunks of a bin, then the next bin."""
        at = lax.div(step, jnp.int32(chunks))
        return at, lax.rem(step, jnp.int32(chunks)) * config.block_channels + lane

    # --- 1. Pool, and project as the latents come.
    def accumulate(step: Any, sums: tuple[Any, Any]) -> tuple[Any, Any]:
        squares, products = sums
        at, latent = position(step)
        if problem.is_spatial:
            pooled = _pool_window(activation_ref, example, at, latent, problem, config)
        else:
            pooled = _pool_features(activation_ref, example, latent, problem)
        pooled = jnp.where(latent < latents_a_bin, pooled, 0.0)
        for ref in (latents_ref, *saved_ref):
            plgpu.store(ref.at[example, at, latent], pooled, mask=latent < latents_a_bin)
        return squares + pooled * pooled, products + projection_tile(at, latent) * pooled[None, :]

    start = (
        jnp.zeros((config.block_channels,), jnp.float32),
        jnp.zeros((rows, config.block_channels), jnp.float32),
    )
    steps = jnp.int32(bins * chunks)
    squares, products = lax.fori_loop(jnp.int32(0), steps, accumulate, start)
    scores = jnp.sum(products, axis=1)
    square = jnp.sum(squares, axis=0)
    scale = jnp.float32(1.0)
    if statics.normalize:
        scale = lax.rsqrt(jnp.maximum(square, NORM_FLOOR_SQUARED))
        scores = scores * scale
    plgpu.store(scores_ref.at[example, row], scores, mask=row < problem.rows)

    # --- 2. Scores to loss, and back.
    column = lax.broadcasted_iota(jnp.int32, (classes,), 0)
    is_class = column < problem.classes
    part = lax.broadcasted_iota(jnp.int32, (config.block_rows,), 0)

    def modulation_tile(first: Any) -> Any:
        inside = (first + part < problem.rows)[:, None] & is_class[None, :]
        at = modulation_ref.at[(first + part)[:, None], column[None, :]]
        return plgpu.load(at, mask=inside, other=0.0).astype(jnp.float32)

    row_parts = jnp.int32(pl.cdiv(problem.rows, config.block_rows))
    if problem.modulation == "matrix":
        # Registers cannot be indexed, so that chunks of the scores come back from memory, where
        # other threads have put them.
        barrier()

        def modulate(index: Any, logits: Any) -> Any:
            first = index * config.block_rows
            chunk = plgpu.load(
                scores_ref.at[example, first + part], mask=first + part < problem.rows, other=0.0
            )
            return logits + jnp.sum(modulation_tile(first) * chunk[:, None], axis=0)

        logits = lax.fori_loop(
            jnp.int32(0), row_parts, modulate, jnp.zeros((classes,), jnp.float32)
        )
    elif problem.modulation == "vector":
        vector = plgpu.load(modulation_ref.at[column], mask=is_class, other=0.0)
        vector = vector.astype(jnp.float32)
        logits = scores * vector
    else:
        logits = scores
    logits = jnp.where(is_class, logits * (1.0 / statics.temperature), -jnp.inf)
    largest = jnp.max(logits, axis=0)
    exponentials = jnp.exp(logits - largest)
    total = jnp.sum(exponentials, axis=0)
    log_total = jnp.log(total) + largest
    label = plgpu.load(label_ref.at[example])
    smoothing = statics.label_smoothing
    target = jnp.where(column == label, 1.0 - smoothing, 0.0) + smoothing / problem.classes
    target = jnp.where(is_class, target, 0.0)
    finite_logits = jnp.where(is_class, logits, 0.0)
    loss = log_total - jnp.sum(target * finite_logits, axis=0)
    plgpu.store(loss_ref.at[example], loss)
    d_logits = (exponentials / total - target) * (1.0 / statics.temperature)
    plgpu.store(d_logits_ref.at[example, column], d_logits, mask=is_class)

    if problem.modulation == "matrix":

        def demodulate(index: Any, carry: Any) -> Any:
            first = index * config.block_rows
            chunk = jnp.sum(modulation_tile(first) * d_logits[None, :], axis=1)
            at = d_scores_ref.at[example, first + part]
            plgpu.store(at, chunk, mask=first + part < problem.rows)
            return carry

        lax.fori_loop(jnp.int32(0), row_parts, demodulate, jnp.int32(0))
        barrier()
        d_scores = plgpu.load(d_scores_ref.at[example, row], mask=row < problem.rows, other=0.0)
    else:
        d_scores = d_logits * vector if problem.modulation == "vector" else d_logits
        plgpu.store(d_scores_ref.at[example, row], d_scores, mask=row < problem.rows)

    # --- 3. Back to the latents.
    barrier()
    along = jnp.float32(0.0)
    if statics.normalize:
        along = jnp.sum(d_scores * scores, axis=0) * scale
        along = jnp.where(square > NORM_FLOOR_SQUARED, along, 0.0)

    def back(step: Any, carry: Any) -> Any:
        at, latent = position(step)
        inside = latent < latents_a_bin
        d_latent = jnp.sum(projection_tile(at, latent) * d_scores[:, None], axis=0)
        pooled = plgpu.load(latents_ref.at[example, at, latent], mask=inside, other=0.0)
        d_latent = scale * (d_latent - pooled * along)
        plgpu.store(latents_ref.at[example, at, latent], d_latent, mask=inside)
        return carry

    lax.fori_loop(jnp.int32(0), steps, back, jnp.int32(0))


def launch(
    problem: Problem,
    config: Config,
    statics: LossOptions,
    activation: jax.Array,
    projection: jax.Array,
    modulation: jax.Array | None,
    labels: jax.Array,
    *,
    save_latents: bool,
    interpret: bool,
) -> KernelOutputs:
    """Launch the kernel once.

    Args:
        problem: the shapes.
        config: tile sizes.
        statics: temperature and the like.
        activation: ``[batch, height, width, channels]`` or ``[batch, features]``.
        projection: by bin, ``[bins, rows, latents a bin]``.
        modulation: None, ``[rows]`` or ``[rows, classes]``.
        labels: int32 ``[batch]``.
        save_latents: whether the latents themselves are wanted too.
        interpret: whether to interpret the kernel, on any device, slowly.

    Returns:
        Losses and unit gradients.
    """
    batch = activation.shape[0]
    shapes = output_shapes(batch, projection.shape, problem.classes)
    shapes += [shapes[1]] if save_latents else []
    inputs = [activation, projection, labels] + ([] if modulation is None else [modulation])
    results = pl.pallas_call(
        functools.partial(
            _local_loss_kernel,
            problem=problem,
            config=config,
            statics=statics,
            interpret=interpret,
        ),
        out_shape=shapes,
        grid=(batch,),
        interpret=interpret,
        name="local_loss",
        # Given, it chooses the Triton lowering; without it newer versions take another one.
        compiler_params=plgpu.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
    )(*inputs)
    loss, d_latents, scores, d_logits, d_scores, *saved = results
    return KernelOutputs(loss, d_latents, scores, d_logits, d_scores, saved[0] if saved else None)
