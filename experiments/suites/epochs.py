"""Whole runs: so many epochs of training with evaluation after each, in seconds.

They are what the training commands do, data, checkpoints and all. Compilation is in the first epoch
only: the time after compilation counts that epoch as the median of the others.
"""

import dataclasses
import itertools
import pathlib
import statistics
import tempfile
import time
from typing import Any

from experiments import setup, several_rules, train
from experiments.config import TrainConfig
from experiments.presets import default_config
from experiments.suites import report

_COLUMNS = {
    "model": "model",
    "rule": "rule",
    "reach": "reach",
    "batch_size": "batch",
    "precision": "precision",
    "epochs": "epochs",
    "seconds": "after compilation [s]",
    "total_seconds": "with compilation [s]",
    "command_seconds": "whole command [s]",
    "test_accuracy": "test accuracy [%]",
    "speed_over_bp": "speed over bp",
}


def measure(config: TrainConfig) -> report.Row:
    """Train a run to its end, and tell how long it took.

    Args:
        config: of at least two epochs, with a new `workdir`.
    """
    began = time.perf_counter()
    # Without what a command says at its end: the folder is about to go.
    trained = train.train(config)
    if number := trained.signal or trained.late_signal:
        raise SystemExit(128 + number)
    command_seconds = time.perf_counter() - began
    records = trained.result.records
    epochs = [record["seconds"] for record in records]
    return {
        "model": config.model,
        "rule": config.rule,
        "reach": config.reach,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "epochs": config.epochs,
        "seconds": sum(epochs[1:]) + statistics.median(epochs[1:]),
        "total_seconds": sum(epochs),
        "command_seconds": command_seconds,
        "test_accuracy": records[-1]["test_accuracy"],
        "epoch_seconds": epochs,
    }


def _groups(config: Any) -> list[list[TrainConfig]]:
    """Models x batch sizes x precisions, in each a run for each rule, that of ``bp`` first."""
    groups = []
    for model, batch_size, precision in itertools.product(
        config.models, config.batch_sizes, dict.fromkeys(config.precisions)
    ):
        common = dataclasses.replace(
            default_config(config.dataset),
            model=model,
            width=config.width,
            epochs=config.epochs,
            batch_size=batch_size,
            precision=precision,
            kernels=config.kernels,
            remat=config.remat,
            slice=config.slice,
            seed=config.seed,
            data_dir=config.data_dir,
            progress=False,
        )
        groups.append(several_rules.of_rules(common, ["bp", *config.rules], config.reach))
    return groups


def run(config: Any) -> int:
    """The suite; returns the exit status."""
    groups = _groups(config)
    runs = [*itertools.chain(*groups)]
    asked = TrainConfig(kernels=config.kernels, remat=config.remat, slice=config.slice)
    several_rules.check_used(asked, runs)
    for one in runs:
        setup.check_task(one)
    out, rows = pathlib.Path(config.out), []
    head = f"{report.device_line()}{report.width_in_words(config.width)}; {config.dataset}, "
    head += f"{config.epochs} epochs, each evaluated\n\n"
    with tempfile.TemporaryDirectory() as folder:
        numbers = itertools.count()
        for group in groups:
            own = [
                measure(dataclasses.replace(one, workdir=f"{folder}/{next(numbers)}"))
                for one in group
            ]
            rows += [{**row, "speed_over_bp": own[0]["seconds"] / row["seconds"]} for row in own]
            # Whatever becomes of the next group.
            report.keep(out, config, rows, head + report.markdown(_COLUMNS, rows))
    report.write(out, config, rows, head + report.markdown(_COLUMNS, rows))
    return 0
