"""The trainer's checkpoints: an Orbax composite of `state` (arrays), `meta` and `files` (JSON).

    CHECKPOINT/state/params.layers.attention.dense.weight/{.zarray,0.0.0}   raw, one directory an array
    CHECKPOINT/meta/metadata      {"config", "lineage", "record"}
    CHECKPOINT/files/metadata     tokenizer and other small files, by name

Layers are stacked in the first dimension. To readers each layer is a tensor of its own, under its name in
files. Uncompressed whole arrays are read by offset, without orbax or jax; anything else (sharded,
compressed, OCDBT) through tensorstore. Written is, without either, what Orbax would write of the same arrays,
which a test compares. Knows the layout on disk; leaves meaning to the table and runs to the trainer.
"""

from __future__ import annotations

import base64
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from growkit.checkpoint.files import read_json
from growkit.checkpoint.output import Job, Progress, create_file, fill
from growkit.checkpoint.tensor import (
    SLOTS,
    Contents,
    Recipe,
    Source,
    Tensor,
    copy_tensor,
    open_raw,
    wrap_array,
)
from growkit.errors import GrowkitError
from growkit.models import read_config
from growkit.models.architecture import Architecture
from growkit.models.notation import Position, Row

STATE, META, FILES = "state", "meta", "files"
# Bytes of decoded chunks that are kept, so that a chunk of several blocks or layers is decoded once.
CACHED = 32 << 20
COUNTERS = ("count", "step", "schedule_step")
# What buckets have in place of a rename: Orbax takes a directory there for finished once it holds this.
COMMITTED = "commit_success.txt"
ORBAX_HANDLERS = "orbax.checkpoint._src.handlers"
HANDLERS = {
    FILES: f"{ORBAX_HANDLERS}.json_checkpoint_handler.JsonCheckpointHandler",
    META: f"{ORBAX_HANDLERS}.json_checkpoint_handler.JsonCheckpointHandler",
    STATE: f"{ORBAX_HANDLERS}.pytree_checkpoint_handler.PyTreeCheckpointHandler",
}


def is_checkpoint(path: Path) -> bool:
    """Whether this is one of the trainer's checkpoints, finished or not."""
    return (path / "_CHECKPOINT_METADATA").is_file() or (path / STATE).is_dir()


