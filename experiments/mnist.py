"""Train on MNIST: 60,000 grey images of handwritten digits, 28x28 pixels."""

from experiments.command_line import train_command
from experiments.config import TrainConfig

# A mirrored digit is another sign, or none.
PRESET = TrainConfig(dataset="mnist", epochs=20, augmentation="none")

if __name__ == "__main__":
    train_command(PRESET, __doc__ or "")
