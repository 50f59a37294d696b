"""The pickles of torch.save, read and written without torch and without running anything.

A state dict is made of dicts, lists, tuples, numbers, texts and tensors. A tensor is a view
(offset, shape, strides) of a storage, and a storage is a member of the zip file around the pickle.
The reader knows the few names that such a pickle uses and refuses every other by name: what it
calls are functions of this file, which make records. The writer uses only operations that
`torch.load(weights_only=True)` reads.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import ml_dtypes
import numpy as np

from growkit.errors import GrowkitError

# The classes of storages that growkit reads numbers of, by the name that pickles use.
STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
# Bytes of a pickle at most; one of 10,000 parameters has 3 MB.
LIMIT = 100_000_000
# Dicts, lists and tuples in each other at most; a state of training has about 6.
DEEPEST = 100
MALFORMED = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    RecursionError,
    TypeError,
    UnicodeError,
    ValueError,
)


class Fixed:
    """What no pickle changes: a pickle may give any object a state, and a frozen class does not
    prevent that.
    """

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a pickle gives a state to what has none")


@dataclass(frozen=True)
class Storage(Fixed):
    """Numbers in one stretch of the file. key: its name there; location: the device's."""

    dtype: np.dtype
    key: str
    location: str
    count: int


@dataclass(frozen=True)
class Stored(Fixed):
    """A tensor: a view of a storage. offset and strides count numbers, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    @property
    def is_contiguous(self) -> bool:
        """Whether the numbers lie one after another in C order."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True


@dataclass(frozen=True)
class _Dtype(Fixed):
    """The stand-in for a storage's class."""

    dtype: np.dtype


class Inert:
    """The stand-in for an object that growkit has no use for: it keeps what it was made from, and
    does nothing. `called` is the name that the pickle has for its class.
    """

    called = ""
    arguments: tuple[Any, ...] = ()

    def __new__(cls, *arguments: Any) -> Inert:
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __init__(self, *arguments: Any) -> None:
        """Nothing: `__new__` is all that a pickle calls of a class that it makes anew."""

    def __setstate__(self, state: Any) -> None:
        """Nothing: the state is left out."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Nothing: entries of what was a dict are left out."""

    def append(self, value: Any) -> None:
        """Nothing: entries of what was a list are left out."""


@dataclass(frozen=True, eq=False)
class Instance:
    """A class or a function of a module, or what it makes, for the writer.

    arguments: what it is called with; None where it is not called. state: what is given to an empty
    instance of the class; None for none.
    """

    module: str
    name: str
    arguments: tuple[Any, ...] | None = None
    state: Any = None


class Foreign(Exception):
    """A pickle names what a state dict has no use for."""


def refuse_all(name: str) -> bool:
    """Which classes a pickle may name beside those of a state dict: none."""
    return False


def read_pickle(
    data: bytes,
    skipped: Callable[[str], bool] = refuse_all,
    known: Mapping[tuple[str, str], Any] | None = None,
) -> Any:
    """The value of a pickle, with `Stored` in the place of tensors.

    skipped: whether objects of a class, called MODULE.NAME, are passed over; an `Inert` stands in
    their place. known: (module, name) -> what stands for it, where that is not what a state dict
    needs. Raises Foreign, with the name, for any other class or function, and GrowkitError for what
    is no pickle.
    """
    return read_next(io.BytesIO(data), skipped, known)


def read_next(
    file: BinaryIO,
    skipped: Callable[[str], bool] = refuse_all,
    known: Mapping[tuple[str, str], Any] | None = None,
    storages: dict[str, Storage] | None = None,
) -> Any:
    """The value of the pickle that begins where an open file stands; see `read_pickle`.

    storages: told every storage that the pickle names, by its key.
    """
    named = {} if storages is None else storages
    try:
        value = _Reader(file, skipped, KNOWN if known is None else known, named).load()
        _measure_depth(value, {})
        return value
    except Foreign:
        raise
    except MALFORMED as problem:
        raise GrowkitError(f"its pickle cannot be read ({type(problem).__name__})") from None


def _measure_depth(value: Any, measured: dict[int, int]) -> int:
    """How deep dicts, lists and tuples lie in each other; 0 for anything else.

    measured: the depth of each by its id. Raises RecursionError for more than DEEPEST, which is
    also what one has that holds itself.
    """
    if isinstance(value, Mapping):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple):
        parts = [*value]
    else:
        return 0
    if id(value) not in measured:
        # Stands until it is measured, and is what one that holds itself finds.
        measured[id(value)] = DEEPEST
        measured[id(value)] = 1 + max((_measure_depth(part, measured) for part in parts), default=0)
    depth = measured[id(value)]
    if depth > DEEPEST:
        raise RecursionError
    return depth


