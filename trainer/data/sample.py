"""The first tokens of a text, for a model to be measured on: a file of text, or token files.

Text is made into tokens by the tokenizer beside the model. Where that states a token that ends a
text, it stands between documents, as in what the trainer reads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from growkit.errors import UsageError
from growkit.models.vocabulary import check_ids
from trainer.data.panics import explain_panics
from trainer.data.text import has_text, open_inputs
from trainer.data.tokenizer import find_own_end, parse_model_tokenizer
from trainer.data.tokens import STEM, TokenFile

# Characters of a text that are read for each token that is wanted. Few tokens are longer.
CHARACTERS = 16


@dataclass(frozen=True)
class Sample:
    """The first tokens of a text. name: what the user calls it.

    begin: the token that the tokenizer puts before every text; None for none, and for token files.
    """

    name: str
    ids: np.ndarray
    begin: int | None = None


@dataclass(frozen=True)
class Reader:
    """What reads texts for a model. files: those beside it, by name. origin: the model's name.

    vocab: how many ids the model has.
    """

    files: Mapping[str, bytes]
    origin: str
    vocab: int

    def read(self, name: str, count: int) -> Sample:
        """The first `count` tokens of a text, fewer where it has no more.

        Raises UsageError where there is no such text and where it was tokenized for another model,
        GrowkitError where the model carries no tokenizer that can be read, and for tokens that it
        does not have.
        """
        if _is_token_data(name):
            return Sample(name, self._read_tokens(name, count))
        tokenizer = parse_model_tokenizer(self.files, self.origin, ", or give token files")
        ids = self._encode(name, tokenizer, count)
        check_ids(ids, self.vocab, self.origin, tokenizer.id_to_token)
        return Sample(name, np.asarray(ids, np.int32), _find_begin(tokenizer))

    def _read_tokens(self, name: str, count: int) -> np.ndarray:
        ids = TokenFile.open(name).tokens[:count].astype(np.int64)
        outside = ids[(ids < 0) | (ids >= self.vocab)]
        if outside.size:
            raise UsageError(
                f"{name} has the token {outside[0]}, and the vocabulary of {self.origin} ends at "
                f"{self.vocab - 1}: it was tokenized for another model; give the text itself"
            )
        return ids.astype(np.int32)

    def _encode(self, name: str, tokenizer: Tokenizer, count: int) -> list[int]:
        end = find_own_end(tokenizer, self.files, self.origin)
        ids: list[int] = []
        for document in filter(has_text, open_inputs([name]).read_documents()):
            if ids and end is not None:
                ids.append(end)
            part = document[: CHARACTERS * (count - len(ids))]
            with explain_panics("encoding a text"):
                ids += tokenizer.encode(part, add_special_tokens=False).ids
            if len(ids) >= count:
                break
        return ids[:count]


def _is_token_data(name: str) -> bool:
    """Whether a name is of token files: a directory of them, a pair's prefix, or one of a pair."""
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, f"{STEM}.bin"))
    return name.endswith((".bin", ".idx")) or os.path.isfile(f"{name}.idx")


def _find_begin(tokenizer: Tokenizer) -> int | None:
    """The special token that a tokenizer puts before a text; None where it puts none there."""
    with explain_panics("encoding a text"):
        encoding = tokenizer.encode("a", add_special_tokens=True)
    if not encoding.ids or not encoding.special_tokens_mask[0]:
        return None
    begin: int = encoding.ids[0]
    return begin
