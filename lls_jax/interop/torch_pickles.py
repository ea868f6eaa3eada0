"""The pickle inside a PyTorch checkpoint, interpreted without executing anything.

It describes objects with few, harmless operations; what it names is compared with a list, never
imported and never called.
"""

import io
import math
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lls_jax.errors import TorchFileError

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


class Storage(NamedTuple):
    """Where a tensor's bytes are in the archive: its key, their dtype, how many elements."""

    key: str
    dtype: Any
    elements: int


_MARK = object()
_REBUILD = _Global("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = _Global("torch._utils", "_rebuild_parameter")
_ORDERED_DICT = _Global("collections", "OrderedDict")
_SIZE = _Global("torch", "Size")


class PickleReader:
    """The operations of a pickle that describes tensors; any other is an error."""

    def __init__(
        self, content: bytes, load: Callable[[Storage], np.ndarray], most_bytes: int
    ) -> None:
        self._content = content
        self._load = load
        self._bytes_left = most_bytes
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The object that the pickle describes."""
        for opcode, argument, _ in pickletools.genops(io.BytesIO(self._content)):
            if opcode.name == "STOP":
                break
            if opcode.name not in _OPERATIONS:
                raise TorchFileError(f"its pickle has the operation {opcode.name}")
            _OPERATIONS[opcode.name](self, argument)
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

    def _binget(self, index: int) -> None:
        self._stack.append(self._memo[index])

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
        self._stack.append(Storage(str(key), _STORAGES[storage.name], int(count)))

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

    def _tensor(self, storage: Storage, offset: int, shape: Any, stride: Any) -> np.ndarray:
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


def _push(value_of: Callable[[Any], Any]) -> Callable[[PickleReader, Any], None]:
    """An operation that puts one value onto the stack: what is made of its argument."""
    return lambda reader, argument: reader._stack.append(value_of(argument))


def _push_tuple(count: int) -> Callable[[PickleReader, Any], None]:
    return lambda reader, _: reader._tuple_of(count)


# All that there are here, by their names in :mod:`pickletools`.
_OPERATIONS: dict[str, Callable[[PickleReader, Any], None]] = {
    "MARK": _push(lambda _: _MARK),
    "NONE": _push(lambda _: None),
    "NEWTRUE": _push(lambda _: True),
    "NEWFALSE": _push(lambda _: False),
    "EMPTY_DICT": _push(lambda _: {}),
    "EMPTY_LIST": _push(lambda _: []),
    "EMPTY_TUPLE": _push(lambda _: ()),
    **dict.fromkeys(
        (
            *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2"),
            *("LONG1", "BINFLOAT", "SHORT_BINBYTES", "BINBYTES"),
        ),
        _push(lambda argument: argument),
    ),
    "TUPLE1": _push_tuple(1),
    "TUPLE2": _push_tuple(2),
    "TUPLE3": _push_tuple(3),
    "TUPLE": PickleReader._tuple,
    "PROTO": PickleReader._proto,
    "FRAME": PickleReader._frame,
    "MEMOIZE": PickleReader._memoize,
    "BINPUT": PickleReader._binput,
    "LONG_BINPUT": PickleReader._binput,
    "BINGET": PickleReader._binget,
    "LONG_BINGET": PickleReader._binget,
    "GLOBAL": PickleReader._global,
    "STACK_GLOBAL": PickleReader._stack_global,
    "APPEND": PickleReader._append,
    "APPENDS": PickleReader._appends,
    "SETITEM": PickleReader._setitem,
    "SETITEMS": PickleReader._setitems,
    "BUILD": PickleReader._build,
    "BINPERSID": PickleReader._binpersid,
    "REDUCE": PickleReader._reduce,
}
