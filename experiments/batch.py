"""Runs of a batch, one after the other: what is over is skipped, what was stopped is resumed.

A run that diverges is noted as such in its folder, one whose data set is not prepared is named and
left out, and the batch goes on.
"""

import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

from lls_jax.errors import DatasetError, DivergedError

_DIVERGED = "diverged.txt"


class Member(NamedTuple):
    """A run of a batch.

    Attributes:
        label: what a person reads of it.
        folder: of the run.
        dataset: what it is trained on.
        is_over: whether there is nothing left to run.
        train: trains it to its end from where it is; returns an exit status.
    """

    label: str
    folder: pathlib.Path
    dataset: str
    is_over: Callable[[], bool]
    train: Callable[[], int]


def divergence(folder: pathlib.Path) -> str | None:
    """What was not finite in a run of a batch, and when; None where nothing was."""
    note = folder / _DIVERGED
    return note.read_text().strip() if note.is_file() else None


def run_all(members: Iterable[Member], after: Callable[[], object]) -> int:
    """Run what is not over.

    Args:
        members: the batch, in order.
        after: is called after each run.

    Returns:
        Exit status: 0, or that of the run that was stopped by a signal.
    """
    unprepared: set[str] = set()
    for member in members:
        if member.is_over() or member.dataset in unprepared:
            continue
        print(f"--- {member.label}", flush=True)
        try:
            status = member.train()
        except DivergedError as error:
            (member.folder / _DIVERGED).write_text(f"{error}\n")
            print(f"diverged: {error}", file=sys.stderr)
            status = 0
        except DatasetError as error:
            unprepared.add(member.dataset)
            print(f"left out: {error}", file=sys.stderr)
            continue
        after()
        if status:
            print("stopped; the same command goes on", file=sys.stderr)
            return status
    return 0
