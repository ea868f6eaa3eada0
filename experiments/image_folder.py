"""Train on images of your own, that prepare_data image_folder has imported."""

from experiments.command_line import train_command

if __name__ == "__main__":
    train_command("image_folder", __doc__ or "")
