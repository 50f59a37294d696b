"""The data that a configuration names: data sets of one file or many, and parts of them."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from growkit.errors import GrowkitError, UsageError
from trainer.config.sections import resolve
from trainer.data.corpus import open_corpus, open_set
from trainer.data.stream import Stream
from trainer.data.text import Shard
from trainer.data.tokenize import tokenize
from trainer.data.tokenizer import train_tokenizer

MODEL = {"layer": 1, "embed": 8, "head": 1, "mlp": 8, "vocab": 300, "context": 8}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A text as a whole, in three shards, and another text."""
    place = tmp_path_factory.mktemp("tokens")
    words = [f"{number} cats sat on {number * 7} mats" for number in range(300)]
    for number, name in enumerate("abc"):
        (place / f"{name}.txt").write_text("\n".join(words[number::3]))
    (place / "given.json").write_bytes(train_tokenizer(words, 280).json)
    files = [place / f"{name}.txt" for name in "abc"]
    tokenize(files, place / "whole", place / "given.json")
    tokenize(files[:1], place / "other", place / "given.json")
    for number in (1, 2, 3):
        tokenize(files, place / f"shard-{number}", place / "given.json", shard=Shard(number, 3))
    return place


def corpus(tokens, train, **data):
    train = {str(tokens / name): weight for name, weight in train.items()}
    return open_corpus(
        resolve({"model": MODEL, "data": {"train": train, "held_out": 0.1} | data}), None
    )


def windows_of(data, number=0):
    windows = data.mixture.parts[number].windows
    return [tuple(windows[each].tolist()) for each in range(len(windows))]


def test_shards_by_a_pattern_are_one_data_set(tokens):
    joined = corpus(tokens, {"shard-*": 1})
    each = corpus(tokens, {f"shard-{number}": 1 for number in (1, 2, 3)})
    assert len(joined.mixture.parts) == len(joined.validation) == 1
    assert windows_of(joined) == [
        window for number in range(3) for window in windows_of(each, number)
    ]
    assert sum(map(len, joined.validation)) == sum(map(len, each.validation))
    assert joined.tokenizer == each.tokenizer


def test_the_shards_are_the_whole(tokens):
    shards = [opened.tokens for opened in open_set(str(tokens / "shard-*"))]
    np.testing.assert_array_equal(np.concatenate(shards), open_set(str(tokens / "whole"))[0].tokens)
    # Two of the three would not be.
    assert sum(map(len, shards[:2])) < len(open_set(str(tokens / "whole"))[0])


def test_a_shard_that_is_missing_is_named(tokens):
    with pytest.raises(UsageError, match="holds shard 3/3 0 times; each is needed once"):
        corpus(tokens, {"shard-[12]": 1})


def test_a_pattern_that_matches_nothing(tokens):
    with pytest.raises(UsageError, match=r"no token data matches .*nothing-\*"):
        corpus(tokens, {"nothing-*": 1})


def test_validation_may_be_a_pattern(tokens):
    data = corpus(tokens, {"other": 1}, validation={str(tokens / "shard-*"): 1})
    assert len(data.validation) == 1
    assert len(data.validation[0]) == sum(
        (len(each) - 1) // 8 for each in open_set(str(tokens / "shard-*"))
    )


def test_a_fraction_of_a_data_set_is_drawn(tokens):
    whole = corpus(tokens, {"whole": 1, "other": 1})
    part = corpus(tokens, {"whole": 1, "other": 1}, fraction={str(tokens / "whole"): 0.25})
    assert windows_of(part) == windows_of(whole)[: round(len(windows_of(whole)) / 4)]
    assert windows_of(part, 1) == windows_of(whole, 1)
    assert part.validation_fingerprint(10) == whole.validation_fingerprint(10)
    assert Stream(part.mixture, 0).fingerprint != Stream(whole.mixture, 0).fingerprint


@pytest.mark.parametrize(
    ("fraction", "fragment"),
    [
        ({"whle": 0.5}, "data.fraction names .*whle, .*did you mean .*whole"),
        ({"whole": 1.5}, "at most 1, .* has 1.5"),
    ],
)
def test_fractions_that_make_no_sense(tokens, fraction, fragment):
    with pytest.raises(UsageError, match=fragment):
        corpus(
            tokens,
            {"whole": 1},
            fraction={str(tokens / name): value for name, value in fraction.items()},
        )


