"""Train on CIFAR-10: the published recipe, schedule-free AdamW at 5e-3, batch 128, 100 epochs."""

from experiments.command_line import train_command

if __name__ == "__main__":
    train_command("cifar10", __doc__ or "")
