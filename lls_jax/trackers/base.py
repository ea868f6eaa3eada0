"""What all trackers have in common: the first process alone, going on, and nothing lost."""

import abc
import json
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from lls_jax import processes
from lls_jax.errors import UserError
from lls_jax.runs import folder as folders
from lls_jax.runs.callbacks import Callback, EpochEnd, Record, RunStart

_NOT_SCALARS = ("epoch", "step")


def scalars(record: Record) -> dict[str, float]:
    """The numbers of an epoch's record by name; of a list, one a block: ``layer_loss/L1``, ...

    >>> scalars({"epoch": 1, "step": 9, "test_loss": 0.5, "test_top5": None, "layer_loss": [2, 1]})
    {'test_loss': 0.5, 'layer_loss/L1': 2.0, 'layer_loss/L2': 1.0}
    """
    found: dict[str, float] = {}
    for name, value in record.items():
        if name in _NOT_SCALARS:
            continue
        parts = {name: value}
        if isinstance(value, list):
            parts = {f"{name}/L{layer + 1}": one for layer, one in enumerate(value)}
        found |= {part: float(one) for part, one in parts.items() if isinstance(one, int | float)}
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


class Tracker(Callback, abc.ABC):
    """Sends an epoch's record on when the epoch ends; metrics.jsonl has it in any case.

    A run that goes on does so where it was: what identifies it is kept in trackers.json of its
    folder. A run that has begun without this tracker is sent from its first epoch on. What cannot
    be sent is tried again after the next epoch, with a warning; training goes on. Of several
    processes the first sends.
    """

    # Key in trackers.json.
    name: str

    def __init__(
        self, settings: Mapping[str, Any] | None = None, warn: Callable[[str], None] = _warn
    ) -> None:
        """Track a run.

        Args:
            settings: what it is trained with, JSON values, to be shown with it.
            warn: is told what could not be sent.
        """
        self._settings, self._warn = dict(settings or {}), warn
        self._unsent: list[Record] = []
        self._records: list[Record] = []
        self._is_open = False

    @abc.abstractmethod
    def open_run(self, event: RunStart, kept: Record | None) -> Record:
        """Begin a run, or go on with one.

        Args:
            event: where it starts.
            kept: what an earlier start returned; None where there was none.

        Returns:
            What identifies it, JSON values.
        """

    def missing(self, records: list[Record]) -> list[Record]:
        """Those of an earlier start's records that did not arrive."""
        del records
        return []

    @abc.abstractmethod
    def send(self, records: list[Record]) -> None:
        """Send the last of these records, which are all up to one epoch."""

    @abc.abstractmethod
    def close_run(self, is_finished: bool) -> None:
        """End it, for this start; `is_finished`: all its epochs are done."""

    def on_start(self, event: RunStart) -> None:
        """Open the run, and send what it has not been sent.

        Raises:
            UserError: it cannot be opened.
        """
        if not processes.is_first():
            return
        self._epochs = event.epochs
        path = None if event.folder is None else event.folder / "trackers.json"
        everyone = json.loads(path.read_text()) if path is not None and path.exists() else {}
        kept = everyone.get(self.name)
        try:
            identity = self.open_run(event, kept)
        except (UserError, ValueError):
            raise
        except Exception as error:
            raise UserError(
                f"{self.name} cannot be opened ({_first_line(error)}); mend that, or leave "
                f"{self.name} out."
            ) from error
        self._is_open = True
        if path is not None and identity != kept:
            folders.write_atomically(path, folders.to_json({**everyone, self.name: identity}))
        self._records = list(event.records)
        self._unsent = list(event.records) if kept is None else self.missing(event.records)
        self._send_all()

    def on_epoch(self, event: EpochEnd) -> None:
        """Send the epoch's record, after those that could not be sent before."""
        if not processes.is_first():
            return
        self._records.append(event.record)
        self._unsent.append(event.record)
        self._send_all()

    def on_exit(self) -> None:
        """End the run for this start."""
        if not self._is_open:
            return
        self._is_open = False
        done = self._records[-1]["epoch"] if self._records else 0
        self._trying(lambda: self.close_run(done >= self._epochs))

    def _send_all(self) -> None:
        def send() -> None:
            while self._unsent:
                self.send([r for r in self._records if r["epoch"] <= self._unsent[0]["epoch"]])
                self._unsent.pop(0)

        self._trying(send)

    def _trying(self, do: Callable[[], None]) -> None:
        try:
            do()
        # Of whatever network or disk is behind it: no reason to lose hours of training.
        except Exception as error:
            self._warn(
                f"{self.name} does not take what is sent ({_first_line(error)}); "
                f"{len(self._unsent)} epochs are waiting, metrics.jsonl has them."
            )


def folder_of(event: RunStart, name: str) -> pathlib.Path:
    """The folder of a run.

    Raises:
        ValueError: it has none.
    """
    if event.folder is None:
        raise ValueError(f"{name} writes into the run's folder, and there is none; give `workdir`.")
    return event.folder
