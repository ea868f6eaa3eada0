"""The source of a user's own parts, kept with the run that they made.

A run is resumed and evaluated with the parts as they are now. What they were when it began lies in
its folder, so that a change is seen, and can be taken back.
"""

import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from experiments.config import TrainConfig
from lls_jax import own_parts, processes
from lls_jax.runs.callbacks import Callback, RunStart

FOLDER = "source"


class _Part(NamedTuple):
    """A part of a user's own.

    Attributes:
        part: it.
        source: its file.
        kept: where that is kept with the run; several parts may be of one file.
    """

    part: own_parts.OwnPart
    source: pathlib.Path
    kept: pathlib.Path


def _parts(folder: pathlib.Path, config: TrainConfig) -> Iterator[_Part]:
    names = {
        "data set": [config.dataset],
        "model": [config.model],
        "rule": config.rule.split(","),
        "optimizer": [config.optimizer],
    }
    for kind, some in names.items():
        for name in filter(own_parts.is_own, some):
            try:
                part = own_parts.find(kind, name)
            except ValueError:
                # Whoever needs it says so: weights are evaluated without their optimizer.
                continue
            if (source := part.source()) is not None:
                yield _Part(part, source.path, folder / FOLDER / f"{source.module}.py")


def changed(folder: pathlib.Path, config: TrainConfig) -> list[str]:
    """A line for each file of a user's own parts that is not what the run began with.

    Only the file itself is compared, and nothing that it imports.

    Args:
        folder: of the run.
        config: the run's.
    """
    found: dict[tuple[pathlib.Path, pathlib.Path], list[str]] = {}
    for part, source, kept in _parts(folder, config):
        if kept.is_file() and kept.read_bytes() != source.read_bytes():
            found.setdefault((source, kept), []).append(f"{part.kind} {part.name!r}")
    return [
        f"{source}, of {' and '.join(parts)}, has changed since this run began; what it was then "
        f"is in {kept}."
        for (source, kept), parts in found.items()
    ]


class KeepSources(Callback):
    """Keeps the sources when a run begins, and warns where they have changed when it goes on."""

    def __init__(self, config: TrainConfig, warn: Callable[[str], None]) -> None:
        """Look after the parts that a config names.

        Args:
            config: the run's.
            warn: is told of a change.
        """
        self._config, self._warn = config, warn

    def on_start(self, event: RunStart) -> None:
        """Compare, then keep what is not kept yet."""
        if event.folder is None or not processes.is_first():
            return
        for line in changed(event.folder, self._config):
            self._warn(line)
        for _, source, kept in _parts(event.folder, self._config):
            if not kept.exists():
                kept.parent.mkdir(exist_ok=True)
                kept.write_bytes(source.read_bytes())
