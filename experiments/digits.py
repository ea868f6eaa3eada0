"""Train on digits: 1,797 handwritten digits, 8x8 pixels, that ship with scikit-learn."""

from experiments.command_line import train_command

if __name__ == "__main__":
    train_command("digits", __doc__ or "")
