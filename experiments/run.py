"""Train on any data set: the one that --dataset names, or your own as package.module:function."""

from experiments.command_line import train_command

if __name__ == "__main__":
    train_command(None, __doc__ or "")
