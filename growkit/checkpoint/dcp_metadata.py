"""The `.metadata` of PyTorch's distributed checkpoints: which bytes of which file are which tensor.

It is a pickle of torch.distributed.checkpoint.metadata.Metadata. Its few classes are known by name
and turned into the records below; every other is refused, and nothing is run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from growkit.checkpoint.files import read_regular
from growkit.checkpoint.kinds import METADATA
from growkit.checkpoint.torch_pickle import (
    KNOWN,
    LIMIT,
    MALFORMED,
    Fixed,
    Foreign,
    Instance,
    make_tuple,
    read_pickle,
    write_pickle,
)
from growkit.errors import GrowkitError

CLASSES = "torch.distributed.checkpoint.metadata"
# Where the class of a place in a file may be defined: in torch, and in OLMo-core.
PLACES = ("torch.distributed.checkpoint.filesystem", "olmo_core.distributed.checkpoint.filesystem")
# Where the properties of tensors were defined until torch 2.2.
OLD_CLASSES = "torch.distributed._shard.sharded_tensor.metadata"
VERSION = "1.0.0"
STRIDED = "torch.strided"
# The dtypes of tensors that growkit reads numbers of. Others are carried along only.
DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
OTHER_DTYPES = (
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("complex64", "complex128"),
)


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, or a whole object, and where its bytes lie.

    offsets, sizes: its first index in the tensor and its shape. file: the name of the file in the
    checkpoint's directory. base, length: the file of torch.save within it, in bytes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    base: int
    length: int


@dataclass(frozen=True)
class Entry:
    """A tensor or an object of a checkpoint.

    path: its keys, from the outermost dict inwards. dtype: torch's name, empty for an object.
    """

    path: tuple[str | int, ...]
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class _Record:
    """What stands for an instance of a class: its state, as the pickle has it."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Metadata(_Record):
    pass


class _Tensor(_Record):
    pass


class _Object(_Record):
    pass


class _Properties(_Record):
    pass


class _Part(_Record):
    pass


class _Index(_Record):
    pass


class _Place(_Record):
    pass


class _Storage(_Record):
    pass


@dataclass(frozen=True)
class _Name(Fixed):
    """What stands for a dtype of torch."""

    name: str


def _make_format(number: Any) -> int:
    """What stands for a memory format."""
    return int(number)


def _make_layout(name: Any) -> str:
    """What stands for a layout. Raises ValueError for another than strided."""
    if name != STRIDED:
        raise ValueError("a layout that is not strided")
    return STRIDED


def _make_path(*parts: Any) -> str:
    """What stands for a path: nothing is done with it."""
    return "/".join(map(str, parts))


# (module, name) -> what stands for a class of the metadata.
RECORDS: Mapping[tuple[str, str], Any] = {
    **{key: value for key, value in KNOWN.items() if key[0] == "collections"},
    **{("torch", name): _Name(name) for name in (*DTYPES, *OTHER_DTYPES)},
    ("torch", "Size"): make_tuple,
    ("torch.serialization", "_get_layout"): _make_layout,
    (CLASSES, "Metadata"): _Metadata,
    (CLASSES, "TensorStorageMetadata"): _Tensor,
    (CLASSES, "BytesStorageMetadata"): _Object,
    (CLASSES, "ChunkStorageMetadata"): _Part,
    (CLASSES, "MetadataIndex"): _Index,
    (CLASSES, "StorageMeta"): _Storage,
    (CLASSES, "TensorProperties"): _Properties,
    (CLASSES, "_MEM_FORMAT_ENCODING"): _make_format,
    (OLD_CLASSES, "TensorProperties"): _Properties,
    (OLD_CLASSES, "MEM_FORMAT_ENCODING"): _make_format,
    **{(module, "_StorageInfo"): _Place for module in PLACES},
    **{
        (module, name): _make_path
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}


def read_metadata(directory: Path) -> dict[str, Entry]:
    """The entries of the checkpoint in a directory, by key.

    Raises GrowkitError, naming the class, for a pickle with other classes than the metadata's, and
    for one that says nothing sound.
    """
    path = directory / METADATA
    content = read_regular(path, LIMIT)
    try:
        value = read_pickle(content, known=RECORDS)
    except Foreign as problem:
        raise GrowkitError(
            f"{path} names {problem.args[0]}, which is no part of a distributed checkpoint's "
            "metadata; nothing of it was run"
        ) from None
    except GrowkitError as problem:
        raise GrowkitError(f"{path}: {problem}") from None
    try:
        return _list_entries(value, path)
    except MALFORMED:
        raise GrowkitError(f"{path} is no metadata of a distributed checkpoint") from None


def _get_state(record: Any, kind: type[_Record]) -> Any:
    """The state of a record. Raises TypeError for one of another kind."""
    if type(record) is not kind:
        raise TypeError(f"no {kind.__name__}")
    return record.state


def _list_entries(value: Any, path: Path) -> dict[str, Entry]:
    state = _get_state(value, _Metadata)
    paths = state.get("planner_data")
    if not isinstance(paths, Mapping):
        raise GrowkitError(
            f"{path} says no keys of nested dicts (planner_data): save with DefaultSavePlanner and "
            "its flatten_state_dict, which is the default"
        )
    places: dict[tuple[str, tuple[int, ...] | None], dict[str, Any]] = {}
    for index, place in state["storage_data"].items():
        fields = _get_state(index, _Index)
        offset = fields.get("offset")
        key = (fields["fqn"], None if offset is None else _read_sizes(offset))
        places[key] = _get_state(place, _Place)
    return {
        str(key): _read_entry(key, record, paths[key], places, path)
        for key, record in state["state_dict_metadata"].items()
    }


def _read_entry(
    key: str,
    record: Any,
    keys: Any,
    places: Mapping[tuple[str, tuple[int, ...] | None], dict[str, Any]],
    path: Path,
) -> Entry:
    if not keys or not all(type(each) in (str, int) for each in keys):
        raise TypeError("keys of another type")
    if type(record) is _Object:
        place = _find_place(places, (key, None), path)
        return Entry(tuple(keys), "", (), (_make_chunk((), (), place),))
    state = _get_state(record, _Tensor)
    shape = _read_sizes(state["size"])
    dtype = _get_state(state["properties"], _Properties)[0]
    if type(dtype) is not _Name:
        raise TypeError("no dtype")
    chunks = []
    for part in state["chunks"]:
        fields = _get_state(part, _Part)
        offsets, sizes = _read_sizes(fields["offsets"]), _read_sizes(fields["sizes"])
        # A process that has nothing of a tensor may have written so.
        if math.prod(sizes) or not math.prod(shape):
            place = _find_place(places, (key, offsets), path)
            chunks.append(_make_chunk(offsets, sizes, place))
    _require_whole(key, shape, chunks, path)
    return Entry(tuple(keys), dtype.name, shape, tuple(chunks))


def _find_place(
    places: Mapping[tuple[str, tuple[int, ...] | None], dict[str, Any]],
    index: tuple[str, tuple[int, ...] | None],
    path: Path,
) -> dict[str, Any]:
    if index not in places:
        raise GrowkitError(f"{path} does not say in which file {index[0]} lies")
    return places[index]


def _make_chunk(
    offsets: tuple[int, ...], sizes: tuple[int, ...], place: Mapping[str, Any]
) -> Chunk:
    """A chunk from what says where it lies."""
    file = place["relative_path"]
    if place.get("transform_descriptors"):
        raise GrowkitError(
            f"{file} was written through {', '.join(map(str, place['transform_descriptors']))}, "
            "which growkit does not undo; save without extensions"
        )
    if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".", ".."):
        raise GrowkitError(f"a distributed checkpoint names the file {file!r} outside itself")
    base, length = _read_sizes((place["offset"], place["length"]))
    return Chunk(offsets, sizes, file, base, length)


