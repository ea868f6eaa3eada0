"""Commands as a person types them."""

import dataclasses
import shlex

from experiments.config import TrainConfig, option
from experiments.presets import default_config


def resume_command(config: TrainConfig) -> str:
    """The command that goes on with a run, or repeats it in another folder."""
    default = default_config(config.dataset, config.preset)
    arguments = ["python", "-m", f"experiments.{config.dataset}"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        is_default = value == getattr(default, field.name) and field.name not in ("rule", "preset")
        is_default |= field.name == "preset" and value is None
        if field.name == "dataset" or is_default:
            continue
        if isinstance(value, bool):
            arguments.append(option(field.name if value else f"no_{field.name}"))
        else:
            arguments += [option(field.name), str(value)]
    return shlex.join(arguments)
