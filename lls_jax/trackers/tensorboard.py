"""TensorBoard's event files, written by tensorboardX, which needs no TensorFlow."""

from typing import Any

from lls_jax.runs.callbacks import Record, RunStart
from lls_jax.trackers.base import Tracker, folder_of, scalars

FOLDER = "tensorboard"


class TensorBoard(Tracker):
    """Writes RUN/tensorboard: each number of a record against the steps done, and the settings."""

    name = "tensorboard"

    def open_run(self, event: RunStart, kept: Record | None) -> Record:
        """Begin a new file; of those before, what the run is about to repeat counts no more."""
        # Imported late: an option of the installation.
        import tensorboardX

        self._writer: Any = tensorboardX.SummaryWriter(
            logdir=str(folder_of(event, self.name) / FOLDER),
            # TensorBoard leaves out what earlier files have from this step on.
            purge_step=None if kept is None else event.step + 1,
        )
        if kept is None and self._settings:
            lines = ["| option | value |", "| --- | --- |"]
            lines += [f"| {name} | {value} |" for name, value in self._settings.items()]
            self._writer.add_text("settings", "\n".join(lines))
        return {"folder": FOLDER}

    def send(self, records: list[Record]) -> None:
        """Write the epoch's numbers, to the disk."""
        record = records[-1]
        for tag, value in scalars(record).items():
            self._writer.add_scalar(tag, value, record["step"])
        self._writer.add_scalar("epoch", record["epoch"], record["step"])
        self._writer.flush()

    def close_run(self, is_finished: bool) -> None:
        """Close the file."""
        self._writer.close()
