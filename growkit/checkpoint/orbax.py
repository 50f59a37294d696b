"""The trainer's checkpoints: an Orbax composite of `state` (arrays), `meta` and `files` (JSON).

    CHECKPOINT/state/params.layers.attention.dense.weight/{.zarray,0.0.0}   raw bytes
    CHECKPOINT/meta/metadata      {"config", "lineage", "record", "hashes"}
    CHECKPOINT/files/metadata     tokenizer and other small files, by name

An array holds all layers, stacked in the first dimension. To readers each layer is a tensor of its
own, under its name in Hugging Face files. Whole uncompressed arrays are read by offset, without
orbax or jax; all others (sharded, compressed, OCDBT) through tensorstore. Writing uses neither, and
makes the files that Orbax would make of the same arrays; a test compares the two.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from growkit.checkpoint.carried import (
    decode_files,
    drop_code_keys,
    encode_files,
    read_head,
    require_inside,
    select_carried,
)
from growkit.checkpoint.files import read_json, refuse_pointer
from growkit.checkpoint.fill import Job, Progress, collect_jobs, create_file, fill
from growkit.checkpoint.hashes import (
    ALGORITHMS,
    KEY,
    Hashed,
    drop_hashes,
    find_changed,
    read_stated,
    state_hashes,
)
from growkit.checkpoint.kinds import FINISHED, STATE
from growkit.checkpoint.numbers import Findings
from growkit.checkpoint.raw import Finish, Passing, Stamp, read_stamp
from growkit.checkpoint.safetensors import MOST_DIMENSIONS
from growkit.checkpoint.store import open_store, read_store
from growkit.checkpoint.tensor import (
    SLOTS,
    Contents,
    Recipe,
    Source,
    Tensor,
    copy_tensor,
    open_raw,
    read_model,
    wrap_array,
)
from growkit.checkpoint.zarr import describe_array, describe_tree, name_chunk, parse_dtype
from growkit.errors import GrowkitError
from growkit.forms import COUNTERS, check_record
from growkit.models import read_config
from growkit.models.architecture import Architecture
from growkit.models.notation import Position, Row

# The items of the composite, beside STATE.
META = "meta"
FILES = "files"
# In buckets, which have no rename, Orbax takes a directory for finished if it holds this file.
COMMITTED = "commit_success.txt"
# Files of the trainer's own, which stay among its checkpoints.
TRAINERS = ("history.csv",)
ORBAX_HANDLERS = "orbax.checkpoint._src.handlers"
HANDLERS = {
    FILES: f"{ORBAX_HANDLERS}.json_checkpoint_handler.JsonCheckpointHandler",
    META: f"{ORBAX_HANDLERS}.json_checkpoint_handler.JsonCheckpointHandler",
    STATE: f"{ORBAX_HANDLERS}.pytree_checkpoint_handler.PyTreeCheckpointHandler",
}


@dataclass(frozen=True)
class Array:
    """A stored array: raw bytes in one file (`file`), or opened by tensorstore (`store`)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path | None = None
    store: Any = None
    stamp: Stamp | None = None
    passing: Passing | None = None

    def as_tensor(self, position: Position = ()) -> Tensor:
        """The whole array, or one unit of the stacked axes (a layer); only that unit is read."""
        shape = self.shape[len(position) :]
        if self.file is not None:
            units = self.shape[: len(position)]
            # C order: the units of the stacked axes lie one after another, each contiguous.
            unit = int(np.ravel_multi_index(position, units)) if position else 0
            offset = unit * math.prod(shape) * self.dtype.itemsize
            return open_raw(self.file, offset, shape, self.dtype, self.stamp, self.passing)
        part = self.store[position] if position else self.store
        chunk = self.store.chunk_layout.read_chunk.shape or ()
        # How many rows of this tensor a chunk holds.
        stride = next(iter(chunk[len(self.shape) - len(shape) :]), 1)

        def rows(start: int, stop: int) -> np.ndarray:
            return read_store(part[start:stop] if shape else part)

        return Tensor(shape, self.dtype, rows, stride=stride)


