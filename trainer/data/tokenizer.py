"""Tokenizers: loaded from a file or trained on the text, and how they encode a document.

A long document is cut into pieces that encode to the same ids as the whole. A tokenizer is written
in the form in which `transformers` loads it.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from growkit.checkpoint.files import LFS_POINTER
from growkit.errors import GrowkitError, UsageError
from growkit.models.vocabulary import check_ids
from trainer.data.panics import explain_panics
from trainer.data.special import (
    CONFIG,
    KEPT,
    USUAL_ENDS,
    Beside,
    choose_end_of_text,
    find_model_end_of_text,
    read_beside,
)
from trainer.data.tokenizer_files import FILE, find_tokenizer

PADDING = "<|padding|>"
SMALLEST_TRAINED_VOCABULARY = 256 + 2  # every byte, the end of text and the padding

# Encoding takes about 150 bytes of memory per character: this bounds it to about 40 MB a process.
_PIECE_CHARACTERS = 1 << 18
_CUT = re.compile(r"(?<=\S)(?=[ \n]\w)")
_CUTS_TRIED = 16
# Characters on each side of a cut that must encode the same with and without the cut.
_CUT_CONTEXT = 1000


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer and its special ids. Made by `load_tokenizer` or `train_tokenizer`."""

    tokenizer: Tokenizer
    json: bytes  # the tokenizer.json that it was made from
    end_of_text: str
    end_of_text_id: int
    vocab_size: int  # highest id + 1, which can be more than the tokenizer's own count
    beside: Beside = Beside({})  # what lies beside the tokenizer.json

    def __reduce__(self) -> tuple[Any, ...]:
        """What is sent to another process: the file, from which the tokenizer is made again."""
        more = (self.end_of_text, self.end_of_text_id, self.vocab_size, self.beside)
        return _restore, (self.json, *more)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32 [tokens], without added special tokens.

        Memory grows with the length of all texts together. Raises GrowkitError where the library
        fails, as with a pattern that does not come to an end.
        """
        with explain_panics("encoding a text"):
            encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_for_model(self, text: str, special: bool, vocab: int, model: object) -> list[int]:
        """The ids of a text, with the tokenizer's special tokens where `special`.

        Raises GrowkitError for a token that a vocabulary of `vocab` ids does not have.
        """
        with explain_panics("encoding a text"):
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        check_ids(ids, vocab, model, self.tokenizer.id_to_token)
        return ids

    def cut_pieces(self, document: str) -> list[str]:
        """A document in pieces of bounded size.

        The encodings of the pieces, joined, are the encoding of the whole.
        """
        return _cut_pieces(document, self._encodes_apart)

    def _encodes_apart(self, left: str, right: str) -> bool:
        """Whether two texts encode to the same ids apart as together."""
        whole, *parts = self.encode([left + right, left, right])
        return np.array_equal(whole, np.concatenate(parts))


def _restore(
    content: bytes, end_of_text: str, end_of_text_id: int, vocab_size: int, beside: Beside
) -> TextTokenizer:
    """A tokenizer that was sent from another process."""
    tokenizer = parse_tokenizer(content, FILE)
    return TextTokenizer(tokenizer, content, end_of_text, end_of_text_id, vocab_size, beside)


def load_tokenizer(path: str | os.PathLike[str], end_of_text: str | None = None) -> TextTokenizer:
    """Load a tokenizer of any form that `trainer.data.tokenizer_files` finds, by path or Hub id.

    Truncation and padding that are saved with it are left out. end_of_text: the token that ends a
    text; None for the one that the tokenizer's files state. Raises UsageError when there is no
    tokenizer or no such token, and GrowkitError for broken files.
    """
    found = find_tokenizer(path)
    tokenizer = parse_tokenizer(found.content, found.name)
    settings = read_beside(found.beside, found.folder)
    if settings.stated is None and found.end is not None:
        settings = replace(settings, stated=(found.end, found.name))
    end = choose_end_of_text(tokenizer, found.name, settings, end_of_text)
    return _make_text_tokenizer(tokenizer, found.content, end, settings)


def load_model_tokenizer(
    files: Mapping[str, bytes], origin: object, config: Mapping[str, Any] | None = None
) -> TextTokenizer:
    """The tokenizer among the files beside a model.

    origin: the model, for messages. config: the model's configuration. Raises GrowkitError when
    there is no tokenizer or it is broken.
    """
    tokenizer = parse_model_tokenizer(files, origin)
    beside = read_beside(files, str(origin))
    model_id = (config or {}).get("eos_token_id")
    end = find_model_end_of_text(tokenizer, _name_model_tokenizer(origin), beside, model_id)
    return _make_text_tokenizer(tokenizer, files[FILE], end, beside)


def parse_model_tokenizer(
    files: Mapping[str, bytes], origin: object, instead: str = ""
) -> Tokenizer:
    """The tokenizer among the files beside a model, whether it names an end of text or not.

    origin: the model, for messages. instead: what else may be given where there is none. Raises
    GrowkitError when there is no tokenizer or it is broken.
    """
    if FILE not in files:
        raise GrowkitError(
            f"{origin} carries no {FILE}, so text cannot be made into tokens; put the one it was "
            f"trained with beside it{instead}"
        )
    return parse_tokenizer(files[FILE], _name_model_tokenizer(origin))


def _name_model_tokenizer(origin: object) -> str:
    return f"the {FILE} of {origin}"


def find_own_end(tokenizer: Tokenizer, files: Mapping[str, bytes], origin: object) -> int | None:
    """The id that ends a text by the files beside a model; None where they state none."""
    beside = read_beside(files, str(origin))
    return tokenizer.token_to_id(beside.stated[0]) if beside.stated else None


def parse_tokenizer(content: bytes, name: str) -> Tokenizer:
    """A tokenizer that encodes the whole of a text, and always in the same way.

    Of what is saved in a tokenizer.json, truncation, padding and the dropout of merges are
    switched off: they are settings of somebody's training. Raises GrowkitError for a broken one.
    """
    if content.startswith(LFS_POINTER):
        raise GrowkitError(
            f"{name} is a Git LFS pointer and no tokenizer; `git lfs pull` brings the file itself"
        )
    try:
        with explain_panics(name):
            tokenizer = Tokenizer.from_str(content.decode())
    except GrowkitError:
        raise
    except Exception as error:  # the library raises the bare class
        raise GrowkitError(f"{name} is not a tokenizer that can be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, end_of_text: str | None = None
) -> TextTokenizer:
    """Train a byte-level BPE of at most `vocab_size` ids: 0 ends a text, 1 is padding, then bytes.

    end_of_text: the name of the token that ends a text, <|endoftext|> unless another is given. The
    same documents give the same tokenizer. It has fewer ids when the text has too few pairs to
    merge. Raises UsageError when `vocab_size` is below 258: 256 bytes and two special tokens.
    """
    if vocab_size < SMALLEST_TRAINED_VOCABULARY:
        raise UsageError(
            f"a byte-level BPE needs a vocabulary of at least {SMALLEST_TRAINED_VOCABULARY} "
            f"(256 bytes and 2 special tokens), not {vocab_size}"
        )
    end = end_of_text or USUAL_ENDS[0]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_cut_at_words(documents), trainer)
    content = tokenizer.to_str(pretty=True).encode()
    return _make_text_tokenizer(tokenizer, content, end, Beside({}))


def _cut_at_words(documents: Iterable[str]) -> Iterator[str]:
    """Pieces of documents, with the same words: those of a byte-level BPE end at white space."""
    for document in documents:
        yield from _cut_pieces(document, lambda left, right: True)


def _make_text_tokenizer(
    tokenizer: Tokenizer, content: bytes, end: str, beside: Beside
) -> TextTokenizer:
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    end_id: int = tokenizer.get_vocab(with_added_tokens=True)[end]
    return TextTokenizer(tokenizer, content, end, end_id, vocab_size, beside)


def _cut_pieces(document: str, can_cut: Callable[[str, str], bool]) -> list[str]:
    """A long document in pieces, because encoding takes much memory per character.

    It is cut before white space, where `can_cut(left, right)` agrees to the text on both sides.
    When it agrees to none of the places that are tried, the rest stays in one piece.
    """
    pieces = []
    start = 0
    while len(document) - start > _PIECE_CHARACTERS:
        cut = _find_cut(document, start + _PIECE_CHARACTERS, can_cut)
        if cut is None:
            break
        pieces.append(document[start:cut])
        start = cut
    pieces.append(document[start:])
    return pieces


def _find_cut(document: str, start: int, can_cut: Callable[[str, str], bool]) -> int | None:
    """The first place from `start` on where the document may be cut, of the few that are tried."""
    for match in itertools.islice(_CUT.finditer(document, start), _CUTS_TRIED):
        cut = match.start()
        left = document[max(0, cut - _CUT_CONTEXT) : cut]
        right = document[cut : cut + _CUT_CONTEXT]
        if can_cut(left, right):
            return cut
    return None


def write_tokenizer(directory: Path, tokenizer: TextTokenizer) -> None:
    """Write the tokenizer, byte for byte, and the file by which `transformers` loads it."""
    (directory / FILE).write_bytes(tokenizer.json)
    config: dict[str, Any] = {
        # The generic class reads tokenizer.json as it is; GPTNeoXTokenizer rebuilds parts of it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        # Without this list the generic class adds token types, which GPT-NeoX does not accept.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    config |= _name_special_tokens(tokenizer)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _name_special_tokens(tokenizer: TextTokenizer) -> dict[str, Any]:
    """The special tokens as the tokenizer's own configuration names them.

    Without one, the end of text also begins a text and stands for the unknown, as in GPT-NeoX.
    """
    end = tokenizer.end_of_text
    stated = tokenizer.beside.config
    if stated:
        kept = {key: stated[key] for key in KEPT if stated.get(key) is not None}
        return kept | {"eos_token": end}
    tokens = {"bos_token": end, "eos_token": end, "unk_token": end}
    if tokenizer.tokenizer.token_to_id(PADDING) is not None:
        tokens["pad_token"] = PADDING
    return tokens
