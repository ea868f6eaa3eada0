"""Train on Fashion-MNIST: 60,000 grey images of clothes, 28x28 pixels, 10 classes."""

from experiments.command_line import train_command

if __name__ == "__main__":
    train_command("fashion_mnist", __doc__ or "")
