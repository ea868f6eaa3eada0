"""Train on CIFAR-100: 60,000 images of 100 classes, 32x32 pixels."""

from experiments.command_line import train_command
from experiments.config import TrainConfig

PRESET = TrainConfig(dataset="cifar100")

if __name__ == "__main__":
    train_command(PRESET, __doc__ or "")
