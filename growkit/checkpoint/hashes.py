"""Hashes of stored arrays: made as an output is written, compared before a model is used.

    "hashes": {"algorithm": "xxh3_64", "arrays": {"params.layers.attention.dense.weight": "9f..."}}

A hash is of an array's bytes in C order, little endian. In a trainer checkpoint it stands in
meta/metadata, by the array's name in `state`; in a Hugging Face directory, in the last entry of
lineage.json, by the tensor's name. XXH3 (https://xxhash.com) takes 34 GB/s a core here, zlib's
crc32 6.5: against writing it costs nothing. It finds damage, not forgery.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from growkit.errors import GrowkitError

KEY = "hashes"
ALGORITHM = "xxh3_64"
# What hashes may be of; all of them are in the package xxhash.
ALGORITHMS = ("xxh3_64", "xxh3_128", "xxh64", "xxh32")
# Bytes read at once, and how many arrays are read side by side.
PIECE = 1 << 20
THREADS = 2


class Hasher(Protocol):
    """What hashlib and xxhash call a hash object."""

    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


def begin_hash(algorithm: str = ALGORITHM) -> Hasher:
    """A hash that nothing was put into yet."""
    import xxhash

    hasher: Hasher = getattr(xxhash, algorithm)()
    return hasher


def hash_bytes(data: Any) -> str:
    """The hash of bytes, or of the memory of a contiguous array."""
    hasher = begin_hash()
    hasher.update(data)
    return hasher.hexdigest()


def hash_file(file: int, offset: int, size: int, algorithm: str = ALGORITHM) -> str:
    """The hash of `size` bytes at `offset` of an open file."""
    hasher = begin_hash(algorithm)
    done = 0
    while done < size:
        data = os.pread(file, min(PIECE, size - done), offset + done)
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

    arrays: name -> hash. read: the bytes of an array by its name, a part at a time.
    """

    algorithm: str
    arrays: Mapping[str, str]
    read: Callable[[str], Iterator[Any]]

    def find_changed(self, progress: Callable[[int], None] = lambda done: None) -> list[str]:
        """The arrays whose bytes have another hash than the one on record, sorted."""
        if self.algorithm not in ALGORITHMS:
            return []

        def has_changed(name: str) -> bool:
            hasher = begin_hash(self.algorithm)
            for part in self.read(name):
                hasher.update(part)
                progress(len(part))
            return hasher.hexdigest() != self.arrays[name]

        names = sorted(self.arrays)
        with ThreadPoolExecutor(THREADS) as pool:
            changed = list(pool.map(has_changed, names))
        return [name for name, differs in zip(names, changed, strict=True) if differs]


def read_stated(stated: Any, known: Sequence[str], where: object) -> tuple[str, dict[str, str]]:
    """(algorithm, hashes by name) from the value of the key "hashes".

    Raises GrowkitError where it is none, or lacks an array that is there.
    """
    try:
        algorithm = str(stated["algorithm"])
        arrays = {str(name): str(value) for name, value in stated["arrays"].items()}
    except (AttributeError, KeyError, TypeError):
        raise GrowkitError(
            f'{where}: "hashes" must hold an algorithm and hashes by array'
        ) from None
    present = set(known)
    return algorithm, {name: value for name, value in arrays.items() if name in present}
