"""The options of a report. Imports nothing heavy: ``--help`` answers at once."""

import dataclasses

from simple_parsing import field, flag

from experiments.config_checks import check_checkpoint


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Write a run as an HTML page."""

    run: str = field(positional=True)
    """Folder of the run."""
    out: str | None = None
    """The file [default: report.html in the run's folder]."""
    checkpoint: str = "last"
    """Whose confusion matrix to show: best, last, or a step."""
    evaluate: bool = flag(default=True, negative_prefix="--no-")
    """Evaluate the checkpoint anew, for its confusion matrix; needs the data set."""
    data_dir: str | None = None
    """Folder of prepared data sets [default: the run's]."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming option and value, for what cannot be."""
        check_checkpoint(self.checkpoint)
