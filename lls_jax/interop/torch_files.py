"""PyTorch checkpoint files, read and written without PyTorch, and without executing anything.

A file of ``torch.save`` is a zip archive: a pickle that describes objects, and the bytes of each
tensor's storage beside it. Reading interprets the pickle's few harmless operations itself: what it
names is compared with a list, never imported and never called.
"""

import io
import math
import pathlib
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lls_jax.errors import TorchFileError

# Tensors may share a storage, as tied weights do; all together may be this many times what the
# storages hold, and no more: a few bytes that say "again" must not fill the memory.
_LARGEST_EXPANSION = 4
# A pickle of names and shapes; no checkpoint of the published models has one of 100 KiB.
_LARGEST_PICKLE = 16 * 2**20
_STORAGES: dict[str, Any] = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Global(NamedTuple):
    module: str
    name: str


class _Storage(NamedTuple):
    key: str
    dtype: Any
    elements: int


_MARK = object()
_REBUILD = _Global("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = _Global("torch._utils", "_rebuild_parameter")
_ORDERED_DICT = _Global("collections", "OrderedDict")
_SIZE = _Global("torch", "Size")


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

    def load(storage: _Storage) -> np.ndarray:
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

    return _Machine(archive.read(pickles[0]), load, _LARGEST_EXPANSION * stored).run()


def _archive_text(
    archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], name: str
) -> str | None:
    """A short text in an archive; None where there is none."""
    entry = entries.get(name)
    if entry is None or entry.file_size > 100:
        return None
    return archive.read(entry).decode("ascii", "replace").strip()