def _read_sizes(values: Any) -> tuple[int, ...]:
    """Sizes or offsets. Raises ValueError for what is none."""
    sizes = tuple(values)
    if not all(type(size) is int and 0 <= size < 1 << 62 for size in sizes):
        raise ValueError("a size that is none")
    return sizes


def _require_whole(key: str, shape: tuple[int, ...], chunks: Sequence[Chunk], path: Path) -> None:
    """Raise GrowkitError unless the chunks are a grid that covers the tensor once."""
    cuts: list[set[tuple[int, int]]] = [set() for _ in shape]
    for chunk in chunks:
        for axis, cut in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            cuts[axis].add(cut)
    covered = len({chunk.offsets for chunk in chunks}) == math.prod(map(len, cuts))
    for size, axis_cuts in zip(shape, cuts, strict=True):
        end = 0
        for offset, length in sorted(axis_cuts):
            covered = covered and offset == end
            end += length
        covered = covered and end == size
    if not covered:
        raise GrowkitError(
            f"{path}: the {len(chunks)} chunks of {key} do not cover its shape {list(shape)} once"
        )


def write_metadata(directory: Path, entries: Mapping[str, Entry]) -> None:
    """Write the `.metadata` of a checkpoint whose files are written."""
    state = {
        "state_dict_metadata": {key: _make_storage(entry) for key, entry in entries.items()},
        "planner_data": {key: entry.path for key, entry in entries.items()},
        "storage_data": {
            _make_index(key, entry, number): _make_place(chunk)
            for key, entry in entries.items()
            for number, chunk in enumerate(entry.chunks)
        },
        "storage_meta": Instance(
            CLASSES,
            "StorageMeta",
            state={"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []},
        ),
        "version": VERSION,
    }
    content = write_pickle(Instance(CLASSES, "Metadata", state=state))
    (directory / METADATA).write_bytes(content)


def _make_storage(entry: Entry) -> Instance:
    if not entry.dtype:
        return Instance(CLASSES, "BytesStorageMetadata", state={})
    layout = Instance("torch.serialization", "_get_layout", (STRIDED,))
    # Contiguous; neither gradients nor pinned memory.
    memory_format = Instance(CLASSES, "_MEM_FORMAT_ENCODING", (0,))
    properties = (Instance("torch", entry.dtype), layout, False, memory_format, False)
    chunks = [
        Instance(
            CLASSES,
            "ChunkStorageMetadata",
            state={"offsets": _make_size(chunk.offsets), "sizes": _make_size(chunk.sizes)},
        )
        for chunk in entry.chunks
    ]
    state = {
        "properties": Instance(CLASSES, "TensorProperties", state=properties),
        "size": _make_size(entry.shape),
        "chunks": chunks,
    }
    return Instance(CLASSES, "TensorStorageMetadata", state=state)


def _make_size(sizes: tuple[int, ...]) -> Instance:
    return Instance("torch", "Size", (sizes,))


def _make_index(key: str, entry: Entry, number: int) -> Instance:
    state: dict[str, Any] = {"fqn": key, "index": None}
    if entry.dtype:
        state = {"fqn": key, "index": number, "offset": _make_size(entry.chunks[number].offsets)}
    return Instance(CLASSES, "MetadataIndex", state=state)


def _make_place(chunk: Chunk) -> Instance:
    state = {"relative_path": chunk.file, "offset": chunk.base, "length": chunk.length}
    return Instance(PLACES[0], "_StorageInfo", state=state)
