"""A written model as digests: what the golden record keeps of an output.

Reads Hugging Face directories and the trainer's checkpoints by the descriptions of their formats,
without the code under test.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

DIGITS = 16
# Stored dtypes by the names of numpy.
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NAMES |= {"<f8": "float64", "<f4": "float32", "<f2": "float16", "<i4": "int32"}
COUNTERS = ("count", "step", "schedule_step")
# Of a lineage entry, what does not depend on where the models lie and on growkit's version.
PLAIN = ("operation", "sizes", "moments", "noise", "seed", "function")
PLAIN += ("weights", "dtype", "multipliers")
HASHED = ("maps", "optimizer")


def digest(value: Any) -> str:
    """The first digits of the sha256 of bytes, or of a JSON value with sorted keys."""
    content = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def described(path: Path, carried: Collection[str]) -> dict[str, Any]:
    """All that is kept of an output; carried: the names of files that its source had beside it.

    {"tensors": {slot: {name: digest}}, "config", "lineage", "files"}, and of a checkpoint
    "counters" and "record" as well.
    """
    if (path / "config.json").exists():
        return _directory(path, carried)
    return _checkpoint(path, carried)


def _directory(path: Path, carried: Collection[str]) -> dict[str, Any]:
    tensors: dict[str, str] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= dict(_safetensors(file))
    beside = {name: (path / name).read_bytes() for name in carried if (path / name).exists()}
    lineage = json.loads((path / "lineage.json").read_text())
    return {
        "tensors": {"params": tensors},
        "config": json.loads((path / "config.json").read_text()),
        "lineage": entry_kept(lineage[-1]),
        "files": digest({name: content.hex() for name, content in beside.items()}),
    }


def _safetensors(path: Path) -> Iterator[tuple[str, str]]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        yield name, _tensor(entry["dtype"], entry["shape"], content[start:end])


def _tensor(dtype: str, shape: list[int], content: bytes) -> str:
    described = f"{NAMES.get(dtype, dtype)} {list(shape)} "
    return digest(described.encode() + content)


def _checkpoint(path: Path, carried: Collection[str]) -> dict[str, Any]:
    meta = json.loads((path / "meta" / "metadata").read_text())
    files = json.loads((path / "files" / "metadata").read_text())
    slots: dict[str, dict[str, str]] = {}
    for array in sorted((path / "state").iterdir()):
        if (array / ".zarray").exists() and array.name not in COUNTERS:
            slot, name = array.name.split(".", 1)
            slots.setdefault(slot, {})[name] = _tensor(*_zarr(array))
    return {
        "tensors": slots,
        "config": meta["config"],
        "lineage": entry_kept(meta["lineage"][-1]),
        "files": digest({name: files[name] for name in carried if name in files}),
        "counters": {name: _counter(path / "state" / name) for name in COUNTERS},
        "record": meta["record"],
    }


def _zarr(path: Path) -> tuple[str, list[int], bytes]:
    """(dtype, shape, bytes) of an array in Zarr version 2 that is one uncompressed chunk."""
    header = json.loads((path / ".zarray").read_text())
    shape = header["shape"]
    if header["compressor"] is not None or header["chunks"] != shape or header["order"] != "C":
        raise ValueError(f"{path} is not one uncompressed chunk")
    chunk = ".".join("0" for _ in shape) or "0"
    return header["dtype"], shape, (path / chunk).read_bytes()


def _counter(path: Path) -> int:
    dtype, shape, content = _zarr(path)
    if dtype != "<i4" or math.prod(shape) != 1:
        raise ValueError(f"{path} is no int32 counter: {dtype} {shape}")
    return int.from_bytes(content, "little", signed=True)


def entry_kept(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A lineage entry without paths, fingerprints and words; its long sections as digests."""
    plain = {name: entry[name] for name in PLAIN if name in entry}
    return plain | {name: digest(entry[name]) for name in HASHED if name in entry}


def combined(tensors: Mapping[str, str]) -> str:
    """One digest of all tensors of a slot."""
    return digest(dict(tensors))
