"""Pictures of runs. Matplotlib without its global state, so that no display is touched.

It takes most of a second to import, which only drawing waits for.
"""

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.panels import Panel, Record, comparison_panels, curve_panels


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches, of no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: pathlib.Path) -> None:
    """Write a figure as PNG, in one step."""
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(path)


def draw_panel(axes: Any, panel: Panel, *, legend: bool = True) -> None:
    """Draw a panel on axes of matplotlib, with or without a legend."""
    for line in panel.lines:
        few = len(line.x) <= 40
        axes.plot(
            line.x, line.y, ".-" if few else "-", label=line.label, color=line.color, linewidth=1.6
        )
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.set_yscale(panel.scale)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.x_label in ("epoch", "block"):
        axes.xaxis.get_major_locator().set_params(integer=True)
    if not legend:
        return
    # Many lines get a narrow legend.
    many = len(panel.lines) > 6
    axes.legend(ncols=1 + len(panel.lines) // 7, fontsize=8 if many else 9, framealpha=0.7)


def _grid(panels: Sequence[Panel], title: str, columns: int, *, one_legend: bool = False) -> Any:
    rows = -(-len(panels) // columns)
    figure = new_figure(5 * columns, 4 * rows + 0.4)
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for index, (axes, panel) in enumerate(zip(grid, panels)):
        draw_panel(axes, panel, legend=not (one_legend and index))
    for unused in grid[len(panels) :]:
        unused.set_axis_off()
    return figure


def draw_curves(records: Sequence[Record], title: str, path: pathlib.Path) -> None:
    """Draw :func:`curve_panels` beside each other.

    Args:
        records: one an epoch, from ``metrics.jsonl``.
        title: above the picture; what was reached is added.
        path: of the PNG; replaced in one step.
    """
    panels = curve_panels(records)
    last = records[-1]
    reached = f"test accuracy {last['test_accuracy']:.2f} % after epoch {last['epoch']}"
    save(_grid(panels, f"{title}: {reached}", min(len(panels), 3)), path)


def draw_comparison(runs: Mapping[str, Sequence[Record]], path: pathlib.Path) -> None:
    """Draw :func:`comparison_panels` beside each other.

    Args:
        runs: records by the run's name.
        path: of the PNG.
    """
    panels = comparison_panels(runs)
    # Epochs and time beside each other; with measurements of blocks under them a wide picture.
    columns = 2 if len(panels) <= 4 else 4
    save(_grid(panels, "runs side by side", columns, one_legend=True), path)


def to_svg(panel: Panel) -> bytes:
    """A panel as a picture of its own."""
    figure = new_figure(4.4, 3.2)
    draw_panel(figure.subplots(), panel)
    return svg_of(figure)


def svg_of(figure: Any) -> bytes:
    """A figure as SVG."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def draw_confusion(
    confusion: np.ndarray, class_names: Sequence[str], title: str, path: pathlib.Path
) -> None:
    """Write :func:`confusion_figure` as PNG.

    Args:
        confusion: counts ``[true class, predicted class]``.
        class_names: names of the classes, in label order.
        title: above the picture.
        path: of the PNG.
    """
    save(confusion_figure(confusion, class_names, title), path)


def confusion_figure(
    confusion: np.ndarray, class_names: Sequence[str], title: str, *, bar: bool = True
) -> Any:
    """A confusion matrix, its rows scaled to 100 %.

    Args:
        confusion: counts ``[true class, predicted class]``.
        class_names: names of the classes, in label order.
        title: above the picture.
        bar: whether the colours' meaning is beside it.
    """
    count = len(class_names)
    side = min(3 + 0.35 * count, 30)
    figure = new_figure(side + bar, side)
    panel = figure.subplots()
    percent = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = panel.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    if bar:
        figure.colorbar(image, label="% of the true class", shrink=0.8)
    panel.set_xticks(range(count), class_names, rotation=60, ha="right")
    panel.set_yticks(range(count), class_names)
    panel.set_xlabel("predicted")
    panel.set_ylabel("true")
    panel.set_title(title)
    if count <= 20:
        for row in range(count):
            for column in range(count):
                if not confusion[row, column]:
                    continue
                value = percent[row, column]
                color = "white" if value > 50 else "black"
                panel.text(
                    column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8
                )
    return figure
