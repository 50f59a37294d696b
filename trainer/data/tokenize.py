"""Tokenization: from text files and a tokenizer to a directory of token ids that training reads.

Blocks of text are encoded by one process or many. The directory holds the token file, its manifest
and the tokenizer; it appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from growkit.checkpoint.output import check_output, commit_output
from growkit.errors import UsageError
from trainer.data.cleaning import Cleaner, Faults, check_policy
from trainer.data.fields import USUAL_FIELDS, Fields
from trainer.data.listing import is_pipe
from trainer.data.plain import WHOLE
from trainer.data.processes import count_cores, map_in_order
from trainer.data.text import (
    BLOCK_SIZE,
    Block,
    Documents,
    Inputs,
    Shard,
    group_documents,
    has_text,
    open_inputs,
)
from trainer.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer, write_tokenizer
from trainer.data.tokens import MANIFEST, TokenWriter

PathName = str | os.PathLike[str]
Progress = Callable[[int, int, int], None]  # (documents, tokens, bytes of text) so far
Say = Callable[[str], None]


def tokenize(
    texts: Sequence[PathName],
    out: PathName,
    tokenizer: PathName | None = None,
    train_bpe: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    processes: int = 1,
    shard: Shard | None = None,
    end_of_text: str | None = None,
    errors: str = "strict",
    fields: Fields = USUAL_FIELDS,
    say: Say = lambda words: None,
    documents: str = WHOLE,
) -> dict[str, Any]:
    """Tokenize text files, or one shard of them, into the directory `out`; returns its manifest.

    texts: files or directories; `trainer.data.text` says what a document is, and `documents` (file,
    blank-line or line) what is one of plain text. fields: where records have their text. tokenizer,
    train_bpe: give one of them, what `trainer.data.tokenizer_files` finds, or the vocabulary size
    of a byte-level BPE to train on the text. progress: called with the documents, tokens and bytes
    of text so far. processes: more than one are spawned, so the script needs `if __name__ ==
    "__main__"`; the output is the same. end_of_text: the token that ends a document; None for the
    tokenizer's own. errors: see `trainer.data.cleaning`. say: called with lines about what is read.

    Raises UsageError for arguments that cannot work and GrowkitError for broken files.
    """
    _check_arguments(tokenizer, train_bpe, shard, errors)
    check_output(_check_local(out), None, force)
    inputs = open_inputs(texts, errors, fields, documents)
    say(inputs.listing.describe(inputs.select_files(shard)))
    loaded = _choose_tokenizer(inputs, tokenizer, train_bpe, end_of_text)
    encoded = _encode_blocks(inputs.read_blocks(shard), loaded, processes, errors)
    if shard is None:
        encoded = _refuse_empty_inputs(encoded, inputs.names)
    origin = _describe_origin(inputs, shard) | fields.describe()
    manifest = _write_directory(encoded, out, loaded, origin, force, progress)
    for words in _describe_reading(inputs):
        say(words)
    return manifest


def _describe_reading(inputs: Inputs) -> Iterator[str]:
    """Notes about files that were read otherwise than some would expect."""
    if inputs.disguised:
        yield f"note: {_name_some(inputs.disguised)} held JSON lines and were read as such"
    if inputs.plain and inputs.cut == WHOLE:
        names = {path.name for path in inputs.plain}
        plain = f"{_name_some(names)} was" if len(inputs.plain) == 1 else "each plain text file was"
        yield (
            f"note: {plain} read as one document; with --documents blank-line what is between "
            "blank lines is one, with --documents line every line"
        )


def _describe_origin(inputs: Inputs, shard: Shard | None) -> dict[str, Any]:
    """What the manifest says of the text and of how it was read."""
    origin: dict[str, Any] = {"sources": [epath.Path(text).name for text in inputs.names]}
    origin["errors"] = inputs.policy
    if inputs.cut != WHOLE:
        origin["documents_by"] = inputs.cut
    if shard is not None:
        origin["shard"] = f"{shard.number}/{shard.count}"
    return origin


def _choose_tokenizer(
    inputs: Inputs, tokenizer: PathName | None, train_bpe: int | None, end_of_text: str | None
) -> TextTokenizer:
    """The tokenizer given, or one trained on the text."""
    if tokenizer is not None:
        return load_tokenizer(tokenizer, end_of_text)
    _refuse_pipes(inputs)
    return train_tokenizer(inputs.read_documents(), train_bpe or 0, end_of_text)


def _name_some(names: set[str], most: int = 3) -> str:
    """Some names, and how many others there are."""
    listed = ", ".join(sorted(names)[:most])
    others = len(names) - most
    return f"{listed} and {others:,} others" if others > 0 else listed


def _refuse_pipes(inputs: Inputs) -> None:
    """Refuse what can be read only once, where a tokenizer is trained on the text first."""
    for _, path in inputs.files:
        if is_pipe(path):
            raise UsageError(
                f"{path} is a pipe, and --train-bpe reads the text twice; write it to a file first"
            )


def _check_arguments(
    tokenizer: PathName | None, train_bpe: int | None, shard: Shard | None, errors: str
) -> None:
    """Refuse a tokenizer that is given twice or not at all, or is another one for each shard, and
    an unknown policy.
    """
    check_policy(errors)
    if (tokenizer is None) == (train_bpe is None):
        raise UsageError(
            "give either a tokenizer or the vocabulary size of one to train, and not both"
        )
    if shard is not None and tokenizer is None:
        raise UsageError(
            "all shards need one tokenizer: train it on some of the text first, and give it with "
            "--tokenizer"
        )


def tokenize_documents(
    documents: Iterable[str],
    out: PathName,
    tokenizer: TextTokenizer,
    sources: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Tokenize documents, one string each, into the directory `out`; returns its manifest.

    Writes tokens.bin, tokens.idx, manifest.json, tokenizer.json and tokenizer_config.json, all or
    none. One end-of-text id follows each document. A document that spells out a special token gets
    that token's id, as in `transformers`. Documents without text (empty or white space) are skipped
    and counted. `sources` are names for the manifest. `documents` is consumed as a stream.

    Raises UsageError when `out` exists (unless `force`) or when there is no text at all.
    """
    encoded = _encode_blocks(group_documents(documents), tokenizer, processes)
    return _write_directory(encoded, out, tokenizer, {"sources": list(sources)}, force, progress)


