"""Commands as a person types them."""

import dataclasses
import shlex
from typing import Any

from experiments.config import TrainConfig
from experiments.option_files import to_arguments
from experiments.presets import PRESETS, default_config


def changed_options(config: TrainConfig) -> dict[str, Any]:
    """Values by field that a command has to give, since the data set's or the preset's differ."""
    default = default_config(config.dataset, config.preset)
    return {
        field.name: value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != getattr(default, field.name)
        or (field.name == "preset" and value is not None)
    }


def resume_command(config: TrainConfig) -> str:
    """The command that goes on with a run, or repeats it in another folder."""
    named = {"dataset": config.dataset, "rule": config.rule}
    values = {**named, **changed_options(config)}
    command = "run"
    if config.dataset in PRESETS:
        command = values.pop("dataset")
    return shlex.join(["python", "-m", f"experiments.{command}", *to_arguments(values)])