@dataclass(frozen=True)
class Array:
    """A stored array: raw bytes in one file (`file`), or whatever tensorstore makes of it (`store`)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path | None = None
    store: Any = None

    def as_tensor(self, position: Position = ()) -> Tensor:
        """All of it, or one unit of the stacked axes; no more than the unit is ever read."""
        shape = self.shape[len(position) :]
        if self.file is not None:
            units = self.shape[: len(position)]
            unit = int(np.ravel_multi_index(position, units)) if position else 0
            offset = unit * math.prod(shape) * self.dtype.itemsize
            return open_raw(self.file, offset, shape, self.dtype)
        part = self.store[position] if position else self.store
        chunk = self.store.chunk_layout.read_chunk.shape or ()
        stride = next(iter(chunk[len(self.shape) - len(shape) :]), 1)

        def rows(start: int, stop: int) -> np.ndarray:
            return _read_store(part[start:stop] if shape else part)

        return Tensor(shape, self.dtype, rows, stride=stride)


def _read_store(part: Any) -> np.ndarray:
    try:
        return np.asarray(part.read().result())
    except ValueError as problem:
        raise GrowkitError(
            f"cannot read an array of the checkpoint: {str(problem).splitlines()[0]}"
        ) from None


def open_checkpoint(path: Path) -> Source:
    """Open a trainer checkpoint. Raises GrowkitError naming the file at fault."""
    meta = read_json(path / META / "metadata")
    described = read_json(path / STATE / "_METADATA")
    try:
        names = _leaf_names(described)
        config, lineage, record = meta["config"], meta.get("lineage", []), meta.get("record", {})
        arrays = {name: _open_array(path / STATE, name, described) for name in names}
        model = read_config(config)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise GrowkitError(
            f"{path} is an Orbax checkpoint, but not one of growkit's trainer"
        ) from None
    except GrowkitError as problem:
        raise GrowkitError(f"{path}: {problem}") from None
    slots = [
        slot
        for slot in SLOTS
        if slot == "params" or any(name.startswith(f"{slot}.") for name in arrays)
    ]
    counters = {name: int(arrays[name].as_tensor().read()) for name in COUNTERS if name in arrays}
    return Source(
        path=path,
        kind="checkpoint",
        config=config,
        tensors={slot: _by_layer(arrays, slot, model) for slot in slots},
        weights=sorted({array.file for array in arrays.values() if array.file}),
        lineage=lineage,
        record=record | counters,
        read_files=lambda: decode_files(read_json(path / FILES / "metadata")),
    )


def _leaf_names(described: Mapping[str, Any]) -> list[str]:
    entries = described["tree_metadata"].values()
    return [".".join(str(key["key"]) for key in entry["key_metadata"]) for entry in entries]


def _open_array(state: Path, name: str, described: Mapping[str, Any]) -> Array:
    """One stored array. Raw where it is one uncompressed chunk, else through tensorstore."""
    if described.get("use_ocdbt") or described.get("use_zarr3"):
        return _through_tensorstore(state, name, described)
    header = read_json(state / name / ".zarray")
    shape, dtype = tuple(header["shape"]), _dtype(header["dtype"])
    chunk = state / name / _chunk(shape)
    plain = (
        header["compressor"] is None
        and not header["filters"]
        and header["order"] == "C"
        and dtype.isnative
    )
    if not plain or tuple(header["chunks"]) != shape:
        return _through_tensorstore(state, name, described)
    size = math.prod(shape) * dtype.itemsize
    found = os.path.getsize(chunk) if chunk.exists() else 0
    if found != size:
        raise GrowkitError(
            f"{chunk} is cut off: an array of {list(shape)} {dtype} takes {size} bytes, the file has {found}"
        )
    return Array(shape, dtype, file=chunk)


def _chunk(shape: tuple[int, ...]) -> str:
    """The file of an array's first, or only, chunk in Zarr version 2."""
    return ".".join("0" for _ in shape) or "0"


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _through_tensorstore(state: Path, name: str, described: Mapping[str, Any]) -> Array:
    import tensorstore

    store: dict[str, Any] = {"driver": "file", "path": f"{state.resolve()}/"}
    store = (
        {"driver": "ocdbt", "base": store, "path": f"{name}/"}
        if described.get("use_ocdbt")
        else (store | {"path": f"{state.resolve()}/{name}/"})
    )
    driver = "zarr3" if described.get("use_zarr3") else "zarr"
    try:
        array = tensorstore.open(
            {"driver": driver, "kvstore": store}, read=True, context=_cache()
        ).result()
    except ValueError as problem:
        raise GrowkitError(
            f"cannot read the array {name!r} of {state}: {str(problem).splitlines()[0]}"
        ) from None
    return Array(tuple(array.shape), array.dtype.numpy_dtype, store=array)


@cache
def _cache() -> Any:
    import tensorstore

    return tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHED}})


def _by_layer(arrays: Mapping[str, Array], slot: str, model: Architecture) -> dict[str, Tensor]:
    """One tensor a layer, under its name in files. Arrays that no row covers are an error."""
    rows = {".".join((slot, *row.path)): row for row in model.table.rows}
    tensors: dict[str, Tensor] = {}
    for name, array in arrays.items():
        if name.startswith(f"{slot}."):
            row = rows.get(name) or _refuse(name, rows)
            for position in product(*(range(size) for size in array.shape[: len(row.stacked)])):
                tensors[row.name_at(position)] = array.as_tensor(position)
    return tensors


def _refuse(name: str, rows: Mapping[str, Row]) -> Row:
    raise GrowkitError(
        f"no row of the axis table covers the array {name!r}; the rows are {', '.join(rows)}"
    )


def encode_files(files: Mapping[str, bytes]) -> dict[str, dict[str, str]]:
    """Small files as JSON: text as text, anything else in base64."""
    encoded = {}
    for name, content in files.items():
        try:
            encoded[name] = {"text": content.decode()}
        except UnicodeDecodeError:
            encoded[name] = {"base64": base64.b64encode(content).decode()}
    return encoded


