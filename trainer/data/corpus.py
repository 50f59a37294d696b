"""The data a configuration names: opened, checked against the model and its tokenizer, split for validation.

Knows which windows of which files a run trains and validates on, and says how far it got through them. Leaves
the files to `trainer.data.tokens` and the order of drawing to `trainer.data.stream`.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
from dataclasses import dataclass, replace

from growkit.checkpoint.tensor import Source
from growkit.errors import UsageError, did_you_mean
from trainer.config.sections import Config
from trainer.data.stream import (
    Joined,
    Mixture,
    Stream,
    Windows,
    check_vocabulary,
    join_windows,
    split_windows,
)
from trainer.data.tokens import TokenFile

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Corpus:
    """The data of a run: the mixture to train on, the windows to validate on, and the tokenizer's files."""

    mixture: Mixture
    validation: list[Windows | Joined]
    tokenizer: dict[str, bytes]
    end_of_text: int

    def validation_fingerprint(self, limit: int) -> str:
        """16 hex digits that two runs share when they validate on the same windows."""
        parts = [[*windows.identity] for windows in self.validation]
        return hashlib.sha256(json.dumps([limit, parts]).encode()).hexdigest()[:16]

    def describe(self, sequences: int) -> list[str]:
        """What is trained on, for the log, if so many sequences are drawn by the end."""
        lines = []
        for name, _, windows in self.mixture.parts:
            share = self.mixture.shares[name]
            lines.append(
                f"data {name!r}: {len(windows) * windows.context:,} tokens, {share:.1%} of the sequences, "
                f"{share * sequences / len(windows):.2f} epochs by the end"
            )
        held = sum(len(windows) for windows in self.validation)
        return [*lines, f"validation: {held:,} windows of {self.mixture.context} tokens held out"]

    def describe_drawn(self, stream: Stream, sequences: int) -> str:
        """What the first sequences of a stream were, counted, for the log."""
        counts, epochs = stream.counts(sequences), stream.epochs(sequences)
        parts = (
            f"{name!r} {counts[name] / sequences:.2%} ({epochs[name]:.2f} epochs)"
            for name in counts
        )
        return f"drawn so far, of {sequences:,} sequences: {', '.join(parts)}"


def open_corpus(config: Config, source: Source | None) -> Corpus:
    """Open every token file of a configuration. Raises UsageError where the model or source cannot take them."""
    data, context = config.data, config.model.context
    if not data.train:
        raise UsageError("no data: set data.train=DIR, a directory that `growkit tokenize` wrote")
    train = {path: open_set(path) for path in data.train}
    held = {path: open_set(path) for path in data.validation or {}}
    for opened in itertools.chain(*train.values(), *held.values()):
        check_vocabulary(opened, config.model.vocab)
        check_tokenizer(opened, source)
    fractions = _fractions(config)
    parts, validation = [], []
    for path, weight in data.train.items():
        windows, last = zip(
            *(split_windows(opened, context, data.held_out) for opened in train[path]), strict=True
        )
        if held:
            windows = [
                replace(each, stop=end.stop) for each, end in zip(windows, last, strict=True)
            ]
        else:
            validation.append(join_windows(last))
        parts.append(
            (path, weight, join_windows([each.take_fraction(fractions.get(path, 1.0)) for each in windows]))
        )
    for files in held.values():
        cuts = [split_windows(opened, context, data.held_out) for opened in files]
        validation.append(join_windows([replace(windows, stop=last.stop) for windows, last in cuts]))
    first = next(iter(train.values()))[0]
    manifest = first.manifest or {}
    return Corpus(
        Mixture(tuple(parts)), validation, _tokenizer_files(first), manifest.get("end_of_text", 0)
    )


def open_set(path: str) -> list[TokenFile]:
    """The token files of one data set: one, or all that a pattern as tokens/pile-* names, sorted.

    Raises UsageError when there are none, or when they are some of the shards of a tokenization and not all.
    """
    if os.path.exists(path) or not glob.has_magic(path):
        return [TokenFile.open(path)]
    found = sorted(glob.glob(path))
    if not found:
        raise UsageError(f"no token data matches {path}")
    opened = [TokenFile.open(each) for each in found]
    shards = [(each.manifest or {}).get("shard") for each in opened]
    counts = {shard.partition("/")[2] for shard in shards if shard}
    if len(counts) == 1 and None not in shards:
        count = int(counts.pop())
        wanted = [f"{number}/{count}" for number in range(1, count + 1)]
        wrong = next((shard for shard in wanted if shards.count(shard) != 1), None)
        if wrong:
            raise UsageError(
                f"{path} holds shard {wrong} {shards.count(wrong)} times; each is needed once"
            )
    return opened


def _fractions(config: Config) -> dict[str, float]:
    """data.fraction, checked."""
    fractions = config.data.fraction or {}
    for path, fraction in fractions.items():
        if path not in config.data.train:
            near = did_you_mean(path, config.data.train)
            raise UsageError(f"data.fraction names {path}, which data.train does not{near}")
        if fraction > 1:
            raise UsageError(f"data.fraction: a fraction is at most 1, {path} has {fraction}")
    return fractions


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
