"""Train on Fashion-MNIST: 60,000 grey images of clothes, 28x28 pixels, 10 classes."""

from experiments.command_line import train_command
from experiments.config import TrainConfig

PRESET = TrainConfig(dataset="fashion_mnist", epochs=20)

if __name__ == "__main__":
    train_command(PRESET, __doc__ or "")
