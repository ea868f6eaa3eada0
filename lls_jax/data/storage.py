"""Loading data sets: prepared ones through TensorFlow Datasets, `digits` from scikit-learn."""

import contextlib
import dataclasses
import errno
import importlib.util
import io
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lls_jax.data.decoded import own_cache, remove_stale
from lls_jax.data.specs import DatasetSpec
from lls_jax.errors import DatasetError

# Sets of photographs may be larger than memory.
MAPPED_LAYOUTS = ("folder", "tiny_imagenet", "coco")


class Split(NamedTuple):
    """Images and labels of one part of a data set.

    Attributes:
        images: uint8 ``[count, height, width, channels]``, which may be a file mapped into memory;
            or float32 ``[count, ...]`` that are normalised already.
        labels: int32 ``[count]``.
    """

    images: np.ndarray
    labels: np.ndarray


def default_data_dir() -> pathlib.Path:
    """TensorFlow Datasets' own default folder, so that sets prepared with it are found."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def prepared_folder(spec: DatasetSpec, data_dir: pathlib.Path) -> pathlib.Path:
    """The folder of a prepared set, whether it exists or not."""
    return data_dir / spec.name / spec.version


def is_prepared(spec: DatasetSpec, data_dir: pathlib.Path) -> bool:
    """Whether a set can be loaded; one whose replacement was cut off is put back first."""
    if spec.layout == "embedded":
        return True
    folder = prepared_folder(spec, data_dir)
    if not folder.exists() and _replaced(folder).exists():
        # Where it cannot be written, or somebody else was faster, there is nothing to do.
        with contextlib.suppress(OSError):
            os.replace(_replaced(folder), folder)
    return (folder / "dataset_info.json").is_file()


def _replaced(folder: pathlib.Path) -> pathlib.Path:
    """The folder of a set while another takes its place."""
    return folder.with_name(f".{folder.name}.replaced")


def put_in_place(new: pathlib.Path, target: pathlib.Path) -> None:
    """Move a set to its place; the one that was there is gone only after that.

    Between the two renames that it takes, the old set is beside its place, from where
    :func:`is_prepared` brings it back.

    Args:
        new: the set, on the same disk.
        target: its place.

    Raises:
        OSError: it cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    old = _replaced(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    for attempt in range(3):
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(new, target)
            break
        except OSError as error:
            # Somebody who looked between the renames has put the old one back.
            if attempt == 2 or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    shutil.rmtree(old, ignore_errors=True)


def resolve(spec: DatasetSpec, data_dir: pathlib.Path) -> DatasetSpec:
    """The entry of a data set, with what only the prepared set knows: sizes, classes, image shape.

    Args:
        spec: the data set.
        data_dir: folder of prepared sets.

    Raises:
        DatasetError: it is not prepared, or its description cannot be read.
    """
    if spec.is_resolved:
        return spec
    folder = prepared_folder(spec, data_dir)
    if not is_prepared(spec, data_dir):
        raise _not_prepared(spec, data_dir)
    import tensorflow_datasets as tfds

    try:
        info = tfds.builder_from_directory(folder).info
        return dataclasses.replace(
            spec.with_side(info.features["image"].shape[0]),
            class_names=tuple(info.features["label"].names),
            train_size=info.splits["train"].num_examples,
            test_size=info.splits["test"].num_examples,
        )
    except Exception as error:
        raise _unreadable(spec, folder, error) from error


def _not_prepared(spec: DatasetSpec, data_dir: pathlib.Path) -> DatasetError:
    how = (
        "it downloads; with no network give it --archive PATH"
        if spec.downloads
        else "--archive PATH"
    )
    return DatasetError(
        f"data set {spec.name!r} is not in {data_dir}; prepare it with "
        f"`{spec.prepare_command(data_dir)}` ({how}), or run the embedded set: "
        "`python -m experiments.digits`."
    )


def _unreadable(spec: DatasetSpec, folder: pathlib.Path, error: Exception) -> DatasetError:
    first_line = (str(error).splitlines() or [""])[0]
    return DatasetError(
        f"{folder} cannot be read ({type(error).__name__}: {first_line}); it must be a complete "
        "set in ArrayRecord format. Remove that folder and run "
        # NAME/VERSION in the folder of all sets.
        f"`{spec.prepare_command(folder.parents[1])}`."
    )


def load(spec: DatasetSpec, split: str, data_dir: pathlib.Path, limit: int | None = None) -> Split:
    """Load one part of a data set into memory.

    The first whole read decodes every PNG and keeps the pixels in a file beside the sets
    (``lls_jax_decoded``), from which later reads take them. Of photographs that file is mapped into
    memory, so that a set may be larger than it; where `data_dir` cannot be written it is in the
    user's cache folder (``$XDG_CACHE_HOME/lls_jax``, by default ``~/.cache/lls_jax``).

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
    spec = resolve(spec, data_dir)
    size = {"train": spec.train_size, "test": spec.test_size}[split]
    if limit is not None and limit > size:
        raise DatasetError(
            f"{limit} {split} examples asked for, but {spec.name!r} has {size}; ask for fewer."
        )
    if spec.layout == "embedded":
        loaded = _load_digits(spec, split)
    elif not is_prepared(spec, data_dir):
        raise _not_prepared(spec, data_dir)
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
    # A row for each image: its 64 grey levels, and its class.
    rows = np.loadtxt(_digits_file(), delimiter=",", dtype=np.int32)
    pixels, labels = rows[:, :-1].reshape(-1, *spec.image_shape), rows[:, -1]
    # Grey levels 0 to 16 become 0 to 255. The order is by writer: a fixed shuffle gives both parts
    # the same writers.
    order = np.random.default_rng(0).permutation(len(labels))
    part = order[: spec.train_size] if split == "train" else order[spec.train_size :]
    return Split(np.rint(pixels[part] * (255 / 16)).astype(np.uint8), labels[part])


def _digits_file() -> pathlib.Path:
    """Scikit-learn's own file of the digits; to import it would take two seconds."""
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise DatasetError("the digits are scikit-learn's, which is not installed; install it.")
    path = pathlib.Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not path.is_file():
        raise DatasetError(f"scikit-learn has no {path}; install its version 1.5 or a later one.")
    return path


def _load_prepared(
    spec: DatasetSpec, split: str, data_dir: pathlib.Path, limit: int | None
) -> Split:
    info = (prepared_folder(spec, data_dir) / "dataset_info.json").stat()
    # A set that was prepared again has another stamp, and so another file.
    stamp = f"{info.st_mtime_ns:x}-{info.st_size:x}"
    cache = data_dir / "lls_jax_decoded" / f"{spec.name}-{spec.version}-{split}-{stamp}.npz"
    if spec.layout in MAPPED_LAYOUTS:
        return _load_mapped(spec, split, data_dir, limit, cache)
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


def _load_mapped(
    spec: DatasetSpec, split: str, data_dir: pathlib.Path, limit: int | None, cache: pathlib.Path
) -> Split:
    """Pixels in a `.npy` file that is mapped into memory, labels beside it."""
    for place in (cache, own_cache(cache)):
        pixels, labels = place.with_suffix(".npy"), place.with_suffix(".labels.npy")
        if labels.is_file() and pixels.is_file():
            return Split(np.load(pixels, mmap_mode="r"), np.load(labels))
    if limit is not None:
        return _decode(spec, split, data_dir, limit)
    try:
        return _decode_to(spec, split, data_dir, cache)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        own = own_cache(cache)
        print(f"note: decoded images are kept in {own.parent} ({error}).", file=sys.stderr)
        return _decode_to(spec, split, data_dir, own)


def _decode_to(spec: DatasetSpec, split: str, data_dir: pathlib.Path, cache: pathlib.Path) -> Split:
    """Decode a split into a file that is mapped into memory.

    Raises:
        OSError: the file's folder cannot be written.
    """
    pixels, labels = cache.with_suffix(".npy"), cache.with_suffix(".labels.npy")
    size = {"train": spec.train_size, "test": spec.test_size}[split]
    cache.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(cache)
    # Names of their own: several machines may share this disk.
    with tempfile.TemporaryDirectory(prefix=".decoding-", dir=cache.parent) as aside:
        images = np.lib.format.open_memmap(
            f"{aside}/pixels.npy", mode="w+", dtype=np.uint8, shape=(size, *spec.image_shape)
        )
        decoded = np.empty(size, np.int32)
        for index, (image, label) in enumerate(_records(spec, split, data_dir, None)):
            images[index], decoded[index] = image, label
        images.flush()
        np.save(f"{aside}/labels.npy", decoded)
        os.replace(f"{aside}/pixels.npy", pixels)
        # Last: the labels say that the pixels are whole.
        os.replace(f"{aside}/labels.npy", labels)
    return Split(np.load(pixels, mmap_mode="r"), decoded)


def _records(
    spec: DatasetSpec, split: str, data_dir: pathlib.Path, limit: int | None
) -> Iterator[tuple[np.ndarray, int]]:
    """The decoded examples, in order."""
    import tensorflow_datasets as tfds
    from PIL import Image

    folder = prepared_folder(spec, data_dir)
    try:
        builder = tfds.builder_from_directory(folder)
        part = split if limit is None else f"{split}[:{limit}]"
        source = builder.as_data_source(part, decoders={"image": tfds.decode.SkipDecoding()})
        for record in source:
            encoded: Any = record["image"]
            image = np.asarray(Image.open(io.BytesIO(encoded)))
            yield image if image.ndim == 3 else image[..., None], record["label"]
    except Exception as error:
        raise _unreadable(spec, folder, error) from error


def _decode(spec: DatasetSpec, split: str, data_dir: pathlib.Path, limit: int | None) -> Split:
    folder = prepared_folder(spec, data_dir)
    records = list(_records(spec, split, data_dir, limit))
    try:
        images = np.stack([image for image, _ in records])
        return Split(images, np.asarray([label for _, label in records], np.int32))
    except Exception as error:
        raise _unreadable(spec, folder, error) from error


def _write_cache(cache: pathlib.Path, data: Split) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(cache)
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