def open_checkpoint(path: Path) -> Source:
    """Open a trainer checkpoint. Raises GrowkitError naming the file at fault."""
    for file in (path / META / "metadata", path / STATE / "_METADATA"):
        if file.exists():
            require_inside(path, file)
    meta = read_json(path / META / "metadata")
    tree = read_json(path / STATE / "_METADATA")
    try:
        config, dropped = drop_code_keys(meta["config"])
        lineage = meta.get("lineage", [])
        names = _list_arrays(tree)
        arrays = {name: _open_array(path / STATE, name, tree) for name in names}
        model = read_model(config, path, lineage if isinstance(lineage, list) else ())
        hashed = _find_hashes(path, meta, arrays)
        record = read_record(path, meta)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise GrowkitError(
            f"{path} is an Orbax checkpoint, but not one of growkit's trainer"
        ) from None
    counters = {name: _read_counter(name, arrays[name], path) for name in COUNTERS & arrays.keys()}
    return Source(
        path=path,
        kind="checkpoint",
        config=config,
        tensors={slot: _split_layers(arrays, slot, model) for slot in _find_slots(arrays)},
        weights=[path / META / "metadata", *_list_state_files(path / STATE, arrays)],
        lineage=drop_hashes(lineage) if isinstance(lineage, list) else lineage,
        record=record | counters,
        read_files=lambda: _read_files(path),
        notes=dropped,
        hashed=hashed,
    )


def read_record(path: Path, meta: Any) -> dict[str, Any]:
    """The trainer's position in a checkpoint's meta. Raises GrowkitError where it is none."""
    try:
        return check_record(meta.get("record", {}))
    except (AttributeError, KeyError, ValueError) as problem:
        raise GrowkitError(f"{path / META / 'metadata'} holds no position: {problem}") from None


def _read_counter(name: str, array: Array, path: Path) -> int:
    """The value of a counter. Raises GrowkitError for an array of several numbers."""
    if array.shape:
        raise GrowkitError(f"{path}: {name} must be one number, and has the shape {array.shape}")
    value = int(array.as_tensor().read())
    if not 0 <= value < 1 << 31:
        raise GrowkitError(f"{path}: {name} must be a whole number from 0, and is {value}")
    return value


def _find_hashes(path: Path, meta: Mapping[str, Any], arrays: dict[str, Array]) -> Hashed | None:
    """The hashes on record of the arrays here, if there are any.

    The arrays that have one are hashed from here on as they are read.
    """
    if KEY not in meta:
        return None
    algorithm, known = read_stated(meta[KEY], list(arrays), path / META / "metadata")

    def find_other() -> str | None:
        files = decode_files(read_json(path / FILES / "metadata")) if "files" in meta[KEY] else {}
        changed = find_changed(meta[KEY], {}, files, meta)
        return f"the bytes of {changed}" if changed else None

    def read(name: str) -> Iterator[memoryview]:
        return arrays[name].as_tensor().read_bytes()

    finish = {}
    for name, array in arrays.items():
        span = array.as_tensor().span
        if name in known and span and algorithm in ALGORITHMS:
            passing = Passing(span.offset, span.size, algorithm)
            arrays[name] = replace(array, passing=passing)
            finish[name] = Finish(passing, span)
    return Hashed(algorithm, known, read, find_other, finish)


def _list_state_files(state: Path, arrays: Mapping[str, Array]) -> list[Path]:
    """Every file that holds bytes of arrays."""
    if all(array.file for array in arrays.values()):
        return sorted({array.file for array in arrays.values() if array.file})
    return sorted(file for file in state.rglob("*") if file.is_file())


def _read_files(path: Path) -> dict[str, bytes]:
    """The small files that a checkpoint carries, of the kinds that growkit carries."""
    file = path / FILES / "metadata"
    if file.exists():
        require_inside(path, file)
    try:
        found = decode_files(read_json(file))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise GrowkitError(f"{file} is garbled: it must hold text or base64 by name") from None
    return select_carried(found, TRAINERS)


