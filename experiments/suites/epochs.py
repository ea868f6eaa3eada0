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

from experiments import train
from experiments.config import TrainConfig
from experiments.presets import default_config
from experiments.suites import report
from experiments.suites.training import kernels_of, local_only, with_reaches

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


def run(config: Any) -> int:
    """The suite: models x batch sizes x precisions, a run for each rule; exit status."""
    named = with_reaches(["bp", *config.rules], config.reach)
    rows: list[report.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for model, batch_size, precision in itertools.product(
            config.models, config.batch_sizes, config.precisions
        ):
            own = [
                measure(
                    dataclasses.replace(
                        default_config(config.dataset),
                        model=model,
                        rule=rule,
                        reach=reach,
                        epochs=config.epochs,
                        batch_size=batch_size,
                        precision=precision,
                        kernels=kernels_of(rule, config.kernels),
                        remat=local_only(rule, config.remat),
                        slice=local_only(rule, config.slice),
                        seed=config.seed,
                        data_dir=config.data_dir,
                        progress=False,
                        workdir=f"{folder}/{model}-{rule}-r{reach}-{batch_size}-{precision}",
                    )
                )
                for rule, reach in named
            ]
            rows += [{**row, "speed_over_bp": own[0]["seconds"] / row["seconds"]} for row in own]
    head = f"{report.device_line()}; {config.dataset}, {config.epochs} epochs, each evaluated\n\n"
    report.write(pathlib.Path(config.out), config, rows, head + report.markdown(_COLUMNS, rows))
    return 0
