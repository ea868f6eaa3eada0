"""A board's table: means and deviations over seeds, paired tests, and what is missing."""

import pathlib
import statistics
from typing import Any

from experiments import batch
from experiments.board import outcome, picture
from experiments.board.content import Board, commands, key_of
from experiments.board.paired import Comparison, compare
from experiments.board.rows import Row, row_of
from experiments.suites.report import markdown

# What each row is tested against, with a reach of 1.
REFERENCES = ("bp", "lls_mxm")
_COLUMNS = {
    "model": "model",
    "shown_budget": "budget",
    "rule": "rule",
    "reach": "reach",
    "n": "seeds",
    "shown_accuracy": "test accuracy [%]",
    "shown_views": "by views [%]",
    "shown_validation": "validation [%]",
    "shown_bp": "against bp",
    "shown_lls_mxm": "against lls_mxm",
    "images_per_second": "images/s",
    "speed_over_bp": "speed over bp",
    "temporary_mb": "temporaries [MB]",
    "temporaries_over_bp": "over bp",
    "extra_parameters": "extra parameters",
    "macs_over_bp": "MACs over bp",
    "missing": "missing",
}
_HOW_TO_READ = """\
Test accuracy after the last step, mean and deviation over seeds; nothing is chosen by the test
images. Against bp and lls_mxm (reach 1): mean difference in points, and p of a two-sided paired
t-test over the seeds that both have; a seed has the same order of images and the same initial
weights in every row. Speed over bp: median over turns of a few steps, in which the rows followed
each other; images/s: that, times bp's. Temporaries: of the compiled step (`memory_analysis`). MACs:
multiply-accumulates of a training step, counted."""
# That are left out where no row has anything to say.
_OPTIONAL = ("shown_views", "shown_validation", "missing")


def summarize(board: Board, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """One entry a row, JSON values."""
    found = {
        (row, seed): outcome.read(row.folder(workdir, seed))
        for row in board.rows
        for seed in board.seeds
    }

    def accuracies(row: Row, name: str = "test") -> dict[int, float]:
        ended = {seed: found.get((row, seed)) for seed in board.seeds}
        values = {seed: getattr(one, name) for seed, one in ended.items() if one is not None}
        return {seed: value for seed, value in values.items() if value is not None}

    def against(row: Row, rule: str) -> Comparison | None:
        other = Row(row.model, rule, 1, row.budget, row.amount)
        if other not in board.rows or other == row:
            return None
        return compare(accuracies(row), accuracies(other))

    entries = []
    for row in board.rows:
        test = accuracies(row)
        comparisons = {rule: against(row, rule) for rule in REFERENCES}
        views, validation = accuracies(row, "views"), accuracies(row, "validation")
        entries.append(
            {
                **row.values(),
                "n": len(test),
                "accuracies": {str(seed): value for seed, value in test.items()},
                "steps": {
                    str(seed): one.step
                    for seed in board.seeds
                    if (one := found[row, seed]) is not None
                },
                **_spread("accuracy", "deviation", test),
                **_spread("views_accuracy", "views_deviation", views),
                **_spread("validation_accuracy", "validation_deviation", validation),
                **{
                    f"against_{rule}": None if one is None else one._asdict()
                    for rule, one in comparisons.items()
                },
                **board.measured.get(key_of(row), {}),
                "missing": _missing(board, row, workdir),
            }
        )
    return entries


def _spread(mean: str, deviation: str, values: dict[int, float]) -> dict[str, float | None]:
    numbers = list(values.values())
    return {
        mean: statistics.mean(numbers) if numbers else None,
        deviation: statistics.stdev(numbers) if len(numbers) > 1 else None,
    }


def _missing(board: Board, row: Row, workdir: pathlib.Path) -> str:
    parts = []
    for seed in board.seeds:
        folder = row.folder(workdir, seed)
        if batch.divergence(folder) is not None:
            parts.append(f"seed {seed} (diverged)")
        elif outcome.read(folder) is None:
            parts.append(f"seed {seed}")
    return ", ".join(parts)


def _mean(mean: float | None, deviation: float | None) -> str | None:
    if mean is None:
        return None
    return f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def _test(comparison: dict[str, Any] | None) -> str | None:
    if comparison is None:
        return None
    p, n = comparison["p"], comparison["n"]
    why = comparison["note"] if p is None else f"p {p:.2g}"
    return f"{comparison['difference']:+.2f} ({why}, n {n})"


def table(summary: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    shown = []
    for entry in summary:
        shown.append(
            {
                **entry,
                "shown_budget": row_of(entry).shown_budget,
                "shown_accuracy": _mean(entry["accuracy"], entry["deviation"]),
                "shown_views": _mean(entry["views_accuracy"], entry["views_deviation"]),
                "shown_validation": _mean(
                    entry["validation_accuracy"], entry["validation_deviation"]
                ),
                **{f"shown_{rule}": _test(entry[f"against_{rule}"]) for rule in REFERENCES},
            }
        )
    columns = {
        key: title
        for key, title in _COLUMNS.items()
        if key not in _OPTIONAL or any(entry.get(key) for entry in shown)
    }
    return markdown(columns, shown)


def page(board: Board, summary: list[dict[str, Any]], workdir: str, environment: Any) -> str:
    """board.md: the table, how it is to be read, and the commands that repeat it."""
    versions = environment["packages"]
    lines = [
        f"# {board.dataset}: rules side by side",
        "",
        table(summary),
        _HOW_TO_READ,
        "",
        f"Device {environment['device']}, {environment['cpu_cores']} cores; Python "
        f"{environment['python']}, jax {versions['jax']}, lls_jax {versions['lls_jax']}, commit "
        f"{environment['commit']}. The same board again:",
        "",
        "```sh",
        *commands(board, workdir),
        "```",
        "",
    ]
    if any(map(picture.is_shown, summary)):
        lines += ["![Accuracy against memory and against time](board.png)", ""]
    return "\n".join(lines)
