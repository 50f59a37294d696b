"""Hashes of what is stored: made as it is written, compared before it is used.

    "hashes": {"algorithm": "xxh3_64",
               "arrays": {"params.layers.attention.dense.weight": "0123456789abcdef", ...},
               "files": {"tokenizer.json": "...", ...},
               "meta": "..."}

An array's hash is of its bytes in C order, little endian, all layers of it together. In a trainer
checkpoint hashes stand in meta/metadata, by the array's name in `state`; a file's is of its bytes
as they are after decoding, the meta's of its other entries as JSON with sorted keys. In a Hugging
Face directory they stand in the last entry of lineage.json, by the tensor's name. XXH3
(https://xxhash.com) takes 17 to 34 GB/s on one core, zlib's crc32 3 to 7: against writing it costs
nothing. It finds damage, not forgery.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from growkit.checkpoint.abreast import map_abreast
from growkit.errors import GrowkitError
from growkit.forms import take_object, take_text

KEY = "hashes"
HASHES = KEY
ALGORITHM = "xxh3_64"
# What hashes may be of; all of them are in the package xxhash.
ALGORITHMS = ("xxh3_64", "xxh3_128", "xxh64", "xxh32")
# Bytes read at once.
PIECE = 1 << 20


class Finish(Protocol):
    """The hash of an array that is hashed as it is read; the rest of it is read by the call."""

    @property
    def was_read(self) -> bool: ...

    def __call__(self) -> str: ...


class Hasher(Protocol):
    """What hashlib and xxhash call a hash object."""

    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


def begin_hash(algorithm: str = ALGORITHM) -> Hasher:
    """A hash that nothing was put into yet."""
    import xxhash

    hasher: Hasher = getattr(xxhash, algorithm)()
    return hasher


def hash_bytes(data: Any, algorithm: str = ALGORITHM) -> str:
    """The hash of bytes, or of the memory of a contiguous array."""
    hasher = begin_hash(algorithm)
    hasher.update(data)
    return hasher.hexdigest()


def hash_file(file: int, offset: int, size: int, algorithm: str = ALGORITHM) -> str:
    """The hash of `size` bytes at `offset` of an open file."""
    hasher = begin_hash(algorithm)
    done = 0
    while done < size:
        data = os.pread(file, min(PIECE, size - done), offset + done)
        # A file that is too short gets another hash, which is what tells.
        if not data:
            break
        hasher.update(data)
        done += len(data)
    return hasher.hexdigest()


def state_hashes(arrays: Mapping[str, str]) -> dict[str, Any]:
    """The value of the key "hashes", from hashes by the array's name."""
    return {"algorithm": ALGORITHM, "arrays": dict(sorted(arrays.items()))}


def state_in_lineage(lineage: Sequence[Any], arrays: Mapping[str, str]) -> list[Any]:
    """The lineage with the hashes in its last entry, and in no other: they are of these tensors."""
    entries = drop_hashes(lineage)
    if entries and isinstance(entries[-1], dict):
        entries[-1] = entries[-1] | {KEY: state_hashes(arrays)}
    return entries


def drop_hashes(lineage: Sequence[Any]) -> list[Any]:
    """The lineage without hashes, which are of tensors that lie elsewhere now."""
    return [
        {key: value for key, value in entry.items() if key != KEY}
        if isinstance(entry, dict)
        else entry
        for entry in lineage
    ]


@dataclass(frozen=True)
class Hashed:
    """Arrays whose hashes are on record.

    arrays: name -> hash. read: the bytes of an array by its name, a part at a time. find_other:
    what differs of all else that has a hash, in words. finish: name -> what makes the hash, for
    arrays that are hashed as they are read.
    """

    algorithm: str
    arrays: Mapping[str, str]
    read: Callable[[str], Iterator[Any]]
    find_other: Callable[[], str | None] = lambda: None
    finish: Mapping[str, Finish] = field(default_factory=dict)

    def find_changed(
        self, progress: Callable[[int], None] = lambda done: None, used: bool = False
    ) -> list[str]:
        """The arrays whose bytes have another hash than the one on record, sorted.

        used: leave out arrays of which nothing was read. Raises GrowkitError for hashes that this
        version cannot compute.
        """
        require_known(self.algorithm)

        def has_changed(name: str) -> bool:
            if name in self.finish:
                return self.finish[name]() != self.arrays[name]
            hasher = begin_hash(self.algorithm)
            for part in self.read(name):
                hasher.update(part)
                progress(len(part))
            return hasher.hexdigest() != self.arrays[name]

        names = sorted(name for name in self.arrays if not used or self._is_used(name))
        # xxhash and reading let go of Python's lock, so threads run side by side.
        changed = map_abreast(has_changed, names)
        return [name for name, differs in zip(names, changed, strict=True) if differs]

    def _is_used(self, name: str) -> bool:
        """Whether an array was read, or may have been: of some nobody keeps count."""
        return name not in self.finish or self.finish[name].was_read


