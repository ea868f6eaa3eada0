"""Train on CIFAR-10: the published recipe, schedule-free AdamW at 5e-3, batch 128, 100 epochs."""

from experiments.command_line import train_command
from experiments.config import TrainConfig

PRESET = TrainConfig(dataset="cifar10")

if __name__ == "__main__":
    train_command(PRESET, __doc__ or "")
