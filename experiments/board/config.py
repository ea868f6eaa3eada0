"""The options of a board. Imports nothing heavy: ``--help`` answers at once."""

import dataclasses

from simple_parsing import field, flag

from experiments import reach_options
from experiments.config_checks import check_seeds

# bp as a user would save its memory; they are no rules, and a board has rows of them.
CHECKPOINTED, ACCUMULATED = "bp_checkpointed", "bp_accumulated"


@dataclasses.dataclass(frozen=True)
class BoardConfig:
    """Compare rules at an equal budget."""

    workdir: str
    """Folder of the board and of its runs."""
    rules: list[str] = field(default_factory=list)
    """Rules to add: names, or your own as package.module:function; bp_checkpointed: bp that
    computes its blocks again; bp_accumulated: bp over 4 micro-batches [default of a new board: lls
    lls_mxm local_classifier bp bp_checkpointed bp_accumulated]."""
    reach: list[reach_options.TypedReach] = reach_options.several()
    """Blocks that a local loss teaches, or 1,2,2,1,1 and the like as of a training run; each rule
    with local losses is trained with each [default of a new board: 1 2]."""
    models: list[str] = field(default_factory=list)
    """Networks [default of a new board: small_conv, or what --options says]."""
    seeds: list[int] = field(default_factory=list)
    """Seeds to add; every row is trained with all of the board's [default of a new board: 0 1 2].
    """
    epochs: int | None = None
    """A budget: passes over the training images. A new board needs this or --seconds, or both."""
    seconds: float | None = None
    """A budget: seconds of training steps at the speed that was measured in turns, compilation and
    evaluation apart; the last epoch is cut short where they are over."""
    dataset: str | None = None
    """Data set: a name, or your own as package.module:function [default of a new board: cifar10].
    """
    options: str | None = None
    """Options of the training command, the same for all runs, as one argument after "=":
    --options="--batch-size 64 --augmentation full" [default of a new board: the published recipe].
    """
    measure_speed: bool = flag(default=True, negative_prefix="--no-")
    """Measure speed and memory of rows that have none yet, after the training; before it where
    --seconds needs it."""
    turns: int = 10
    """Turns of five steps that each row takes when speed is measured."""
    data_dir: str | None = None
    """Folder of prepared data sets [default: $TFDS_DATA_DIR or ~/tensorflow_datasets]."""
    dry_run: bool = flag(default=False, negative_prefix="--no-")
    """List the rows and what is missing; run and write nothing."""
    progress: bool = flag(default=True, negative_prefix="--no-")
    """Show a progress bar where there is a terminal."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming option and value, for what cannot be."""
        if self.reach:
            reach_options.check(self.reach)
        if self.seeds:
            check_seeds("--seeds", self.seeds)
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"--epochs is {self.epochs}; it must be at least 1.")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise ValueError(f"--seconds is {self.seconds}; it must be positive.")
        if self.turns < 1:
            raise ValueError(f"--turns is {self.turns}; it must be at least 1.")
        if self.seconds is not None and not self.measure_speed:
            raise ValueError(
                "--seconds needs the speed of each row, which --no-measure-speed leaves out; give "
                "one of them."
            )
