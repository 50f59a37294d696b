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

import base64
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from growkit.checkpoint.carried import drop_code_keys, require_inside, select_carried
from growkit.checkpoint.files import read_json
from growkit.checkpoint.fill import Job, Progress, collect_jobs, create_file, fill
from growkit.checkpoint.hashes import KEY, Hashed, drop_hashes, read_stated, state_hashes
from growkit.checkpoint.numbers import Findings
from growkit.checkpoint.raw import Stamp, read_stamp
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
from growkit.errors import GrowkitError
from growkit.models import read_config
from growkit.models.architecture import Architecture
from growkit.models.notation import Position, Row

# The items of the composite.
STATE = "state"
META = "meta"
FILES = "files"
# Orbax writes this file last: a directory that holds it is a finished checkpoint.
FINISHED = "_CHECKPOINT_METADATA"
# In buckets, which have no rename, Orbax takes a directory for finished if it holds this file.
COMMITTED = "commit_success.txt"
COUNTERS = ("count", "step", "schedule_step")
# Files of the trainer's own, which stay among its checkpoints.
TRAINERS = ("history.csv",)
ORBAX_HANDLERS = "orbax.checkpoint._src.handlers"
HANDLERS = {
    FILES: f"{ORBAX_HANDLERS}.json_checkpoint_handler.JsonCheckpointHandler",
    META: f"{ORBAX_HANDLERS}.json_checkpoint_handler.JsonCheckpointHandler",
    STATE: f"{ORBAX_HANDLERS}.pytree_checkpoint_handler.PyTreeCheckpointHandler",
}
# Orbax's number for a key of a dict.
DICT_KEY = 2


def is_checkpoint(path: Path) -> bool:
    """Whether this is one of the trainer's checkpoints, finished or not."""
    return (path / FINISHED).is_file() or (path / STATE).is_dir()


@dataclass(frozen=True)
class Array:
    """A stored array: raw bytes in one file (`file`), or opened by tensorstore (`store`)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path | None = None
    store: Any = None
    stamp: Stamp | None = None

    def as_tensor(self, position: Position = ()) -> Tensor:
        """The whole array, or one unit of the stacked axes (a layer); only that unit is read."""
        shape = self.shape[len(position) :]
        if self.file is not None:
            units = self.shape[: len(position)]
            # C order: the units of the stacked axes lie one after another, each contiguous.
            unit = int(np.ravel_multi_index(position, units)) if position else 0
            offset = unit * math.prod(shape) * self.dtype.itemsize
            return open_raw(self.file, offset, shape, self.dtype, self.stamp)
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
        record = _read_record(meta)
        names = _list_arrays(tree)
        arrays = {name: _open_array(path / STATE, name, tree) for name in names}
        model = read_model(config, path, lineage if isinstance(lineage, list) else ())
        hashed = _find_hashes(path, meta, arrays)
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


def _read_record(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's position. Raises ValueError where it is none."""
    record: dict[str, Any] = dict(meta.get("record", {}).items())
    counters = [record[name] for name in COUNTERS if name in record]
    # They are written as int32.
    if not all(type(value) is int and abs(value) < 1 << 31 for value in counters):
        raise ValueError
    return record


def _read_counter(name: str, array: Array, path: Path) -> int:
    """The value of a counter. Raises GrowkitError for an array of several numbers."""
    if array.shape:
        raise GrowkitError(f"{path}: {name} must be one number, and has the shape {array.shape}")
    return int(array.as_tensor().read())


def _find_hashes(path: Path, meta: Mapping[str, Any], arrays: Mapping[str, Array]) -> Hashed | None:
    """The hashes on record of the arrays here, if there are any."""
    if KEY not in meta:
        return None
    algorithm, known = read_stated(meta[KEY], list(arrays), path / META / "metadata")
    return Hashed(algorithm, known, lambda name: arrays[name].as_tensor().read_bytes())


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
    dtype = _parse_dtype(header["dtype"])
    encoded = header["compressor"] is not None or header["filters"]
    # Fortran order and foreign byte order are left to tensorstore, which knows how to read them.
    native = header["order"] == "C" and dtype.isnative
    if encoded or not native or tuple(header["chunks"]) != shape:
        return _open_stored(state, name, tree)
    chunk = state / name / _chunk(shape)
    size = math.prod(shape) * dtype.itemsize
    found = 0
    stamp = None
    if chunk.exists():
        require_inside(state.parent, chunk)
        stamp = read_stamp(chunk)
        found = os.path.getsize(chunk)
    if found != size:
        raise GrowkitError(
            f"{chunk} is cut off: an array of {list(shape)} {dtype} takes {size} bytes, "
            f"the file has {found}"
        )
    return Array(shape, dtype, file=chunk, stamp=stamp)


