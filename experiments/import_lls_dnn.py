"""Make a run folder of a checkpoint that the authors' PyTorch code has written.

The file is read without PyTorch and without executing anything in it. What comes out is a run like
any other: evaluate it, or train on with the experiment of its data set and the same options.
"""

import dataclasses
import functools
import pathlib
import shlex
from typing import TYPE_CHECKING

from simple_parsing import field

from experiments.command_line import parse, run
from experiments.presets import default_config
from lls_jax.errors import UserError

if TYPE_CHECKING:
    from experiments.setup import Task
    from lls_jax.training import Optimizer, TrainState


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """Import a PyTorch checkpoint of LLS-DNN."""

    checkpoint: str = field(positional=True)
    """The file, like model_best.pth.tar."""
    out: str = "imported"
    """Run folder to make; it must not hold a run yet."""
    model: str = "small_conv"
    """Its network."""
    rule: str = "lls_mxm"
    """Its learning rule."""
    dataset: str = "cifar10"
    """Its data set."""
    basis_rows: int | None = None
    """Rows of the basis of lls_mxm_reduced [default: the model's published number]."""
    waveform: str | None = None
    """Of the periodic basis: square or cosine [default: the rule's own, square]."""
    data_dir: str | None = None
    """Folder of prepared data sets [default: $TFDS_DATA_DIR or ~/tensorflow_datasets]."""

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown data set."""
        default_config(self.dataset)


def _check_shapes(state: "TrainState", task: "Task", tx: "Optimizer") -> None:
    """Raise ValueError where a run of this network on these images has arrays of other shapes."""
    import jax

    from experiments.setup import example_image
    from lls_jax import training

    image = example_image(task.spec)
    create = functools.partial(training.create_train_state, task.model, task.rule, tx)
    expected = jax.eval_shape(create, jax.random.key(0), image).params
    shapes = dict(jax.tree_util.tree_leaves_with_path(expected))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        if leaf.shape != shapes[path].shape:
            raise ValueError(
                f"{jax.tree_util.keystr(path)} has shape {leaf.shape}, and model "
                f"{task.model.name!r} on data set {task.spec.name!r} has {shapes[path].shape}; "
                "give the --dataset and --model that it was trained with."
            )


def import_lls_dnn(config: ImportConfig) -> int:
    """Read, convert, and write the run folder; returns the exit status."""
    import numpy as np

    from experiments.optimizers import make
    from experiments.run_config import ConfigSettings
    from experiments.setup import make_task
    from lls_jax import interop
    from lls_jax.interop import torch_files
    from lls_jax.runs import checkpoints
    from lls_jax.runs import folder as folders
    from lls_jax.runs.resuming import save_start

    folder = pathlib.Path(config.out)
    if (folder / "config.json").exists():
        raise UserError(f"{folder} holds a run already; give another --out.")
    # What the command of its data set has where nothing is given.
    trained = dataclasses.replace(
        default_config(config.dataset),
        model=config.model,
        rule=config.rule,
        basis_rows=config.basis_rows,
        waveform=config.waveform,
        data_dir=config.data_dir,
        workdir=config.out,
    )
    task = make_task(trained)
    content = torch_files.read(pathlib.Path(config.checkpoint))
    state_dict = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state_dict, dict):
        raise UserError(f"{config.checkpoint} holds a {type(content).__name__}; expected a dict.")
    arrays = {name: value for name, value in state_dict.items() if isinstance(value, np.ndarray)}
    tx = make(trained, steps_per_epoch=1000)
    try:
        state = interop.from_lls_dnn(task.model, task.rule, tx, arrays)
        _check_shapes(state, task, tx)
    except ValueError as error:
        raise UserError(f"{config.checkpoint}: {error}") from error
    settings = ConfigSettings(trained)
    with folders.claim(folder):
        folders.write_settings(folder, settings)
        folders.write_environment(folder)
        with checkpoints.open_checkpoints(folders.checkpoints(folder)) as manager:
            save_start(manager, settings.values, task.model, task.rule, state)
    epoch = content.get("epoch")
    after = f", saved after epoch {epoch + 1}" if isinstance(epoch, int) else ""
    print(
        f"{len(arrays)} arrays of {config.checkpoint}{after}; evaluate with:\n"
        f"  python -m experiments.evaluate --workdir {shlex.quote(str(folder))}"
    )
    return 0


if __name__ == "__main__":
    config = parse(ImportConfig, "import_lls_dnn", __doc__ or "")
    run(lambda: import_lls_dnn(config))
