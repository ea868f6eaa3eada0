"""Reading official archives: CIFAR-10's binary and Python formats, and MNIST's IDX files."""

import gzip
import io
import pathlib
import pickle
import pickletools
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lls_jax.data.specs import DatasetSpec
from lls_jax.data.storage import Split, check_split
from lls_jax.errors import DatasetError

_CIFAR_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_CIFAR_FILES = (*_CIFAR_TRAIN, "test_batch")
# No file of these archives is larger; what claims to be is not one of them.
_LARGEST_FILE = 256 * 2**20


def read_archive(spec: DatasetSpec, path: pathlib.Path) -> dict[str, Split]:
    """Read the official archive of a data set.

    Args:
        spec: the data set.
        path: for CIFAR the ``.tar.gz``, binary or Python version, or the unpacked folder; for
            MNIST-like sets the folder with the four IDX files, gzipped or not.

    Returns:
        ``{"train": ..., "test": ...}``, with counts, sizes and label ranges checked.

    Raises:
        DatasetError: it is missing, truncated, or not that archive.
    """
    if not path.exists():
        raise DatasetError(f"archive {path} does not exist; give the file or folder itself.")
    try:
        readers = {"cifar10": _read_cifar10, "cifar100": _read_cifar100, "idx": _read_idx_folder}
        splits = readers[spec.layout](spec, path)
    except (EOFError, zlib.error, tarfile.TarError, gzip.BadGzipFile) as error:
        raise DatasetError(
            f"archive {path} is truncated or not a gzipped archive ({error}); fetch it again."
        ) from error
    check_split(spec, "train", splits["train"], spec.train_size)
    check_split(spec, "test", splits["test"], spec.test_size)
    return splits


# --- CIFAR-10 ----------------------------------------------------------------------------------


def _cifar_files(path: pathlib.Path, names: tuple[str, ...], title: str) -> dict[str, Any]:
    files = _cifar_folder(path, names) if path.is_dir() else _cifar_tar(path, names)
    missing = [name for name in names if name not in files]
    if missing:
        raise DatasetError(
            f"archive {path} lacks {', '.join(missing)} (binary files end in .bin, Python ones in "
            f"nothing); expected {title}'s binary or Python version."
        )
    return files


def _read_cifar100(spec: DatasetSpec, path: pathlib.Path) -> dict[str, Split]:
    files = _cifar_files(path, ("train", "test"), "CIFAR-100")
    splits = {}
    for name, count in (("train", spec.train_size), ("test", spec.test_size)):
        is_binary, content = files[name]
        parse = _parse_cifar_binary if is_binary else _parse_cifar_python
        splits[name] = parse(spec, f"{path}: {name}", content, count)
    return splits


def _read_cifar10(spec: DatasetSpec, path: pathlib.Path) -> dict[str, Split]:
    files = _cifar_files(path, _CIFAR_FILES, "CIFAR-10")
    sizes = dict.fromkeys(_CIFAR_TRAIN, spec.train_size // len(_CIFAR_TRAIN))
    sizes["test_batch"] = spec.test_size
    parts = {}
    for name in _CIFAR_FILES:
        is_binary, content = files[name]
        parse = _parse_cifar_binary if is_binary else _parse_cifar_python
        parts[name] = parse(spec, f"{path}: {name}", content, sizes[name])
    train = [parts[name] for name in _CIFAR_TRAIN]
    return {
        "train": Split(*(np.concatenate(arrays) for arrays in zip(*train))),
        "test": parts["test_batch"],
    }


def _cifar_key(file_name: str, names: tuple[str, ...]) -> str | None:
    stem = file_name.removesuffix(".bin")
    return stem if stem in names else None


def _cifar_folder(path: pathlib.Path, names: tuple[str, ...]) -> dict[str, tuple[bool, bytes]]:
    # The archive unpacks into a folder of its own: both it and its parent are welcome.
    for folder in (path, *sorted(child for child in path.iterdir() if child.is_dir())):
        files = {
            key: (file.suffix == ".bin", _read_limited(file.open("rb"), str(file)))
            for file in sorted(folder.iterdir())
            if file.is_file() and (key := _cifar_key(file.name, names))
        }
        if files:
            return files
    return {}


def _cifar_tar(path: pathlib.Path, names: tuple[str, ...]) -> dict[str, tuple[bool, bytes]]:
    files = {}
    # Members are read in memory, never extracted: their paths cannot lead anywhere.
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            file_name = pathlib.PurePosixPath(member.name).name
            key = _cifar_key(file_name, names)
            stream = archive.extractfile(member) if key and member.isfile() else None
            if key and stream:
                files[key] = (file_name.endswith(".bin"), _read_limited(stream, member.name))
    return files


def _read_limited(stream: Any, name: str) -> bytes:
    with stream:
        content = stream.read(_LARGEST_FILE + 1)
    if len(content) > _LARGEST_FILE:
        raise DatasetError(f"{name} is larger than {_LARGEST_FILE} bytes; it is not a data file.")
    return content


def _planes_to_images(spec: DatasetSpec, planes: np.ndarray) -> np.ndarray:
    height, width, channels = spec.image_shape
    return planes.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)


