"""Tokenizers: loaded, or trained on the very text, and what they make of a document.

Knows which ids end a text, how a long document is cut so that its encoding stays the same, and the form in
which `transformers` loads a tokenizer. Leaves files of text to `trainer.data.text` and token files to
`trainer.data.tokenize`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from etils import epath
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from growkit.errors import GrowkitError, UsageError

END_OF_TEXT_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
PADDING = "<|padding|>"
SMALLEST_TRAINED_VOCABULARY = 256 + 2  # every byte, the end of text and the padding

# Encoding takes some 150 bytes of memory a character, so this bounds it to some tens of megabytes a process.
_PIECE_CHARACTERS = 1 << 18
_CUT = re.compile(r"(?<=\S)(?=[ \n]\w)")
_CUTS_TRIED = 16
_CUT_CONTEXT = (
    1000  # characters on each side of a cut that must encode the same with and without it
)


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer and what growkit has to know of it. Make one with `load_tokenizer` or `train_tokenizer`."""

    tokenizer: Tokenizer
    json: bytes  # the tokenizer.json it was made from
    end_of_text: str
    end_of_text_id: int
    vocab_size: int  # one more than the highest id, which can exceed the tokenizer's own count

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32 [tokens], without special tokens added; memory grows with all of them."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def cut_pieces(self, document: str) -> list[str]:
        """A document in pieces of bounded size whose encodings, joined, are the encoding of the whole."""
        return _pieces(document, self._separate)

    def _separate(self, left: str, right: str) -> bool:
        whole, *parts = self.encode([left + right, left, right])
        return np.array_equal(whole, np.concatenate(parts))


def load_tokenizer(path: str | os.PathLike) -> TextTokenizer:
    """Load a tokenizer.json, or the one in a directory; truncation and padding are switched off.

    Raises UsageError when there is none or it has no end-of-text token, GrowkitError when it is broken.
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
    """The tokenizer among the files beside a model. Raises GrowkitError when there is none or it is broken."""
    if "tokenizer.json" not in files:
        raise GrowkitError(
            f"{origin} carries no tokenizer.json, so text cannot be made into tokens; put the one it was trained with "
            f"beside it"
        )
    return _read_tokenizer(files["tokenizer.json"], f"the tokenizer.json of {origin}")


def _read_tokenizer(content: bytes, name: str) -> TextTokenizer:
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises the bare class
        raise GrowkitError(f"{name} is not a tokenizer that can be read: {error}") from error
    return _text_tokenizer(tokenizer, content, name)


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
    pieces = (
        piece for document in documents for piece in _pieces(document, lambda left, right: True)
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return _text_tokenizer(
        tokenizer, tokenizer.to_str(pretty=True).encode(), "the trained tokenizer"
    )


def _text_tokenizer(tokenizer: Tokenizer, content: bytes, name: str) -> TextTokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = next(
        (each for each in END_OF_TEXT_NAMES if tokenizer.token_to_id(each) is not None), None
    )
    if end is None:
        raise UsageError(
            f"{name} has no end-of-text token; looked for {', '.join(END_OF_TEXT_NAMES)}"
        )
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return TextTokenizer(tokenizer, content, end, tokenizer.token_to_id(end), vocab_size)


def _pieces(document: str, separate: Callable[[str, str], bool]) -> list[str]:
    """A long document in pieces.

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


def write_tokenizer(directory: Path, tokenizer: TextTokenizer) -> None:
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
