"""The training commands' presets: what a data set is trained with unless told otherwise."""

import dataclasses
import difflib
from typing import Any, NamedTuple

from experiments.config import TrainConfig

PRESETS = {
    preset.dataset: preset
    for preset in (
        TrainConfig(dataset="cifar10"),
        TrainConfig(dataset="cifar100"),
        # A mirrored digit is another sign, or none.
        TrainConfig(dataset="digits", epochs=30, batch_size=64, augmentation="none"),
        TrainConfig(dataset="fashion_mnist", epochs=20),
        TrainConfig(dataset="image_folder"),
        TrainConfig(dataset="imagenette", model="vgg8", epochs=300, augmentation="full"),
        TrainConfig(dataset="mnist", epochs=20, augmentation="none"),
        TrainConfig(dataset="tiny_imagenet", model="vgg8", epochs=300, augmentation="flip_erase"),
        TrainConfig(dataset="visual_wake_words", model="mobilenet_v1", epochs=300),
    )
}


class Measured(NamedTuple):
    """An accuracy that was measured with a data set's own preset.

    Attributes:
        accuracy: on the test images after the last epoch, in percent.
        how: seeds and versions.
        command: that repeats it.
    """

    accuracy: float
    how: str
    command: str


# What backpropagation reaches; a run beside a person's own stands before it.
BP_MEASURED = {
    "digits": Measured(
        99.54,
        "mean of seeds 0 to 2, jax 0.10.2 on a CPU",
        "python -m experiments.digits --rule bp",
    ),
}

# What `--preset` changes, of whatever data set.
RECIPES: dict[str, dict[str, Any]] = {
    # The speed-run airbench94 with Muon: https://github.com/KellerJordan/cifar10-airbench.
    "airbench": {
        "model": "airbench",
        "epochs": 8,
        "batch_size": 2000,
        "optimizer": "muon",
        "learning_rate": 0.24,
        "momentum": 0.6,
        # Its 2e-6 for each of 2,000 images.
        "weight_decay": 0.004,
        "schedule": "linear",
        "classifier_smoothing": 0.2,
        "augmentation": "alternating_flip_translate",
        "test_views": "flip_translate",
    }
}


def default_config(dataset: str, preset: str | None = None) -> TrainConfig:
    """What a command trains a data set with unless told otherwise.

    Args:
        dataset: of :data:`PRESETS`, or a user's own, whose images are taken as they are.
        preset: of :data:`RECIPES`; None for the data set's own.

    Raises:
        ValueError: an unknown data set or preset.
    """
    config = PRESETS.get(dataset)
    if config is None:
        if ":" not in dataset:
            close = difflib.get_close_matches(dataset, PRESETS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"unknown data set {dataset!r}; expected one of {', '.join(PRESETS)}, or your own "
                f"as package.module:function.{hint}"
            )
        config = TrainConfig(dataset=dataset, augmentation="none")
    if preset is None:
        return config
    if preset not in RECIPES:
        close = difflib.get_close_matches(preset, RECIPES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown preset {preset!r}; expected one of {', '.join(RECIPES)}.{hint}")
    return dataclasses.replace(config, preset=preset, **RECIPES[preset])