def _list_arrays(tree: Mapping[str, Any]) -> list[str]:
    """The names of all arrays, as SLOT.PATH, from what Orbax says of the tree."""
    entries = tree["tree_metadata"].values()
    return [".".join(str(key["key"]) for key in entry["key_metadata"]) for entry in entries]


def _find_slots(arrays: Mapping[str, Array]) -> list[str]:
    """The slots that the checkpoint has; params always."""
    found = {name.split(".")[0] for name in arrays} | {"params"}
    return [slot for slot in SLOTS if slot in found]


def _open_array(state: Path, name: str, tree: Mapping[str, Any]) -> Array:
    """One stored array: raw if it is one uncompressed chunk, else through tensorstore."""
    if tree.get("use_ocdbt") or tree.get("use_zarr3"):
        return _open_stored(state, name, tree)
    # A name is joined to a path below: it must not climb out of the checkpoint.
    if "/" in name or name.startswith("."):
        raise GrowkitError(f"{state} names an array {name!r}, which leads out of the directory")
    require_inside(state.parent, state / name / ".zarray")
    header = read_json(state / name / ".zarray")
    shape = tuple(header["shape"])
    if len(shape) > MOST_DIMENSIONS or not all(type(size) is int for size in shape):
        raise ValueError(name)
    dtype = parse_dtype(header["dtype"])
    encoded = header["compressor"] is not None or header["filters"]
    # Fortran order and foreign byte order are left to tensorstore, which knows how to read them.
    native = header["order"] == "C" and dtype.isnative
    if encoded or not native or tuple(header["chunks"]) != shape:
        return _open_stored(state, name, tree)
    chunk = state / name / name_chunk(shape)
    size = math.prod(shape) * dtype.itemsize
    found = 0
    stamp = None
    if chunk.exists():
        require_inside(state.parent, chunk)
        stamp = read_stamp(chunk)
        found = os.path.getsize(chunk)
    if found != size:
        if found:
            refuse_pointer(read_head(chunk), chunk)
        raise GrowkitError(
            f"{chunk} is cut off: an array of {list(shape)} {dtype} takes {size} bytes, "
            f"the file has {found}"
        )
    return Array(shape, dtype, file=chunk, stamp=stamp)


def _open_stored(state: Path, name: str, tree: Mapping[str, Any]) -> Array:
    # Headers only; chunks are read when their rows are asked for.
    store = open_store(state, name, tree)
    return Array(tuple(store.shape), store.dtype.numpy_dtype, store=store)


def _split_layers(arrays: Mapping[str, Array], slot: str, model: Architecture) -> dict[str, Tensor]:
    """One tensor for each unit of the stacked axes (each layer), under its name in files.

    Raises GrowkitError for an array that no row of the axis table covers.
    """
    rows = {".".join((slot, *row.path)): row for row in model.table.rows}
    tensors: dict[str, Tensor] = {}
    for name, array in arrays.items():
        if not name.startswith(f"{slot}."):
            continue
        row = rows.get(name)
        if row is None:
            known = ", ".join(rows)
            raise GrowkitError(
                f"no row of the axis table covers the array {name!r}; the rows are {known}"
            )
        units = array.shape[: len(row.stacked)]
        # One tensor a layer, as in files: layers stacked in an array are views of it by offset.
        for position in product(*(range(size) for size in units)):
            tensors[row.name_at(position)] = array.as_tensor(position)
    return tensors


