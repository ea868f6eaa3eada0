"""Train on Tiny ImageNet: 200 classes of ImageNet, 64x64 pixels."""

from experiments.command_line import train_command

if __name__ == "__main__":
    train_command("tiny_imagenet", __doc__ or "")
