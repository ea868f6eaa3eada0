"""The op as one kernel in Triton itself, called through jax-triton.

The program of :mod:`pallas_kernels.local_loss.pallas_triton`, which says how it works, for the day
when Pallas' Triton lowering is gone.
"""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from triton.runtime.interpreter import InterpretedFunction

from pallas_kernels.errors import KernelUnavailableError
from pallas_kernels.local_loss.heads import Head, trace
from pallas_kernels.local_loss.results import (
    Results,
    collect,
    gradient_shapes,
    programs_of,
)
from pallas_kernels.local_loss.tiles import Tiles
from pallas_kernels.local_loss.triton_source import constants, load_kernel, write_source


def launch(
    head: Head,
    params: Any,
    latents: jax.Array,
    projection: jax.Array,
    labels: jax.Array,
    weights: jax.Array | None,
    *,
    wants_scores: bool,
    tiles: Tiles,
    interpret: bool = False,
) -> Results:
    """Launch the kernel once; see :class:`pallas_kernels.local_loss.results.Form`."""
    (batch, num_latents), num_rows = latents.shape, projection.shape[0]
    program = trace(head, num_rows, params, labels.dtype)
    leaves = jax.tree.leaves(params)
    arrays = [*map(jnp.asarray, program.consts), *leaves]
    wants_gradient = weights is not None
    kernel = load_kernel(
        write_source(
            program,
            [(tuple(array.shape), np.dtype(array.dtype)) for array in arrays],
            num_rows,
            np.dtype(labels.dtype),
            wants_gradient,
            wants_scores,
        )
    )
    learned = [leaf.shape for own, leaf in zip(program.learned, leaves) if own]
    shapes = [jax.ShapeDtypeStruct((batch,), jnp.float32)]
    if wants_gradient:
        shapes += gradient_shapes(latents, num_rows, learned, wants_scores)
    weights = jnp.ones(batch, jnp.float32) if weights is None else weights
    fixed = constants(batch, num_latents, num_rows, tiles.block_latents)
    inputs = (latents, projection, labels, weights, *arrays)
    grid = (programs_of(batch),)
    if interpret:
        if not isinstance(kernel, InterpretedFunction):
            raise KernelUnavailableError(
                "Triton was imported without its interpreter; set TRITON_INTERPRET=1 in the "
                "environment before Python starts, or use 'pallas' with interpret=True."
            )
        results = jax.pure_callback(
            lambda *arrays: _interpret(kernel, grid, shapes, fixed, *arrays), shapes, *inputs
        )
    else:
        # Optional, and needs jaxlib's GPU plugin.
        jax_triton: Any = importlib.import_module("jax_triton")
        results = jax_triton.triton_call(
            *inputs,
            kernel=kernel,
            out_type=shapes,
            grid=grid,
            name="head_loss",
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            **fixed,
        )
    loss, *gradients = results
    return collect(loss, gradients, learned, wants_scores)


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


def _interpret(
    kernel: Any, grid: Any, shapes: Any, fixed: dict[str, Any], *inputs: Any
) -> list[np.ndarray]:
    """Run the kernel in Triton's interpreter, on the host."""
    # Poisoned: what is read before it was written shows.
    results = [np.full(shape.shape, np.nan, shape.dtype) for shape in shapes]
    arrays = [np.ascontiguousarray(array) for array in inputs] + results
    with np.errstate(all="ignore"):
        kernel[grid](*map(_Buffer, arrays), **fixed)
    return results
