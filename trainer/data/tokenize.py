"""Tokenized text: from text files and a tokenizer to a directory of token ids that training reads.

Knows how blocks of text become ids, in one process or many, and what the directory holds: the token file, its
manifest, and the tokenizer. Leaves reading text to `trainer.data.text`, tokenizers to `trainer.data.tokenizer`, processes
to `trainer.data.processes` and the format of the token file to `trainer.data.tokens`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from etils import epath

from growkit.checkpoint.output import check_output, commit_output
from growkit.errors import UsageError
from trainer.data.processes import count_cores, map_in_order
from trainer.data.text import (
    BLOCK_SIZE,
    Block,
    Documents,
    Shard,
    count_utf8_bytes,
    group_documents,
    has_text,
    open_inputs,
)
from trainer.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer, write_tokenizer
from trainer.data.tokens import MANIFEST, TokenWriter

Progress = Callable[[int, int, int], None]


def tokenize(
    texts: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    tokenizer: str | os.PathLike | None = None,
    train_bpe: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    processes: int = 1,
    shard: Shard | None = None,
) -> dict:
    """Tokenize text files, or one shard of them, into the directory `out`; returns its manifest.

    `texts` are files or directories. A `.jsonl` file holds one object a line, whose "text" is a document; each
    row of a `.parquet` file is one, in the column "text"; any other file is one document. Each may be compressed
    (`.gz`, `.zst`). A directory means the .txt, .md, .rst, .py, .jsonl and .parquet files under it, sorted. Give
    either `tokenizer`, a tokenizer.json or a directory holding one, or `train_bpe`, the vocabulary size of a
    byte-level BPE to train on the text. `progress`, if given, is called with the documents, tokens and bytes of
    text written so far. The output is the same for any number of `processes`, which are started by spawning: with
    more than one, the calling script needs the usual `if __name__ == "__main__"`. One is the calling process, in
    which the tokenizer has threads of its own.

    Raises UsageError for arguments that cannot work and GrowkitError for broken files.
    """
    if (tokenizer is None) == (train_bpe is None):
        raise UsageError(
            "give either a tokenizer or the vocabulary size of one to train, and not both"
        )
    if shard is not None and tokenizer is None:
        raise UsageError(
            "all shards need one tokenizer: train it on some of the text first, and give it with --tokenizer"
        )
    check_output(_local(out), None, force)
    inputs = open_inputs(texts)
    if tokenizer is not None:
        chosen = load_tokenizer(tokenizer)
    else:
        chosen = train_tokenizer(inputs.read_documents(), train_bpe)
    encoded = _encoded(inputs.read_blocks(shard), chosen, processes)
    about: dict = {"sources": [epath.Path(text).name for text in texts]}
    if shard is not None:
        about["shard"] = f"{shard.number}/{shard.count}"
    else:
        encoded = _refuse_empty(encoded, inputs.names)
    return _write(encoded, out, chosen, about, force, progress)


def tokenize_documents(
    documents: Iterable[str],
    out: str | os.PathLike,
    tokenizer: TextTokenizer,
    sources: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
    processes: int = 1,
) -> dict:
    """Tokenize documents, one string each, into the directory `out`; returns its manifest.

    Writes tokens.bin, tokens.idx, manifest.json, tokenizer.json and tokenizer_config.json, all or none. One
    end-of-text id follows each document; a document that spells out a special token gets that token's id, as
    in `transformers`. Documents without text (empty or white space) are skipped and counted. `sources` are
    names for the manifest. `documents` is consumed as a stream.

    Raises UsageError when `out` exists (unless `force`) or when there is no text at all.
    """
    encoded = _encoded(group_documents(documents), tokenizer, processes)
    return _write(encoded, out, tokenizer, {"sources": list(sources)}, force, progress)


@dataclass(frozen=True)
class _Piece:
    """A part of a document that is too long to be encoded at once."""

    text: str
    where: str
    complete: bool  # it is the document's last
    source: int


@dataclass(frozen=True)
class _Encoded:
    """What became of a block: ids int32 [tokens], end-of-text ids included, and the length of each document."""

    source: int
    ids: np.ndarray
    lengths: list[int]
    bytes: int
    empty: int = 0
    complete: bool = True  # the last document does not go on in the next block


@dataclass(frozen=True)
class _Encoder:
    """Encodes blocks, in whichever process it is made."""

    tokenizer: TextTokenizer

    def __call__(self, block: Block | _Piece) -> _Encoded:
        end = np.array([self.tokenizer.end_of_text_id], np.int32)
        if isinstance(block, _Piece):
            (ids,) = self.tokenizer.encode([block.text])
            ids = np.concatenate([ids, end]) if block.complete else ids
            return _Encoded(
                block.source,
                ids,
                [len(ids)],
                count_utf8_bytes(block.text, block.where),
                0,
                block.complete,
            )
        texts, size, empty = [], 0, 0
        for text, where in block.read_documents():
            if has_text(text):
                size += count_utf8_bytes(text, where)
                texts.append(text)
            else:
                empty += 1
        documents = [np.concatenate([*ids, end]) for ids in self._encode(texts)]
        ids = np.concatenate([np.zeros(0, np.int32), *documents])
        return _Encoded(block.source, ids, [*map(len, documents)], size, empty)

    def _encode(self, texts: list[str]) -> Iterator[list[np.ndarray]]:
        """The ids of each text, in pieces: all texts at once where they are short, for speed."""
        if sum(map(len, texts)) <= 2 * BLOCK_SIZE:
            yield from ([ids] for ids in self.tokenizer.encode(texts))
            return
        for text in texts:
            yield [
                ids
                for piece in self.tokenizer.cut_pieces(text)
                for ids in self.tokenizer.encode([piece])
            ]


def _encoded(
    blocks: Iterable[Block], tokenizer: TextTokenizer, processes: int
) -> Iterator[_Encoded]:
    """What becomes of blocks of text, in order, computed by so many processes."""
    if processes < 1:
        raise UsageError(
            f"the number of processes must be at least 1, not {processes}; here are {count_cores()} cores"
        )
    return map_in_order(_Encoder, (tokenizer,), _cut(blocks, tokenizer), processes)


def _cut(blocks: Iterable[Block], tokenizer: TextTokenizer) -> Iterator[Block | _Piece]:
    """The blocks, with a document too long for one process in pieces. The cuts depend on the document alone."""
    for block in blocks:
        if isinstance(block, Documents) and len(block.texts) == 1 and has_text(block.texts[0]):
            ((document, where),) = block.read_documents()
            count_utf8_bytes(document, where)
            *pieces, last = tokenizer.cut_pieces(document)
            yield from (_Piece(piece, where, False, block.source) for piece in pieces)
            yield _Piece(last, where, True, block.source)
        else:
            yield block


def _refuse_empty(encoded: Iterator[_Encoded], names: Sequence[str]) -> Iterator[_Encoded]:
    """The same; raises UsageError where an input held no text."""
    current, found = 0, False
    for each in encoded:
        if each.source != current:
            _refuse_unless(found, names[current])
            current, found = each.source, False
        found = found or bool(each.lengths)
        yield each
    _refuse_unless(found, names[current])


def _refuse_unless(found: bool, name: str) -> None:
    if not found:
        raise UsageError(f"{name} holds no text; leave it out")


def _write(
    encoded: Iterator[_Encoded],
    out: str | os.PathLike,
    tokenizer: TextTokenizer,
    about: dict,
    force: bool,
    progress: Progress | None,
) -> dict:
    """Write the directory of tokens; returns its manifest, `about` in it."""
    check_output(_local(out), None, force)
    counts = {"bytes": 0, "empty_documents": 0}
    with commit_output(_local(out), force) as directory, closing(encoded):
        directory.mkdir()
        with TokenWriter(directory, tokenizer.vocab_size) as writer:
            for ids, lengths in _whole_documents(encoded, counts):
                writer.add_all(ids, lengths)
                if progress:
                    progress(writer.documents, writer.tokens, counts["bytes"])
        if not writer.documents:
            where = f"shard {about['shard']}" if "shard" in about else "any document given"
            raise UsageError(f"there is no text to tokenize in {where}")
        manifest = {
            "tokenizer_sha256": hashlib.sha256(tokenizer.json).hexdigest(),
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text_id,
            **writer.summary(),
            **counts,
            **about,
        }
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        write_tokenizer(directory, tokenizer)
    return manifest


def _whole_documents(
    encoded: Iterable[_Encoded], counts: dict[str, int]
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Ids and lengths of whole documents, their pieces joined; adds what was read to `counts`."""
    pieces: list[np.ndarray] = []
    for each in encoded:
        counts["bytes"] += each.bytes
        counts["empty_documents"] += each.empty
        pieces.append(each.ids)
        if each.complete:
            ids = np.concatenate(pieces)
            yield ids, each.lengths if len(pieces) == 1 else [len(ids)]
            pieces = []


def _local(out: str | os.PathLike) -> Path:
    name = os.fspath(out)
    if "://" in name:
        raise UsageError(
            f"token files are memory-mapped, so write them to a local disk and not to {name}"
        )
    return Path(os.path.abspath(name))
