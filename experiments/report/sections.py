"""What a page says of a run, section by section."""

import dataclasses
import html as escaping
import statistics
from collections.abc import Sequence
from typing import Any

from experiments import panels, plots
from experiments.commands import resume_command
from experiments.config import TrainConfig
from experiments.config_choices import option
from experiments.evaluate import Judged, by_class
from experiments.panels import Record
from experiments.parameters import BlockParameters
from experiments.presets import default_config
from experiments.report import html
from lls_jax.runs.callbacks import EarlyStopping, selection_accuracy


def head(config: TrainConfig, records: Sequence[Record]) -> str:
    """What was trained, and the figures that matter."""
    last = records[-1]
    best = max(records, key=lambda record: (selection_accuracy(record) or 0.0, record["epoch"]))
    by = "validation" if config.validation_examples else "test"
    reach = f", reach {config.reach}" if config.reach != 1 else ""
    figures = {
        f"test accuracy after epoch {last['epoch']}": f"{last['test_accuracy']:.2f} %",
        f"best {by} accuracy, epoch {best['epoch']}": f"{selection_accuracy(best) or 0.0:.2f} %",
        "training accuracy": f"{last['train_accuracy']:.2f} %",
        "training and evaluation": _duration(last["total_seconds"]),
    }
    if last.get("test_views_accuracy") is not None:
        figures["test accuracy by views"] = f"{last['test_views_accuracy']:.2f} %"
    cells = "".join(
        f"<div><b>{html.text(value)}</b><span>{html.text(name)}</span></div>\n"
        for name, value in figures.items()
    )
    unfinished = ""
    if last["epoch"] < config.epochs:
        patience = config.patience
        is_over = patience is not None and EarlyStopping(patience).is_over(list(records))
        how = "stopped early" if is_over else "not finished yet"
        unfinished = f" of {config.epochs}; {how}"
    return (
        f"<h1>{html.text(title(config))}{html.text(reach)}</h1>\n"
        f'<p class="quiet">{last["epoch"]} epochs{unfinished}, batch size {config.batch_size}, '
        f"seed {config.seed}</p>\n"
        f'<div class="figures">{cells}</div>\n'
    )


def title(config: TrainConfig) -> str:
    """A run in a few words."""
    return f"{config.rule} on {config.model}, {config.dataset}"


def _duration(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 180 else f"{seconds:.1f} s"


def curves(records: Sequence[Record]) -> str:
    """A picture for each quantity."""
    drawn = "".join(
        html.picture(plots.to_svg(panel), f"{panel.y_label} against {panel.x_label}")
        for panel in panels.curve_panels(records)
    )
    return html.section("Curves", f'<div class="pictures">{drawn}</div>\n')


def confusion(judged: Judged | str) -> str:
    """The confusion matrix, or why there is none."""
    if isinstance(judged, str):
        return html.section("Confusion matrix", f'<p class="quiet">{html.text(judged)}</p>\n')
    result, names = judged.result, judged.task.spec.class_names
    figure = plots.confusion_figure(result.confusion, names, "", bar=False)
    said = (
        f"Checkpoint of step {judged.step}, epoch {judged.epoch}: {result.accuracy:.2f} % of "
        f"{judged.examples} test images, loss {result.loss:.4f}"
        + ("" if result.top5 is None else f", {result.top5:.2f} % among the first five")
        + ". In percent of each true class:"
    )
    drawn = html.picture(plots.svg_of(figure), "confusion matrix")
    classes = [[name, accuracy] for name, accuracy in by_class(judged).items()]
    return html.section(
        "Confusion matrix",
        f"<p>{html.text(said)}</p>\n"
        f'<div class="confusion">{drawn}</div>\n'
        "<details><summary>Accuracy by class</summary>"
        + html.table(("class", "accuracy [%]"), classes)
        + "</details>\n",
    )


def blocks(records: Sequence[Record], counted: Sequence[BlockParameters]) -> str:
    """What each block has, lost and was measured to be, the classifier at last.

    Args:
        records: one an epoch.
        counted: parameters, the classifier's at last; empty where they are not known.
    """
    first, last = records[0], records[-1]
    losses = len(last["layer_loss"])
    measured = {
        name: [record[name] for record in records if record.get(name)][-1]
        for name in panels.MEASURED
        if any(record.get(name) for record in records)
    }
    recorded = max([losses, *map(len, measured.values())])
    # A user's own network may have fewer blocks by now than it was trained with.
    counted = counted if len(counted) > recorded else []
    count = max(len(counted) - 1, recorded)
    if count < 1:
        return ""
    columns = ["block"]
    columns += ["parameters", "of its rule"] if counted else []
    columns += ["loss, first epoch", "loss, last epoch"]
    columns += [panels.MEASURED[name].label for name in measured]
    rows = []
    for block in range(count + 1):
        is_classifier = block == count
        row: list[Any] = ["classifier" if is_classifier else f"L{block + 1}"]
        if counted:
            own = counted[block]
            row += [f"{own.own:,}", f"{own.rule:,}"]
        if is_classifier:
            row += [first["train_loss"], last["train_loss"]]
        else:
            row += [r["layer_loss"][block] if block < losses else None for r in (first, last)]
        row += [values[block] if block < len(values) else None for values in measured.values()]
        rows.append(row)
    return html.section("Blocks", html.table(columns, rows))


def timing(records: Sequence[Record]) -> str:
    """How long it took."""
    later = records[1:] or records
    rows = {
        "training and evaluation": _duration(records[-1]["total_seconds"]),
        "first epoch, with compilation": _duration(records[0]["seconds"]),
        "an epoch, median of the others": _duration(statistics.median(r["seconds"] for r in later)),
        "images/s, median": f"{statistics.median(r['images_per_second'] for r in later):.0f}",
    }
    return html.section("Timing", html.pairs(rows))


_HERE = (
    *("workdir", "data_dir", "progress", "profile"),
    *("coordinator", "num_processes", "process_id"),
)


def options(config: TrainConfig) -> str:
    """What was chosen, the command that repeats it, and everything else folded away."""
    default = default_config(config.dataset)
    values = dataclasses.asdict(config)
    changed = {
        option(name): value
        for name, value in values.items()
        if name not in ("dataset", *_HERE) and value != getattr(default, name)
    }
    others = {
        option(name): "not given" if value is None else value
        for name, value in values.items()
        if name not in ("dataset", *_HERE) and option(name) not in changed
    }
    # Without what is this machine's own.
    here = {name: getattr(default, name) for name in _HERE}
    command = resume_command(dataclasses.replace(config, **here))
    return html.section(
        "Repeat it",
        f"<pre>{escaping.escape(command)}</pre>\n"
        + (html.pairs(changed, ("option", "not the default")) if changed else "")
        + "<details><summary>All other options</summary>"
        + html.pairs(others, ("option", "default"))
        + "</details>\n",
    )


def versions(environments: Sequence[dict[str, Any]]) -> str:
    """On what it ran, start by start."""
    parts = []
    for environment in environments:
        known = {name: value for name, value in environment.items() if name != "packages"}
        parts.append(html.pairs({**known, **environment.get("packages", {})}))
    many = f'<p class="quiet">It was started {len(parts)} times, on different grounds.</p>\n'
    return html.section("Versions", (many if len(parts) > 1 else "") + "".join(parts))
