"""Train on Tiny ImageNet: 200 classes of ImageNet, 64x64 pixels."""

from experiments.command_line import train_command
from experiments.config import TrainConfig

PRESET = TrainConfig(dataset="tiny_imagenet", model="vgg8", epochs=300, augmentation="flip_erase")

if __name__ == "__main__":
    train_command(PRESET, __doc__ or "")