def _parse_cifar_binary(spec: DatasetSpec, name: str, content: bytes, count: int) -> Split:
    pixels = int(np.prod(spec.image_shape))
    # CIFAR-100 has the coarse label first, then the fine one.
    labels = 2 if spec.layout == "cifar100" else 1
    expected = count * (pixels + labels)
    if len(content) != expected:
        raise DatasetError(
            f"{name} has {len(content)} bytes; expected {expected}, {count} records of "
            f"{pixels + labels}. Fetch it again."
        )
    records = np.frombuffer(content, np.uint8).reshape(count, pixels + labels)
    fine = records[:, labels - 1].astype(np.int32)
    return Split(_planes_to_images(spec, records[:, labels:]), fine)


def _parse_cifar_python(spec: DatasetSpec, name: str, content: bytes, count: int) -> Split:
    batch = load_restricted_pickle(content, name)
    pixels = int(np.prod(spec.image_shape))
    data = batch.get(b"data") if isinstance(batch, dict) else None
    key = b"fine_labels" if spec.layout == "cifar100" else b"labels"
    labels = batch.get(key) if isinstance(batch, dict) else None
    if (
        not isinstance(data, np.ndarray)
        or data.dtype != np.uint8
        or data.shape != (count, pixels)
        or not isinstance(labels, list)
        or len(labels) != count
        or not all(isinstance(label, int) for label in labels)
    ):
        raise DatasetError(
            f"{name} does not hold `data`, uint8 [{count}, {pixels}], and `{key.decode()}`, "
            f"{count} ints; expected a batch of CIFAR's Python version."
        )
    # Clipped so that an absurd label is reported as out of range rather than overflowing.
    small = [max(-1, min(label, 2**31 - 1)) for label in labels]
    return Split(_planes_to_images(spec, data), np.asarray(small, np.int32))


def _empty_array(kind: Any, shape: Any, dtype: Any) -> np.ndarray:
    # NumPy's own `_reconstruct` would allocate whatever shape the pickle names.
    if kind is not np.ndarray or shape not in ((0,), 0):
        raise pickle.UnpicklingError(f"array of kind {kind!r} and first shape {shape!r}")
    del dtype
    return np.empty(0, np.uint8)


def _plain_dtype(name: Any, align: bool = False, copy: bool = False) -> np.dtype:
    del align, copy
    text = name.decode("ascii") if isinstance(name, bytes) else name
    if text not in ("u1", "i1", "i4", "i8", "f4", "f8", "|u1", "|i1"):
        raise pickle.UnpicklingError(f"array dtype {name!r}")
    return np.dtype(text)


def _latin1(text: Any, encoding: Any) -> bytes:
    # How Python 3 writes bytes in protocol 2.
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("an encoding other than latin1")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Callable[..., Any] | type] = {
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _plain_dtype,
    ("_codecs", "encode"): _latin1,
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to a persistent object")


def _check_memo(content: bytes) -> None:
    """Raise ValueError where a few bytes ask for a memo, of what was read, of gigabytes."""
    for opcode, number, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(number or 0) > len(content):
            raise ValueError(f"entry {number} of its memo, of {len(content)} bytes")


def load_restricted_pickle(content: bytes, name: str) -> Any:
    """Read a pickle that holds NumPy arrays, dicts, lists, bytes and ints, and nothing else.

    Args:
        content: the pickle.
        name: what errors call it.

    Returns:
        What it holds; strings of Python 2 as bytes.

    Raises:
        DatasetError: it is damaged, or refers to anything else; nothing it names is executed.
    """
    try:
        _check_memo(content)
        return _RestrictedUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:
        # A damaged pickle can fail in any opcode, with almost any exception.
        raise DatasetError(
            f"{name} is not a pickle of plain arrays ({error}); fetch the Python version again, or "
            "use the binary one."
        ) from error


# --- IDX ---------------------------------------------------------------------------------------

_IDX_FILES = {"train": "train", "test": "t10k"}


def _read_idx_folder(spec: DatasetSpec, path: pathlib.Path) -> dict[str, Split]:
    if not path.is_dir():
        raise DatasetError(
            f"archive {path} is not a folder; expected the one with the four IDX files."
        )
    splits = {}
    for split, prefix in _IDX_FILES.items():
        images = _read_idx(path, f"{prefix}-images-idx3-ubyte", 3)
        labels = _read_idx(path, f"{prefix}-labels-idx1-ubyte", 1)
        splits[split] = Split(images[..., None], labels.astype(np.int32))
    return splits


def _read_idx(folder: pathlib.Path, name: str, axes: int) -> np.ndarray:
    # Some unpackers write train-images.idx3-ubyte.
    stems = (name, name.replace("-idx", ".idx"))
    candidates = [folder / f"{stem}{end}" for stem in stems for end in (".gz", "")]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise DatasetError(
            f"{folder} lacks {name} (or {name}.gz); expected the four IDX files of this data set."
        )
    opener: Any = gzip.open if found.suffix == ".gz" else open
    content = _read_limited(opener(found, "rb"), str(found))
    header = 4 + 4 * axes
    expected = bytes((0, 0, 8, axes))
    if len(content) < header or content[:4] != expected:
        raise DatasetError(
            f"{found} starts with {content[:4]!r}; expected {expected!r}, an IDX file of "
            f"unsigned bytes with {axes} axes."
        )
    shape = tuple(int(size) for size in np.frombuffer(content[4:header], ">u4"))
    wanted = int(np.prod(shape, dtype=object))
    if len(content) - header != wanted:
        raise DatasetError(
            f"{found} has {len(content) - header} bytes of data; its header {shape} promises "
            f"{wanted}. Fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def examples(data: Split) -> Iterator[tuple[np.ndarray, int]]:
    """Each image with its label."""
    for image, label in zip(data.images, data.labels):
        yield image, int(label)