def require_known(algorithm: str) -> None:
    """Raise GrowkitError for an algorithm that this version cannot compute."""
    if algorithm not in ALGORITHMS:
        raise GrowkitError(
            f"the hashes on record are of {algorithm[:80]!r}, and this version of growkit computes "
            f"{', '.join(ALGORITHMS)}; --no-verify uses what is there without comparing"
        )


def check_stated(stated: Any, where: object) -> Mapping[str, Any]:
    """The value of the key "hashes". Raises GrowkitError where it is none."""
    try:
        take_text(stated, "algorithm")
        for name in ("arrays", "files"):
            if name == "arrays" or name in stated:
                hashes = take_object(stated, name)
                for each in hashes:
                    take_text(hashes, each)
    except (KeyError, TypeError, ValueError):
        raise GrowkitError(
            f'{where}: "hashes" must hold an algorithm and hashes by array'
        ) from None
    known: Mapping[str, Any] = stated
    return known


def read_stated(stated: Any, known: Sequence[str], where: object) -> tuple[str, dict[str, str]]:
    """(algorithm, hashes by name) from the value of the key "hashes".

    Raises GrowkitError where it is none.
    """
    hashes = check_stated(stated, where)
    algorithm: str = hashes["algorithm"]
    arrays: Mapping[str, str] = hashes["arrays"]
    present = set(known)
    return algorithm, {name: value for name, value in arrays.items() if name in present}


def view_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order, without a copy where they lie so already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def hash_array(array: np.ndarray, algorithm: str = ALGORITHM) -> str:
    """The hash of a whole array, as hexadecimal digits: 16 of xxh3_64."""
    return hash_bytes(view_bytes(array), algorithm)


def hash_meta(meta: Mapping[str, Any], algorithm: str = ALGORITHM) -> str:
    """The hash of a checkpoint's meta without its hashes: the same before and after JSON."""
    others = {key: value for key, value in meta.items() if key != HASHES}
    # Sorted keys, because JSON may come back in another order.
    return hash_bytes(json.dumps(others, sort_keys=True).encode(), algorithm)


def make_hashes(
    arrays: Mapping[str, str], files: Mapping[str, bytes], meta: Mapping[str, Any]
) -> dict[str, Any]:
    """The value of "hashes" in meta. arrays: the hash of each array by its name in the state."""
    return {
        "algorithm": ALGORITHM,
        "arrays": dict(arrays),
        "files": {name: hash_bytes(content) for name, content in files.items()},
        "meta": hash_meta(meta),
    }


def read_hashes(meta: Mapping[str, Any], where: object) -> Mapping[str, Any] | None:
    """The hashes of a checkpoint's meta, None where it has none.

    Raises GrowkitError for what is none, and for hashes that this version cannot compute.
    """
    if HASHES not in meta:
        return None
    hashes = check_stated(meta[HASHES], where)
    require_known(hashes["algorithm"])
    return hashes


def find_changed(
    hashes: Mapping[str, Any],
    arrays: Mapping[str, str],
    files: Mapping[str, bytes] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> str | None:
    """What differs first from its stored hash, in words (`the array 'mu.x'`); None for nothing.

    arrays: hashes computed now, of as many arrays as were read. files, meta: None where they were
    not read. Where some arrays, or files, have a hash, all must: a record that lacks one is damaged
    itself.
    """
    algorithm = hashes["algorithm"]
    if meta is not None and "meta" in hashes and hash_meta(meta, algorithm) != hashes["meta"]:
        return "the meta"
    stored = hashes.get("arrays", {})
    # Of several processes none has a whole array: then no array has a hash.
    for name, found in arrays.items() if stored else ():
        if stored.get(name) != found:
            return f"the array {name!r}" if name in stored else f"the hash of the array {name!r}"
    stored = hashes.get("files", {})
    for name, content in (files or {}).items() if stored else ():
        if stored.get(name) != hash_bytes(content, algorithm):
            return f"the file {name!r}" if name in stored else f"the hash of the file {name!r}"
    return None
