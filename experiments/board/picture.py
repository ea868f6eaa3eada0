"""A board's picture: accuracy against memory, and against time."""

import pathlib
from collections.abc import Sequence
from typing import Any

from experiments import panels, plots
from experiments.board.rows import row_of

_MARKERS = ("o", "s", "^", "D", "v", "P")
_AXES = (
    ("temporary_mb", "temporaries of a step [MB]"),
    ("step_ms", "time of a training step [ms]"),
)


def is_shown(entry: dict[str, Any]) -> bool:
    """Whether a row has all that a point needs."""
    return entry["accuracy"] is not None and all(axis in entry for axis, _ in _AXES)


def draw(summary: Sequence[dict[str, Any]], title: str, path: pathlib.Path) -> None:
    """Draw trained and measured rows: a colour a rule, a marker a reach, deviations as bars.

    Args:
        summary: of :func:`experiments.board.summary.summarize`.
        title: above the picture.
        path: of the PNG; replaced in one step.
    """
    entries = list(filter(is_shown, summary))
    groups = list(dict.fromkeys((e["model"], e["budget"], e["amount"]) for e in entries))
    if not groups:
        return
    rules = list(dict.fromkeys(entry["rule"] for entry in summary))
    reaches = sorted({entry["reach"] for entry in summary}, key=str)
    figure = plots.new_figure(12, 4.2 * len(groups) + 0.4)
    figure.suptitle(title)
    grid = figure.subplots(len(groups), 2, squeeze=False)
    for group, pair in zip(groups, grid):
        own = [e for e in entries if (e["model"], e["budget"], e["amount"]) == group]
        for panel, (axis, label) in zip(pair, _AXES):
            for entry in own:
                row = row_of(entry)
                panel.errorbar(
                    entry[axis],
                    entry["accuracy"],
                    yerr=entry["deviation"],
                    fmt=_MARKERS[reaches.index(row.reach) % len(_MARKERS)],
                    color=panels.color(rules.index(row.rule)),
                    markersize=9,
                    markeredgecolor="white",
                    capsize=4,
                    label=row.label,
                )
            panel.set_xlabel(label)
            panel.set_ylabel("test accuracy [%]")
            panel.margins(x=0.1, y=0.15)
            panel.set_xlim(left=0)
            panel.grid(alpha=0.3)
            panel.set_title(f"{row.model}, {row.shown_budget}", fontsize=10)
        handles, labels = pair[1].get_legend_handles_labels()
        pair[1].legend(handles, labels, loc="center left", bbox_to_anchor=(1.02, 0.5))
    plots.save(figure, path)