@dataclass(frozen=True)
class Leaf:
    """An array to be written: the recipes of its layers (or a single one), end to end."""

    shape: tuple[int, ...]
    dtype: np.dtype
    recipes: tuple[Recipe, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def collect_leaves(contents: Contents, model: Architecture) -> dict[tuple[str, ...], Leaf]:
    """Every array of an output by its path in the tree: the slots' stacked arrays, the counters."""
    found: dict[tuple[str, ...], Leaf] = {}
    for slot, recipes in contents.recipes.items():
        for row in model.table.rows:
            names = [row.name_at(position) for position in row.positions(model.sizes)]
            parts = tuple(recipes[name] for name in names if name in recipes)
            if row.kind and not parts:
                continue
            _check_all_layers(row, len(parts), len(names))
            _check_one_dtype(row, parts)
            shape = row.stacked_sizes(model.sizes) + parts[0].shape
            found[(slot, *row.path)] = Leaf(shape, parts[0].dtype, parts)
    for name in COUNTERS:
        value = np.asarray(contents.record.get(name, 0), np.int32)
        found[(name,)] = Leaf((), value.dtype, (copy_tensor(wrap_array(value)),))
    return found


def _check_all_layers(row: Row, found: int, wanted: int) -> None:
    """Raise GrowkitError where some layers lack a parameter: an array is of all layers."""
    if found != wanted:
        raise GrowkitError(
            f"{found} of {wanted} layers have {row.name}, and a trainer checkpoint stores the "
            f"layers as one array; its layers are all alike"
        )


def _check_one_dtype(row: Row, parts: tuple[Recipe, ...]) -> None:
    """Raise GrowkitError if layers differ in dtype: they are stored as one array, which has one."""
    dtypes = sorted({str(part.dtype) for part in parts})
    if len(dtypes) > 1:
        raise GrowkitError(
            f"the layers of {row.name} have dtypes {' and '.join(dtypes)}, and a checkpoint stores "
            "them as one array; `growkit export SRC OUT --dtype float32` makes them the same"
        )


def write_checkpoint(path: Path, contents: Contents, progress: Progress | None = None) -> Findings:
    """Write `contents` at `path`, which must not exist, as a checkpoint that stock Orbax restores.

    The files that mark an item, and then the whole checkpoint, as finished come last. Returns what
    was found in the numbers.
    """
    begun = time.time_ns()
    record = {key: value for key, value in contents.record.items() if key not in COUNTERS}
    config = drop_code_keys(contents.config)[0]
    meta = {"config": config, "lineage": drop_hashes(contents.lineage), "record": record}
    arrays = collect_leaves(contents, read_config(contents.config, contents.lineage))
    path.mkdir()
    hashes, findings = _write_arrays(path / STATE, arrays, progress)
    meta[KEY] = state_hashes(hashes)
    files = select_carried(contents.files, TRAINERS)
    for item, value in ((META, meta), (FILES, encode_files(files))):
        (path / item).mkdir()
        (path / item / "metadata").write_text(json.dumps(value))
    # In Orbax's order, markers last: what was cut off on the way is not taken for finished.
    for item in (STATE, META, FILES):
        (path / item / COMMITTED).write_text(f"{item} is complete")
    (path / COMMITTED).write_text("all items are complete")
    described = {
        "item_handlers": HANDLERS,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": begun,
        "commit_timestamp_nsecs": time.time_ns(),
        "custom_metadata": {},
    }
    (path / FINISHED).write_text(json.dumps(described))
    return findings


def _write_arrays(
    state: Path, arrays: Mapping[tuple[str, ...], Leaf], progress: Progress | None
) -> tuple[dict[str, str], Findings]:
    """Write each array as one raw chunk in Zarr version 2, and Orbax's metadata of them all.

    Returns the hashes by array, and what was found in the numbers.
    """
    state.mkdir()
    with collect_jobs() as jobs:
        for keys, leaf in arrays.items():
            directory = state / ".".join(keys)
            directory.mkdir()
            (directory / ".zarray").write_text(json.dumps(describe_array(leaf.shape, leaf.dtype)))
            file = create_file(directory / name_chunk(leaf.shape), leaf.size)
            slot = keys[0] if keys[0] in SLOTS else ""
            jobs.append(Job(slot, ".".join(keys), leaf.recipes, file, 0))
        filled = fill(jobs, progress)
    (state / "_METADATA").write_text(json.dumps(describe_tree(arrays)))
    return {name: value for (_, name), value in filled.hashes.items()}, filled.findings
