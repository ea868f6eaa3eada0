"""Train on CIFAR-100: 60,000 images of 100 classes, 32x32 pixels."""

from experiments.command_line import train_command

if __name__ == "__main__":
    train_command("cifar100", __doc__ or "")
