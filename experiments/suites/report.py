"""A suite's results: a table for people, JSON for programs."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from lls_jax.runs import folder as folders

Row = dict[str, Any]


def markdown(columns: dict[str, str], rows: Sequence[Row]) -> str:
    """A Markdown table.

    Args:
        columns: heading by key of a row.
        rows: strings, integers, floats (shown to three digits) and None (shown as nothing).
    """

    def cell(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return str(value)

    lines = ["| " + " | ".join(columns.values()) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def device_line() -> str:
    """Which device and jax the figures are of."""
    device = jax.devices()[0]
    return f"{device.platform} ({device.device_kind}), jax {jax.__version__}"


def width_in_words(width: float) -> str:
    """What is said behind the device of networks that are not of the published width."""
    return "" if width == 1 else f", {width:g} times the published width"


def keep(folder: pathlib.Path, config: Any, results: Any, text: str) -> None:
    """Write ``benchmark.json`` and ``benchmark.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "config": dataclasses.asdict(config),
        "environment": folders.environment(),
        "results": results,
    }
    folders.write_atomically(folder / "benchmark.json", folders.to_json(content))
    folders.write_atomically(folder / "benchmark.md", text)


def write(folder: pathlib.Path, config: Any, results: Any, text: str) -> None:
    """:func:`keep`, and print the table."""
    keep(folder, config, results, text)
    print(f"{text}\nwritten: {folder / 'benchmark.json'}, benchmark.md")