class _Machine:
    """The operations of a pickle that describes tensors; any other is an error."""

    def __init__(
        self, content: bytes, load: Callable[[_Storage], np.ndarray], most_bytes: int
    ) -> None:
        self._content = content
        self._load = load
        self._bytes_left = most_bytes
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(self._content)):
            if opcode.name == "STOP":
                break
            if opcode.name in _PUSHED:
                self._stack.append(_PUSHED[opcode.name](argument))
                continue
            step = getattr(self, f"_{opcode.name.lower()}", None)
            if step is None:
                raise TorchFileError(f"its pickle has the operation {opcode.name}")
            step(argument)
        if len(self._stack) != 1:
            raise TorchFileError("its pickle does not end with one object")
        return self._stack[0]

    def _since_mark(self) -> list[Any]:
        place = max(i for i, value in enumerate(self._stack) if value is _MARK)
        values = self._stack[place + 1 :]
        del self._stack[place:]
        return values

    def _proto(self, version: int) -> None:
        if version > 5:
            raise TorchFileError(f"its pickle has protocol {version}")

    def _frame(self, size: int) -> None:
        """How the pickle was cut into pieces; of no use here."""

    def _memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _binput(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    _long_binput = _binput

    def _binget(self, index: int) -> None:
        self._stack.append(self._memo[index])

    _long_binget = _binget

    def _global(self, name: str) -> None:
        self._stack.append(_Global(*name.split(" ")))

    def _stack_global(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(_Global(module, name))

    def _tuple(self, _: None) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _tuple_of(self, count: int) -> None:
        values = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._stack.append(values)

    def _tuple1(self, _: None) -> None:
        self._tuple_of(1)

    def _tuple2(self, _: None) -> None:
        self._tuple_of(2)

    def _tuple3(self, _: None) -> None:
        self._tuple_of(3)

    def _append(self, _: None) -> None:
        value = self._stack.pop()
        self._container(list).append(value)

    def _appends(self, _: None) -> None:
        values = self._since_mark()
        self._container(list).extend(values)

    def _setitem(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _setitems(self, _: None) -> None:
        self._set(self._since_mark())

    def _set(self, pairs: list[Any]) -> None:
        target = self._container(dict)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Hashing nested tuples can take forever.
            if not isinstance(key, str | int):
                raise TorchFileError(f"a dict has a key of type {type(key).__name__}")
            target[key] = value

    def _container(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise TorchFileError(f"{type(self._stack[-1]).__name__} where a {kind.__name__} is due")
        return self._stack[-1]

    def _build(self, _: None) -> None:
        # A state dict's version numbers; nothing here has a state to set.
        self._stack.pop()
        self._container(dict)

    def _binpersid(self, _: None) -> None:
        kind, storage, key, _, count = self._stack.pop()
        if kind != "storage" or storage.module != "torch" or storage.name not in _STORAGES:
            raise TorchFileError(f"it has a storage of kind {storage}")
        self._stack.append(_Storage(str(key), _STORAGES[storage.name], int(count)))

    def _reduce(self, _: None) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if function == _REBUILD:
            result: Any = self._tensor(*arguments[:4])
        elif function == _PARAMETER:
            result = arguments[0]
        elif function == _SIZE:
            result = tuple(arguments[0])
        elif function == _ORDERED_DICT and arguments == ():
            result = {}
        else:
            what = ".".join(function) if isinstance(function, _Global) else type(function).__name__
            raise TorchFileError(f"it asks for {what} to be called, which no checkpoint needs")
        self._stack.append(result)

    def _tensor(self, storage: _Storage, offset: int, shape: Any, stride: Any) -> np.ndarray:
        array = self._load(storage)
        if (
            len(shape) != len(stride)
            or len(shape) > 8
            or min((*shape, *stride, offset), default=0) < 0
        ):
            raise TorchFileError(f"a tensor of shape {shape} and strides {stride}")
        count = math.prod(shape)
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride))
        # More elements than the storage has would be an expansion, which takes memory for nothing.
        if count > array.size or (count and last >= array.size):
            raise TorchFileError(f"a tensor of shape {shape} reaches beyond its storage")
        if not count:
            return np.empty(shape, array.dtype)
        self._bytes_left -= count * array.itemsize
        if self._bytes_left < 0:
            raise TorchFileError("its tensors together are many times larger than its storages")
        strides = tuple(step * array.itemsize for step in stride)
        return np.lib.stride_tricks.as_strided(array[offset:], shape, strides).copy()


def _same(value: Any) -> Any:
    return value


# Operations that put one value onto the stack.
_PUSHED: dict[str, Callable[[Any], Any]] = {
    "MARK": lambda _: _MARK,
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    **dict.fromkeys(
        ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2"), _same
    ),
    **dict.fromkeys(("LONG1", "BINFLOAT", "SHORT_BINBYTES", "BINBYTES"), _same),
}


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


def write(path: pathlib.Path, state_dict: Mapping[str, np.ndarray], epoch: int) -> None:
    """Write ``{"epoch", "state_dict"}`` so that ``torch.load(path, weights_only=True)`` reads it.

    Args:
        path: the file.
        state_dict: arrays by name, float32 or int64.
        epoch: index of the last epoch, from 0, as the published code counts.
    """
    kinds = {np.dtype(np.float32): b"FloatStorage", np.dtype(np.int64): b"LongStorage"}
    ordered = b"ccollections\nOrderedDict\n)R"
    body, storages = [], []
    for key, (name, array) in enumerate(state_dict.items()):
        # `ascontiguousarray` would give a scalar an axis.
        value = np.asarray(array, order="C")
        strides = tuple(step // value.itemsize for step in value.strides)
        storage = (
            b"(" + _text("storage") + b"ctorch\n" + kinds[value.dtype] + b"\n"
            + _text(str(key)) + _text("cpu") + _number(value.size) + b"tQ"
        )  # fmt: skip
        tensor = (
            b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _number(0)
            + _numbers(value.shape) + _numbers(strides) + b"\x89" + ordered + b"tR"
        )  # fmt: skip
        body.append(_text(name) + tensor)
        storages.append(value)
    state = ordered + b"(" + b"".join(body) + b"u"
    pickle = (
        b"\x80\x02}(" + _text("epoch") + _number(epoch) + _text("state_dict") + state + b"u."
    )  # fmt: skip
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/byteorder", "little")
        for key, value in enumerate(storages):
            little = value.astype(value.dtype.newbyteorder("<"))
            archive.writestr(f"archive/data/{key}", little.tobytes())
        archive.writestr("archive/version", "3\n")