class _Reader(pickle.Unpickler):
    """An unpickler that finds records in the place of classes, and nothing else."""

    def __init__(
        self,
        file: BinaryIO,
        skipped: Callable[[str], bool],
        known: Mapping[tuple[str, str], Any],
        storages: dict[str, Storage],
    ) -> None:
        super().__init__(file)
        self.skipped = skipped
        self.known = known
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        known = self.known.get((module, name))
        if known is not None:
            return known
        called = f"{module}.{name}"
        if self.skipped(called):
            return type("Inert", (Inert,), {"called": called})
        raise Foreign(called)

    def persistent_load(self, pid: Any) -> Storage:
        # Files of torch before 1.6 add a view of the storage, which torch has long left empty.
        word, kind, key, location, count, *views = pid
        texts = isinstance(key, str) and isinstance(location, str)
        if word != "storage" or not isinstance(kind, _Dtype) or not texts or not _is_size(count):
            raise ValueError(pid)
        if any(views):
            raise ValueError("a view of a storage")
        found = Storage(kind.dtype, key, location, count)
        if self.storages.setdefault(key, found) != found:
            raise ValueError("one storage of two kinds")
        return found


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Stored:
    """What torch._utils._rebuild_tensor_v2 is given, as a record."""
    sizes = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or not all(_is_size(size) for size in sizes):
        raise ValueError("a tensor of no storage")
    if len(shape) != len(strides):
        raise ValueError("a tensor with other strides than dimensions")
    return Stored(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data: Any, *rest: Any) -> Stored:
    if not isinstance(data, Stored):
        raise ValueError("a parameter that is no tensor")
    return data


def make_tuple(values: Any = ()) -> tuple[Any, ...]:
    """What torch.Size is given, as a tuple."""
    return tuple(values)


KNOWN: Mapping[tuple[str, str], Any] = {
    **{("torch", name): _Dtype(dtype) for name, dtype in STORAGES.items()},
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): make_tuple,
}


def write_pickle(value: Any) -> bytes:
    """The pickle of a value of dicts, lists, tuples, numbers, texts, None, `Stored`, `Instance`.

    Raises GrowkitError for anything else.
    """
    parts = [b"\x80\x02"]
    _write(value, parts)
    parts.append(b".")
    return b"".join(parts)


def _write(value: Any, parts: list[bytes]) -> None:
    """Append the operations that make a value."""
    kind = type(value)
    if kind in SCALARS:
        parts.append(SCALARS[kind](value))
    elif isinstance(value, Mapping):
        parts.append(b"}(")
        for key, each in value.items():
            _write(key, parts)
            _write(each, parts)
        parts.append(b"u")
    elif kind is list:
        parts.append(b"](")
        for each in value:
            _write(each, parts)
        parts.append(b"e")
    elif kind is tuple:
        parts.append(b"(")
        for each in value:
            _write(each, parts)
        parts.append(b"t")
    elif kind is Stored:
        _write_tensor(value, parts)
    elif kind is Instance:
        _write_instance(value, parts)
    else:
        _refuse(value)


def _refuse(value: Any) -> NoReturn:
    raise GrowkitError(f"a state dict holds a {type(value).__name__}, which growkit does not write")


def _write_instance(instance: Instance, parts: list[bytes]) -> None:
    parts.append(f"c{instance.module}\n{instance.name}\n".encode())
    if instance.arguments is not None:
        _write(instance.arguments, parts)
        parts.append(b"R")
    elif instance.state is not None:
        # An empty instance, then its state.
        parts.append(b")\x81")
        _write(instance.state, parts)
        parts.append(b"b")


def _write_tensor(tensor: Stored, parts: list[bytes]) -> None:
    storage = tensor.storage
    parts.append(b"ctorch._utils\n_rebuild_tensor_v2\n((")
    _write("storage", parts)
    parts.append(f"ctorch\n{STORAGE_NAMES[storage.dtype]}\n".encode())
    named: list[Any] = [storage.key, storage.location, storage.count]
    placed: list[Any] = [tensor.offset, tensor.shape, tensor.strides, False]
    for each in named:
        _write(each, parts)
    parts.append(b"tQ")
    for each in placed:
        _write(each, parts)
    # No hooks.
    parts.append(b"ccollections\nOrderedDict\n)RtR")


def _write_whole(number: int) -> bytes:
    if 0 <= number < 256:
        return b"K" + struct.pack("<B", number)
    if -(1 << 31) <= number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(data)) + data


def _write_text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


SCALARS: dict[type, Any] = {
    int: _write_whole,
    float: lambda value: b"G" + struct.pack(">d", value),
    str: _write_text,
    bool: lambda value: b"\x88" if value else b"\x89",
    type(None): lambda value: b"N",
}
