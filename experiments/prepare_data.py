"""Import a data set, from its official archive or by downloading it, for training offline.

cifar10 and cifar100 take the binary or the Python version, as .tar.gz or unpacked; fashion_mnist
and mnist the folder with the four IDX files, gzipped or not; imagenette and image_folder a folder,
or a packed one, with train/CLASS/*.jpg and val/CLASS/*.jpg; tiny_imagenet its own;
visual_wake_words the folder with COCO's images and the annotations that the Visual Wake Words
scripts write.
"""

import dataclasses
import pathlib

from simple_parsing import field, flag

from experiments.command_line import parse, run
from lls_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Import a data set into TensorFlow Datasets' format."""

    dataset: str = field(positional=True)
    """cifar10, cifar100, fashion_mnist, mnist, imagenette, tiny_imagenet, visual_wake_words, or
    image_folder for your own."""
    archive: str | None = None
    """Path of the official archive [default: download it]."""
    data_dir: str | None = None
    """Folder of prepared data sets [default: $TFDS_DATA_DIR or ~/tensorflow_datasets]."""
    image_size: int | None = None
    """Height and width that photographs are brought to; of larger ones than 128 (but for
    tiny_imagenet) windows of 128 are trained on [default: the published recipe's]."""
    skip_corrupt: bool = flag(default=False, negative_prefix="--no-")
    """Leave out files that are no images, instead of stopping."""
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
    if config.image_size is not None and config.image_size < 1:
        raise UserError(f"--image-size is {config.image_size}; it must be at least 1.")
    archive = None if config.archive is None else pathlib.Path(config.archive)
    target = prepare.prepare(
        spec,
        folder,
        archive,
        image_size=config.image_size,
        skip_corrupt=config.skip_corrupt,
        progress=config.progress,
    )
    spec = storage.resolve(spec, folder)
    print(f"{spec.name}: {spec.train_size} training and {spec.test_size} test images in {target}")
    return 0


if __name__ == "__main__":
    config = parse(PrepareConfig, "prepare_data", __doc__ or "")
    run(lambda: prepare_data(config))