def test_a_list_says_that_its_parts_weigh_the_same(tokens):
    paths = [str(tokens / name) for name in ("whole", "other")]
    data = open_corpus(resolve({"model": MODEL, "data": {"train": paths}}), None)
    (note,) = [line for line in data.describe(400) if "weigh the same" in line]
    assert "the 2 data sets weigh the same, whatever their sizes" in note
    assert "data.mix=proportional" in note
    assert not any("weigh" in line for line in corpus(tokens, {"whole": 3, "other": 1}).describe(9))


def test_a_proportional_mixture_draws_by_size(tokens):
    data = corpus(tokens, {"whole": 1, "other": 1}, mix="proportional")
    sizes = {part.name: len(part.windows) for part in data.mixture.parts}
    drawn = Stream(data.mixture, 0).counts(1000)
    for name, size in sizes.items():
        assert drawn[name] / 1000 == pytest.approx(size / sum(sizes.values()), rel=0.02)
    epochs = list(Stream(data.mixture, 0).epochs(1000).values())
    assert epochs[0] == pytest.approx(epochs[1], rel=0.02)
    assert not any("weigh" in line for line in data.describe(400))
    # Weights say how much more often a text is drawn.
    doubled = corpus(tokens, {"whole": 1, "other": 2}, mix="proportional")
    shares = doubled.mixture.shares
    ratio = 2 * sizes[str(tokens / "other")] / sizes[str(tokens / "whole")]
    assert shares[str(tokens / "other")] / shares[str(tokens / "whole")] == pytest.approx(ratio)


def test_what_is_absurd_is_said(tokens):
    data = corpus(tokens, {"whole": 1}, held_out=0.0)
    said = data.describe(41 * len(data.mixture.parts[0].windows))
    assert any("is repeated 41 times" in line and "teaches nothing more" in line for line in said)
    assert "validation: 1 window of 8 tokens held out" in said
    assert any("a validation loss of 1 window is mostly chance" in line for line in said)
    usual = corpus(tokens, {"whole": 1}).describe(100)
    assert not any(line.startswith("note") for line in usual)


@pytest.mark.parametrize("alike", [True, False])
def test_data_sets_of_different_tokenizers(tokens, tmp_path, alike):
    """Truncation and padding make no other tokenizer."""
    given = json.loads((tokens / "given.json").read_text())
    if alike:
        given["padding"] = None
        text = json.dumps(given, indent=1)
    else:
        text = train_tokenizer(["other words, and more of them"] * 3, 280).json.decode()
    (tmp_path / "given.json").write_text(text)
    tokenize([tokens / "b.txt"], tmp_path / "b", tmp_path / "given.json")
    paths = [str(tokens / "whole"), str(tmp_path / "b")]
    config = resolve({"model": MODEL, "data": {"train": paths}})
    if alike:
        open_corpus(config, None)
        return
    with pytest.raises(UsageError, match="were tokenized with different tokenizers"):
        open_corpus(config, None)


def test_what_was_drawn_is_logged(tokens):
    data = corpus(tokens, {"whole": 3, "other": 1})
    sizes = [len(part.windows) for part in data.mixture.parts]
    said = data.describe_drawn(Stream(data.mixture, 0), 400)
    shares = [float(share) for share in re.findall(r"([\d.]+)%", said)]
    epochs = [float(epoch) for epoch in re.findall(r"\(([\d.]+) epochs\)", said)]
    assert said.startswith("drawn so far, of 400 sequences: ")
    assert shares == pytest.approx([75, 25], rel=0.011)
    assert epochs == pytest.approx([300 / sizes[0], 100 / sizes[1]], rel=0.02)
    facts = data.describe(400)
    assert f"75.0% of the sequences, {300 / sizes[0]:.2f} epochs by the end" in facts[0]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 2471645608\n"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs_is_carried_into_no_run(tokens, tmp_path, name):
    shutil.copytree(tokens / "whole", tmp_path / "whole")
    (tmp_path / "whole" / name).write_text(POINTER)
    with pytest.raises(GrowkitError, match=f"{name} is a Git LFS pointer"):
        _ = corpus(tmp_path, {"whole": 1}).tokenizer
