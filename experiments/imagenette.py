"""Train on Imagenette: ten classes of ImageNet, windows of 128x128 pixels."""

from experiments.command_line import train_command
from experiments.config import TrainConfig

PRESET = TrainConfig(dataset="imagenette", model="vgg8", epochs=300, augmentation="full")

if __name__ == "__main__":
    train_command(PRESET, __doc__ or "")
