"""Write a run's weights for others: safetensors or a PyTorch state dict, and a model card."""

import dataclasses
import pathlib
import sys
from typing import Any

from simple_parsing import field

from experiments.command_line import parse, run
from experiments.config_checks import check_checkpoint
from lls_jax.errors import UserError

FORMATS = {"safetensors": "model.safetensors", "torch": "model.pt"}


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Export a run's evaluation weights."""

    workdir: str = field(positional=True, metavar="RUN")
    """Folder of the run."""
    format: str = "safetensors"
    """safetensors, or torch: a state dict for torch.load. Both have PyTorch's names and layouts:
    layers.0.conv.weight, layers.0.norm.running_mean, ..., classifier.weight."""
    output: str | None = None
    """Folder to write the file and MODEL_CARD.md to [default: export in the run's folder]."""
    checkpoint: str | None = None
    """best, last, or a step; has to be named while the run is unfinished [default: best]."""
    data_dir: str | None = None
    """Folder of prepared data sets [default: the run's]."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming option and value, for what cannot be."""
        if self.format not in FORMATS:
            raise ValueError(f"--format is {self.format!r}; expected {' or '.join(FORMATS)}.")
        if self.checkpoint is not None:
            check_checkpoint(self.checkpoint)


def _check_finished(folder: pathlib.Path, trained: Any) -> None:
    """Raise UserError where a run has epochs to go."""
    from lls_jax.runs import folder as folders
    from lls_jax.runs.callbacks import EarlyStopping

    records = folders.read_metrics(folder)
    done, patience = len(records), trained.patience
    if patience is not None and EarlyStopping(patience).is_over(records):
        return
    if done < trained.epochs:
        raise UserError(
            f"{folder} is unfinished: {done} of {trained.epochs} epochs; give its command again to "
            "finish it, or --checkpoint best or last to export what there is."
        )


def export(config: ExportConfig) -> int:
    """Restore, convert, and write the files; returns the exit status."""
    from experiments import own_sources
    from experiments.model_card import Card, write_card
    from experiments.run_config import read_config
    from experiments.setup import example_image, make_task
    from lls_jax import interop
    from lls_jax.interop import torch_files
    from lls_jax.runs import folder as folders
    from lls_jax.runs.restore import restore

    folder = pathlib.Path(config.workdir)
    trained = read_config(folder)
    if config.data_dir is not None:
        trained = dataclasses.replace(trained, data_dir=config.data_dir)
    if config.checkpoint is None and folders.checkpoints(folder).is_dir():
        _check_finished(folder, trained)
    task = make_task(trained)
    for changed in own_sources.changed(folder, trained):
        print(f"warning: {changed}", file=sys.stderr)
    wanted = config.checkpoint or "best"
    state, meta = restore(folder, task.model, task.rule, example_image(task.spec), wanted)
    output = folder / "export" if config.output is None else pathlib.Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    path = output / FORMATS[config.format]
    arrays = interop.to_state_dict(task.model, state)
    if config.format == "torch":
        torch_files.write_state_dict(path, arrays)
    else:
        texts = {"dataset": trained.dataset, "model": trained.model, "rule": trained.rule}
        interop.save_safetensors(path, task.model, state, texts)
    card = Card(folder, trained, task.spec, task.model, meta, int(state.step), path, arrays)
    write_card(card, output / "MODEL_CARD.md")
    print(f"{len(arrays)} arrays of step {int(state.step)} in {path}, {output / 'MODEL_CARD.md'}")
    return 0


if __name__ == "__main__":
    config = parse(ExportConfig, "export", __doc__ or "")
    run(lambda: export(config))
