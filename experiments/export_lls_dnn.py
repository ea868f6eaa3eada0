"""Write a run's weights as a checkpoint that the authors' PyTorch code loads."""

import dataclasses
import pathlib

from experiments.command_line import parse, run
from experiments.config_checks import check_checkpoint
from lls_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Export a run to LLS-DNN."""

    workdir: str
    """Folder of the run."""
    out: str = "model_best.pth.tar"
    """File to write."""
    checkpoint: str = "best"
    """best, last, or a step."""
    data_dir: str | None = None
    """Folder of prepared data sets [default: the run's]."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming option and value, for what cannot be."""
        check_checkpoint(self.checkpoint)


def export_lls_dnn(config: ExportConfig) -> int:
    """Restore, convert, and write the file; returns the exit status."""
    from experiments.run_config import read_config
    from experiments.setup import example_image, make_task
    from lls_jax import interop
    from lls_jax.interop import torch_files
    from lls_jax.runs.restore import restore

    folder = pathlib.Path(config.workdir)
    trained = read_config(folder)
    if config.data_dir is not None:
        trained = dataclasses.replace(trained, data_dir=config.data_dir)
    task = make_task(trained)
    example = example_image(task.spec)
    state, meta = restore(folder, task.model, task.rule, example, config.checkpoint)
    try:
        state_dict = interop.to_lls_dnn(task.model, state)
    except ValueError as error:
        raise UserError(str(error)) from error
    torch_files.write(pathlib.Path(config.out), state_dict, max(meta["epochs_done"] - 1, 0))
    print(f"{len(state_dict)} arrays of step {int(state.step)} in {config.out}")
    return 0


if __name__ == "__main__":
    config = parse(ExportConfig, "export_lls_dnn", __doc__ or "")
    run(lambda: export_lls_dnn(config))
