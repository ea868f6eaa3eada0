"""A training command's config in the folder of its run, of this version or an earlier one."""

import dataclasses
import pathlib
from typing import Any

from experiments.config import FORMAT, SPREADING, TrainConfig, from_dict, may_go_on, option
from lls_jax.errors import UserError
from lls_jax.runs import folder as folders


def _parse(path: pathlib.Path, values: dict[str, Any]) -> tuple[TrainConfig, int]:
    """The config of a run, and the format that it was written in.

    Raises:
        UserError: it cannot be read.
    """
    values = dict(values)
    try:
        written = values.pop("format", 1)
        if written > FORMAT:
            raise ValueError(f"it has format {written}, and this version knows {FORMAT}")
        if written == 1:
            # These meant the rule's own, which it has whatever it is.
            own = {"waveform": "square", "temperature": 0.5, "label_smoothing": 0.0}
            values |= {name: None for name, value in own.items() if values.get(name) == value}
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


class ConfigSettings(folders.Settings):
    """A training command's config as the settings of a run."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__({"format": FORMAT, **dataclasses.asdict(config)})
        self._config = config

    def check(self, folder: pathlib.Path, stored: dict[str, Any]) -> None:
        """Raise UserError, naming the options that differ, or an earlier version's optimizer."""
        before, written = _parse(folder, stored)
        config = self._config
        if written < FORMAT:
            raise UserError(
                f"{folder} was written by an earlier version, whose schedule_free_adamw was "
                "optax's and not the published optimizer, so that it cannot go on as it was; give "
                "another --workdir to train anew (evaluate and compare still read this one)."
            )
        differing = [
            f"{option(field.name)} {getattr(before, field.name)} there, "
            f"{getattr(config, field.name)} here"
            for field in dataclasses.fields(config)
            if not may_go_on(before, config, field.name)
        ]
        if differing:
            spread = before.epochs != config.epochs and config.schedule in SPREADING
            because = f"; --schedule {config.schedule} depends on --epochs" if spread else ""
            raise UserError(
                f"{folder} holds a run with another config ({'; '.join(differing)}{because}); give "
                "the same options to resume it, or another --workdir for a new run."
            )