@dataclass(frozen=True)
class _Piece:
    """A part of a document that is too long to be encoded at once."""

    text: str
    complete: bool  # this is the last piece of the document
    source: int  # number of the input that it is from
    faults: Faults = Faults()  # of the block that the document was


@dataclass(frozen=True)
class _Encoded:
    """The ids of a block or a piece."""

    source: int  # number of the input that they are from
    ids: np.ndarray  # int32 [tokens], end-of-text ids included
    lengths: list[int]  # tokens of each document
    bytes: int  # of the text
    empty: int = 0  # documents without text
    faults: Faults = Faults()  # what was replaced or left out since the block before
    complete: bool = True  # False: the document goes on in the next piece


@dataclass(frozen=True)
class _Encoder:
    """Encodes blocks and pieces, in whichever process it is made."""

    tokenizer: TextTokenizer
    policy: str  # see `trainer.data.cleaning`

    def __call__(self, block: Block | _Piece) -> _Encoded:
        if isinstance(block, _Piece):
            return self._encode_piece(block)
        return self._encode_block(block)

    @property
    def _end(self) -> np.ndarray:
        return np.array([self.tokenizer.end_of_text_id], np.int32)

    def _encode_piece(self, piece: _Piece) -> _Encoded:
        (ids,) = self.tokenizer.encode([piece.text])
        if piece.complete:
            ids = np.concatenate([ids, self._end])
        size = len(piece.text.encode())
        return _Encoded(
            piece.source, ids, [len(ids)], size, faults=piece.faults, complete=piece.complete
        )

    def _encode_block(self, block: Block) -> _Encoded:
        texts = []
        size = 0
        empty = 0
        cleaner = Cleaner(self.policy)
        for text, _ in block.read_documents(cleaner):
            if has_text(text):
                size += len(text.encode())
                texts.append(text)
            else:
                empty += 1
        documents = [np.concatenate([*ids, self._end]) for ids in self._encode_texts(texts)]
        ids = np.concatenate([np.zeros(0, np.int32), *documents])
        lengths = [len(document) for document in documents]
        return _Encoded(block.source, ids, lengths, size, empty, block.faults + cleaner.take())

    def _encode_texts(self, texts: list[str]) -> Iterator[list[np.ndarray]]:
        """The ids of each text, in pieces."""
        # Where the texts are short, all at once, which is faster than one by one.
        if sum(len(text) for text in texts) <= 2 * BLOCK_SIZE:
            for ids in self.tokenizer.encode(texts):
                yield [ids]
            return
        for text in texts:
            pieces = self.tokenizer.cut_pieces(text)
            yield [ids for piece in pieces for ids in self.tokenizer.encode([piece])]


