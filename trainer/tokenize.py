"""Tokenized text: from text files and a tokenizer to a directory of token ids that training reads.

Knows how to read text (plain files, JSON lines, gzip, whole directories), how to load a tokenizer or train
one on that very text, and what the directory holds: the token file, its manifest, and the tokenizer in the
form `transformers` loads. Leaves the format of the token file to `trainer.tokens`.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from etils import epath
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from growkit.checkpoint.output import check_output, committed
from growkit.errors import GrowkitError, UsageError
from trainer.tokens import MANIFEST, TokenWriter

END_OF_TEXT_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
PADDING = "<|padding|>"
SMALLEST_TRAINED_VOCABULARY = 256 + 2  # every byte, the end of text and the padding

_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
# Encoding takes some 150 bytes of memory a character, so these bound it to a few hundred megabytes.
_PIECE_CHARACTERS = 1 << 18
_BATCH_CHARACTERS = 1 << 21
_BATCH_PIECES = 4096
_CUT = re.compile(r"(?<=\S)(?=[ \n]\w)")
_CUTS_TRIED = 16
_CUT_CONTEXT = 1000  # characters on each side of a cut that must encode the same with and without it
_PROGRESS_EVERY = 100  # documents

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer and what growkit has to know of it. Make one with `load_tokenizer` or `train_tokenizer`."""

    tokenizer: Tokenizer
    json: bytes  # the tokenizer.json it was made from
    end_of_text: str
    end_of_text_id: int
    vocab_size: int  # one more than the highest id, which can exceed the tokenizer's own count

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32 [tokens], without special tokens added."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]


