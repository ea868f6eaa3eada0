"""Compare runs: a table, and a picture of accuracy and loss against epochs and time."""

import dataclasses
import pathlib
from typing import Any

from simple_parsing import field

from experiments.command_line import parse, run
from lls_jax.errors import UserError

_COLUMNS = (
    ("run", "run"),
    ("dataset", "data"),
    ("model", "model"),
    ("rule", "rule"),
    ("epochs", "epochs"),
    ("test_accuracy", "Acc@1 [%]"),
    ("best_accuracy", "best Acc@1 [%]"),
    ("test_loss", "test loss"),
    ("seconds", "time [s]"),
    ("images_per_second", "images/s"),
    ("device", "device"),
)


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Compare training runs."""

    runs: list[str] = field(positional=True, nargs="+")
    """Folders of the runs."""
    out: str = "comparison"
    """Folder for comparison.md, comparison.json and comparison.png."""


def _row(name: str, folder: pathlib.Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    import statistics

    from experiments.run_config import read_config
    from lls_jax.runs import folder as folders
    from lls_jax.runs.callbacks import selection_accuracy

    config = read_config(folder)
    best = max(records, key=lambda record: (selection_accuracy(record), record["epoch"]))
    environments = folders.read_environment(folder)
    return {
        "run": name,
        "dataset": config.dataset,
        "model": config.model,
        "rule": config.rule,
        "epochs": records[-1]["epoch"],
        "test_accuracy": records[-1]["test_accuracy"],
        "best_accuracy": best["test_accuracy"],
        "test_loss": records[-1]["test_loss"],
        "layer_loss": records[-1]["layer_loss"],
        "seconds": records[-1]["total_seconds"],
        "images_per_second": statistics.median(record["images_per_second"] for record in records),
        "device": environments[-1].get("device") if environments else None,
    }


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _markdown(rows: list[dict[str, Any]]) -> str:
    header = [title for _, title in _COLUMNS]
    lines = [header, ["---"] * len(header)]
    lines += [[_cell(row[key]).replace("|", "\\|") for key, _ in _COLUMNS] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _short(names: list[str]) -> list[str]:
    """The runs' own names, without the folders that they lie in; whole where two would be one."""
    own = [pathlib.Path(name).resolve().name for name in names]
    return own if len(set(own)) == len(own) else names


def compare(config: CompareConfig) -> int:
    """Write table and picture; returns the exit status."""
    from experiments import plots
    from experiments.run_config import read_config
    from lls_jax.runs import folder as folders

    rows, curves = [], {}
    names = list(dict.fromkeys(config.runs))
    for name, short in zip(names, _short(names)):
        folder = pathlib.Path(name)
        read_config(folder)
        records = folders.read_metrics(folder)
        if not records:
            raise UserError(f"run {folder} has no finished epoch yet; train it first.")
        rows.append(_row(name, folder, records))
        curves[short] = records
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    table = _markdown(rows)
    folders.write_atomically(out / "comparison.md", table)
    folders.write_atomically(out / "comparison.json", folders.to_json(rows))
    plots.draw_comparison(curves, out / "comparison.png")
    print(table + f"\nwritten: {out / 'comparison.md'}, comparison.json, comparison.png")
    return 0


if __name__ == "__main__":
    config = parse(CompareConfig, "compare", __doc__ or "")
    run(lambda: compare(config))
