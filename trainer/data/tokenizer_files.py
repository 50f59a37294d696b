"""Where a tokenizer lies: a tokenizer.json, files that make one, a directory of them, a Hub id.

Whatever is given becomes the bytes of a tokenizer.json, and the files beside it that say more.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from etils import epath

from growkit.checkpoint.files import is_remote
from growkit.checkpoint.hub import download_from_hub, is_hub_id
from growkit.errors import UsageError
from trainer.data.special import CONFIG, MAP
from trainer.data.tokenizer_forms import (
    ADDED,
    MERGES,
    SENTENCEPIECE,
    VOCAB,
    convert_sentencepiece,
    join_vocabulary,
)

FILE = "tokenizer.json"
# What is fetched of a model of the Hub: all that a tokenizer can be made of, and no weights.
HUB_FILES = (FILE, CONFIG, MAP, ADDED, VOCAB, MERGES, f"*{SENTENCEPIECE}", "config.json")
FORMS = (
    f"a {FILE}, a {VOCAB} with a {MERGES} beside it, a SentencePiece {SENTENCEPIECE}, a directory "
    f"holding one of them, or a Hub id as OWNER/NAME"
)
_VOCAB_NAME = re.compile(r"(.*)(?:vocab\.json|merges\.txt)")


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as it was found.

    content: the bytes of its tokenizer.json. name: of the file that it was read from, for messages.
    beside: the files by name that say more of it. end: the token that ends a text, where the
    tokenizer's own format names it.
    """

    content: bytes
    name: str
    beside: Mapping[str, bytes] = field(default_factory=dict)
    end: str | None = None

    @property
    def folder(self) -> str:
        """The directory that the tokenizer lies in."""
        return os.path.dirname(self.name) or "."


def find_tokenizer(path: str | os.PathLike[str]) -> TokenizerFiles:
    """The tokenizer that a path or a Hub id names.

    Raises UsageError where there is none or a package is missing, GrowkitError for broken files and
    where the Hub cannot be reached.
    """
    file = epath.Path(os.path.expanduser(path))
    if file.is_dir():
        return _search_directory(file)
    if file.exists() if is_remote(file) else os.path.isfile(file):
        return _read_file(file)
    text = os.fspath(path)
    # A directory of the owner's name is here: then the path was meant to lie in it.
    if is_hub_id(text) and not Path(text.split("/")[0]).exists():
        hint = f"; give {FORMS}"
        return _search_directory(epath.Path(download_from_hub(text, HUB_FILES, hint)))
    raise UsageError(f"no tokenizer at {file}: give {FORMS}")


def _search_directory(folder: epath.Path) -> TokenizerFiles:
    """The tokenizer in a directory: its tokenizer.json before anything else."""
    for name in (FILE, VOCAB):
        if (folder / name).exists() and (name == FILE or (folder / MERGES).exists()):
            return _read_file(folder / name)
    models = sorted(child for child in folder.iterdir() if child.name.endswith(SENTENCEPIECE))
    if len(models) > 1:
        raise UsageError(
            f"{folder} holds {', '.join(model.name for model in models)}; name the one that is the "
            f"tokenizer"
        )
    if models:
        return _read_file(models[0])
    raise UsageError(f"no tokenizer at {folder / FILE}: give {FORMS}")


def _read_file(file: epath.Path) -> TokenizerFiles:
    """The tokenizer in a file, by the file's name."""
    beside = {name: (file.parent / name).read_bytes() for name in _list_beside(file)}
    if file.name.endswith(SENTENCEPIECE):
        content, end = convert_sentencepiece(file, beside)
        return TokenizerFiles(content, str(file), beside, end)
    named = _VOCAB_NAME.fullmatch(file.name)
    if named:
        vocab = file.parent / f"{named[1]}{VOCAB}"
        merges = file.parent / f"{named[1]}{MERGES}"
        for half in (vocab, merges):
            if not half.exists():
                raise UsageError(f"{file} is half of a tokenizer: {half} is missing")
        return TokenizerFiles(join_vocabulary(vocab, merges, beside), str(vocab), beside)
    return TokenizerFiles(file.read_bytes(), str(file), beside)


def _list_beside(file: epath.Path) -> list[str]:
    """The names of the files beside a tokenizer that say more of it."""
    # Another name is one of several tokenizers in a directory, and what lies there is of none.
    if file.name not in (FILE, VOCAB, MERGES) and not file.name.endswith(SENTENCEPIECE):
        return []
    return [name for name in (CONFIG, MAP, ADDED) if (file.parent / name).exists()]
