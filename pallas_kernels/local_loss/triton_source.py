"""The op as Triton source: a fixed body, and the head printed from its jaxpr."""

import hashlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

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

_TYPES = {
    "float32": "tl.float32", "bfloat16": "tl.bfloat16", "float16": "tl.float16",
    "int32": "tl.int32", "int64": "tl.int64", "uint32": "tl.uint32", "int16": "tl.int16",
    "int8": "tl.int8", "uint8": "tl.uint8", "bool": "tl.int1",
}  # fmt: skip
_EXPRESSIONS = {
    "neg": "-{}", "abs": "tl.abs({})", "exp": "tl.exp({})", "log": "tl.log({})",
    "sqrt": "tl.sqrt({})", "rsqrt": "tl.rsqrt({})", "sin": "tl.sin({})", "cos": "tl.cos({})",
    "floor": "tl.floor({})", "not": "{} == 0", "add": "{} + {}",
    "sub": "{} - {}", "mul": "{} * {}", "rem": "{} % {}", "max": "tl.maximum({}, {})",
    "min": "tl.minimum({}, {})", "eq": "{} == {}", "ne": "{} != {}", "lt": "{} < {}",
    "le": "{} <= {}", "gt": "{} > {}", "ge": "{} >= {}", "and": "{} & {}", "or": "{} | {}",
    "select": "tl.where({}, {}, {})",
}  # fmt: skip
_HEADER = '''\
"""Written by pallas_kernels.local_loss.triton_source."""

import triton
import triton.language as tl


@triton.jit
def head_loss({pointers}, batch: tl.constexpr, latents: tl.constexpr, rows: tl.constexpr,
              wide: tl.constexpr, block: tl.constexpr):
    place = tl.program_id(0) * {examples} + tl.arange(0, {examples})
    is_example = place < batch
    # Behind the batch stands its last example once more, with a weight of 0.
    example = tl.minimum(place, batch - 1).to(tl.int64)
    row = tl.arange(0, wide)
    lane = tl.arange(0, block)
    scores = tl.zeros(({examples}, wide), tl.float32)
    square = tl.zeros(({examples},), tl.float32)
    for first in range(0, latents, block):
        latent = first + lane
        z = tl.load(latents_ptr + example[:, None] * latents + latent[None, :],
                    mask=(latent < latents)[None, :], other=0.0).to(tl.float32)
        w = tl.load(projection_ptr + row[:, None] * latents + latent[None, :],
                    mask=(row < rows)[:, None] & (latent < latents)[None, :],
                    other=0.0).to(tl.float32)
        scores += tl.dot(z, tl.trans(w), input_precision="ieee")
        square += tl.sum(z * z, axis=1)
    labels = tl.load(labels_ptr + example)
'''
_WEIGHTS = """\
    weights = tl.load(weights_ptr + example, mask=is_example, other=0.0)
"""
_LOSS = """\
    tl.store(loss_ptr + place, {loss}, mask=is_example)
"""
_BACK = """\
    for first in range(0, latents, block):
        latent = first + lane
        inside = is_example[:, None] & (latent < latents)[None, :]
        z = tl.load(latents_ptr + example[:, None] * latents + latent[None, :],
                    mask=(latent < latents)[None, :], other=0.0).to(tl.float32)
        w = tl.load(projection_ptr + row[:, None] * latents + latent[None, :],
                    mask=(row < rows)[:, None] & (latent < latents)[None, :],
                    other=0.0).to(tl.float32)
        d_z = tl.dot({d_scores}, w, input_precision="ieee") + 2.0 * {d_square}[:, None] * z
        tl.store(d_latents_ptr + place.to(tl.int64)[:, None] * latents + latent[None, :],
                 d_z.to(d_latents_ptr.dtype.element_ty), mask=inside)
"""
_SCORES = """\
    tl.store(d_scores_ptr + place[:, None] * rows + row[None, :], {d_scores},
             mask=is_example[:, None] & (row < rows)[None, :])
"""


