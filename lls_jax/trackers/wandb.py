"""Weights & Biases."""

import os
import uuid
from typing import Any

from lls_jax.runs.callbacks import Record, RunStart
from lls_jax.trackers.base import Tracker, scalars

_PROJECT = "lls_jax"


class WandB(Tracker):
    """A run of Weights & Biases, of project ``lls_jax`` unless WANDB_PROJECT says otherwise.

    It is what wandb's own environment variables make it: WANDB_MODE=offline sends nothing, and
    ``wandb sync`` does so later.
    """

    name = "wandb"

    def open_run(self, event: RunStart, kept: Record | None) -> Record:
        """Begin a run under an id that is kept, or go on with that of before."""
        # Imported late: an option of the installation.
        import wandb

        identity = kept or {
            "id": uuid.uuid4().hex[:12],
            "project": os.environ.get("WANDB_PROJECT", _PROJECT),
        }
        self._run: Any = wandb.init(
            **identity,
            resume="allow",
            name=None if event.folder is None else event.folder.name,
            dir=None if event.folder is None else str(event.folder),
            config=self._settings,
        )
        return identity

    def send(self, records: list[Record]) -> None:
        """Log the epoch's numbers against the steps done; what it has already it leaves out."""
        record = records[-1]
        self._run.log({**scalars(record), "epoch": record["epoch"]}, step=record["step"])

    def close_run(self, is_finished: bool) -> None:
        """Finish: what is under way is sent first."""
        self._run.finish(exit_code=0)
