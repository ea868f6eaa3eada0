"""Measure the kernels on this GPU, and remember those that are faster than XLA.

For every shape the tiles of the heuristic and their neighbours run forward and backward against
XLA, at each batch size. The fastest tiles are written to the table that `implementation=None`
reads; a shape for which XLA is faster, at any of the batch sizes, gets no entry.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from pallas_kernels.local_loss.config import Config, Problem, heuristic, table_path, widest_window
from pallas_kernels.local_loss.shapes import LAYERS, MODULATIONS, Layer, problem, problems

_TURNS = 5


def neighbours(problem: Problem) -> Iterator[Config]:
    """The tiles of the heuristic, and those with one size halved or doubled."""
    base = heuristic(problem)
    yield base
    window = widest_window(problem.width, problem.pool_size) if problem.is_spatial else 1
    for name, least, most in (
        ("num_warps", 1, 16),
        ("block_channels", 16, 256),
        ("block_columns", 1, 2 * window),
        ("block_rows", 1, 128),
        ("num_stages", 1, 4),
    ):
        if name == "block_rows" and problem.modulation != "matrix":
            continue
        value = getattr(base, name)
        for other in (value // 2, value * 2):
            if least <= other <= most:
                yield dataclasses.replace(base, **{name: other})


def _seconds(one: Problem, batches: Sequence[int], makers: Sequence[Any]) -> list[list[float]]:
    """Seconds by contestant, by batch size; infinite where it does not compile or run."""
    from pallas_kernels import timing

    table: list[list[float]] = [[] for _ in makers]
    for batch in batches:
        functions, who = [], []
        for index, (implementation, config) in enumerate(makers):
            try:
                call = timing.loss_and_gradients(one, batch, implementation, config)
                call()
            except Exception as error:
                # Tiles that a device has no room for are not an error of the measurement.
                print(f"  {implementation} {config}: {type(error).__name__}", file=sys.stderr)
                continue
            functions.append(call)
            who.append(index)
        measured = dict(zip(who, timing.turns(functions, _TURNS)))
        for index, row in enumerate(table):
            row.append(measured.get(index, math.inf))
    return table


def _write(path: pathlib.Path, section: str, entries: dict[str, Config | None]) -> None:
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError):
        table = {}
    rows = table.setdefault(section, {})
    for key, config in entries.items():
        rows.pop(key, None)
        if config is not None:
            rows[key] = dataclasses.asdict(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may be reading: it sees the old table or the new one.
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


def tune(
    wanted: Sequence[Problem], implementations: Sequence[str], batches: Sequence[int]
) -> list[dict[str, Any]]:
    """Measure, and write the table.

    Args:
        wanted: the shapes.
        implementations: kernels to measure.
        batches: batch sizes; an entry is written where the kernel wins at all of them.

    Returns:
        One row a shape and kernel: ``problem``, ``implementation``, ``config`` (None where XLA
        won), ``speed_over_xla`` and ``speed_over_heuristic``, geometric means over the batches.
    """
    import jax

    kind = jax.devices()[0].device_kind
    rows = []
    for one in wanted:
        candidates = list(neighbours(one))
        for implementation in implementations:
            makers = [("xla", None), *((implementation, config) for config in candidates)]
            xla, base, *others = _seconds(one, batches, makers)

            def ratio(slow: list[float], fast: list[float]) -> float:
                logs = [math.log(s / f) if f < math.inf else -math.inf for s, f in zip(slow, fast)]
                return math.exp(sum(logs) / len(logs))

            timed = [base, *others]
            best = max(range(len(timed)), key=lambda index: ratio(xla, timed[index]))
            wins = all(fast < slow for fast, slow in zip(timed[best], xla))
            config = candidates[best] if wins else None
            _write(table_path(), f"{implementation}: {kind}", {one.key: config})
            rows.append(
                {
                    "problem": one.key,
                    "implementation": implementation,
                    "config": None if config is None else dataclasses.asdict(config),
                    "speed_over_xla": ratio(xla, timed[best]),
                    "speed_over_heuristic": ratio(base, timed[best]) if base[0] < math.inf else 0.0,
                }
            )
            verdict = "" if wins else "  (xla stays)"
            print(
                f"{one.key:60} {implementation:7} {rows[-1]['speed_over_xla']:6.2f} x xla "
                f"{rows[-1]['speed_over_heuristic']:5.2f} x heuristic{verdict}",
                flush=True,
            )
    return rows


def _own_layer(text: str) -> Layer:
    try:
        *shape, pool_size = (int(part) for part in text.replace(":", "x").split("x"))
        if len(shape) not in (1, 3) or min(*shape, pool_size) < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not HEIGHTxWIDTHxCHANNELS:POOL or FEATURES:POOL, like 32x32x64:4"
        ) from None
    return Layer(tuple(shape), pool_size)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models", nargs="+", default=list(LAYERS), choices=list(LAYERS), help="published models"
    )
    parser.add_argument(
        "--layers", nargs="+", type=_own_layer, metavar="HxWxC:POOL",
        help="your own activations instead, like 32x32x64:4, or FEATURES:POOL",
    )  # fmt: skip
    parser.add_argument("--modulations", nargs="+", default=list(MODULATIONS), choices=MODULATIONS)
    parser.add_argument("--classes", type=int, default=10, help="classes, 2 to 1024 (10)")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[128, 1024], help="(128 1024)")
    parser.add_argument(
        "--implementations", nargs="+", default=["pallas"], choices=["pallas", "triton"]
    )
    options = parser.parse_args(arguments)
    if not 2 <= options.classes <= 1024 or min(options.batches) < 1:
        parser.error("--classes takes 2 to 1024, --batches at least 1")

    import jax

    from pallas_kernels.local_loss import KernelUnavailableError, require

    try:
        for implementation in options.implementations:
            require(implementation)
    except KernelUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.layers:
        wanted = [
            problem(layer, modulation, options.classes, dtype)
            for layer in options.layers
            for modulation in options.modulations
            for dtype in options.dtypes
        ]
    else:
        wanted = list(
            problems(
                tuple(options.models),
                tuple(options.modulations),
                options.classes,
                tuple(options.dtypes),
            )
        )
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {len(wanted)} shapes")
    rows = tune(wanted, options.implementations, options.batches)
    won = [row["speed_over_xla"] for row in rows if row["config"] is not None]
    mean = math.exp(sum(map(math.log, won)) / len(won)) if won else 1.0
    print(
        f"{len(won)} of {len(rows)} faster than XLA, by {mean:.2f} in the geometric mean; "
        f"written: {table_path()}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
