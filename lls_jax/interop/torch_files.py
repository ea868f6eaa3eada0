"""PyTorch checkpoint files, read and written without PyTorch, and without executing anything.

A file of ``torch.save`` is a zip archive: a pickle that describes objects, and the bytes of each
tensor's storage beside it; :mod:`lls_jax.interop.torch_pickles` reads the pickle.
"""

import pathlib
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from lls_jax.errors import TorchFileError
from lls_jax.interop.torch_pickles import PickleReader, Storage

# Tensors may share a storage, as tied weights do; all together may be this many times what the
# storages hold, and no more: a few bytes that say "again" must not fill the memory.
_LARGEST_EXPANSION = 4
# A pickle of names and shapes; no checkpoint of the published models has one of 100 KiB.
_LARGEST_PICKLE = 16 * 2**20


def read(path: pathlib.Path) -> Any:
    """Read a checkpoint that ``torch.save`` has written (PyTorch 1.6 and newer).

    Args:
        path: the file.

    Returns:
        What was saved: dicts, lists, tuples, numbers and strings; tensors as NumPy arrays.

    Raises:
        TorchFileError: it is damaged, or holds something else than plain tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive)
    except TorchFileError as error:
        raise TorchFileError(f"{path}: {error}") from error
    except FileNotFoundError:
        raise TorchFileError(f"{path} does not exist.") from None
    except (zipfile.BadZipFile, OSError) as error:
        raise TorchFileError(
            f"{path} is not a checkpoint of PyTorch 1.6 or newer ({error}); save it again with a "
            "newer PyTorch, or fetch it again."
        ) from error
    except Exception as error:
        # A damaged file can fail anywhere, with almost any exception.
        raise TorchFileError(f"{path} is damaged ({type(error).__name__}: {error}).") from error


def _read_archive(archive: zipfile.ZipFile) -> Any:
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise TorchFileError("no data.pkl; it is not a checkpoint")
    folder = pickles[0].removesuffix("data.pkl")
    if entries[pickles[0]].file_size > _LARGEST_PICKLE:
        raise TorchFileError("its data.pkl is too large to be a description")
    order = ">" if _archive_text(archive, entries, f"{folder}byteorder") == "big" else "<"
    loaded: dict[str, np.ndarray] = {}
    storages = [entry for name, entry in entries.items() if name.startswith(f"{folder}data/")]
    stored = sum(entry.file_size for entry in storages)

    def load(storage: Storage) -> np.ndarray:
        if storage.key not in loaded:
            entry = entries.get(f"{folder}data/{storage.key}")
            dtype = np.dtype(storage.dtype)
            # Never compressed by PyTorch, so that no more memory is taken than the file has bytes.
            if entry is None or entry.compress_type != zipfile.ZIP_STORED:
                raise TorchFileError(f"storage {storage.key!r} is missing or compressed")
            if entry.file_size != storage.elements * dtype.itemsize:
                raise TorchFileError(
                    f"storage {storage.key!r} has {entry.file_size} bytes; expected "
                    f"{storage.elements * dtype.itemsize}"
                )
            array = np.frombuffer(archive.read(entry), dtype)
            if order == ">":
                array = array.byteswap()
            loaded[storage.key] = array
        return loaded[storage.key]

    return PickleReader(archive.read(pickles[0]), load, _LARGEST_EXPANSION * stored).run()


def _archive_text(
    archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], name: str
) -> str | None:
    """A short text in an archive; None where there is none."""
    entry = entries.get(name)
    if entry is None or entry.file_size > 100:
        return None
    return archive.read(entry).decode("ascii", "replace").strip()


# --- Writing -------------------------------------------------------------------------------------


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _number(value: int) -> bytes:
    if 0 <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    encoded = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def _numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"


_ORDERED = b"ccollections\nOrderedDict\n)R"
_KINDS = {np.dtype(np.float32): b"FloatStorage", np.dtype(np.int64): b"LongStorage"}


def _describe(state_dict: Mapping[str, np.ndarray]) -> tuple[bytes, list[np.ndarray]]:
    """A pickle of a state dict, without its head and end, and the arrays of its storages."""
    body, storages = [], []
    for key, (name, array) in enumerate(state_dict.items()):
        # `ascontiguousarray` would give a scalar an axis.
        value = np.asarray(array, order="C")
        strides = tuple(step // value.itemsize for step in value.strides)
        storage = (
            b"(" + _text("storage") + b"ctorch\n" + _KINDS[value.dtype] + b"\n"
            + _text(str(key)) + _text("cpu") + _number(value.size) + b"tQ"
        )  # fmt: skip
        tensor = (
            b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _number(0)
            + _numbers(value.shape) + _numbers(strides) + b"\x89" + _ORDERED + b"tR"
        )  # fmt: skip
        body.append(_text(name) + tensor)
        storages.append(value)
    return _ORDERED + b"(" + b"".join(body) + b"u", storages


def _write_archive(path: pathlib.Path, content: bytes, storages: list[np.ndarray]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + content + b".")
        archive.writestr("archive/byteorder", "little")
        for key, value in enumerate(storages):
            little = value.astype(value.dtype.newbyteorder("<"))
            archive.writestr(f"archive/data/{key}", little.tobytes())
        archive.writestr("archive/version", "3\n")


def write(path: pathlib.Path, state_dict: Mapping[str, np.ndarray], epoch: int) -> None:
    """Write ``{"epoch", "state_dict"}`` so that ``torch.load(path, weights_only=True)`` reads it.

    Args:
        path: the file.
        state_dict: arrays by name, float32 or int64.
        epoch: index of the last epoch, from 0, as the published code counts.
    """
    state, storages = _describe(state_dict)
    content = b"}(" + _text("epoch") + _number(epoch) + _text("state_dict") + state + b"u"
    _write_archive(path, content, storages)


def write_state_dict(path: pathlib.Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Write a state dict by itself, as ``torch.save(module.state_dict(), path)`` does.

    Args:
        path: the file.
        state_dict: arrays by name, float32 or int64.
    """
    _write_archive(path, *_describe(state_dict))