def tokenize(
    texts: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    tokenizer: str | os.PathLike | None = None,
    train_bpe: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> dict:
    """Tokenize text files into the directory `out`; returns its manifest.

    `texts` are files or directories. A `.jsonl` file holds one object a line, whose "text" is a document; any
    other file is one document; each may be gzipped (`.gz`). A directory means the .txt, .md, .rst, .py and
    .jsonl files under it, sorted. Give either `tokenizer`, a tokenizer.json or a directory holding one, or
    `train_bpe`, the vocabulary size of a byte-level BPE to train on the text. `progress`, if given, is called
    with the documents, tokens and bytes of text written so far.

    Raises UsageError for arguments that cannot work and GrowkitError for broken files.
    """
    if (tokenizer is None) == (train_bpe is None):
        raise UsageError("give either a tokenizer or the vocabulary size of one to train, and not both")
    check_output(_local(out), None, force)
    inputs = _text_files(texts)
    if tokenizer is not None:
        chosen = load_tokenizer(tokenizer)
    else:
        chosen = train_tokenizer(_read_inputs(inputs), train_bpe)
    sources = [epath.Path(text).name for text in texts]
    return tokenize_documents(_read_inputs(inputs), out, chosen, sources, force, progress)


def tokenize_documents(
    documents: Iterable[str],
    out: str | os.PathLike,
    tokenizer: TextTokenizer,
    sources: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> dict:
    """Tokenize documents, one string each, into the directory `out`; returns its manifest.

    Writes tokens.bin, tokens.idx, manifest.json, tokenizer.json and tokenizer_config.json, all or none. One
    end-of-text id follows each document; a document that spells out a special token gets that token's id, as
    in `transformers`. Documents without text (empty or white space) are skipped and counted. `sources` are
    names for the manifest. `documents` is consumed as a stream.

    Raises UsageError when `out` exists (unless `force`) or when there is no text at all.
    """
    counts = {"bytes": 0, "empty_documents": 0}
    check_output(_local(out), None, force)
    with committed(_local(out), force) as directory:
        directory.mkdir()
        with TokenWriter(directory, tokenizer.vocab_size) as writer:
            for ids in _encode(_counted(documents, counts), tokenizer):
                writer.add(ids)
                if progress and writer.documents % _PROGRESS_EVERY == 0:
                    progress(writer.documents, writer.tokens, counts["bytes"])
        if not writer.documents:
            raise UsageError("there is no text to tokenize: no document given holds any")
        if progress:
            progress(writer.documents, writer.tokens, counts["bytes"])
        manifest = _manifest(tokenizer, writer.summary(), counts, sources)
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        _write_tokenizer(directory, tokenizer)
    return manifest


def load_tokenizer(path: str | os.PathLike) -> TextTokenizer:
    """Load a tokenizer.json, or the one in a directory; truncation and padding are switched off.

    Raises UsageError when there is none or it has no end-of-text token, GrowkitError when it is broken.
    """
    file = epath.Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.exists():
        raise UsageError(f"no tokenizer at {file}: give a tokenizer.json, or a directory holding one")
    content = file.read_bytes()
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises the bare class
        raise GrowkitError(f"{file} is not a tokenizer.json that can be read: {error}") from error
    return _text_tokenizer(tokenizer, content, str(file))


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Train a byte-level BPE of at most `vocab_size` ids: 0 ends a text, 1 is padding, then the bytes.

    The same documents give the same tokenizer. Fewer ids come out when the text has too few pairs to merge.
    Raises UsageError when `vocab_size` is below 258, which the bytes and the two special tokens take.
    """
    if vocab_size < SMALLEST_TRAINED_VOCABULARY:
        raise UsageError(
            f"a byte-level BPE needs a vocabulary of at least {SMALLEST_TRAINED_VOCABULARY} (256 bytes and 2 "
            f"special tokens), not {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT_NAMES[0], PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Byte-level words end at white space, so that every cut found there leaves the words as they are.
    pieces = (piece for document in documents for piece in _pieces(document, lambda left, right: True))
    tokenizer.train_from_iterator(pieces, trainer)
    return _text_tokenizer(tokenizer, tokenizer.to_str(pretty=True).encode(), "the trained tokenizer")


def _text_tokenizer(tokenizer: Tokenizer, content: bytes, name: str) -> TextTokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = next((each for each in END_OF_TEXT_NAMES if tokenizer.token_to_id(each) is not None), None)
    if end is None:
        raise UsageError(f"{name} has no end-of-text token; looked for {', '.join(END_OF_TEXT_NAMES)}")
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return TextTokenizer(tokenizer, content, end, tokenizer.token_to_id(end), vocab_size)


def _encode(documents: Iterable[str], tokenizer: TextTokenizer) -> Iterator[np.ndarray]:
    """The ids of each document, int32 [tokens], its end-of-text id included."""
    end = np.array([tokenizer.end_of_text_id], np.int32)
    document: list[np.ndarray] = []
    for batch in _batches(_all_pieces(documents, tokenizer)):
        encodings = tokenizer.encode([piece for piece, _ in batch])
        for ids, (_, last) in zip(encodings, batch, strict=True):
            document.append(ids)
            if last:
                yield np.concatenate([*document, end])
                document = []


def _all_pieces(documents: Iterable[str], tokenizer: TextTokenizer) -> Iterator[tuple[str, bool]]:
    """The pieces of all documents in order, each with whether it is the last of its document."""

    def separate(left: str, right: str) -> bool:
        whole, *parts = tokenizer.encode([left + right, left, right])
        return np.array_equal(whole, np.concatenate(parts))

    for document in documents:
        *pieces, last = _pieces(document, separate)
        yield from ((piece, False) for piece in pieces)
        yield last, True


def _pieces(document: str, separate: Callable[[str, str], bool]) -> list[str]:
    """A long document in pieces whose encodings, joined, are the encoding of the whole.

    Encoding takes much memory a character, so a long document is cut before white space, wherever
    `separate(left, right)` finds that the text around the cut encodes the same in two parts.
    """
    pieces, start = [], 0
    while len(document) - start > _PIECE_CHARACTERS:
        cut = _find_cut(document, start + _PIECE_CHARACTERS, separate)
        if cut is None:
            break
        pieces.append(document[start:cut])
        start = cut
    return [*pieces, document[start:]]


def _find_cut(document: str, start: int, separate: Callable[[str, str], bool]) -> int | None:
    for match in itertools.islice(_CUT.finditer(document, start), _CUTS_TRIED):
        cut = match.start()
        if separate(document[max(0, cut - _CUT_CONTEXT) : cut], document[cut : cut + _CUT_CONTEXT]):
            return cut
    return None


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Group pieces into lists of bounded size, in order."""
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[0])
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _counted(documents: Iterable[str], counts: dict) -> Iterator[str]:
    """The documents that hold text; adds their UTF-8 bytes, and the number of the others, to `counts`."""
    for number, document in enumerate(documents):
        if _has_text(document):
            counts["bytes"] += _utf8_bytes(document, f"document {number}")
            yield document
        else:
            counts["empty_documents"] += 1


def _has_text(document: str) -> bool:
    return bool(document) and not document.isspace()


def _utf8_bytes(document: str, where: str) -> int:
    try:
        return len(document.encode())
    except UnicodeEncodeError as error:
        raise GrowkitError(f"{where} is not text: it has half a surrogate pair at character {error.start}") from error


def _manifest(tokenizer: TextTokenizer, summary: dict, counts: dict, sources: Sequence[str]) -> dict:
    return {
        "tokenizer_sha256": hashlib.sha256(tokenizer.json).hexdigest(),
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text_id,
        **summary,
        **counts,
        "sources": list(sources),
    }


def _write_tokenizer(directory: Path, tokenizer: TextTokenizer) -> None:
    """The tokenizer, byte for byte, and the file that tells `transformers` how to load it."""
    (directory / "tokenizer.json").write_bytes(tokenizer.json)
    end = tokenizer.end_of_text
    config = {
        # The generic class reads tokenizer.json as it is; GPTNeoXTokenizer rebuilds parts of it by itself.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
        "clean_up_tokenization_spaces": False,
        # Without this list the generic class adds token types, which GPT-NeoX does not take.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if tokenizer.tokenizer.token_to_id(PADDING) is not None:
        config["pad_token"] = PADDING
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _text_files(texts: Sequence[str | os.PathLike]) -> list[tuple[str, list[epath.Path]]]:
    """Each input's name and the files that it stands for."""
    if not texts:
        raise UsageError("name at least one text file or directory to tokenize")
    return [(os.fspath(text), _files_of(epath.Path(text))) for text in texts]


def _files_of(path: epath.Path) -> list[epath.Path]:
    if not path.exists():
        raise UsageError(f"no such file or directory: {path}")
    if not path.is_dir():
        return [path]
    files = sorted(folder / name for folder, _, names in path.walk() for name in names if _looks_like_text(name))
    if not files:
        raise UsageError(f"no text files under {path}; looked for {', '.join(_TEXT_SUFFIXES)} and their .gz")
    return files


def _looks_like_text(name: str) -> bool:
    return name.removesuffix(".gz").endswith(_TEXT_SUFFIXES)


def _read_inputs(inputs: Iterable[tuple[str, list[epath.Path]]]) -> Iterator[str]:
    """All documents, input by input; raises UsageError at the end of one that held no text."""
    for name, files in inputs:
        found = False
        for document in itertools.chain.from_iterable(map(_read_file, files)):
            found = found or _has_text(document)
            yield document
        if not found:
            raise UsageError(f"{name} holds no text; leave it out")


def _read_file(path: epath.Path) -> Iterator[str]:
    """The documents of one file, empty ones included."""
    with _open(path) as file:
        if path.name.removesuffix(".gz").endswith(".jsonl"):
            yield from _read_json_lines(file, path)
        else:
            yield _decode(file.read(), path, 0)


@contextmanager
def _open(path: epath.Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as raw, _unzipped(raw, path) as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise GrowkitError(f"{path} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise GrowkitError(f"cannot read {path}: {error.strerror or error}") from error


def _unzipped(raw: BinaryIO, path: epath.Path) -> AbstractContextManager[BinaryIO]:
    return gzip.open(raw) if path.name.endswith(".gz") else nullcontext(raw)


def _read_json_lines(file: BinaryIO, path: epath.Path) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(file, 1):
        text = _decode(line, path, offset)
        offset += len(line)
        if text.strip():
            yield _json_text(text, f"{path}, line {number}")


def _json_text(line: str, where: str) -> str:
    """The "text" of one JSON line."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise GrowkitError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise GrowkitError(f'{where} must be an object with a string under "text"')
    _utf8_bytes(value["text"], where)
    return value["text"]


def _decode(data: bytes, path: epath.Path, offset: int) -> str:
    """Text from bytes that begin at byte `offset` of the file."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise GrowkitError(
            f"{path} is not UTF-8 text: byte {offset + error.start} is 0x{data[error.start]:02x}"
        ) from error


def _local(out: str | os.PathLike) -> Path:
    name = os.fspath(out)
    if "://" in name:
        raise UsageError(f"token files are memory-mapped, so write them to a local disk and not to {name}")
    return Path(os.path.abspath(name))
