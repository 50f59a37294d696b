"""The data that a configuration names: opened, checked against the model, split for validation.

`open_corpus` returns what a run trains and validates on; `Corpus` also says, for the log, what was
drawn so far and what will be by the end.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
from dataclasses import dataclass

import numpy as np

from growkit.checkpoint.tensor import Source
from growkit.errors import UsageError, did_you_mean
from trainer.config.sections import Config
from trainer.data.stream import DataSet, Mixture, Stream
from trainer.data.tokens import TokenFile
from trainer.data.windows import AnyWindows, Windows, join_windows, split_windows

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_TOKENS_AT_ONCE = 1 << 24  # tokens in memory at once while the largest id is looked for


@dataclass(frozen=True)
class Corpus:
    """The data of a run."""

    mixture: Mixture  # what to train on
    validation: list[AnyWindows]  # what to validate on
    tokenizer: dict[str, bytes]  # the tokenizer's files, by name
    end_of_text: int  # token id

    def validation_fingerprint(self, limit: int) -> str:
        """16 hex digits, the same for runs that validate on the same windows, `limit` at most."""
        identities = [list(windows.identity) for windows in self.validation]
        key = json.dumps([limit, identities])
        return hashlib.sha256(key.encode()).hexdigest()[:16]

    def describe(self, sequences: int) -> list[str]:
        """Lines for the log: what a run trains on that draws so many sequences in all."""
        lines = []
        for part in self.mixture.parts:
            tokens = len(part.windows) * self.mixture.context
            share = self.mixture.shares[part.name]
            epochs = share * sequences / len(part.windows)
            lines.append(
                f"data {part.name!r}: {tokens:,} tokens, {share:.1%} of the sequences, "
                f"{epochs:.2f} epochs by the end"
            )
        held = sum(len(windows) for windows in self.validation)
        lines.append(f"validation: {held:,} windows of {self.mixture.context} tokens held out")
        return lines

    def describe_drawn(self, stream: Stream, sequences: int) -> str:
        """A line for the log: which data sets the first sequences of a stream came from."""
        counts = stream.counts(sequences)
        epochs = stream.epochs(sequences)
        parts = (
            f"{name!r} {counts[name] / sequences:.2%} ({epochs[name]:.2f} epochs)"
            for name in counts
        )
        return f"drawn so far, of {sequences:,} sequences: {', '.join(parts)}"


def open_corpus(config: Config, source: Source | None) -> Corpus:
    """Open every token file of a configuration.

    source: the model that training begins with, None for a new one. Raises UsageError where the
    data do not fit the model or the source's tokenizer.
    """
    data = config.data
    if not data.train:
        raise UsageError("no data: set data.train=DIR, a directory that `growkit tokenize` wrote")
    train = {path: open_set(path) for path in data.train}
    held = {path: open_set(path) for path in data.validation or {}}
    for token_file in itertools.chain(*train.values(), *held.values()):
        check_vocabulary(token_file, config.model.vocab)
        check_tokenizer(token_file, source)
    if held:
        mixture, validation = _read_separate(config, train, held)
    else:
        mixture, validation = _hold_out(config, train)
    first = next(iter(train.values()))[0]
    end_of_text = (first.manifest or {}).get("end_of_text", 0)
    return Corpus(mixture, validation, _read_tokenizer_files(first), end_of_text)


def _read_separate(
    config: Config, train: dict[str, list[TokenFile]], held: dict[str, list[TokenFile]]
) -> tuple[Mixture, list[AnyWindows]]:
    """Train on all windows of some files, and validate on all windows of others."""
    context = config.model.context
    windows = {
        path: [Windows.all(token_file, context) for token_file in files]
        for path, files in train.items()
    }
    validation = [
        join_windows([Windows.all(token_file, context) for token_file in files])
        for files in held.values()
    ]
    return _make_mixture(config, windows), validation


def _hold_out(
    config: Config, train: dict[str, list[TokenFile]]
) -> tuple[Mixture, list[AnyWindows]]:
    """Train on the first windows of each file, and validate on its last ones."""
    windows: dict[str, list[Windows]] = {}
    validation: list[AnyWindows] = []
    for path, files in train.items():
        splits = [
            split_windows(token_file, config.model.context, config.data.held_out)
            for token_file in files
        ]
        windows[path] = [first for first, _ in splits]
        validation.append(join_windows([last for _, last in splits]))
    return _make_mixture(config, windows), validation


def _make_mixture(config: Config, windows: dict[str, list[Windows]]) -> Mixture:
    """The data sets by path, with the weights and fractions that the configuration gives them."""
    fractions = _check_fractions(config)
    parts = []
    for path, weight in config.data.train.items():
        fraction = fractions.get(path, 1.0)
        some = join_windows([each.take_fraction(fraction) for each in windows[path]])
        parts.append(DataSet(path, weight, some))
    return Mixture(tuple(parts))


def open_set(path: str) -> list[TokenFile]:
    """The token files of one data set: one, or all that a pattern as tokens/pile-* names, sorted.

    Raises UsageError when there are none, or when a shard of the tokenization is missing.
    """
    if os.path.exists(path) or not glob.has_magic(path):
        return [TokenFile.open(path)]
    found = sorted(glob.glob(path))
    if not found:
        raise UsageError(f"no token data matches {path}")
    opened = [TokenFile.open(each) for each in found]
    _check_shards(path, opened)
    return opened


def _check_shards(path: str, opened: list[TokenFile]) -> None:
    """Refuse some of the shards of one tokenization without the others."""
    shards = [(each.manifest or {}).get("shard") for each in opened]
    counts = {shard.partition("/")[2] for shard in shards if shard}
    if None in shards or len(counts) != 1:
        return
    count = int(counts.pop())
    for number in range(1, count + 1):
        shard = f"{number}/{count}"
        if shards.count(shard) != 1:
            raise UsageError(
                f"{path} holds shard {shard} {shards.count(shard)} times; each is needed once"
            )


def _check_fractions(config: Config) -> dict[str, float]:
    """data.fraction, by path. Raises UsageError for unknown paths and fractions above 1."""
    fractions = config.data.fraction or {}
    for path, fraction in fractions.items():
        if path not in config.data.train:
            near = did_you_mean(path, config.data.train)
            raise UsageError(f"data.fraction names {path}, which data.train does not{near}")
        if fraction > 1:
            raise UsageError(f"data.fraction: a fraction is at most 1, {path} has {fraction}")
    return fractions


def check_vocabulary(token_file: TokenFile, vocab_size: int) -> None:
    """Raise UsageError unless a vocabulary of `vocab_size` ids holds every id of the data.

    The manifest says how many ids the tokenizer has; without one all tokens are read.
    """
    if token_file.manifest is not None:
        lowest = 0
        highest = token_file.manifest["vocab_size"] - 1
    else:
        lowest, highest = _find_range(token_file.tokens)
    if lowest < 0:
        raise UsageError(
            f"{token_file.name} has the negative id {lowest}, which no vocabulary holds"
        )
    if highest >= vocab_size:
        raise UsageError(
            f"{token_file.name} comes from a tokenizer whose ids exceed the vocabulary: ids up to "
            f"{highest} need a vocabulary of {highest + 1}, and the model has {vocab_size}"
        )


def _find_range(tokens: np.ndarray) -> tuple[int, int]:
    """The lowest and the highest id, read in bounded memory."""
    starts = range(0, len(tokens), _TOKENS_AT_ONCE)
    parts = [tokens[start : start + _TOKENS_AT_ONCE] for start in starts]
    lowest = min(int(part.min()) for part in parts)
    highest = max(int(part.max()) for part in parts)
    return lowest, highest


def check_tokenizer(token_file: TokenFile, source: Source | None) -> None:
    """Raise UsageError when the data were tokenized with another tokenizer than the source's."""
    if source is None or "tokenizer.json" not in source.files:
        return
    expected = hashlib.sha256(source.files["tokenizer.json"]).hexdigest()
    found = (token_file.manifest or {}).get("tokenizer_sha256")
    if found not in (None, expected):
        raise UsageError(
            f"{token_file.name} was tokenized with another tokenizer than the one {source.path} "
            f"carries; tokenize the text with --tokenizer from there"
        )


def _read_tokenizer_files(token_file: TokenFile) -> dict[str, bytes]:
    """The tokenizer's files beside a token file, by name."""
    directory = token_file.bin_path.parent
    present = [name for name in TOKENIZER if (directory / name).is_file()]
    return {name: (directory / name).read_bytes() for name in present}