def _encode_blocks(
    blocks: Iterable[Block], tokenizer: TextTokenizer, processes: int, policy: str = "strict"
) -> Generator[_Encoded, None, None]:
    """The ids of blocks of text, in order, computed by so many processes."""
    if processes < 1:
        raise UsageError(
            f"the number of processes must be at least 1, not {processes}; here are "
            f"{count_cores()} cores"
        )
    tasks = _cut_long_documents(blocks, tokenizer)
    return map_in_order(_Encoder, (tokenizer, policy), tasks, processes)


def _cut_long_documents(
    blocks: Iterable[Block], tokenizer: TextTokenizer
) -> Iterator[Block | _Piece]:
    """The blocks, with a document too long for one process cut into pieces.

    The cuts depend on nothing but the document.
    """
    for block in blocks:
        if isinstance(block, Documents) and len(block.texts) == 1 and has_text(block.texts[0]):
            # Documents of files are clean; those of a caller are refused where they are not.
            ((document, _),) = block.read_documents(Cleaner("strict"))
            *pieces, last = tokenizer.cut_pieces(document)
            for piece in pieces:
                yield _Piece(piece, False, block.source)
            yield _Piece(last, True, block.source, block.faults)
        else:
            yield block


def _refuse_empty_inputs(
    encoded: Iterable[_Encoded], names: Sequence[str]
) -> Generator[_Encoded, None, None]:
    """Pass on what is encoded. Raises UsageError where an input held no text."""
    current = 0
    found = False
    for each in encoded:
        if each.source != current:
            _refuse_unless(found, names[current : each.source])
            current = each.source
            found = False
        found = found or bool(each.lengths)
        yield each
    _refuse_unless(found, names[current:])


def _refuse_unless(found: bool, names: Sequence[str]) -> None:
    """Refuse the first input without text: all but the first have none, because none was read."""
    empty = names[1:] if found else names
    if empty:
        raise UsageError(f"{empty[0]} holds no text; leave it out")


def _write_directory(
    encoded: Generator[_Encoded, None, None],
    out: PathName,
    tokenizer: TextTokenizer,
    origin: dict[str, Any],
    force: bool,
    progress: Progress | None,
) -> dict[str, Any]:
    """Write the directory of tokens; returns its manifest, with `origin` in it."""
    path = _check_local(out)
    check_output(path, None, force)
    counts = {"bytes": 0, "empty_documents": 0, "skipped_documents": 0, "replaced_characters": 0}
    with commit_output(path, force) as directory, closing(encoded):
        directory.mkdir()
        with TokenWriter(directory, tokenizer.vocab_size) as writer:
            for ids, lengths in _join_pieces(encoded, counts):
                writer.add_all(ids, lengths)
                if progress:
                    progress(writer.documents, writer.tokens, counts["bytes"])
        if not writer.documents:
            where = f"shard {origin['shard']}" if "shard" in origin else "any document given"
            raise UsageError(f"there is no text to tokenize in {where}")
        manifest = _describe_tokenizer(tokenizer) | writer.summary() | counts | origin
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        write_tokenizer(directory, tokenizer)
    return manifest


def _describe_tokenizer(tokenizer: TextTokenizer) -> dict[str, Any]:
    """What the manifest says of the tokenizer."""
    return {
        "tokenizer_sha256": hashlib.sha256(tokenizer.json).hexdigest(),
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text_id,
    }


def _join_pieces(
    encoded: Iterable[_Encoded], counts: dict[str, int]
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Ids and lengths of whole documents; adds the text that was read to `counts`."""
    pieces: list[np.ndarray] = []
    for each in encoded:
        counts["bytes"] += each.bytes
        counts["empty_documents"] += each.empty
        counts["skipped_documents"] += each.faults.skipped
        counts["replaced_characters"] += each.faults.replaced
        pieces.append(each.ids)
        if not each.complete:
            continue
        ids = np.concatenate(pieces)
        lengths = each.lengths if len(pieces) == 1 else [len(ids)]
        pieces = []
        yield ids, lengths


def _check_local(out: PathName) -> Path:
    """The path of an output on a local disk. Raises UsageError for a bucket."""
    name = os.fspath(out)
    if "://" in name:
        raise UsageError(
            f"token files are memory-mapped, so write them to a local disk and not to {name}"
        )
    return Path(os.path.abspath(os.path.expanduser(name)))
