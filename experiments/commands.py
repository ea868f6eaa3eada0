"""Commands as a person types them."""

import dataclasses
import shlex

from experiments.config import TrainConfig
from experiments.option_files import to_arguments
from experiments.presets import PRESETS, default_config


def resume_command(config: TrainConfig) -> str:
    """The command that goes on with a run, or repeats it in another folder."""
    default = default_config(config.dataset, config.preset)
    values = {
        field.name: value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != getattr(default, field.name)
        or field.name in ("rule", "preset", "dataset")
    }
    if config.preset is None:
        values.pop("preset")
    command = "run"
    if config.dataset in PRESETS:
        command = values.pop("dataset")
    return shlex.join(["python", "-m", f"experiments.{command}", *to_arguments(values)])
