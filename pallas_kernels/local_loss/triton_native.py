"""The local loss as one kernel in Triton itself, called through jax-triton.

The program of :mod:`pallas_kernels.local_loss.pallas_triton`, which says how it works; here as the
package that Pallas' Triton lowering is being replaced by wants it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from pallas_kernels.local_loss.availability import KernelUnavailableError
from pallas_kernels.local_loss.config import Config, Problem, next_power_of_2, widest_window
from pallas_kernels.local_loss.gradient import KernelOutputs, LossOptions, output_shapes
from pallas_kernels.local_loss.reference import NORM_FLOOR_SQUARED

NAME = "local_loss"


@triton.jit
def local_loss_kernel(  # type: ignore[no-untyped-def]
    activation_ptr,
    projection_ptr,
    labels_ptr,
    modulation_ptr,
    loss_ptr,
    latents_ptr,
    scores_ptr,
    d_logits_ptr,
    d_scores_ptr,
    saved_ptr,
    height: tl.constexpr,
    width: tl.constexpr,
    channels: tl.constexpr,
    pool_size: tl.constexpr,
    latents_a_bin: tl.constexpr,
    num_bins: tl.constexpr,
    window: tl.constexpr,
    num_rows: tl.constexpr,
    num_classes: tl.constexpr,
    padded_rows: tl.constexpr,
    padded_classes: tl.constexpr,
    modulation: tl.constexpr,
    normalize: tl.constexpr,
    temperature: tl.constexpr,
    label_smoothing: tl.constexpr,
    norm_floor: tl.constexpr,
    save_latents: tl.constexpr,
    block_channels: tl.constexpr,
    block_columns: tl.constexpr,
    block_rows: tl.constexpr,
):
    """One example: its loss, and its gradients for a cotangent of 1."""
    # 64 bits once, to the example: an activation may have more than 2**31 elements, one example of
    # it does not.
    example = tl.program_id(0).to(tl.int64)
    chunks: tl.constexpr = (latents_a_bin + block_channels - 1) // block_channels
    steps: tl.constexpr = num_bins * chunks
    num_latents: tl.constexpr = num_bins * latents_a_bin
    if height > 0:
        activation_ptr += example * (height * width * channels)
    else:
        activation_ptr += example * channels
    latents_ptr += example * num_latents
    if save_latents:
        saved_ptr += example * num_latents
    scores_ptr += example * num_rows
    d_scores_ptr += example * num_rows
    d_logits_ptr += example * num_classes
    row = tl.arange(0, padded_rows)
    lane = tl.arange(0, block_channels)
    is_row = row < num_rows

    # --- 1. Pool, and project as the latents come.
    squares = tl.zeros((block_channels,), tl.float32)
    products = tl.zeros((padded_rows, block_channels), tl.float32)
    for step in range(0, steps):
        at = step // chunks
        latent = step % chunks * block_channels + lane
        inside = latent < latents_a_bin
        if height > 0:
            top = at // pool_size * height // pool_size
            bottom = ((at // pool_size + 1) * height + pool_size - 1) // pool_size
            left = at % pool_size * width // pool_size
            right = ((at % pool_size + 1) * width + pool_size - 1) // pool_size
            offset = tl.arange(0, block_columns)
            total = tl.zeros((block_columns, block_channels), tl.float32)
            for image_row in range(top, bottom):
                for first in tl.static_range(0, window, block_columns):
                    column = left + first + offset
                    place = (image_row * width + column) * channels
                    total += tl.load(
                        activation_ptr + place[:, None] + latent[None, :],
                        mask=(column < right)[:, None] & inside[None, :],
                        other=0.0,
                    ).to(tl.float32)
            pooled = tl.sum(total, axis=0) / ((bottom - top) * (right - left)).to(tl.float32)
        else:
            start = latent * channels // pool_size
            stop = ((latent + 1) * channels + pool_size - 1) // pool_size
            pooled = tl.zeros((block_channels,), tl.float32)
            for offset in range(0, window):
                feature = start + offset
                pooled += tl.load(
                    activation_ptr + feature,
                    mask=(feature < stop) & inside,
                    other=0.0,
                ).to(tl.float32)
            pooled = pooled / (stop - start).to(tl.float32)
        pooled = tl.where(inside, pooled, 0.0)
        latent_at = at * latents_a_bin + latent
        tl.store(latents_ptr + latent_at, pooled, mask=inside)
        if save_latents:
            tl.store(saved_ptr + latent_at, pooled, mask=inside)
        weights = tl.load(
            projection_ptr + (at * num_rows + row[:, None]) * latents_a_bin + latent[None, :],
            mask=is_row[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        squares += pooled * pooled
        products += weights * pooled[None, :]
    scores = tl.sum(products, axis=1)
    square = tl.sum(squares, axis=0)
    scale = 1.0
    if normalize:
        scale = tl.rsqrt(tl.maximum(square, norm_floor))
        scores = scores * scale
    tl.store(scores_ptr + row, scores, mask=is_row)

    # --- 2. Scores to loss, and back.
    column = tl.arange(0, padded_classes)
    is_class = column < num_classes
    part = tl.arange(0, block_rows)
    if modulation == "matrix":
        # Registers cannot be indexed, so that chunks of the scores come back from memory, where
        # other threads have put them.
        tl.debug_barrier()
        logits = tl.zeros((padded_classes,), tl.float32)
        for first in range(0, num_rows, block_rows):
            some = first + part
            matrix = tl.load(
                modulation_ptr + some[:, None] * num_classes + column[None, :],
                mask=(some < num_rows)[:, None] & is_class[None, :],
                other=0.0,
            ).to(tl.float32)
            chunk = tl.load(scores_ptr + some, mask=some < num_rows, other=0.0)
            logits += tl.sum(matrix * chunk[:, None], axis=0)
    elif modulation == "vector":
        vector = tl.load(modulation_ptr + column, mask=is_class, other=0.0).to(tl.float32)
        logits = scores * vector
    else:
        logits = scores
    logits = tl.where(is_class, logits * (1.0 / temperature), float("-inf"))
    largest = tl.max(logits, axis=0)
    exponentials = tl.exp(logits - largest)
    sum_of_exponentials = tl.sum(exponentials, axis=0)
    label = tl.load(labels_ptr + example)
    target = tl.where(column == label, 1.0 - label_smoothing, 0.0) + label_smoothing / num_classes
    target = tl.where(is_class, target, 0.0)
    picked = tl.sum(target * tl.where(is_class, logits, 0.0), axis=0)
    tl.store(loss_ptr + example, tl.log(sum_of_exponentials) + largest - picked)
    d_logits = (exponentials / sum_of_exponentials - target) * (1.0 / temperature)
    tl.store(d_logits_ptr + column, d_logits, mask=is_class)
    if modulation == "matrix":
        for first in range(0, num_rows, block_rows):
            some = first + part
            matrix = tl.load(
                modulation_ptr + some[:, None] * num_classes + column[None, :],
                mask=(some < num_rows)[:, None] & is_class[None, :],
                other=0.0,
            ).to(tl.float32)
            chunk = tl.sum(matrix * d_logits[None, :], axis=1)
            tl.store(d_scores_ptr + some, chunk, mask=some < num_rows)
        tl.debug_barrier()
        d_scores = tl.load(d_scores_ptr + row, mask=is_row, other=0.0)
    else:
        d_scores = d_logits
        if modulation == "vector":
            d_scores = d_logits * vector
        tl.store(d_scores_ptr + row, d_scores, mask=is_row)

    # --- 3. Back to the latents.
    tl.debug_barrier()
    along = 0.0
    if normalize:
        along = tl.sum(d_scores * scores, axis=0) * scale
        along = tl.where(square > norm_floor, along, 0.0)
    for step in range(0, steps):
        at = step // chunks
        latent = step % chunks * block_channels + lane
        inside = latent < latents_a_bin
        weights = tl.load(
            projection_ptr + (at * num_rows + row[:, None]) * latents_a_bin + latent[None, :],
            mask=is_row[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        d_latent = tl.sum(weights * d_scores[:, None], axis=0)
        latent_at = at * latents_a_bin + latent
        pooled = tl.load(latents_ptr + latent_at, mask=inside, other=0.0)
        tl.store(latents_ptr + latent_at, scale * (d_latent - pooled * along), mask=inside)


def constants(
    problem: Problem, config: Config, statics: LossOptions, save_latents: bool
) -> dict[str, Any]:
    """What the kernel is specialised for, by parameter."""
    size = problem.width if problem.is_spatial else problem.channels
    return {
        "height": problem.height,
        "width": problem.width,
        "channels": problem.channels,
        "pool_size": problem.pool_size,
        "latents_a_bin": problem.channels if problem.is_spatial else problem.pool_size,
        "num_bins": problem.pool_size**2 if problem.is_spatial else 1,
        "window": widest_window(size, problem.pool_size),
        "num_rows": problem.rows,
        "num_classes": problem.classes,
        "padded_rows": next_power_of_2(max(problem.rows, 16)),
        "padded_classes": next_power_of_2(max(problem.classes, 16)),
        "modulation": problem.modulation,
        "normalize": statics.normalize,
        "temperature": float(statics.temperature),
        "label_smoothing": float(statics.label_smoothing),
        "norm_floor": NORM_FLOOR_SQUARED,
        "save_latents": save_latents,
        "block_channels": config.block_channels,
        "block_columns": config.block_columns,
        "block_rows": config.block_rows,
    }


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
    """Launch the kernel once; the arguments are those of the Pallas kernel's `launch`."""
    batch = activation.shape[0]
    shapes = output_shapes(batch, projection.shape, problem.classes)
    # A kernel's parameters are fixed; the one that is not wanted has no elements to speak of.
    shapes.append(shapes[1] if save_latents else jax.ShapeDtypeStruct((1,), jnp.float32))
    # Likewise: without a modulation nothing reads that pointer.
    inputs = (activation, projection, labels, labels if modulation is None else modulation)
    fixed = constants(problem, config, statics, save_latents)
    if interpret:
        if not isinstance(local_loss_kernel, InterpretedFunction):
            raise KernelUnavailableError(
                "Triton was imported without its interpreter; set TRITON_INTERPRET=1 in the "
                "environment before Python starts, or use 'pallas' with interpret=True."
            )
        results = jax.pure_callback(
            lambda *arrays: _interpret(batch, shapes, fixed, *arrays), shapes, *inputs
        )
    else:
        import jax_triton  # Optional, and needs jaxlib's GPU plugin.

        results = jax_triton.triton_call(
            *inputs,
            kernel=local_loss_kernel,
            out_type=shapes,
            grid=(batch,),
            name=NAME,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **fixed,
        )
    loss, d_latents, scores, d_logits, d_scores, saved = results
    return KernelOutputs(
        loss, d_latents, scores, d_logits, d_scores, saved if save_latents else None
    )


class _Buffer:
    """A NumPy array as Triton's interpreter wants a tensor: what it asks for, and no more."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = str(array.dtype)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_Buffer":
        return self

    def cpu(self) -> "_Buffer":
        return self

    def new_empty(self, size: int, device: str) -> "_Buffer":
        del size, device
        return self

    def set_(self, *view: Any) -> None:
        """The storage is shared: there is nothing to set."""

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides

    def copy_(self, other: "_Buffer") -> None:
        """Nothing was copied to the host, so that nothing is copied back."""


def _interpret(batch: int, shapes: Any, fixed: dict[str, Any], *inputs: Any) -> list[np.ndarray]:
    """Run the kernel in Triton's interpreter, on the host."""
    # Poisoned: what is read before it was written shows.
    results = [np.full(shape.shape, np.nan, np.float32) for shape in shapes]
    arrays = [np.ascontiguousarray(array) for array in inputs] + results
    with np.errstate(all="ignore"):
        local_loss_kernel[(batch,)](*map(_Buffer, arrays), **fixed)
    return results
