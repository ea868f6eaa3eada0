"""From a run's folder to its page."""

import dataclasses
import pathlib

from experiments import setup
from experiments.config import TrainConfig
from experiments.evaluate import EvaluateConfig, Judged, judge
from experiments.parameters import BlockParameters, count_parameters
from experiments.report import html, sections
from experiments.report.config import ReportConfig
from experiments.run_config import read_config
from lls_jax.errors import UserError
from lls_jax.runs import folder as folders


def report(config: ReportConfig) -> int:
    """Write a run's page; returns the exit status."""
    folder = pathlib.Path(config.run)
    trained = read_config(folder)
    if config.data_dir is not None:
        trained = dataclasses.replace(trained, data_dir=config.data_dir)
    path = pathlib.Path(config.out) if config.out else folder / "report.html"
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; give a file, like {path / 'report.html'}.")
    records = folders.read_metrics(folder)
    if not records:
        raise UserError(f"run {folder} has no finished epoch yet; train it first.")
    content = [
        sections.head(trained, records),
        sections.curves(records),
        sections.blocks(records, _parameters(trained)),
        sections.confusion(_judged(config)),
        sections.timing(records),
        sections.options(trained),
        sections.versions(folders.read_environment(folder)),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    folders.write_atomically(path, html.document(sections.title(trained), "".join(content)))
    print(f"written: {path}")
    return 0


def _judged(config: ReportConfig) -> Judged | str:
    """The checkpoint on the test images, or why it is not judged."""
    if not config.evaluate:
        return "Left out, as asked."
    try:
        return judge(EvaluateConfig(config.run, config.checkpoint, data_dir=config.data_dir))
    except (UserError, OSError) as error:
        kept = folders.checkpoints(pathlib.Path(config.run))
        if config.checkpoint.isdecimal() and not (kept / config.checkpoint).is_dir():
            raise
        return f"It could not be evaluated: {error}"


def _parameters(trained: TrainConfig) -> list[BlockParameters]:
    """Of each block; nothing where network or rule are not to be had here."""
    try:
        return count_parameters(setup.make_task(trained))
    except (UserError, OSError):
        return []