def decode_files(encoded: Mapping[str, Mapping[str, str]]) -> dict[str, bytes]:
    """The inverse of `encode_files`. Raises GrowkitError for a name that would lead out of a directory."""
    for name in encoded:
        if name in ("", ".", "..") or "/" in name:
            raise GrowkitError(f"the checkpoint carries a file under a name that is none: {name!r}")
    return {
        name: entry["text"].encode() if "text" in entry else base64.b64decode(entry["base64"])
        for name, entry in encoded.items()
    }


@dataclass(frozen=True)
class Leaf:
    """An array of one recipe a layer (or a single one), laid end to end."""

    shape: tuple[int, ...]
    dtype: np.dtype
    recipes: tuple[Recipe, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def collect_leaves(contents: Contents, model: Architecture) -> dict[tuple[str, ...], Leaf]:
    """Every array of an output, by its path in the tree: slots of stacked arrays, and the counters."""
    found: dict[tuple[str, ...], Leaf] = {}
    for slot, recipes in contents.recipes.items():
        for row in model.table.rows:
            parts = tuple(
                recipes[row.name_at(position)] for position in row.positions(model.sizes)
            )
            _check_one_dtype(row, parts)
            shape = row.stacked_sizes(model.sizes) + parts[0].shape
            found[(slot, *row.path)] = Leaf(shape, parts[0].dtype, parts)
    for name in COUNTERS:
        value = np.asarray(contents.record.get(name, 0), np.int32)
        found[(name,)] = Leaf((), value.dtype, (copy_tensor(wrap_array(value)),))
    return found


def _check_one_dtype(row: Row, parts: tuple[Recipe, ...]) -> None:
    """Layers are laid end to end in one array, which has one dtype."""
    dtypes = sorted({str(part.dtype) for part in parts})
    if len(dtypes) > 1:
        raise GrowkitError(
            f"the layers of {row.name} have dtypes {' and '.join(dtypes)}, and a checkpoint stores them as one array; "
            f"`growkit export SRC OUT --dtype float32` makes them the same"
        )


def write_checkpoint(path: Path, contents: Contents, progress: Progress | None = None) -> None:
    """Write `contents` at `path`, which must not exist, as a trainer checkpoint that stock Orbax restores.

    What says that an item, and then the whole, is complete comes last.
    """
    begun = time.time_ns()
    record = {key: value for key, value in contents.record.items() if key not in COUNTERS}
    about = {"config": contents.config, "lineage": contents.lineage, "record": record}
    arrays = collect_leaves(contents, read_config(contents.config))
    path.mkdir()
    _write_arrays(path / STATE, arrays, progress)
    for item, value in ((META, about), (FILES, encode_files(contents.files))):
        (path / item).mkdir()
        (path / item / "metadata").write_text(json.dumps(value))
    for item in (STATE, META, FILES):
        (path / item / COMMITTED).write_text(f"{item} is complete")
    (path / COMMITTED).write_text("all items are complete")
    stamps = {"init_timestamp_nsecs": begun, "commit_timestamp_nsecs": time.time_ns()}
    described = {
        "item_handlers": HANDLERS,
        "metrics": {},
        "performance_metrics": {},
        **stamps,
        "custom_metadata": {},
    }
    (path / "_CHECKPOINT_METADATA").write_text(json.dumps(described))


def _write_arrays(
    state: Path, arrays: Mapping[tuple[str, ...], Leaf], progress: Progress | None
) -> None:
    """Every array as one raw chunk in Zarr version 2, in a directory of its own, and what Orbax says of them all."""
    state.mkdir()
    jobs: list[Job] = []
    try:
        for keys, leaf in arrays.items():
            directory = state / ".".join(keys)
            directory.mkdir()
            (directory / ".zarray").write_text(json.dumps(_zarr_header(leaf)))
            file, part = (
                create_file(directory / _chunk(leaf.shape), leaf.size),
                leaf.size // len(leaf.recipes),
            )
            jobs.extend(
                Job(recipe, file, number * part) for number, recipe in enumerate(leaf.recipes)
            )
        fill(jobs, progress)
    finally:
        for file in {job.file for job in jobs}:
            os.close(file)
    (state / "_METADATA").write_text(json.dumps(_tree_metadata(arrays)))


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
    """What Orbax's handler of trees writes of nested dicts of numpy arrays; 2 is its type of a dict's key."""
    tree = {
        str(keys): {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for keys in sorted(arrays)
    }
    options = {"use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    return {"tree_metadata": tree, **options, "custom_metadata": None}
