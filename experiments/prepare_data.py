"""Import a data set, from its official archive or by downloading it, for training offline.

cifar10 takes the binary or the Python version, as .tar.gz or unpacked; fashion_mnist and mnist take
the folder with the four IDX files, gzipped or not.
"""

import dataclasses
import pathlib

from simple_parsing import field, flag

from experiments.command_line import UserError, parse, run


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Import a data set into TensorFlow Datasets' format."""

    dataset: str = field(positional=True)
    """cifar10, fashion_mnist or mnist."""
    archive: str | None = None
    """Path of the official archive [default: download it]."""
    data_dir: str | None = None
    """Folder of prepared data sets [default: $TFDS_DATA_DIR or ~/tensorflow_datasets]."""
    progress: bool = flag(default=True, negative_prefix="--no-")
    """Show progress bars where there is a terminal."""


def prepare_data(config: PrepareConfig) -> int:
    """Import the data set; returns the exit status."""
    from lls_jax.data import get_spec, prepare, storage

    try:
        spec = get_spec(config.dataset)
    except ValueError as error:
        raise UserError(str(error)) from error
    folder = (
        storage.default_data_dir() if config.data_dir is None else pathlib.Path(config.data_dir)
    )
    archive = None if config.archive is None else pathlib.Path(config.archive)
    target = prepare.prepare(spec, folder, archive, progress=config.progress)
    print(f"{spec.name}: {spec.train_size} training and {spec.test_size} test images in {target}")
    return 0


if __name__ == "__main__":
    config = parse(PrepareConfig, "prepare_data", __doc__ or "")
    run(lambda: prepare_data(config))
