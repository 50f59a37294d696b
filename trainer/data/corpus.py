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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from growkit.checkpoint.files import refuse_pointer
from growkit.checkpoint.tensor import Source
from growkit.errors import UsageError, did_you_mean
from trainer.config.sections import Config
from trainer.data.checked import check_content
from trainer.data.stream import DataSet, Mixture, Stream
from trainer.data.tokens import TokenFile
from trainer.data.windows import AnyWindows, Windows, join_windows, split_windows

# Muennighoff et al. (2023), Scaling Data-Constrained Language Models, section 6: repeating is
# nearly as good as new text for 4 epochs, and worth nothing after about 40.
MANY_EPOCHS = 40
FEW_WINDOWS = 8
DEPARTURE = 0.01  # of all sequences
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Corpus:
    """The data of a run."""

    mixture: Mixture  # what to train on
    validation: list[AnyWindows]  # what to validate on
    validation_names: list[str]  # of the data sets that those windows are of
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
                f"{epochs:,.2f} epochs by the end"
            )
            if epochs > MANY_EPOCHS:
                lines.append(
                    f"note: {part.name!r} is repeated {epochs:,.0f} times, and after about "
                    f"{MANY_EPOCHS} epochs text teaches nothing more; take more text, or a "
                    f"smaller schedule.steps"
                )
        lines += self._describe_weights()
        held = sum(len(windows) for windows in self.validation)
        lines.append(
            f"validation: {_count_windows(held)} of {self.mixture.context} tokens held out"
        )
        if held < FEW_WINDOWS:
            lines.append(
                f"note: a validation loss of {_count_windows(held)} is mostly chance; hold out "
                f"more with data.held_out, or name data.validation"
            )
        return lines

    def _describe_weights(self) -> list[str]:
        """A line about weights that are equal though sizes are not; none where it is clear."""
        parts = self.mixture.parts
        sizes = [len(part.windows) for part in parts]
        equal = len({part.weight for part in parts}) == 1
        if not equal or max(sizes) < 1.5 * min(sizes):
            return []
        return [
            f"note: the {len(parts)} data sets weigh the same, whatever their sizes; give weights "
            f"as data.train={{PATH: WEIGHT}}, or data.mix=proportional for all text alike"
        ]

    def departs(self, stream: Stream, sequences: int) -> bool:
        """Whether what was drawn from a data set is not its share, by more than DEPARTURE."""
        counts = stream.counts(sequences)
        # One sequence more or less is what whole numbers cost.
        allowed = 1 + DEPARTURE * sequences
        shares = self.mixture.shares
        return any(abs(counts[name] - shares[name] * sequences) > allowed for name in counts)

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
    opened = list(itertools.chain(*train.values(), *held.values()))
    for token_file in opened:
        check_tokenizer(token_file, source)
    _check_one_tokenizer(opened)
    for token_file in opened:
        check_vocabulary(token_file, config.model.vocab)
    if held:
        mixture, validation = _read_separate(config, train, held)
    else:
        mixture, validation = _hold_out(config, train)
    first = next(iter(train.values()))[0]
    end_of_text = (first.manifest or {}).get("end_of_text", 0)
    names = shorten_names(list(held or train))
    return Corpus(mixture, validation, names, _read_tokenizer_files(first), end_of_text)


def shorten_names(paths: Sequence[str]) -> list[str]:
    """As many of the last parts of each path as tell it from all others: books, code."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


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
        if config.data.mix == "proportional":
            # Each text is drawn as often as any other, times its weight.
            weight *= len(some)
        parts.append(DataSet(path, weight, some))
    return Mixture(tuple(parts))


def _count_windows(count: int) -> str:
    return "1 window" if count == 1 else f"{count:,} windows"


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
    """Raise UsageError unless a vocabulary of `vocab_size` ids holds every id that occurs.

    Raises GrowkitError where the file is not what its manifest says. A tokenizer may have more
    tokens than the model, as one for padding, as long as no text has them.
    """
    content = check_content(token_file)
    if content.lowest < 0:
        raise UsageError(
            f"{token_file.name} has the negative id {content.lowest}, which no vocabulary holds"
        )
    if content.highest >= vocab_size:
        raise UsageError(
            f"{token_file.name} has ids that exceed the vocabulary: ids up to {content.highest} "
            f"occur, which need a vocabulary of {content.highest + 1}, and the model has "
            f"{vocab_size}"
        )


def check_tokenizer(token_file: TokenFile, source: Source | None) -> None:
    """Raise UsageError when the data were tokenized with another tokenizer than the source's."""
    if source is None or "tokenizer.json" not in source.files:
        return
    theirs = source.files["tokenizer.json"]
    found = (token_file.manifest or {}).get("tokenizer_sha256")
    if found in (None, hashlib.sha256(theirs).hexdigest()):
        return
    ours = _read_tokenizer_files(token_file).get("tokenizer.json", b"")
    if not encode_alike(ours, theirs):
        raise UsageError(
            f"{token_file.name} was tokenized with another tokenizer than the one {source.path} "
            f"carries; tokenize the text with --tokenizer from there"
        )


def _check_one_tokenizer(token_files: Iterable[TokenFile]) -> None:
    """Raise UsageError when data sets were tokenized with different tokenizers."""
    first: tuple[TokenFile, str] | None = None
    for token_file in token_files:
        found = (token_file.manifest or {}).get("tokenizer_sha256")
        if found is None:
            continue
        if first is None:
            first = (token_file, found)
        if found != first[1]:
            one, other = (
                _read_tokenizer_files(each).get("tokenizer.json", b"")
                for each in (first[0], token_file)
            )
            if not encode_alike(one, other):
                raise UsageError(
                    f"{first[0].name} and {token_file.name} were tokenized with different "
                    f"tokenizers, so the same ids mean other tokens; tokenize both with one"
                )


def encode_alike(one: bytes, other: bytes) -> bool:
    """Whether two tokenizer.json differ in nothing but what is not obeyed: truncation, padding."""
    contents = []
    for each in (one, other):
        try:
            content = json.loads(each)
        except (ValueError, RecursionError):
            return False
        if not isinstance(content, dict):
            return False
        contents.append(content | {"truncation": None, "padding": None})
    return bool(contents[0] == contents[1])


def _read_tokenizer_files(token_file: TokenFile) -> dict[str, bytes]:
    """The tokenizer's files beside a token file, by name."""
    directory = token_file.bin_path.parent
    present = [directory / name for name in TOKENIZER if (directory / name).is_file()]
    contents = {path: path.read_bytes() for path in present}
    for path, content in contents.items():
        refuse_pointer(content, path)
    return {path.name: content for path, content in contents.items()}
