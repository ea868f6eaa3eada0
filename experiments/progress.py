"""What a person sees while a run trains."""

import sys
from typing import Any

import tqdm

from lls_jax import processes

Record = dict[str, Any]


def say(*values: str, **options: Any) -> None:
    """Print; of several processes one speaks for all."""
    if processes.is_first():
        print(*values, **options)


class EpochBar:
    """A progress bar over the images of one epoch; on a terminal only."""

    def __init__(self, epoch: int, epochs: int, images: int, done: int, *, enabled: bool) -> None:
        self._bar = tqdm.tqdm(
            desc=f"epoch {epoch}/{epochs}",
            total=images,
            initial=done,
            unit=" images",
            leave=False,
            dynamic_ncols=True,
            disable=not (enabled and sys.stderr.isatty()),
        )

    def advance(self, images: int) -> None:
        """Count images as trained on."""
        self._bar.update(images)

    def show(self, loss: float, accuracy: float) -> None:
        """Show the epoch's training loss, and accuracy in percent, so far."""
        self._bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1f} %")

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


def layer_losses(losses: list[float]) -> str:
    """``L1 1.465  L2 0.944``."""
    return "  ".join(f"L{layer + 1} {loss:.3f}" for layer, loss in enumerate(losses))


def epoch_line(record: Record, epochs: int) -> str:
    """One line that sums up an epoch."""
    top5 = record["test_top5"]
    parts = [
        f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}",
        f"train loss {record['train_loss']:.4f} acc {record['train_accuracy']:.2f}",
        f"test loss {record['test_loss']:.4f} Acc@1 {record['test_accuracy']:.2f}"
        + ("" if top5 is None else f" Acc@5 {top5:.2f}"),
        f"{record['seconds']:.1f} s, {record['images_per_second']:.0f} images/s",
        layer_losses(record["layer_loss"]),
    ]
    return "  |  ".join(part for part in parts if part)
