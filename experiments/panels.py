"""What pictures of runs show, as data: lines over epochs, time and blocks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Record = dict[str, Any]


class Measured(NamedTuple):
    """How a measurement of the blocks is shown.

    Attributes:
        label: what it is.
        digits: ``digits(value)``, for a line of text.
        scale: of a picture's axis.
    """

    label: str
    digits: Callable[[float], str]
    scale: str = "linear"


# What :class:`lls_jax.analysis.Measure` writes into a record, by its key.
MEASURED = {
    "alignment": Measured("cosine with bp's gradient", "{:.3f}".format),
    "gradient_norm": Measured("gradient norm", "{:.2e}".format, "log"),
    "bp_gradient_norm": Measured("bp's gradient norm", "{:.2e}".format, "log"),
    "probe_accuracy": Measured("linear probe accuracy [%]", "{:.2f}".format),
    "head_accuracy": Measured("local head accuracy [%]", "{:.2f}".format),
}


def color(index: int) -> str:
    """The colour of a line or a point among others, the same in every picture."""
    return f"C{index % 10}"


class Line(NamedTuple):
    """A line of a panel.

    Attributes:
        label: in the legend.
        x: where its points are.
        y: likewise; NaN where there is no number, which is not drawn.
        color: of matplotlib; None for the next one.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: Any = None


class Panel(NamedTuple):
    """One picture of several.

    Attributes:
        x_label: of the axis, with its unit.
        y_label: likewise.
        lines: what is drawn.
        scale: of the vertical axis.
    """

    x_label: str
    y_label: str
    lines: list[Line]
    scale: str = "linear"


_UNKNOWN = float("nan")
# What an epoch's record has of a quantity, by the line's label.
_LINES = {
    "accuracy [%]": {
        "train": "train_accuracy",
        "validation": "validation_accuracy",
        "test": "test_accuracy",
        "test, mean over views": "test_views_accuracy",
    },
    "cross-entropy of the classifier": {
        "train": "train_loss",
        "validation": "validation_loss",
        "test": "test_loss",
    },
}


def _number(value: Any) -> float:
    return _UNKNOWN if value is None else float(value)


def _by_depth(count: int) -> list[Any]:
    """Colours of blocks: dark at the image, light at the classifier."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * i / max(count - 1, 1)) for i in range(count)]


def _block_lines(records: Sequence[Record], name: str) -> list[Line]:
    own = [record for record in records if record.get(name)]
    count = max((len(record[name]) for record in own), default=0)
    epochs = [record["epoch"] for record in own]
    return [
        Line(f"L{block + 1}", epochs, [_number(record[name][block]) for record in own], color)
        for block, color in enumerate(_by_depth(count))
    ]


def curve_panels(records: Sequence[Record]) -> list[Panel]:
    """Accuracy, loss, each local layer's loss, and what was measured of blocks, against epochs.

    Args:
        records: one an epoch, from ``metrics.jsonl``.
    """
    epochs = [record["epoch"] for record in records]
    panels = [
        Panel(
            "epoch",
            label,
            [
                Line(line, epochs, [_number(record.get(name)) for record in records])
                for line, name in lines.items()
                if any(record.get(name) is not None for record in records)
            ],
        )
        for label, lines in _LINES.items()
    ]
    panels.append(Panel("epoch", "local loss, training", _block_lines(records, "layer_loss")))
    panels += [
        Panel("epoch", measured.label, _block_lines(records, name), measured.scale)
        for name, measured in MEASURED.items()
    ]
    return [panel for panel in panels if panel.lines]


def _unit_of_time(seconds: float) -> tuple[str, float]:
    """``(name, seconds)`` of a unit in which that is a number that one reads easily."""
    for name, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 3 * length:
            return name, length
    return "s", 1.0


def comparison_panels(runs: Mapping[str, Sequence[Record]]) -> list[Panel]:
    """Test accuracy and loss of several runs against epochs and time, and their blocks at the end.

    Args:
        runs: records by the run's name.
    """
    unit, length = _unit_of_time(max(records[-1]["total_seconds"] for records in runs.values()))

    def against(x: str, x_label: str, y: str, y_label: str, scale: float = 1.0) -> Panel:
        return Panel(
            x_label,
            y_label,
            [
                Line(
                    name,
                    [record[x] / scale for record in records],
                    [_number(record[y]) for record in records],
                    color(index),
                )
                for index, (name, records) in enumerate(runs.items())
            ],
        )

    panels = []
    for y, y_label in (
        ("test_accuracy", "test accuracy [%]"),
        ("test_loss", "test loss, cross-entropy"),
    ):
        panels.append(against("epoch", "epoch", y, y_label))
        panels.append(against("total_seconds", f"training time [{unit}]", y, y_label, length))
    for name, measured in MEASURED.items():
        lines = []
        for index, (run, records) in enumerate(runs.items()):
            if own := [record for record in records if record.get(name)]:
                values = [_number(value) for value in own[-1][name]]
                lines.append(Line(run, range(1, len(values) + 1), values, color(index)))
        if lines:
            panels.append(Panel("block", f"{measured.label}, last epoch", lines, measured.scale))
    return panels
