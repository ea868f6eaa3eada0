"""Train on MNIST: 60,000 grey images of handwritten digits, 28x28 pixels."""

from experiments.command_line import train_command

if __name__ == "__main__":
    train_command("mnist", __doc__ or "")
