"""Pictures of runs. Matplotlib without its global state, so that no display is touched.

It takes most of a second to import, which only drawing waits for.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

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


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches, of no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: pathlib.Path) -> None:
    """Write a figure as PNG, in one step."""
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(path)


def color(index: int) -> str:
    """The colour of a line or a point among others, the same in every picture."""
    return f"C{index % 10}"


def _series(records: Sequence[Record], name: str) -> list[float]:
    return [record[name] for record in records]


def draw_curves(records: Sequence[Record], title: str, path: pathlib.Path) -> None:
    """Accuracy, loss, each local layer's loss, and what was measured of blocks, against epochs.

    Args:
        records: one an epoch, from ``metrics.jsonl``.
        title: above the picture.
        path: of the PNG; replaced in one step.
    """
    layers = len(records[0]["layer_loss"])
    measured = [name for name in MEASURED if any(name in record for record in records)]
    count = (3 if layers else 2) + len(measured)
    columns = min(count, 4 if measured else 3)
    rows = -(-count // columns)
    figure = new_figure(5 * columns, 4 * rows)
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    panels = grid[:count]
    for unused in grid[count:]:
        unused.set_axis_off()
    epochs = _series(records, "epoch")
    for panel, quantity, label in zip(
        panels, ("accuracy", "loss"), ("accuracy [%]", "cross-entropy of the classifier")
    ):
        for split in ("train", "test"):
            panel.plot(epochs, _series(records, f"{split}_{quantity}"), ".-", label=split)
        panel.set_ylabel(label)
    if layers:
        losses = np.array(_series(records, "layer_loss"))
        for layer in range(layers):
            panels[2].plot(epochs, losses[:, layer], ".-", label=f"L{layer + 1}")
        panels[2].set_ylabel("local loss, training")
    for panel, name in zip(panels[count - len(measured) :], measured):
        own = [record for record in records if name in record]
        # None, where there is no number, becomes NaN, which is not drawn.
        values = np.array(_series(own, name), dtype=float)
        for layer in range(values.shape[1]):
            panel.plot(_series(own, "epoch"), values[:, layer], ".-", label=f"L{layer + 1}")
        panel.set_ylabel(MEASURED[name].label)
        panel.set_yscale(MEASURED[name].scale)
    for panel in panels:
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.3)
        panel.legend()
    save(figure, path)


def draw_comparison(runs: Mapping[str, Sequence[Record]], path: pathlib.Path) -> None:
    """Test accuracy and loss of several runs, against epochs and against seconds.

    Args:
        runs: records by the run's name.
        path: of the PNG.
    """
    figure = new_figure(12, 8)
    panels = figure.subplots(2, 2)
    for row, (quantity, label) in enumerate(
        (("test_accuracy", "test accuracy [%]"), ("test_loss", "test loss"))
    ):
        for column, (against, unit) in enumerate(
            (("epoch", "epoch"), ("total_seconds", "time [s]"))
        ):
            panel = panels[row][column]
            for name, records in runs.items():
                x, y = _series(records, against), _series(records, quantity)
                panel.plot(x, y, ".-", label=name)
            panel.set_xlabel(unit)
            panel.set_ylabel(label)
            panel.grid(alpha=0.3)
    panels[0][0].legend()
    save(figure, path)


def draw_confusion(
    confusion: np.ndarray, class_names: Sequence[str], title: str, path: pathlib.Path
) -> None:
    """A confusion matrix, its rows scaled to 100 %.

    Args:
        confusion: counts ``[true class, predicted class]``.
        class_names: names of the classes, in label order.
        title: above the picture.
        path: of the PNG.
    """
    count = len(class_names)
    side = min(4 + 0.45 * count, 30)
    figure = new_figure(side + 1, side)
    panel = figure.subplots()
    percent = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = panel.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="% of the true class")
    panel.set_xticks(range(count), class_names, rotation=60, ha="right")
    panel.set_yticks(range(count), class_names)
    panel.set_xlabel("predicted")
    panel.set_ylabel("true")
    panel.set_title(title)
    if count <= 20:
        for row in range(count):
            for column in range(count):
                value = percent[row, column]
                color = "white" if value > 50 else "black"
                panel.text(
                    column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8
                )
    save(figure, path)
