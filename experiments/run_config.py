"""A training command's config in the folder of its run, of this version or an earlier one."""

import dataclasses
import pathlib
from typing import Any

from experiments.config import FORMAT, TrainConfig
from experiments.config_choices import SPREADING, option
from lls_jax import own_parts
from lls_jax.errors import UserError
from lls_jax.runs import folder as folders

# What may differ when a run is resumed: where things are and what is shown, never the numbers.
NOT_COMPARED = (
    # Other executions of the same updates: equal within rounding.
    *("pipeline", "stages", "data_parallel", "remat", "slice"),
    *("coordinator", "num_processes", "process_id"),
    "data_dir",
    "data_on_device",
    "workdir",
    "progress",
    "checkpoint_every",
    "eval_batch_size",
    "patience",
    "test_views",
    # A name for values that are compared themselves.
    "preset",
    *("measure", "measure_every"),
    *("log", "profile"),
)
# Those of them that say when a run is over and what it has: config.json has its newest start's.
OF_NEWEST_START = ("patience", "test_views")


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """A config from what a run folder holds.

    Raises:
        ValueError: it has fields that no config has, or wrong values.
    """
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"unknown fields {', '.join(unknown)}")
    return TrainConfig(**values)


def may_go_on(stored: TrainConfig, config: TrainConfig, name: str) -> bool:
    """Whether a run may go on with another value of an option: what was trained is the same.

    Args:
        stored: of the run so far.
        config: of its continuation.
        name: of a field.
    """
    if name in NOT_COMPARED or getattr(stored, name) == getattr(config, name):
        return True
    # A run can be extended.
    is_longer = name == "epochs" and config.epochs > stored.epochs
    return is_longer and spreads(config) is None


def spreads(config: TrainConfig) -> str | None:
    """The option by which updates depend on the number of epochs; None where they do not.

    Raises:
        UserError: the user's own optimizer is not to be found.
    """
    if config.schedule in SPREADING:
        return f"--schedule {config.schedule}"
    # Its whitening's bias has a rate that falls over a share of the epochs.
    by_epochs = config.optimizer == "muon" and config.model == "airbench"
    if own_parts.is_own(config.optimizer):
        try:
            by_epochs = bool(own_parts.find("optimizer", config.optimizer).takes(["epochs"]))
        except ValueError as error:
            raise UserError(str(error)) from error
    return f"--optimizer {config.optimizer}" if by_epochs else None


def _parse(path: pathlib.Path, values: dict[str, Any]) -> tuple[TrainConfig, int]:
    """The config of a run, and the format that it was written in.

    Raises:
        UserError: it cannot be read.
    """
    values = dict(values)
    if "made_by" in values:
        raise UserError(
            f"{path} is a run of {values['made_by']}, whose model and rule the commands do not "
            "know; restore it in Python by lls_jax.evaluation.restore."
        )
    try:
        written = values.pop("format", 1)
        if written > FORMAT:
            raise ValueError(f"it has format {written}, and this version knows {FORMAT}")
        if written == 1:
            # These meant the rule's own, which it has whatever it is.
            own = {"waveform": "square", "temperature": 0.5, "label_smoothing": 0.0}
            values |= {name: None for name, value in own.items() if values.get(name) == value}
        if written < 3 and values.get("model") == "airbench":
            # It had nothing to follow.
            values["dropout"] = 0.0
        return from_dict(values), written
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path / 'config.json'} is not a config of this version: {error}."
        ) from error


def read_config(folder: pathlib.Path) -> TrainConfig:
    """The config of a run, of this version or an earlier one.

    Raises:
        UserError: there is no run in this folder, or its config cannot be read.
    """
    values = folders.read_settings(folder)
    if values is None:
        raise UserError(
            f"{folder} holds no run (it has no config.json); give the --workdir of a training run."
        )
    return _parse(folder, values)[0]


def begin_from(folder: pathlib.Path) -> TrainConfig:
    """The options of another run, for a new one.

    Raises:
        UserError: there is no run in this folder, or its config cannot be read, or means something
            else in this version.
    """
    config = read_config(folder)
    written = (folders.read_settings(folder) or {}).get("format", 1)
    if was := _was_otherwise(config, written):
        raise UserError(
            f"{folder} was written by an earlier version, whose {was}; give the options themselves."
        )
    # These are of one start of that run.
    return dataclasses.replace(
        config, workdir=None, coordinator=None, num_processes=None, process_id=None
    )


def check_same_run(folder: pathlib.Path, config: TrainConfig) -> None:
    """Check that what a folder holds, if anything, is the run of a config, or more epochs of it.

    Raises:
        UserError: it is another one, and the message names the options that differ.
    """
    stored = folders.read_settings(folder)
    if stored is None:
        return
    before, _ = _parse(folder, stored)
    if before.epochs != config.epochs and spreads(config) is None:
        config = dataclasses.replace(config, epochs=max(config.epochs, before.epochs))
    ConfigSettings(config).check(folder, stored)


def _was_otherwise(config: TrainConfig, written: int) -> str | None:
    """What a config asked for in the version that wrote it, where that is something else now."""
    if written == 1:
        return "schedule_free_adamw was optax's and not the published optimizer"
    if written == 2 and config.optimizer in ("adam", "adamw") and config.momentum != 0.9:
        return f"{config.optimizer} had a b1 of 0.9 and not --momentum {config.momentum}"
    return None


class ConfigSettings(folders.Settings):
    """A training command's config as the settings of a run."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__({"format": FORMAT, **dataclasses.asdict(config)})
        self._config = config

    def check(self, folder: pathlib.Path, stored: dict[str, Any]) -> None:
        """Raise UserError, naming the options that differ, or an earlier version's optimizer."""
        before, written = _parse(folder, stored)
        config = self._config
        if was := _was_otherwise(before, written):
            raise UserError(
                f"{folder} was written by an earlier version, whose {was}, so that it cannot go on "
                "as it was; give another --workdir to train anew (evaluate and compare still read "
                "this one)."
            )
        differing = [
            f"{option(field.name)} {getattr(before, field.name)} there, "
            f"{getattr(config, field.name)} here"
            for field in dataclasses.fields(config)
            if not may_go_on(before, config, field.name)
        ]
        if differing:
            by = spreads(config) if before.epochs != config.epochs else None
            because = f"; {by} depends on --epochs" if by else ""
            raise UserError(
                f"{folder} holds a run with another config ({'; '.join(differing)}{because}); give "
                "the same options to resume it, or another --workdir for a new run."
            )
