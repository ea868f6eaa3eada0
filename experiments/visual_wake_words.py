"""Train on Visual Wake Words: is a person in the image? Windows of 128x128 pixels."""

from experiments.command_line import train_command

if __name__ == "__main__":
    train_command("visual_wake_words", __doc__ or "")
