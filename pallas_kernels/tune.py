"""Search the kernels' tiles on this GPU, and remember the fastest.

For every shape the tiles of the heuristic and their neighbours run forward and backward, at each
batch size, and XLA's plain chain beside them. The fastest tiles are written to the table that the
kernels read. Whether a run takes a kernel is measured when it starts, on whole steps.
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

from pallas_kernels.local_loss.shapes import LAYERS, MODULATIONS, Layer, Problem, problems
from pallas_kernels.local_loss.tiles import Tiles, default_tiles, table_key, table_path

_TURNS = 5


def neighbours(problem: Problem) -> Iterator[Tiles]:
    """The tiles of the heuristic, and those with one size halved or doubled."""
    base = default_tiles(problem.rows, problem.latents, problem.params)
    yield base
    for name, least, most in (
        ("num_warps", 1, 16),
        ("block_latents", 16, 256),
        ("num_stages", 1, 4),
    ):
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


def _write(path: pathlib.Path, section: str, key: str, tiles: Tiles) -> None:
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError):
        table = {}
    table.setdefault(section, {})[key] = dataclasses.asdict(tiles)
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
        batches: batch sizes; the tiles that are the fastest over all of them are written.

    Returns:
        One row a shape and kernel: ``problem``, ``implementation``, ``tiles`` (None where none
        ran), ``speed_over_xla`` and ``speed_over_heuristic``, geometric means over the batches.
    """
    import jax

    kind = jax.devices()[0].device_kind
    rows = []
    for one in wanted:
        candidates = list(neighbours(one))
        for implementation in implementations:
            makers = [("xla", None), *((implementation, tiles) for tiles in candidates)]
            xla, base, *others = _seconds(one, batches, makers)

            def ratio(slow: list[float], fast: list[float]) -> float:
                if math.inf in fast:
                    return 0.0
                return math.exp(sum(math.log(s / f) for s, f in zip(slow, fast)) / len(fast))

            timed = [base, *others]
            best = max(range(len(timed)), key=lambda index: ratio(xla, timed[index]))
            speed = ratio(xla, timed[best])
            key = table_key(one.rows, one.latents, one.params)
            if speed:
                _write(table_path(), f"{implementation}: {kind}", key, candidates[best])
            rows.append(
                {
                    "problem": key,
                    "implementation": implementation,
                    "tiles": dataclasses.asdict(candidates[best]) if speed else None,
                    "speed_over_xla": speed,
                    "speed_over_heuristic": ratio(base, timed[best]) if base[0] < math.inf else 0.0,
                }
            )
            print(
                f"{key:40} {implementation:7} {speed:6.2f} x xla "
                f"{rows[-1]['speed_over_heuristic']:5.2f} x heuristic",
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
    parser.add_argument("--classes", type=int, default=10, help="classes, 2 to 512 (10)")
    parser.add_argument("--batches", nargs="+", type=int, default=[128, 1024], help="(128 1024)")
    parser.add_argument(
        "--implementations", nargs="+", default=["pallas"], choices=["pallas", "split", "triton"]
    )
    options = parser.parse_args(arguments)
    if not 2 <= options.classes <= 512 or min(options.batches) < 1:
        parser.error("--classes takes 2 to 512, --batches at least 1")

    import jax

    from pallas_kernels.local_loss import KernelUnavailableError, require

    try:
        for implementation in options.implementations:
            require(implementation)
    except KernelUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    layers = options.layers or [layer for model in options.models for layer in LAYERS[model]]
    wanted = problems(layers, options.modulations, options.classes)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {len(wanted)} shapes")
    tune(wanted, options.implementations, options.batches)
    print(f"written: {table_path()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
