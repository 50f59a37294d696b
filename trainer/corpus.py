"""The data a configuration names: opened, checked against the model and its tokenizer, split for validation.

Knows which windows of which files a run trains and validates on. Leaves the files to `trainer.tokens` and
the order of drawing to `trainer.data`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

from growkit.checkpoint.tensor import Source
from growkit.errors import UsageError
from trainer.config import Config
from trainer.data import Mixture, Windows, check_vocabulary, split
from trainer.tokens import TokenFile

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Corpus:
    """The data of a run: the mixture to train on, the windows to validate on, and the tokenizer's files."""

    mixture: Mixture
    validation: list[Windows]
    tokenizer: dict[str, bytes]
    end_of_text: int

    def validation_fingerprint(self, limit: int) -> str:
        """16 hex digits that two runs share when they validate on the same windows."""
        parts = [[*windows.identity] for windows in self.validation]
        return hashlib.sha256(json.dumps([limit, parts]).encode()).hexdigest()[:16]

    def facts(self) -> list[str]:
        """What is trained on, for the log."""
        lines = []
        for name, _, windows in self.mixture.parts:
            share = self.mixture.shares[name]
            lines.append(f"data {name!r}: {len(windows) * windows.context:,} tokens, {share:.1%} of the sequences")
        held = sum(len(windows) for windows in self.validation)
        return [*lines, f"validation: {held:,} windows of {self.mixture.context} tokens held out"]


def open_corpus(config: Config, source: Source | None) -> Corpus:
    """Open every token file of a configuration. Raises UsageError where the model or source cannot take them."""
    if not config.data.train:
        raise UsageError("no data: set data.train=DIR, a directory that `growkit tokenize` wrote")
    train = {path: TokenFile.open(path) for path in config.data.train}
    held = {path: TokenFile.open(path) for path in config.data.validation or {}}
    for opened in (*train.values(), *held.values()):
        check_vocabulary(opened, config.model.vocab)
        check_tokenizer(opened, source)
    parts, validation = [], []
    for path, weight in config.data.train.items():
        windows, last = split(train[path], config.model.context, config.data.held_out)
        if held:
            windows = replace(windows, stop=last.stop)
        else:
            validation.append(last)
        parts.append((path, weight, windows))
    for opened in held.values():
        windows, last = split(opened, config.model.context, config.data.held_out)
        validation.append(replace(windows, stop=last.stop))
    first = next(iter(train.values()))
    manifest = first.manifest or {}
    return Corpus(Mixture(tuple(parts)), validation, _tokenizer_files(first), manifest.get("end_of_text", 0))


def check_tokenizer(opened: TokenFile, source: Source | None) -> None:
    """Raise UsageError when the data were tokenized with another tokenizer than the source carries."""
    theirs = source.files.get("tokenizer.json") if source else None
    ours = (opened.manifest or {}).get("tokenizer_sha256")
    if theirs is not None and ours is not None and hashlib.sha256(theirs).hexdigest() != ours:
        raise UsageError(
            f"{opened.name} was tokenized with another tokenizer than the one {source.path} carries; "
            f"tokenize the text with --tokenizer from there"
        )


def _tokenizer_files(opened: TokenFile) -> dict[str, bytes]:
    beside = opened.bin_path.parent
    return {name: (beside / name).read_bytes() for name in TOKENIZER if (beside / name).is_file()}
