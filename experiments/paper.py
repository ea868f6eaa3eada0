"""Run the published experiments as one batch, and write their tables.

A run that is done is skipped, one that was stopped is resumed, one whose data set is not prepared
is named and left out; one that diverges is recorded as such, and the batch goes on. The table is
written anew after every run.
"""

import dataclasses
import pathlib
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from simple_parsing import field, flag

from experiments import startup
from experiments.command_line import parse, run
from experiments.config import TrainConfig
from experiments.config_checks import check_seeds
from experiments.config_choices import option
from lls_jax.errors import UserError

# The recipes' augmentation, by data set: of 100 epochs of a SmallConv, and of 300 of VGG8.
_BASIC = {"mnist": "crop", "fashion_mnist": "flip_crop", "cifar10": "flip", "imagenette": "flip"}
_AUGMENTED = {
    **{"mnist": "crop", "fashion_mnist": "flip_crop", "cifar10": "full", "cifar100": "full"},
    **{"imagenette": "full", "tiny_imagenet": "flip_erase", "visual_wake_words": "flip"},
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A cell of a table: one experiment, to be run with several seeds."""

    dataset: str
    model: str
    rule: str
    waveform: str
    epochs: int
    augmentation: str

    @property
    def name(self) -> str:
        """Of its runs' folders, but for the seed."""
        waveform = f"-{self.waveform}" if self.rule.startswith("lls") else ""
        return f"{self.dataset}-{self.model}-{self.rule}{waveform}"


def _table_1() -> Iterator[Entry]:
    """Waveforms of the basis, and a random one."""
    kinds = (("lls", "cosine"), ("lls", "square"), ("lls_random", "square"))
    for dataset in ("mnist", "fashion_mnist", "cifar10", "imagenette"):
        long = 300 if dataset in ("cifar10", "imagenette") else 100
        for rule, waveform in kinds:
            yield Entry(dataset, "small_conv", rule, waveform, 100, _BASIC[dataset])
        for rule, waveform in kinds:
            yield Entry(dataset, "vgg8", rule, waveform, long, _AUGMENTED[dataset])


def _table_2() -> Iterator[Entry]:
    """Against direct feedback alignment and backpropagation."""
    for dataset in ("mnist", "cifar10", "cifar100"):
        for rule in ("lls", "bp", "dfa"):
            augmentation = _BASIC.get(dataset, "flip")
            yield Entry(dataset, "small_conv_l", rule, "square", 100, augmentation)


def _table_3() -> Iterator[Entry]:
    """Modulations, against local classifiers and backpropagation."""
    for dataset in ("cifar10", "cifar100", "imagenette", "tiny_imagenet", "visual_wake_words"):
        for rule in ("bp", "local_classifier", "lls", "lls_m", "lls_mxm"):
            yield Entry(dataset, "vgg8", rule, "square", 300, _AUGMENTED[dataset])


def _every_rule() -> Iterator[Entry]:
    """Every rule on the smallest model: not of the paper."""
    # Imported late: ``--help`` answers at once.
    from lls_jax import rules

    for rule in rules.NAMES:
        yield Entry("cifar10", "small_conv", rule, "square", 100, "flip")
    yield Entry("fashion_mnist", "small_conv", "lls_mxm", "square", 100, "flip_crop")


TABLES = {"1": _table_1, "2": _table_2, "3": _table_3, "rules": _every_rule}


@dataclasses.dataclass(frozen=True)
class PaperConfig:
    """Run the experiments of one of the paper's tables."""

    table: str
    """1: waveforms; 2: against feedback alignment; 3: modulations; rules: every rule on
    SmallConv."""
    workdir: str
    """Folder of all runs, and of the table."""
    only: list[str] = field(default_factory=list)
    """Run only experiments whose name has one of these as some of its parts, like cifar10 or
    vgg8-lls_m."""
    epochs: int | None = None
    """Epochs of every run [default: the published 100 or 300]."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Run each experiment once with each of these."""
    train_examples: int | None = None
    """Use only the first N training images [default: all]."""
    eval_examples: int | None = None
    """Use only the first N test images [default: all]."""
    data_dir: str | None = None
    """Folder of prepared data sets [default: $TFDS_DATA_DIR or ~/tensorflow_datasets]."""
    dry_run: bool = flag(default=False, negative_prefix="--no-")
    """List the experiments and what is done; run and write nothing."""
    progress: bool = flag(default=True, negative_prefix="--no-")
    """Show a progress bar where there is a terminal."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming option and value, for what cannot be."""
        if self.table not in TABLES:
            raise ValueError(f"--table is {self.table}; expected one of {', '.join(TABLES)}.")
        for name in ("epochs", "train_examples", "eval_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{option(name)} is {value}; it must be at least 1.")
        check_seeds("--seeds", self.seeds)


def train_config(config: PaperConfig, entry: Entry, seed: int) -> TrainConfig:
    """One run."""
    # Imported late: ``--help`` answers at once.
    from lls_jax import rules

    return TrainConfig(
        dataset=entry.dataset,
        model=entry.model,
        rule=entry.rule,
        waveform=entry.waveform if "waveform" in rules.options_of(entry.rule) else None,
        epochs=config.epochs or entry.epochs,
        augmentation=entry.augmentation,
        seed=seed,
        train_examples=config.train_examples,
        eval_examples=config.eval_examples,
        data_dir=config.data_dir,
        workdir=str(pathlib.Path(config.workdir) / f"{entry.name}-s{seed}"),
        progress=config.progress,
    )


class _State(NamedTuple):
    """How far a run is.

    Attributes:
        accuracy: on the test images, in percent; None unless it is finished.
        epochs: done.
        diverged: what was not finite, and when; None where nothing was.
    """

    accuracy: float | None
    epochs: int
    diverged: str | None

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to run."""
        return self.accuracy is not None or self.diverged is not None


def _state(one: TrainConfig) -> _State:
    """How far a run is.

    Raises:
        UserError: its folder holds a run with other options, whose accuracy is not this one's.
    """
    from experiments.batch import divergence
    from experiments.run_config import check_same_run
    from lls_jax.runs import folder as folders

    folder = pathlib.Path(one.run_folder())
    check_same_run(folder, one)
    accuracies = {r["epoch"]: r["test_accuracy"] for r in folders.read_metrics(folder)}
    return _State(
        # A run may have gone on beyond it.
        accuracy=accuracies.get(one.epochs),
        epochs=max(accuracies, default=0),
        diverged=divergence(folder),
    )


def rows(config: PaperConfig, entries: list[Entry]) -> list[dict[str, Any]]:
    """The table: means and deviations over seeds, and what is missing."""
    result = []
    for entry in entries:
        runs = [train_config(config, entry, seed) for seed in config.seeds]
        states = [*map(_state, runs)]
        finished = [state.accuracy for state in states if state.accuracy is not None]
        missing = [
            f"seed {seed} ({state.epochs} epochs{', diverged' if state.diverged else ''})"
            for seed, state in zip(config.seeds, states)
            if state.accuracy is None
        ]
        result.append(
            {
                **dataclasses.asdict(entry),
                # None where the rule has no use for one.
                "waveform": runs[0].waveform,
                "epochs": runs[0].epochs,
                "accuracy": statistics.mean(finished) if finished else None,
                "deviation": statistics.stdev(finished) if len(finished) > 1 else None,
                "runs": len(finished),
                "missing": ", ".join(missing),
            }
        )
    return result


_COLUMNS = {
    "dataset": "data",
    "model": "model",
    "rule": "rule",
    "waveform": "waveform",
    "epochs": "epochs",
    "accuracy": "test accuracy [%]",
    "deviation": "deviation",
    "runs": "runs",
    "missing": "missing",
}


def _markdown(table: list[dict[str, Any]]) -> str:
    from experiments.suites.report import markdown

    # Accuracies to two digits behind the point, as everywhere.
    shown = [
        {**row, **{k: f"{row[k]:.2f}" for k in ("accuracy", "deviation") if row[k] is not None}}
        for row in table
    ]
    return markdown(_COLUMNS, shown)


def _write(config: PaperConfig, entries: list[Entry]) -> str:
    from lls_jax.runs import folder as folders

    table = rows(config, entries)
    text = _markdown(table)
    folder = pathlib.Path(config.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    folders.write_atomically(folder / f"table-{config.table}.md", text)
    folders.write_atomically(folder / f"table-{config.table}.json", folders.to_json(table))
    return text


def _member(config: PaperConfig, entry: Entry, seed: int) -> Any:
    from experiments import train
    from experiments.batch import Member

    one = train_config(config, entry, seed)
    return Member(
        label=f"{entry.name}, seed {seed}",
        folder=pathlib.Path(one.run_folder()),
        dataset=entry.dataset,
        is_over=lambda: _state(one).is_over,
        train=lambda: train.train_and_evaluate(one),
    )


def paper(config: PaperConfig) -> int:
    """Run what is missing, write the table; returns the exit status."""
    from experiments import batch

    entries = [
        entry
        for entry in TABLES[config.table]()
        if not config.only or any(f"-{part}-" in f"-{entry.name}-" for part in config.only)
    ]
    if not entries:
        names = ", ".join(entry.name for entry in TABLES[config.table]())
        raise UserError(f"no experiment of table {config.table} has {config.only} in {names}.")
    if config.dry_run:
        print(_markdown(rows(config, entries)))
        return 0
    # All of them are looked at before the first is trained.
    rows(config, entries)
    members = [_member(config, entry, seed) for seed in config.seeds for entry in entries]
    if status := batch.run_all(members, lambda: _write(config, entries)):
        return status
    print(_write(config, entries))
    print(f"written: {config.workdir}/table-{config.table}.md, table-{config.table}.json")
    return 0


if __name__ == "__main__":
    config = parse(PaperConfig, "paper", __doc__ or "")
    startup.prepare()
    run(lambda: paper(config))