def _open_stored(state: Path, name: str, tree: Mapping[str, Any]) -> Array:
    # Headers only; chunks are read when their rows are asked for.
    store = open_store(state, name, tree)
    return Array(tuple(store.shape), store.dtype.numpy_dtype, store=store)


def _chunk(shape: tuple[int, ...]) -> str:
    """The file name of an array's first (or only) chunk in Zarr version 2."""
    return ".".join("0" for _ in shape) or "0"


def _parse_dtype(name: str) -> np.dtype:
    """The dtype of numbers. Raises ValueError for others: raw bytes are not Python objects."""
    kind: Any = ml_dtypes.bfloat16 if name == "bfloat16" else name
    dtype: np.dtype[Any] = np.dtype(kind)
    if name != "bfloat16" and dtype.kind not in "fiu":
        raise ValueError(name)
    return dtype


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


def encode_files(files: Mapping[str, bytes]) -> dict[str, dict[str, str]]:
    """Small files as JSON: UTF-8 text as text, anything else in base64."""
    encoded = {}
    for name, content in files.items():
        # Text stays readable in the JSON, and as small as it is; base64 takes a third more.
        try:
            encoded[name] = {"text": content.decode()}
        except UnicodeDecodeError:
            encoded[name] = {"base64": base64.b64encode(content).decode()}
    return encoded


def decode_files(encoded: Mapping[str, Mapping[str, str]]) -> dict[str, bytes]:
    """The inverse of `encode_files`. Raises GrowkitError for a name that leaves its directory."""
    files = {}
    for name, entry in encoded.items():
        if name in ("", ".", "..") or "/" in name:
            raise GrowkitError(f"the checkpoint carries a file under a name that is none: {name!r}")
        if "text" in entry:
            files[name] = entry["text"].encode()
        else:
            files[name] = base64.b64decode(entry["base64"], validate=True)
    return files


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
            parts = tuple(recipes[name] for name in names)
            _check_one_dtype(row, parts)
            shape = row.stacked_sizes(model.sizes) + parts[0].shape
            found[(slot, *row.path)] = Leaf(shape, parts[0].dtype, parts)
    for name in COUNTERS:
        value = np.asarray(contents.record.get(name, 0), np.int32)
        found[(name,)] = Leaf((), value.dtype, (copy_tensor(wrap_array(value)),))
    return found


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
            (directory / ".zarray").write_text(json.dumps(_zarr_header(leaf)))
            file = create_file(directory / _chunk(leaf.shape), leaf.size)
            slot = keys[0] if keys[0] in SLOTS else ""
            jobs.append(Job(slot, ".".join(keys), leaf.recipes, file, 0))
        filled = fill(jobs, progress)
    (state / "_METADATA").write_text(json.dumps(_tree_metadata(arrays)))
    return {name: value for (_, name), value in filled.hashes.items()}, filled.findings


def _zarr_header(leaf: Leaf) -> dict[str, Any]:
    return {
        "chunks": leaf.shape,
        "compressor": None,
        "dimension_separator": ".",
        "dtype": "bfloat16" if leaf.dtype == ml_dtypes.bfloat16 else leaf.dtype.str,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": leaf.shape,
        "zarr_format": 2,
    }


def _tree_metadata(arrays: Mapping[tuple[str, ...], Leaf]) -> dict[str, Any]:
    """The metadata that Orbax's handler of trees writes for nested dicts of numpy arrays."""
    tree = {
        str(keys): {
            "key_metadata": [{"key": key, "key_type": DICT_KEY} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for keys in sorted(arrays)
    }
    options = {"use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    return {"tree_metadata": tree, **options, "custom_metadata": None}
