"""Tile sizes of the kernels: a heuristic on shapes, and a table of measured ones."""

import dataclasses
import functools
import json
import os
import pathlib

# A tile of this many float32 values is 32 registers a thread at 4 warps.
_TILE = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """The shapes that a kernel is built for.

    Attributes:
        height: of the activation; 0 for feature vectors.
        width: of the activation; 0 for feature vectors.
        channels: of the activation; its features for feature vectors.
        pool_size: bins along each spatial axis, or along the features.
        rows: rows of the projection.
        classes: number of logits.
        modulation: ``"none"``, ``"vector"`` or ``"matrix"``.
        dtype: of the activation.
    """

    height: int
    width: int
    channels: int
    pool_size: int
    rows: int
    classes: int
    modulation: str
    dtype: str

    @property
    def is_spatial(self) -> bool:
        """Whether the activation is an image rather than a feature vector."""
        return self.height > 0

    @property
    def key(self) -> str:
        """The problem as the table of measured tiles names it."""
        return "-".join(str(value) for value in dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes of one kernel; each is a power of two.

    Attributes:
        block_channels: latents that are pooled and projected at once.
        block_columns: columns of a pooling window that are read at once.
        block_rows: rows of a modulation matrix that are multiplied at once.
        num_warps: warps a program.
        num_stages: stages of the compiler's software pipeline.
    """

    block_channels: int
    block_columns: int
    block_rows: int
    num_warps: int = 4
    num_stages: int = 2


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is not below `value`, at least 1."""
    return 1 << max(value - 1, 0).bit_length()


def widest_window(size: int, bins: int) -> int:
    """Elements of the widest adaptive pooling bin."""
    return max(-(-(i + 1) * size // bins) - i * size // bins for i in range(bins))


def heuristic(problem: Problem) -> Config:
    """Tiles that fit any problem: few registers first, then as much in flight as they allow.

    >>> heuristic(Problem(height=32, width=32, channels=32, pool_size=4, rows=10, classes=10,
    ...                   modulation="none", dtype="float32"))
    Config(block_channels=32, block_columns=8, block_rows=16, num_warps=4, num_stages=2)
    """
    padded_rows = next_power_of_2(max(problem.rows, 16))
    latents = problem.channels if problem.is_spatial else problem.pool_size
    fitting = max(16, min(128, _TILE // padded_rows))
    block_channels = max(16, min(fitting, next_power_of_2(latents)))
    columns = 1
    if problem.is_spatial:
        window = next_power_of_2(widest_window(problem.width, problem.pool_size))
        # Small enough that no compiler is tempted to trade a register for the stack.
        columns = max(1, min(window, _TILE // block_channels // 8))
    padded_classes = next_power_of_2(max(problem.classes, 16))
    return Config(
        block_channels=block_channels,
        block_columns=columns,
        block_rows=max(1, min(padded_rows, _TILE // padded_classes)),
        num_warps=4 * max(1, padded_rows * block_channels // _TILE),
    )


def table_path() -> pathlib.Path:
    """The file of measured tiles: ``$LLS_JAX_TUNED``, or one in the user's cache folder."""
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return pathlib.Path(os.environ.get("LLS_JAX_TUNED", default / "lls_jax" / "tuned.json"))


@functools.lru_cache(maxsize=4)
def _read_table(path: pathlib.Path, stamp: int) -> dict[str, dict[str, dict[str, int]]]:
    del stamp
    return json.loads(path.read_text())


def tuned(implementation: str, device_kind: str, problem: Problem) -> Config | None:
    """The measured tiles of a problem on a device, if ``python -m pallas_kernels.tune`` found any.

    Args:
        implementation: ``"pallas"`` or ``"triton"``.
        device_kind: as JAX names it, like ``"NVIDIA H200"``.
        problem: the shapes.
    """
    path = table_path()
    try:
        table = _read_table(path, path.stat().st_mtime_ns)
    except (OSError, ValueError):
        return None
    entry = table.get(f"{implementation}: {device_kind}", {}).get(problem.key)
    return None if entry is None else Config(**entry)


def choose(implementation: str, device_kind: str | None, problem: Problem) -> Config:
    """The measured tiles where there are any, those of the heuristic elsewhere."""
    measured = None if device_kind is None else tuned(implementation, device_kind, problem)
    return measured or heuristic(problem)
