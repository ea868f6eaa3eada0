"""Train on Imagenette: ten classes of ImageNet, windows of 128x128 pixels."""

from experiments.command_line import train_command

if __name__ == "__main__":
    train_command("imagenette", __doc__ or "")
