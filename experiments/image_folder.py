"""Train on images of your own, that prepare_data image_folder has imported."""

from experiments.command_line import train_command
from experiments.config import TrainConfig

PRESET = TrainConfig(dataset="image_folder")

if __name__ == "__main__":
    train_command(PRESET, __doc__ or "")
