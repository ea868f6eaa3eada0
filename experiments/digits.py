"""Train on digits: 1,797 handwritten digits, 8x8 pixels, that ship with scikit-learn."""

from experiments.command_line import train_command
from experiments.config import TrainConfig

# A mirrored digit is another sign, or none.
PRESET = TrainConfig(dataset="digits", epochs=30, batch_size=64, augmentation="none")

if __name__ == "__main__":
    train_command(PRESET, __doc__ or "")