class SourceOps:
    """:class:`pallas_kernels.local_loss.padded.Ops` on names of values, in lines of source."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.indent = ""

    def write(self, line: str) -> None:
        """A line, inside the loops that are open."""
        self.lines.append(self.indent + line)

    def named(self, expression: str) -> str:
        """A new value's name."""
        name = f"v{len(self.lines)}"
        self.write(f"{name} = {expression}")
        return name

    def elementwise(self, name: str, dtype: np.dtype, *values: Any) -> Any:
        """See :class:`Ops`."""
        if name == "cast":
            return self.named(f"{values[0]}.to({_TYPES[dtype.name]})")
        if name == "bitcast":
            return self.named(f"{values[0]}.to({_TYPES[dtype.name]}, bitcast=True)")
        expression = _EXPRESSIONS.get(name) or (
            "{} / {}" if np.issubdtype(dtype, np.floating) else "{} // {}"
        )
        return self.named(expression.format(*map(_operand, values)))

    def iota(self, shape: tuple[int, ...], axis: int) -> Any:
        """See :class:`Ops`."""
        cut = ", ".join(":" if at == axis else "None" for at in range(len(shape)))
        return self.named(f"tl.arange(0, {shape[axis]})" + (f"[{cut}]" if len(shape) > 1 else ""))

    def broadcast(self, value: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """See :class:`Ops`."""
        if isinstance(value, np.generic):
            return self.named(f"tl.full({shape}, {_operand(value)}, {_TYPES[dtype.name]})")
        return self.named(f"tl.broadcast_to({value}, {shape})")

    def reshape(self, value: Any, shape: tuple[int, ...]) -> Any:
        """See :class:`Ops`."""
        return self.named(f"tl.reshape({value}, {shape})")

    def transpose(self, value: Any, permutation: tuple[int, ...]) -> Any:
        """See :class:`Ops`."""
        return self.named(f"tl.permute({value}, {permutation})")

    def reduce(self, name: str, value: Any, axis: int) -> Any:
        """See :class:`Ops`."""
        return self.named(f"tl.{name}({value}, axis={axis})")

    def dot(self, a: Any, b: Any) -> Any:
        """See :class:`Ops`."""
        return self.named(f'tl.dot({a}, {b}, input_precision="ieee")')

    def walk(self, count: int, step: Callable[[Any, Any], Any], start: Any) -> Any:
        """See :class:`Ops`."""
        total = None if start is None else self.named(start)
        index, outside = f"i{len(self.lines)}", self.indent
        self.write(f"for {index} in range(0, {count}):")
        self.indent = outside + "    "
        new = step(index, total)
        if total is not None:
            self.write(f"{total} = {new}")
        self.indent = outside
        return total


def _operand(value: Any) -> str:
    if not isinstance(value, np.generic):
        return value
    if np.issubdtype(value.dtype, np.floating):
        number = float(value)
        return repr(number) if np.isfinite(number) else f'float("{number}")'
    return repr(value.item())


def _place(pointer: str, shape: tuple[int, ...], start: str = "") -> tuple[str, str | None]:
    """The addresses of an array's tile, and what is inside the array; None for everything."""
    padded, terms, masks, stride = padded_shape(shape), [], [], 1
    for axis in reversed(range(len(shape))):
        cut = ", ".join(":" if at == axis else "None" for at in range(len(shape)))
        index = f"tl.arange(0, {padded[axis]})" + (f"[{cut}]" if len(shape) > 1 else "")
        terms.append(f"{index} * {stride}")
        if padded[axis] != shape[axis]:
            masks.append(f"({index} < {shape[axis]})")
        stride *= shape[axis]
    return " + ".join([pointer, *([start] if start else []), *terms]), " & ".join(masks) or None


def _chunk(
    pointer: str, shape: tuple[int, ...], chunk: str, axis: int, start: str = ""
) -> tuple[str, str]:
    """Addresses of a matrix's places, sixteen along an axis and all along the other; its mask."""
    along = f"({chunk} * {LEAST_SIDE} + tl.arange(0, {LEAST_SIDE})[:, None])"
    across = f"tl.arange(0, {dot_side(shape[1 - axis])})[None, :]"
    row, column = (along, across) if axis == 0 else (across, along)
    place = " + ".join([pointer, *([start] if start else []), f"{row} * {shape[1]}", column])
    return place, f"({along} < {shape[axis]}) & ({across} < {shape[1 - axis]})"


def _load(ops: SourceOps, pointer: str, shape: tuple[int, ...], dtype: np.dtype) -> Padded:
    if is_large(shape):

        def load(chunk: Any, axis: int) -> Any:
            place, mask = _chunk(pointer, shape, chunk, axis)
            return ops.named(f"tl.load({place}, mask={mask}, other=0).to(tl.float32)")

        return Padded(InMemory(load), shape, dtype)
    place, mask = _place(pointer, shape)
    guarded = f", mask={mask}, other=0" if mask else ""
    return Padded(ops.named(f"tl.load({place}{guarded})"), shape, dtype)


def _store_partial(lanes: Lanes, ops: SourceOps, pointer: str, x: Padded) -> None:
    start = f"tl.program_id(0) * {int(np.prod(x.shape, dtype=int))}"
    if isinstance(x.value, Outer):

        def store(chunk: Any, rows: Any) -> None:
            place, mask = _chunk(pointer, x.shape, chunk, 0, start)
            ops.write(f"tl.store({place}, {rows}, mask={mask})")

        lanes.store_outer(x.value, store)
        return
    place, mask = _place(pointer, x.shape, start)
    value = lanes.tile(x) if x.shape else _operand(x.value)
    ops.write(f"tl.store({place}, {value}{f', mask={mask}' if mask else ''})")


def pointers_of(program: HeadProgram, leaves: int, gradient: bool, scores: bool) -> list[str]:
    """Names of the kernel's pointers: what it reads, and what it writes from ``loss_ptr`` on."""
    held = [f"held{index}_ptr" for index in range(len(program.consts))]
    given = [f"param{index}_ptr" for index in range(leaves)]
    outs = ["loss_ptr"]
    if gradient:
        learned = [index for index, own in enumerate(program.learned) if own]
        outs += ["d_latents_ptr", *(["d_scores_ptr"] if scores else [])]
        outs += [f"d_param{index}_ptr" for index in learned]
    return ["latents_ptr", "projection_ptr", "labels_ptr", "weights_ptr", *held, *given, *outs]


def write_source(
    program: HeadProgram,
    arrays: list[tuple[tuple[int, ...], np.dtype]],
    rows: int,
    label_dtype: np.dtype,
    wants_gradient: bool,
    wants_scores: bool,
) -> str:
    """The module with the kernel ``head_loss``.

    Args:
        program: the head.
        arrays: shapes and dtypes of its constants and parameters.
        rows: of the projection.
        label_dtype: integers.
        wants_gradient: whether the gradients are wanted too.
        wants_scores: whether the gradient of the scores is.

    Raises:
        KernelUnavailableError: the head has something that no kernel has.
    """
    ops = SourceOps()
    lanes = Lanes(ops)
    held = len(program.consts)
    names = pointers_of(program, len(arrays) - held, wants_gradient, wants_scores)
    loaded = [
        _load(ops, pointer, shape, dtype)
        for pointer, (shape, dtype) in zip(names[4 : 4 + len(arrays)], arrays)
    ]
    float32 = np.dtype(np.float32)
    outputs = 3 + sum(program.learned) if wants_gradient else 1
    loss, *gradients = interpreter.run(
        lanes,
        program.jaxpr,
        loaded[:held],
        [
            Padded(
                lanes.narrow("scores", (EXAMPLES, dot_side(rows)), (EXAMPLES, rows)),
                (EXAMPLES, rows),
                float32,
            ),
            Padded("square", (EXAMPLES,), float32),
            Padded("labels", (EXAMPLES,), label_dtype),
            Padded("weights", (EXAMPLES,), float32),
            *loaded[held:],
        ],
        [index < outputs for index in range(len(program.jaxpr.outvars))],
    )
    loss_name = lanes.tile(loss)
    stores: list[str] = [_LOSS.format(loss=loss_name)]
    if wants_gradient:
        d_scores, d_square, *d_learned = gradients
        d_square_name = lanes.tile(d_square)
        d_scores_name = lanes.widened(lanes.mask(d_scores, (1,), 0))
        if wants_scores:
            stores.append(_SCORES.format(d_scores=d_scores_name))
        for pointer, x in zip(names[len(names) - len(d_learned) :], d_learned, strict=True):
            _store_partial(lanes, ops, pointer, x)
        stores.append(_BACK.format(d_scores=d_scores_name, d_square=d_square_name))
    body = "".join(f"    {line}\n" for line in ops.lines)
    weights = _WEIGHTS if wants_gradient else ""
    header = _HEADER.format(pointers=", ".join(names), examples=EXAMPLES)
    return header + weights + body + "".join(stores)


def load_kernel(source: str) -> Any:
    """The kernel of a module that is kept by its content in the user's cache folder.

    Triton reads a function's source from its file.
    """
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    name = "head_loss_" + hashlib.sha256(source.encode()).hexdigest()[:24]
    path = base / "lls_jax" / "triton" / f"{name}.py"
    if name not in sys.modules:
        if not path.exists() or path.read_text() != source:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Another process may be reading: it sees all of it or nothing.
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_text(source)
            temporary.replace(path)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name].head_loss


def constants(batch: int, latents: int, rows: int, block: int) -> dict[str, int]:
    """What the kernel is specialised for."""
    return {
        "batch": batch,
        "latents": latents,
        "rows": rows,
        "wide": dot_side(rows),
        "block": block,
    }
