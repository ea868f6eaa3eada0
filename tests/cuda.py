"""Lowering and compiling for CUDA on a machine without a GPU."""

import pathlib
import re
import subprocess
from typing import NamedTuple

import jax


def lower(function, *args):
    """Lower a jitted function for an H100; the same program as on one."""
    mesh = jax.sharding.AbstractMesh(
        (),
        (),
        abstract_device=jax.sharding.AbstractDevice(
            device_kind="NVIDIA H100", platform="gpu", num_cores=132
        ),
    )
    with jax.sharding.use_abstract_mesh(mesh):
        return function.trace(*args).lower(lowering_platforms=("cuda",))


class Kernel(NamedTuple):
    name: str
    ttir: str
    num_warps: int
    num_stages: int


def triton_kernels(lowered):
    """The Triton kernels that Pallas put into a lowered program, as text."""
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    kernels = []

    def visit(op):
        if op.name == "stablehlo.custom_call":
            target = ir.StringAttr(op.attributes["call_target_name"]).value
            if target == "__gpu$xla.gpu.triton":
                config = ir.DictAttr(op.attributes["mhlo.backend_config"])
                context = ir.Context()
                dialect.register_dialect(context)
                context.load_all_available_dialects()
                # The barrier is an operation of MLIR's own GPU dialect, which jaxlib leaves out.
                context.allow_unregistered_dialects = True
                code = ir.StringAttr(config["ir"]).value_bytes
                with context:
                    ttir = ir.Module.parse(code).operation.get_asm()
                ttir = re.sub(r'"gpu\.barrier"\(\).*', "gpu.barrier", ttir)
                kernels.append(
                    Kernel(
                        ir.StringAttr(config["name"]).value,
                        ttir,
                        ir.IntegerAttr(config["num_warps"]).value,
                        ir.IntegerAttr(config["num_stages"]).value,
                    )
                )
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return kernels


class Resources(NamedTuple):
    registers: int
    stack: int
    shared: int


def resources(compiled, folder: pathlib.Path) -> Resources:
    """Registers, stack and shared memory of what Triton compiled, read from the machine code."""
    import triton

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run(
        [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    return Resources(registers, stack, compiled.metadata.shared)


def compile_ttir(kernel: Kernel, capability: int, folder: pathlib.Path) -> Resources:
    """Compile a kernel to machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    path = folder / f"{kernel.name}.ttir"
    path.write_text(kernel.ttir)
    compiled = triton.compile(
        str(path),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": kernel.num_warps, "num_stages": kernel.num_stages},
    )
    return resources(compiled, folder)


POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


def compile_jit(function, fixed, pointers, tiles, capability, folder: pathlib.Path) -> Resources:
    """Compile a function of Triton's own to machine code.

    Args:
        function: decorated with `triton.jit`.
        fixed: values of its constexpr parameters.
        pointers: types of its other parameters where they are not ``*fp32``.
        tiles: for its `num_warps` and `num_stages`.
        capability: like 90.
        folder: for files.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {
        parameter.name: "constexpr" if parameter.is_constexpr else "*fp32"
        for parameter in function.params
    }
    types.update(pointers)
    places = {name: index for index, name in enumerate(types)}
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=function,
        signature=types,
        constexprs={(places[name],): value for name, value in fixed.items()},
        # As XLA's buffers are.
        attrs={(places[n],): aligned for n, kind in types.items() if kind != "constexpr"},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
    )
    return resources(compiled, folder)
