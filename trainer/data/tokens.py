"""Token files: a stream of token ids on disk, in Megatron's indexed format, as a memory map.

The format, in which GPT-NeoX and Pythia publish their data, is a pair of files: `.bin` holds the
ids of all documents end to end, `.idx` where each document lies in it. A pair that growkit made has
a `manifest.json` beside it. Token files must be on a local disk, because they are memory-mapped.
"""

from __future__ import annotations

import array
import hashlib
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from growkit.checkpoint.files import LFS_POINTER, read_json
from growkit.errors import GrowkitError, UsageError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
MANIFEST = "manifest.json"
STEM = "tokens"

# Magic, version, dtype code, number of sequences, length of the document index.
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOAT_CODES = (6, 7)  # the format allows floats, which cannot be token ids
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
_BYTES_PER_SEQUENCE = 4 + 8  # an int32 length and an int64 pointer
_SEQUENCES_AT_ONCE = 1 << 20
_LONGEST_DOCUMENT = 2**31 - 1  # lengths are int32


def select_token_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron stores ids of this vocabulary in: uint16 below 65500 ids, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class TokenWriter:
    """Writes documents to `directory/tokens.bin`, and `directory/tokens.idx` at close.

    A context manager: leaving it closes the writer; after an error no index is written. Takes four
    bytes of memory per document. The directory must exist.
    """

    def __init__(self, directory: str | os.PathLike[str], vocab_size: int) -> None:
        self.dtype = select_token_dtype(vocab_size)
        self.tokens = 0
        self._vocab_size = vocab_size
        self._index_path = Path(directory) / f"{STEM}.idx"
        self._lengths = array.array("i")
        self._hash = hashlib.sha256()
        self._index_hash = hashlib.sha256()
        self._bin = open(Path(directory) / f"{STEM}.bin", "wb")  # noqa: SIM115 (closed by close)

    def add(self, ids: np.ndarray) -> None:
        """Append one document, ids of shape [length]; see `add_all`."""
        self.add_all(ids, [np.size(ids)])

    def add_all(self, ids: np.ndarray, lengths: Sequence[int]) -> None:
        """Append documents laid end to end: ids of shape [sum of lengths].

        Raises UsageError when an id is negative or not below `vocab_size`, and GrowkitError when a
        document is longer than the format allows (2**31 - 1 tokens).
        """
        ids = np.asarray(ids)
        if ids.size and (ids.min() < 0 or ids.max() >= self._vocab_size):
            raise UsageError(
                f"token ids must lie in 0..{self._vocab_size - 1} for a vocabulary of "
                f"{self._vocab_size}; from document {self.documents} on there are ids from "
                f"{ids.min()} to {ids.max()}"
            )
        if max(lengths, default=0) > _LONGEST_DOCUMENT:
            raise GrowkitError(
                f"a document holds at most {_LONGEST_DOCUMENT} tokens, and from document "
                f"{self.documents} on there is one of {max(lengths)}; split it"
            )
        data = ids.astype(self.dtype).tobytes()
        self._bin.write(data)
        self._hash.update(data)
        self._lengths.extend(lengths)
        self.tokens += ids.size

    @property
    def documents(self) -> int:
        """How many documents have been added."""
        return len(self._lengths)

    def summary(self) -> dict[str, Any]:
        """What the manifest says of the files, when they are closed: counts, dtype, sha256."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "dtype": self.dtype.name,
            "bin_sha256": self._hash.hexdigest(),
            "idx_sha256": self._index_hash.hexdigest(),
        }

    def close(self) -> None:
        """Finish `tokens.bin` and write `tokens.idx`."""
        self._bin.close()
        lengths = np.array(self._lengths, "<i4")
        sizes = lengths * np.int64(self.dtype.itemsize)
        pointers = np.cumsum(sizes, dtype="<i8") - sizes
        boundaries = np.arange(self.documents + 1, dtype="<i8")
        code = _CODES[self.dtype]
        header = _HEADER.pack(MAGIC, VERSION, code, len(lengths), len(boundaries))
        arrays = [lengths, pointers.astype("<i8"), boundaries]
        with open(self._index_path, "wb") as index:
            for part in (header, *(array.tobytes() for array in arrays)):
                index.write(part)
                self._index_hash.update(part)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._bin.close()


@dataclass(frozen=True)
class _Index:
    """The content of an `.idx` file, as views of its memory map."""

    dtype: np.dtype
    lengths: np.ndarray  # [sequences] int32, tokens
    pointers: np.ndarray  # [sequences] int64, bytes into the .bin
    documents: np.ndarray  # [documents + 1] int64, boundaries between documents, in sequences


@dataclass(frozen=True, eq=False)
class TokenFile:
    """A token stream on disk, open for reading. Made by `TokenFile.open`."""

    name: str  # as it was given to `open`
    tokens: np.ndarray  # [tokens], a read-only memory map of the whole stream
    manifest: dict[str, Any] | None  # content of manifest.json; None for a bare Megatron pair
    bin_path: Path
    index_path: Path
    _index: _Index

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TokenFile:
        """Open a directory that `tokenize` made, or a Megatron pair by its prefix or either file.

        Checks the whole index, but only sizes and counts of the `.bin` and the manifest;
        `trainer.data.checked` reads the ids too. Raises UsageError when there is no such data,
        GrowkitError when the files are broken.
        """
        prefix = _find_prefix(path)
        bin_path = Path(f"{prefix}.bin")
        index_path = Path(f"{prefix}.idx")
        for each in (bin_path, index_path):
            _refuse_pointer(each)
        index = _read_index(index_path)
        tokens = _map_tokens(bin_path, index_path, index)
        manifest_path = bin_path.with_name(MANIFEST)
        manifest = None
        if bin_path.stem == STEM and manifest_path.is_file():
            manifest = _read_manifest(manifest_path, index, len(tokens))
        return cls(os.fspath(path), tokens, manifest, bin_path, index_path, index)

    @property
    def dtype(self) -> np.dtype:
        """The integer type the ids are stored in."""
        return self._index.dtype

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def documents(self) -> np.ndarray:
        """Where documents begin and end, in tokens: int64 [documents + 1], the first 0."""
        starts = np.append(self._index.pointers // self.dtype.itemsize, len(self))
        # A builder that was never told of documents leaves the single entry 0. Then each sequence
        # is a document.
        if len(self._index.documents) == 1:
            return starts
        return starts[self._index.documents]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell data sets apart, whatever they are called.

        They are of the ids, by the manifest; without one, of the index and the size of the `.bin`.
        """
        if self.manifest is not None:
            return str(self.manifest["bin_sha256"])[:16]
        with open(self.index_path, "rb") as index:
            digest = hashlib.file_digest(index, "sha256")
        digest.update(str(self.tokens.nbytes).encode())
        return digest.hexdigest()[:16]


