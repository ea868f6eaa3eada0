"""Loading data sets: prepared ones through TensorFlow Datasets, `digits` from scikit-learn."""

import io
import os
import pathlib
import sys
import tempfile
from typing import Any, NamedTuple

import numpy as np

from lls_jax.data.specs import DatasetSpec


class DatasetError(Exception):
    """A data set is missing, or is not what it should be; the message says what to do."""


class Split(NamedTuple):
    """Images and labels of one part of a data set.

    Attributes:
        images: uint8 ``[count, height, width, channels]``.
        labels: int32 ``[count]``.
    """

    images: np.ndarray
    labels: np.ndarray


def default_data_dir() -> pathlib.Path:
    """TensorFlow Datasets' own default folder, so that sets prepared with it are found."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def prepared_folder(spec: DatasetSpec, data_dir: pathlib.Path) -> pathlib.Path:
    """Where a prepared set lies, whether it exists or not."""
    return data_dir / spec.name / spec.version


def is_prepared(spec: DatasetSpec, data_dir: pathlib.Path) -> bool:
    """Whether a set can be loaded from `data_dir`."""
    embedded = spec.layout == "embedded"
    return embedded or (prepared_folder(spec, data_dir) / "dataset_info.json").is_file()


def load(spec: DatasetSpec, split: str, data_dir: pathlib.Path, limit: int | None = None) -> Split:
    """Load one part of a data set into memory.

    The first whole read decodes every PNG and keeps the pixels in a file beside the sets
    (``lls_jax_decoded``), from which later reads take them.

    Args:
        spec: the data set.
        split: ``"train"`` or ``"test"``.
        data_dir: folder of prepared sets.
        limit: at most this many examples, the first ones; None for all.

    Returns:
        Images and labels.

    Raises:
        DatasetError: it is not prepared, or its files are not what they should be.
    """
    size = {"train": spec.train_size, "test": spec.test_size}[split]
    if limit is not None and limit > size:
        raise DatasetError(
            f"{limit} {split} examples asked for, but {spec.name!r} has {size}; ask for fewer."
        )
    if spec.layout == "embedded":
        loaded = _load_digits(spec, split)
    elif not is_prepared(spec, data_dir):
        raise DatasetError(
            f"data set {spec.name!r} is not in {data_dir}; prepare it with "
            f"`python -m experiments.prepare_data {spec.name}` (it downloads; with no network give "
            "it --archive PATH), or run the embedded set: `python -m experiments.digits`."
        )
    else:
        loaded = _load_prepared(spec, split, data_dir, limit)
    split_data = Split(*(array[:limit] for array in loaded))
    check_split(spec, split, split_data, size if limit is None else limit)
    return split_data


def check_split(spec: DatasetSpec, split: str, data: Split, expected: int) -> None:
    """Raise DatasetError unless count, image shape and label range are as `spec` says."""
    if len(data.images) != expected or len(data.labels) != expected:
        raise DatasetError(
            f"{spec.name!r} {split} holds {len(data.images)} images and {len(data.labels)} labels; "
            f"expected {expected} of each. Prepare it again."
        )
    if data.images.shape[1:] != spec.image_shape or data.images.dtype != np.uint8:
        raise DatasetError(
            f"{spec.name!r} {split} has {data.images.dtype} images of shape "
            f"{data.images.shape[1:]}; expected uint8 {spec.image_shape}. Prepare it again."
        )
    wrong = np.flatnonzero((data.labels < 0) | (data.labels >= spec.num_classes))
    if len(wrong):
        raise DatasetError(
            f"{spec.name!r} {split} example {wrong[0]} has label {data.labels[wrong[0]]}; labels "
            f"must lie between 0 and {spec.num_classes - 1}. Check the archive it came from."
        )


def _load_digits(spec: DatasetSpec, split: str) -> Split:
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    # Grey levels 0 to 16 become 0 to 255. The order is by writer: a fixed shuffle gives both parts
    # the same writers.
    order = np.random.default_rng(0).permutation(len(digits.target))
    part = order[: spec.train_size] if split == "train" else order[spec.train_size :]
    images = np.rint(digits.images[part] * (255 / 16)).astype(np.uint8)[..., None]
    return Split(images, digits.target[part].astype(np.int32))


def _load_prepared(
    spec: DatasetSpec, split: str, data_dir: pathlib.Path, limit: int | None
) -> Split:
    info = (prepared_folder(spec, data_dir) / "dataset_info.json").stat()
    # A set that was prepared again has another stamp, and so another file.
    stamp = f"{info.st_mtime_ns:x}-{info.st_size:x}"
    cache = data_dir / "lls_jax_decoded" / f"{spec.name}-{spec.version}-{split}-{stamp}.npz"
    if cache.is_file():
        try:
            with np.load(cache) as stored:
                return Split(stored["images"], stored["labels"])
        except Exception as error:
            print(f"warning: {cache} is damaged ({error}); decoding again.", file=sys.stderr)
    decoded = _decode(spec, split, data_dir, limit)
    if limit is None:
        _write_cache(cache, decoded)
    return decoded


def _decode(spec: DatasetSpec, split: str, data_dir: pathlib.Path, limit: int | None) -> Split:
    import tensorflow_datasets as tfds
    from PIL import Image

    folder = prepared_folder(spec, data_dir)
    try:
        builder = tfds.builder_from_directory(folder)
        part = split if limit is None else f"{split}[:{limit}]"
        source = builder.as_data_source(part, decoders={"image": tfds.decode.SkipDecoding()})
        images, labels = [], []
        for record in source:
            encoded: Any = record["image"]
            image = np.asarray(Image.open(io.BytesIO(encoded)))
            images.append(image if image.ndim == 3 else image[..., None])
            labels.append(record["label"])
        return Split(np.stack(images), np.asarray(labels, np.int32))
    except Exception as error:
        raise DatasetError(
            f"{folder} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "it must be a complete set in ArrayRecord format. Remove that folder and run "
            f"`python -m experiments.prepare_data {spec.name}`."
        ) from error


def _write_cache(cache: pathlib.Path, data: Split) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        for stale in cache.parent.glob("-".join(cache.stem.split("-")[:3]) + "-*.npz"):
            stale.unlink()
        with tempfile.NamedTemporaryFile(dir=cache.parent, delete=False) as file:
            try:
                np.savez(file, images=data.images, labels=data.labels)
                os.chmod(file.name, 0o644)
                os.replace(file.name, cache)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        # Only time is lost: a read-only folder of shared sets is normal.
        print(f"note: decoded images are not kept for next time ({error}).", file=sys.stderr)
