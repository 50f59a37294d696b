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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from growkit.errors import GrowkitError, UsageError

END_OF_TEXT_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
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

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32 [tokens], without added special tokens.

        Memory grows with the length of all texts together.
        """
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def cut_pieces(self, document: str) -> list[str]:
        """A document in pieces of bounded size.

        The encodings of the pieces, joined, are the encoding of the whole.
        """
        return _cut_pieces(document, self._encodes_apart)

    def _encodes_apart(self, left: str, right: str) -> bool:
        """Whether two texts encode to the same ids apart as together."""
        whole, *parts = self.encode([left + right, left, right])
        return np.array_equal(whole, np.concatenate(parts))


def load_tokenizer(path: str | os.PathLike[str]) -> TextTokenizer:
    """Load a tokenizer.json, or the one in a directory; truncation and padding are switched off.

    Raises UsageError when there is none or it has no end-of-text token, and GrowkitError when it is
    broken.
    """
    file = epath.Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.exists():
        raise UsageError(
            f"no tokenizer at {file}: give a tokenizer.json, or a directory holding one"
        )
    return _read_tokenizer(file.read_bytes(), str(file))


def load_model_tokenizer(files: Mapping[str, bytes], origin: object) -> TextTokenizer:
    """The tokenizer among the files beside a model.

    origin: the model, for messages. Raises GrowkitError when there is none or it is broken.
    """
    if "tokenizer.json" not in files:
        raise GrowkitError(
            f"{origin} carries no tokenizer.json, so text cannot be made into tokens; put the one "
            f"it was trained with beside it"
        )
    return _read_tokenizer(files["tokenizer.json"], f"the tokenizer.json of {origin}")


def _read_tokenizer(content: bytes, name: str) -> TextTokenizer:
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises the bare class
        raise GrowkitError(f"{name} is not a tokenizer that can be read: {error}") from error
    return _make_text_tokenizer(tokenizer, content, name)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Train a byte-level BPE of at most `vocab_size` ids: 0 ends a text, 1 is padding, then bytes.

    The same documents give the same tokenizer. It has fewer ids when the text has too few pairs to
    merge. Raises UsageError when `vocab_size` is below 258: 256 bytes and two special tokens.
    """
    if vocab_size < SMALLEST_TRAINED_VOCABULARY:
        raise UsageError(
            f"a byte-level BPE needs a vocabulary of at least {SMALLEST_TRAINED_VOCABULARY} "
            f"(256 bytes and 2 special tokens), not {vocab_size}"
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
    tokenizer.train_from_iterator(_cut_at_words(documents), trainer)
    content = tokenizer.to_str(pretty=True).encode()
    return _make_text_tokenizer(tokenizer, content, "the trained tokenizer")


def _cut_at_words(documents: Iterable[str]) -> Iterator[str]:
    """Pieces of documents, with the same words: those of a byte-level BPE end at white space."""
    for document in documents:
        yield from _cut_pieces(document, lambda left, right: True)


def _make_text_tokenizer(tokenizer: Tokenizer, content: bytes, name: str) -> TextTokenizer:
    """Switch truncation and padding off, and find the end-of-text token."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    for end in END_OF_TEXT_NAMES:
        end_id = tokenizer.token_to_id(end)
        if end_id is not None:
            return TextTokenizer(tokenizer, content, end, end_id, vocab_size)
    raise UsageError(f"{name} has no end-of-text token; looked for {', '.join(END_OF_TEXT_NAMES)}")


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
    (directory / "tokenizer.json").write_bytes(tokenizer.json)
    end = tokenizer.end_of_text
    config: dict[str, Any] = {
        # The generic class reads tokenizer.json as it is; GPTNeoXTokenizer rebuilds parts of it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
        "clean_up_tokenization_spaces": False,
        # Without this list the generic class adds token types, which GPT-NeoX does not accept.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if tokenizer.tokenizer.token_to_id(PADDING) is not None:
        config["pad_token"] = PADDING
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
