"""Train on Visual Wake Words: is a person in the image? Windows of 128x128 pixels."""

from experiments.command_line import train_command
from experiments.config import TrainConfig

PRESET = TrainConfig(dataset="visual_wake_words", model="mobilenet_v1", epochs=300)

if __name__ == "__main__":
    train_command(PRESET, __doc__ or "")
