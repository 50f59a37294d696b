"""Hugging Face directories: config.json, safetensors files with or without an index, and what lies beside.

Reads headers only, by the arithmetic of the safetensors format (8 bytes of length, a JSON header, raw
bytes), and writes the same in shards, the index last. Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from growkit.checkpoint.files import encode_json, read_json
from growkit.checkpoint.output import Job, Progress, create_file, fill
from growkit.checkpoint.tensor import Contents, Recipe, Source, Tensor, open_raw
from growkit.errors import GrowkitError
from growkit.models import FAMILIES

INDEX = "model.safetensors.index.json"
LINEAGE = "lineage.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Integer and boolean tensors are buffers of old checkpoints; they are named and passed over.
BUFFER_DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD = 5_000_000_000
WHOLE = "model.safetensors"
# Tokenizers stay well below this; what is larger is data or weights, and would be held in memory.
CARRIED_LIMIT = 100_000_000
HEADER_LIMIT = 100_000_000
# Weights in any format: carried along they would be the old model.
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
OWN = ("config.json", LINEAGE)


def is_directory(path: Path) -> bool:
    """Whether this looks like a Hugging Face directory."""
    return (path / "config.json").is_file()


def open_directory(path: Path) -> Source:
    """Open a Hugging Face directory; reads config.json and headers. Raises GrowkitError naming the file at fault."""
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise GrowkitError(f"{path / 'config.json'} is not a JSON object")
    files = _weight_files(path)
    tensors: dict[str, Tensor] = {}
    family = FAMILIES.get(str(config.get("model_type")))
    buffers = family.buffers if family else ()
    for file in files:
        found = read_header(file, buffers)
        if twice := tensors.keys() & found.keys():
            raise GrowkitError(
                f"{path} holds the tensor {min(twice)!r} twice, the second time in {file.name}"
            )
        tensors |= found
    _check_index(path, files, tensors)
    return Source(
        path=path,
        kind="huggingface",
        config=config,
        tensors={"params": tensors},
        weights=files,
        lineage=read_json(path / LINEAGE) if (path / LINEAGE).exists() else [],
        record={},
        read_files=lambda: _carried(path),
    )


def _weight_files(path: Path) -> list[Path]:
    """The files that transformers would read: the whole one, else the index's shards, else all there are."""
    index = path / INDEX
    if (path / WHOLE).exists():
        return [path / WHOLE]
    if not index.exists():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            others = sorted(file.name for file in path.iterdir() if file.suffix in WEIGHTS)
            hint = (
                f"; it has {others[0]}: save it from transformers as safetensors first"
                if others
                else ""
            )
            raise GrowkitError(f"{path} has a config.json but no .safetensors file{hint}")
        return files
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise GrowkitError(f"{index} has no weight_map of tensor names to file names")
    files = [path / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise GrowkitError(f"{index} names the shard {file.name!r}, which is not there")
    return files


def _check_index(path: Path, files: list[Path], tensors: dict[str, Tensor]) -> None:
    index = path / INDEX
    indexed = index.exists() and files != [path / WHOLE]
    missing = set(read_json(index)["weight_map"]) - set(tensors) if indexed else set()
    if missing:
        raise GrowkitError(f"{index} names the tensor {min(missing)!r}, which no shard holds")


def read_header(path: Path, buffers: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors of one safetensors file, by name.

    buffers: how the names of tensors end that may be whole numbers. Raises GrowkitError where header and file
    disagree.
    """
    total = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(HEADER_LIMIT, total - 8):
            raise GrowkitError(
                f"{path} is not a safetensors file or is cut off: its first 8 bytes announce a header of {length} "
                f"bytes, the file has {total}"
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise GrowkitError(
                f"{path} has a garbled safetensors header: {length} bytes that are not JSON"
            ) from None
    if not isinstance(header, dict):
        raise GrowkitError(f"{path} has a garbled safetensors header: it is not a JSON object")
    header.pop("__metadata__", None)
    return {
        name: _tensor(path, name, entry, 8 + length, total, buffers)
        for name, entry in header.items()
    }


def _tensor(
    path: Path, name: str, entry: Any, base: int, total: int, buffers: tuple[str, ...]
) -> Tensor:
    try:
        kind, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)):
            raise ValueError
        size = math.prod(shape)
    except (TypeError, KeyError, ValueError):
        raise GrowkitError(
            f"{path} has a garbled safetensors header at the tensor {name!r}"
        ) from None
    dtype = (DTYPES | (BUFFER_DTYPES if name.endswith(buffers) else {})).get(kind)
    if dtype is None:
        raise GrowkitError(
            f"{path}: the tensor {name!r} has dtype {kind}, and growkit reads {', '.join(DTYPES)}"
        )
    if end - start != size * dtype.itemsize:
        raise GrowkitError(
            f"{path}: the tensor {name!r} of shape {list(shape)} and dtype {kind} takes {size * dtype.itemsize} bytes, "
            f"its header says {end - start}"
        )
    if base + end > total:
        raise GrowkitError(
            f"{path} is cut off: the tensor {name!r} ends at byte {base + end}, the file has {total}"
        )
    return open_raw(path, base + start, shape, dtype)


def _carried(path: Path) -> dict[str, bytes]:
    """The small files to carry along: everything at the top that holds no weights and that is not rewritten."""
    return {
        file.name: file.read_bytes()
        for file in sorted(path.iterdir())
        if file.is_file()
        and not file.name.startswith(".")
        and file.name not in OWN
        and not file.name.endswith(WEIGHTS)
        and ".index." not in file.name
        and file.stat().st_size <= CARRIED_LIMIT
    }


def write_directory(
    path: Path, contents: Contents, progress: Progress | None = None, shard: int = SHARD
) -> None:
    """Write a Hugging Face directory of `contents`' params at `path`, which must not exist; the index comes last.

    shard: bytes of tensors a file holds at most (one larger tensor gets a file of its own).
    """
    path.mkdir()
    recipes = contents.recipes["params"]
    shards = _shards(recipes, shard)
    weight_map: dict[str, str] = {}
    jobs: list[Job] = []
    try:
        for number, names in enumerate(shards, 1):
            many = f"model-{number:05}-of-{len(shards):05}.safetensors"
            name = WHOLE if len(shards) == 1 else many
            weight_map |= dict.fromkeys(names, name)
            jobs += _begin_shard(path / name, {tensor: recipes[tensor] for tensor in names})
        fill(jobs, progress)
    finally:
        for file in {job.file for job in jobs}:
            os.close(file)
    for name, content in contents.files.items():
        (path / name).write_bytes(content)
    # transformers 4 reads torch_dtype, 5 reads dtype.
    dtype = str(next(iter(recipes.values())).dtype)
    (path / "config.json").write_bytes(
        encode_json(contents.config | {"torch_dtype": dtype, "dtype": dtype})
    )
    (path / LINEAGE).write_bytes(encode_json(contents.lineage))
    if len(shards) > 1:
        total = sum(recipe.size for recipe in recipes.values())
        (path / INDEX).write_bytes(
            encode_json({"metadata": {"total_size": total}, "weight_map": weight_map})
        )


def _shards(recipes: dict[str, Recipe], limit: int) -> list[list[str]]:
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
    offset = 0
    for name, recipe in recipes.items():
        header[name] = {
            "dtype": NAMES[recipe.dtype],
            "shape": list(recipe.shape),
            "data_offsets": [offset, offset + recipe.size],
        }
        offset += recipe.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file = create_file(path, 8 + len(text) + offset)
    os.pwrite(file, struct.pack("<Q", len(text)) + text, 0)
    base = 8 + len(text)
    return [
        Job(recipe, file, base + header[name]["data_offsets"][0])
        for name, recipe in recipes.items()
    ]
