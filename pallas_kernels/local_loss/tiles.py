"""Sizes of a kernel's program: a heuristic on shapes, and a table of measured ones."""

import dataclasses
import functools
import json
import math
import os
import pathlib
from typing import Any

import jax

from pallas_kernels.local_loss.heads import EXAMPLES
from pallas_kernels.local_loss.padded import dot_side, is_large, padded_shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of a kernel's program; each a power of two.

    Attributes:
        block_latents: latents that are projected at once, at least 16.
        num_warps: warps a program.
        num_stages: stages of the compiler's software pipeline.
    """

    block_latents: int
    num_warps: int = 4
    num_stages: int = 2


def default_tiles(rows: int, latents: int, params: Any) -> Tiles:
    """Tiles that spill no registers: as many latents at once as leaves room for the projection.

    Args:
        rows: of the projection.
        latents: of an example.
        params: the head's, a pytree.

    >>> default_tiles(10, 512, [])
    Tiles(block_latents=64, num_warps=4, num_stages=2)
    """
    wide, sizes, room = dot_side(rows), [], 4096
    for leaf in jax.tree.leaves(params):
        sides = padded_shape(leaf.shape)
        if is_large(leaf.shape):
            # Sixteen of its rows, or columns, are there at a time.
            sizes.append(max(sides))
            room = 2048
        else:
            sizes.append(math.prod(sides) // EXAMPLES)
    largest = max(wide, *sizes, 1)
    fitting = max(16, min(64, room // wide))
    warps = 4 if largest <= 64 else 8 if largest <= 256 else 16
    return Tiles(block_latents=min(fitting, dot_side(latents)), num_warps=warps)


def table_path() -> pathlib.Path:
    """The file of measured tiles: ``$LLS_JAX_TUNED``, or one in the user's cache folder."""
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return pathlib.Path(os.environ.get("LLS_JAX_TUNED", default / "lls_jax" / "tuned.json"))


def table_key(rows: int, latents: int, params: Any) -> str:
    """How the table names the shapes of a call."""
    shapes = ["x".join(map(str, leaf.shape)) or "1" for leaf in jax.tree.leaves(params)]
    return "-".join([f"{rows}x{latents}", *shapes])


@functools.lru_cache(maxsize=4)
def _read_table(path: pathlib.Path, stamp: int) -> dict[str, dict[str, dict[str, int]]]:
    del stamp
    return json.loads(path.read_text())


def choose_tiles(
    implementation: str, device_kind: str, rows: int, latents: int, params: Any
) -> Tiles:
    """The tiles that ``python -m pallas_kernels.tune`` has measured, else those of the heuristic.

    Args:
        implementation: ``"split"``, ``"pallas"`` or ``"triton"``.
        device_kind: as JAX names it, like ``"NVIDIA H200"``.
        rows: of the projection.
        latents: of an example.
        params: the head's, a pytree.
    """
    path = table_path()
    try:
        table = _read_table(path, path.stat().st_mtime_ns)
    except (OSError, ValueError):
        table = {}
    entry = table.get(f"{implementation}: {device_kind}", {}).get(table_key(rows, latents, params))
    return default_tiles(rows, latents, params) if entry is None else Tiles(**entry)
