"""From a board's options to its runs, its measurements and its files."""

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence

from experiments import batch, data_sets, setup
from experiments.board import content, costs, outcome, picture, speed, summary
from experiments.board.config import ACCUMULATED, BoardConfig
from experiments.board.content import Board, key_of
from experiments.board.rows import Row, train_config
from experiments.config import TrainConfig
from experiments.suites.entrants import PARTS
from lls_jax.errors import UserError
from lls_jax.runs import folder as folders


def board(config: BoardConfig) -> int:
    """Add to a board, run what is missing, write it; returns the exit status."""
    workdir = pathlib.Path(config.workdir)
    made = content.extend(config, content.read(workdir))
    for row in made.rows:
        # What is done needs nobody's rule any more.
        if key_of(row) not in made.measured or _missing(row, workdir, made.seeds):
            _check(made.recipe, row)
    if config.dry_run:
        print(summary.table(summary.summarize(made, workdir)))
        return 0
    with folders.claim(workdir):
        return _Maker(config, workdir, made).make()


def _check(recipe: TrainConfig, row: Row) -> None:
    """Raise UserError, before anything is trained, for a row that cannot be."""
    setup.check_task(train_config(recipe, row))
    if row.rule == ACCUMULATED and recipe.batch_size % PARTS:
        raise UserError(
            f"{ACCUMULATED} cuts a batch into {PARTS} parts, which --batch-size "
            f"{recipe.batch_size} does not allow; give another, or leave it out of --rules."
        )


def _missing(row: Row, workdir: pathlib.Path, seeds: Sequence[int]) -> bool:
    return not all(outcome.is_over(row.folder(workdir, seed)) for seed in seeds)


class _Maker:
    """A board under way."""

    def __init__(self, config: BoardConfig, workdir: pathlib.Path, board: Board) -> None:
        self._config, self._workdir, self._board = config, workdir, board
        self._recipe = dataclasses.replace(
            board.recipe,
            data_dir=config.data_dir or board.recipe.data_dir,
            progress=config.progress,
        )

    def make(self) -> int:
        """Measure, train and write; returns the exit status."""
        with setup.as_user_error():
            data_sets.download(self._recipe)
        timed = [row for row in self._board.rows if row.budget == "seconds"]
        # Their runs are as long as their speed says.
        if timed:
            self._measure()
        self._write()
        if status := batch.run_all(self._members(), self._write):
            return status
        if self._config.measure_speed:
            self._measure()
        print(summary.table(summary.summarize(self._board, self._workdir)))
        print(f"written: {self._workdir}/board.md, board.json, board.png")
        return 0

    def _members(self) -> list[batch.Member]:
        """Seed by seed, so that all rows have one early; runs that rows share are there once."""
        members: dict[pathlib.Path, batch.Member] = {}
        for seed, row in itertools.product(self._board.seeds, self._board.rows):
            folder = row.folder(self._workdir, seed)
            members.setdefault(folder, self._member(row.runs, seed, folder))
        return list(members.values())

    def _member(self, row: Row, seed: int, folder: pathlib.Path) -> batch.Member:
        def train() -> int:
            steps, epochs = self._length(row)
            own = train_config(
                self._recipe, row, seed=seed, epochs=epochs, workdir=str(folder),
                # Launches of many steps would not end where the budget does.
                loop=self._recipe.loop if steps is None else "dispatch",
            )  # fmt: skip
            return outcome.train_run(own, row, steps)

        return batch.Member(
            label=f"{row.model}, {row.label}, {row.shown_budget}, seed {seed}",
            folder=folder,
            dataset=self._board.dataset,
            is_over=lambda: outcome.is_over(folder),
            train=train,
        )

    def _length(self, row: Row) -> tuple[int | None, int]:
        """``(steps, epochs)`` of a run; the steps are None where the epochs are whole."""
        if row.budget == "epochs":
            return None, int(row.amount)
        recipe = self._recipe
        available = setup.make_task(train_config(recipe, row)).spec.train_size
        available -= recipe.validation_examples or 0
        an_epoch = max(min(available, recipe.train_examples or available) // recipe.batch_size, 1)
        seconds = self._board.measured[key_of(row)]["step_ms"] / 1e3
        steps = max(int(row.amount / seconds), 1)
        return steps, -(-steps // an_epoch)

    def _measure(self) -> None:
        """Measure rows that have no figures yet, network by network."""
        measured = self._board.measured
        missing = {key_of(row): row for row in self._board.rows if key_of(row) not in measured}
        for model in dict.fromkeys(row.model for row in missing.values()):
            rows = [row for row in missing.values() if row.model == model]
            print(f"--- speed of {model}: {', '.join(row.label for row in rows)}", flush=True)
            bp = measured.get((model, "bp", 1))
            figures = speed.measure(
                self._recipe, rows, self._config.turns, None if bp is None else bp["step_ms"]
            )
            for key, own in figures.items():
                row = Row(*key, budget="", amount=0)
                task = setup.make_task(train_config(self._recipe, row))
                own |= costs.count(task, row)._asdict()
            # What was there stays.
            measured.update({**figures, **measured})
            self._write()

    def _write(self) -> None:
        entries = summary.summarize(self._board, self._workdir)
        environment = folders.environment()
        self._workdir.mkdir(parents=True, exist_ok=True)
        whole = {**content.to_json(self._board, entries), "environment": environment}
        page = summary.page(self._board, entries, str(self._workdir), environment)
        folders.write_atomically(self._workdir / "board.json", folders.to_json(whole))
        folders.write_atomically(self._workdir / "board.md", page)
        title = (
            f"{self._board.dataset}: test accuracy at an equal budget; bars: deviation over seeds"
        )
        picture.draw(entries, title, self._workdir / "board.png")
