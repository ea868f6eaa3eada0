"""The op as one kernel in Triton itself, called through jax-triton.

The program of :mod:`pallas_kernels.local_loss.pallas_triton`, which says how it works, for the day
when Pallas' Triton lowering is gone.
"""

import importlib
from typing import Any

import jax
import numpy as np
from triton.runtime.interpreter import InterpretedFunction

from pallas_kernels.errors import KernelUnavailableError
from pallas_kernels.local_loss.results import Call, Results, collect, prepare, programs_of
from pallas_kernels.local_loss.triton_source import constants, load_kernel, write_source


def launch(call: Call) -> Results:
    """Launch the kernel once; see :class:`pallas_kernels.local_loss.results.Call`."""
    (batch, num_latents), num_rows = call.latents.shape, call.projection.shape[0]
    prepared = prepare(call)
    kernel = load_kernel(
        write_source(
            prepared.program,
            [(tuple(array.shape), np.dtype(array.dtype)) for array in prepared.arrays],
            num_rows,
            np.dtype(call.labels.dtype),
            call.weights is not None,
            call.wants_scores,
        )
    )
    fixed = constants(batch, num_latents, num_rows, call.tiles.block_latents)
    inputs = (call.latents, call.projection, call.labels, prepared.weights, *prepared.arrays)
    grid = (programs_of(batch),)
    if call.interpret:
        if not isinstance(kernel, InterpretedFunction):
            raise KernelUnavailableError(
                "Triton was imported without its interpreter; set TRITON_INTERPRET=1 in the "
                "environment before Python starts, or use 'pallas' with interpret=True."
            )
        outputs = jax.pure_callback(
            lambda *arrays: _interpret(kernel, grid, prepared.outputs, fixed, *arrays),
            prepared.outputs,
            *inputs,
        )
    else:
        # Optional, and needs jaxlib's GPU plugin.
        jax_triton: Any = importlib.import_module("jax_triton")
        outputs = jax_triton.triton_call(
            *inputs,
            kernel=kernel,
            out_type=prepared.outputs,
            grid=grid,
            name="head_loss",
            num_warps=call.tiles.num_warps,
            num_stages=call.tiles.num_stages,
            **fixed,
        )
    return collect(call, prepared, outputs)


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