def _find_prefix(path: str | os.PathLike[str]) -> Path:
    """The common name of a pair, without `.bin` and `.idx`."""
    name = os.fspath(path)
    if "://" in name:
        raise UsageError(
            f"token files are memory-mapped from a local disk: copy {name} to one first"
        )
    if os.path.isdir(name):
        prefix = os.path.join(name, STEM)
    else:
        stem, suffix = os.path.splitext(name)
        prefix = stem if suffix in (".bin", ".idx") else name
    _check_pair(name, prefix)
    return Path(prefix)


def _check_pair(name: str, prefix: str) -> None:
    """Refuse a name for which the two files are not there."""
    files = [f"{prefix}.bin", f"{prefix}.idx"]
    missing = [file for file in files if not os.path.isfile(file)]
    if len(missing) == 1:
        raise GrowkitError(f"a token file is a .bin and an .idx, and {missing[0]} is missing")
    if missing and os.path.isdir(name):
        raise UsageError(
            f"{name} is a directory without {STEM}.bin and {STEM}.idx; make them with tokenize"
        )
    if missing:
        raise UsageError(
            f"no token data at {name}: neither a directory, nor {missing[0]} and {missing[1]}"
        )


def _refuse_pointer(path: Path) -> None:
    """Refuse a file that Git LFS left in the place of the real one."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise GrowkitError(
                f"{path} is a Git LFS pointer, not the file; `git lfs pull` fetches that"
            )


def _read_index(path: Path) -> _Index:
    """Map an `.idx` file and check it against itself."""
    if path.stat().st_size < _HEADER.size:
        raise GrowkitError(f"{path} is cut short: an index has at least {_HEADER.size} bytes")
    data = np.memmap(path, mode="r")
    magic, version, code, sequences, boundaries = _HEADER.unpack(data[: _HEADER.size].tobytes())
    _check_header(path, magic, version, code)
    expected = _HEADER.size + sequences * _BYTES_PER_SEQUENCE + boundaries * 8
    if data.size != expected:
        fault = "cut short" if data.size < expected else "too long"
        raise GrowkitError(
            f"{path} is {fault}: {sequences} sequences and {boundaries} document boundaries take "
            f"{expected} bytes, and it has {data.size}"
        )
    if not sequences:
        raise GrowkitError(f"{path} is empty: it lists no sequences")
    lengths_end = _HEADER.size + sequences * 4
    pointers_end = lengths_end + sequences * 8
    index = _Index(
        np.dtype(_DTYPES[code]),
        data[_HEADER.size : lengths_end].view("<i4"),
        data[lengths_end:pointers_end].view("<i8"),
        data[pointers_end:].view("<i8"),
    )
    _check_documents(path, index)
    return index


def _check_header(path: Path, magic: bytes, version: int, code: int) -> None:
    """Refuse what is not an index of token ids by its first fields."""
    if magic != MAGIC:
        raise GrowkitError(
            f"{path} is not a Megatron index: it begins with {magic!r} instead of {MAGIC!r}"
        )
    if version != VERSION:
        raise GrowkitError(
            f"{path} has index version {version}; only version {VERSION} can be read"
        )
    if code in _FLOAT_CODES:
        raise GrowkitError(
            f"{path} says the data are floats (dtype code {code}); token ids are integers"
        )
    if code not in _DTYPES:
        raise GrowkitError(f"{path} has dtype code {code}; the integer types are {sorted(_DTYPES)}")


def _check_documents(path: Path, index: _Index) -> None:
    """The document index rises from 0 to the number of sequences (or is the single entry 0)."""
    boundaries = index.documents
    sequences = len(index.lengths)
    if not len(boundaries) or boundaries[0] != 0:
        raise GrowkitError(f"the document index of {path} must begin with 0")
    if len(boundaries) > 1 and (boundaries[-1] != sequences or (np.diff(boundaries) < 0).any()):
        raise GrowkitError(
            f"the document index of {path} must rise from 0 to its {sequences} sequences; it ends "
            f"at {boundaries[-1]}"
        )


def _map_tokens(path: Path, index_path: Path, index: _Index) -> np.ndarray:
    """Map the `.bin` after checking that the sequences of the index fill it end to end."""
    expected = _check_contiguous(index_path, index)
    size = path.stat().st_size
    if size != expected:
        fault = "cut short" if size < expected else "too long"
        raise GrowkitError(
            f"{path} is {fault}: its index says {expected} bytes of {index.dtype.name} tokens, and "
            f"it has {size}"
        )
    if not size:
        raise GrowkitError(f"{path} is empty: it holds no tokens")
    return np.memmap(path, dtype=index.dtype, mode="r")


def _check_contiguous(path: Path, index: _Index) -> int:
    """The bytes that the sequences take, end to end. Raises GrowkitError for gaps and overlaps."""
    end = 0
    # In parts, so that a large index does not take memory.
    for first in range(0, len(index.lengths), _SEQUENCES_AT_ONCE):
        some = slice(first, first + _SEQUENCES_AT_ONCE)
        sizes = index.lengths[some].astype(np.int64) * index.dtype.itemsize
        ends = end + np.cumsum(sizes)
        wrong = (ends - sizes != index.pointers[some]) | (sizes < 0)
        if wrong.any():
            sequence = first + int(np.argmax(wrong))
            raise GrowkitError(
                f"{path} is broken: sequence {sequence} does not begin where the one before it ends"
            )
        end = int(ends[-1])
    return end


def _read_manifest(path: Path, index: _Index, tokens: int) -> dict[str, Any]:
    """The manifest beside a pair, after checking that it describes that pair."""
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise GrowkitError(f"{path} must hold a JSON object, not a {type(manifest).__name__}")
    found = {"tokens": tokens, "documents": len(index.documents) - 1, "dtype": index.dtype.name}
    missing = {*found, "bin_sha256", "vocab_size", "end_of_text"} - set(manifest)
    if missing:
        raise GrowkitError(
            f"{path} lacks {min(missing)!r}; tokenize the text again, or remove the manifest"
        )
    for key, value in found.items():
        if manifest[key] != value:
            raise GrowkitError(
                f"{path} says {key} = {manifest[key]!r}, and the files beside it {value!r}"
            )
    _check_values(path, manifest)
    return manifest


def _check_values(path: Path, manifest: dict[str, Any]) -> None:
    """Refuse values of a manifest that cannot be: of another type, or out of range."""
    vocab_size = manifest["vocab_size"]
    end = manifest["end_of_text"]
    rules = {
        "vocab_size": (type(vocab_size) is int and vocab_size > 0, "a number of ids"),
        "end_of_text": (
            type(end) is int and type(vocab_size) is int and 0 <= end < vocab_size,
            "an id below vocab_size",
        ),
        "shard": (_is_text(manifest.get("shard"), r"[1-9]\d{0,8}/[1-9]\d{0,8}"), "I/N"),
    }
    for key in ("bin_sha256", "idx_sha256", "tokenizer_sha256"):
        may_lack = key != "bin_sha256" or manifest[key] is not None
        holds = may_lack and _is_text(manifest.get(key), "[0-9a-f]{64}")
        rules[key] = (holds, "64 hexadecimal digits")
    for key, (holds, wanted) in rules.items():
        if not holds:
            raise GrowkitError(
                f"{path} says {key} = {manifest[key]!r}, which must be {wanted}; tokenize the text "
                f"again, or remove the manifest"
            )


def _is_text(value: Any, pattern: str) -> bool:
    """Whether a value is left out, or text of this pattern."""
    return value is None or (isinstance(value, str) and re.fullmatch(pattern, value) is not None)
