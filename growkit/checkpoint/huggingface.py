"""Hugging Face directories: config.json, safetensors files with or without an index, small files.

Reading takes the headers alone, by the safetensors format (8 bytes of length, a JSON header, raw
bytes). Writing makes the same in shards, with the index last.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from growkit.checkpoint.files import encode_json, read_json
from growkit.checkpoint.naming import name_tensors
from growkit.checkpoint.output import Job, Progress, create_file, fill
from growkit.checkpoint.tensor import Contents, Recipe, Source, Tensor, open_raw, read_model
from growkit.errors import GrowkitError

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
LINEAGE = "lineage.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Integers and booleans occur in the buffers of old checkpoints only, which are not read.
BUFFER_DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
# Bytes of tensors in one file, unless told otherwise.
SHARD = 5_000_000_000
# Tokenizers are well below this. Anything larger is data or weights, and is read into memory.
CARRIED_LIMIT = 100_000_000
HEADER_LIMIT = 100_000_000
# Weights in other formats are not carried along: they would be the old model's.
WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".ot",
    ".npz",
    ".pkl",
    ".pickle",
    ".tflite",
)
# Files that growkit writes itself.
OWN = ("config.json", LINEAGE)


def is_directory(path: Path) -> bool:
    """Whether this looks like a Hugging Face directory."""
    return (path / "config.json").is_file()


def open_directory(path: Path) -> Source:
    """Open a Hugging Face directory; reads config.json and the headers of the weight files.

    Raises GrowkitError naming the file at fault.
    """
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise GrowkitError(f"{path / 'config.json'} is not a JSON object")
    files = _list_weight_files(path)
    model = read_model(config, path)
    tensors = _read_headers(path, files, model.buffers)
    named = name_tensors(tensors, model, config, path)
    lineage = path / LINEAGE
    return Source(
        path=path,
        kind="huggingface",
        config=config | named.config,
        tensors={"params": named.tensors},
        weights=files,
        lineage=read_json(lineage) if lineage.exists() else [],
        record={},
        read_files=lambda: _read_small_files(path),
        known_model=named.model,
        notes=named.notes,
    )


def _list_weight_files(path: Path) -> list[Path]:
    """The files that transformers would read: the whole file, else the shards of the index.

    With neither, every safetensors file of the directory.
    """
    if (path / WHOLE).exists():
        return [path / WHOLE]
    if (path / INDEX).exists():
        return _list_shards(path)
    files = sorted(path.glob("*.safetensors"))
    if files:
        return files
    hint = ""
    others = sorted(file.name for file in path.iterdir() if file.suffix in WEIGHTS)
    if others:
        hint = f"; it has {others[0]}: save it from transformers as safetensors first"
    raise GrowkitError(f"{path} has a config.json but no .safetensors file{hint}")


def _list_shards(path: Path) -> list[Path]:
    """The files that the index names. Raises GrowkitError for a broken index or a missing file."""
    index = path / INDEX
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise GrowkitError(f"{index} has no weight_map of tensor names to file names")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise GrowkitError(f"{index} has no weight_map of tensor names to file names")
    files = [path / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise GrowkitError(f"{index} names the shard {file.name!r}, which is not there")
    return files


def _read_headers(path: Path, files: list[Path], buffers: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of all weight files. Raises GrowkitError for a tensor that is there twice."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = read_header(file, buffers)
        twice = tensors.keys() & found.keys()
        if twice:
            raise GrowkitError(
                f"{path} holds the tensor {min(twice)!r} twice, the second time in {file.name}"
            )
        tensors |= found
    _check_index(path, files, tensors)
    return tensors


def _check_index(path: Path, files: list[Path], tensors: dict[str, Tensor]) -> None:
    """Raise GrowkitError if the index, where it was used, names a tensor that no shard holds."""
    index = path / INDEX
    if files == [path / WHOLE] or not index.exists():
        return
    missing = set(read_json(index)["weight_map"]) - set(tensors)
    if missing:
        raise GrowkitError(f"{index} names the tensor {min(missing)!r}, which no shard holds")


def read_header(path: Path, buffers: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors of one safetensors file, by name.

    buffers: how names end that may hold integers or booleans, because no model reads them.
    Raises GrowkitError where header and file disagree.
    """
    total = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(HEADER_LIMIT, total - 8):
            raise GrowkitError(
                f"{path} is not a safetensors file or is cut off: its first 8 bytes announce a "
                f"header of {length} bytes, the file has {total}"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise GrowkitError(
            f"{path} has a garbled safetensors header: {length} bytes that are not JSON"
        ) from None
    if not isinstance(header, dict):
        raise GrowkitError(f"{path} has a garbled safetensors header: it is not a JSON object")
    header.pop("__metadata__", None)
    data = _Data(path, 8 + length, total, buffers)
    return {name: data.open_tensor(name, entry) for name, entry in header.items()}


@dataclass(frozen=True)
class _Data:
    """The part of a safetensors file after its header, which begins at byte `base` of `total`."""

    path: Path
    base: int
    total: int
    buffers: tuple[str, ...]

    def open_tensor(self, name: str, entry: Any) -> Tensor:
        """The tensor of one header entry. Raises GrowkitError if the entry cannot be right."""
        kind, shape, start, end = self._parse(name, entry)
        dtype = DTYPES.get(kind)
        if dtype is None and name.endswith(self.buffers):
            dtype = BUFFER_DTYPES.get(kind)
        if dtype is None:
            known = ", ".join(DTYPES)
            raise GrowkitError(
                f"{self.path}: the tensor {name!r} has dtype {kind}, and growkit reads {known}"
            )
        size = math.prod(shape) * dtype.itemsize
        if end - start != size:
            raise GrowkitError(
                f"{self.path}: the tensor {name!r} of shape {list(shape)} and dtype {kind} takes "
                f"{size} bytes, its header says {end - start}"
            )
        if self.base + end > self.total:
            raise GrowkitError(
                f"{self.path} is cut off: the tensor {name!r} ends at byte {self.base + end}, "
                f"the file has {self.total}"
            )
        return open_raw(self.path, self.base + start, shape, dtype)

    def _parse(self, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
        """(dtype, shape, first byte, last byte) of an entry."""
        try:
            kind = entry["dtype"]
            shape = tuple(entry["shape"])
            start, end = entry["data_offsets"]
            numbers = (*shape, start, end)
            if not all(isinstance(number, int) and number >= 0 for number in numbers):
                raise ValueError
            return str(kind), shape, start, end
        except (TypeError, KeyError, ValueError):
            raise GrowkitError(
                f"{self.path} has a garbled safetensors header at the tensor {name!r}"
            ) from None


def _read_small_files(path: Path) -> dict[str, bytes]:
    """The files to carry along: small ones at the top that hold no weights."""
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if _is_carried(file)}


def _is_carried(file: Path) -> bool:
    if not file.is_file() or file.name.startswith(".") or file.name in OWN:
        return False
    if file.name.endswith(WEIGHTS) or ".index." in file.name:
        return False
    return file.stat().st_size <= CARRIED_LIMIT


def write_directory(
    path: Path, contents: Contents, progress: Progress | None = None, shard: int = SHARD
) -> None:
    """Write the params of `contents` as a Hugging Face directory at `path`, which must not exist.

    shard: the most bytes of tensors in one file (a larger tensor gets a file of its own).
    """
    path.mkdir()
    recipes = contents.recipes["params"]
    weight_map = _write_shards(path, recipes, shard, progress)
    for name, content in contents.files.items():
        (path / name).write_bytes(content)
    (path / "config.json").write_bytes(encode_json(contents.config))
    (path / LINEAGE).write_bytes(encode_json(contents.lineage))
    if len(set(weight_map.values())) > 1:
        total = sum(recipe.size for recipe in recipes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / INDEX).write_bytes(encode_json(index))


def _write_shards(
    path: Path, recipes: dict[str, Recipe], limit: int, progress: Progress | None
) -> dict[str, str]:
    """Write all weight files; returns the file of each tensor."""
    shards = _split_into_shards(recipes, limit)
    weight_map: dict[str, str] = {}
    jobs: list[Job] = []
    try:
        for number, names in enumerate(shards, 1):
            file_name = WHOLE
            if len(shards) > 1:
                file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map |= dict.fromkeys(names, file_name)
            jobs += _begin_shard(path / file_name, {name: recipes[name] for name in names})
        fill(jobs, progress)
    finally:
        for file in {job.file for job in jobs}:
            os.close(file)
    return weight_map


def _split_into_shards(recipes: dict[str, Recipe], limit: int) -> list[list[str]]:
    """The names of the tensors of each file, in order, at most `limit` bytes a file."""
    shards: list[list[str]] = [[]]
    room = limit
    for name, recipe in recipes.items():
        if shards[-1] and recipe.size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= recipe.size
    return shards


def _begin_shard(path: Path, recipes: dict[str, Recipe]) -> list[Job]:
    """Reserve the file, write its header, and return the jobs that fill it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    offset = 0
    for name, recipe in recipes.items():
        offsets[name] = offset
        header[name] = {
            "dtype": NAMES[recipe.dtype],
            "shape": list(recipe.shape),
            "data_offsets": [offset, offset + recipe.size],
        }
        offset += recipe.size
    text = json.dumps(header, separators=(",", ":")).encode()
    # Data begins at a multiple of 8 bytes, so that every dtype is aligned in a mapped file.
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    file = create_file(path, base + offset)
    os.pwrite(file, struct.pack("<Q", len(text)) + text, 0)
    return [Job(recipe, file, base + offsets[name]) for name, recipe in recipes.items()]
