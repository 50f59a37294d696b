"""A run's config.yaml is a configuration; data sets have losses of their own; quiet and JSON."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from runs import SEQUENCES, TINY, recipe, rows, rows_of, same_state, state_of, values

from growkit.checkpoint.location import open_source
from growkit.cli import run
from trainer.config.sections import resolve
from trainer.config.values import read_values
from trainer.data.corpus import Corpus, open_corpus, shorten_names
from trainer.data.stream import count_in_turn
from trainer.log import curves

pytestmark = pytest.mark.usefixtures("compiled_once")

SHORT = {"steps": 4, "warmup": 1}


def short(data, make=values, **sections):
    """A run of four steps on both data sets, of which the first weighs three times as much."""
    train = {str(data / "text"): 3, str(data / "code"): 1}
    every = {"every": 4}
    settled = {"schedule": SHORT, "checkpoint": every, "eval": every | {"windows": 5}}
    return make(data, data={"train": train, "held_out": 0.05}, **settled, **sections)


@pytest.fixture(scope="module")
def first(data, tmp_path_factory):
    """A run on two data sets, begun by a file; what it printed is kept beside it."""
    root = tmp_path_factory.mktemp("given")
    (root / "run.yaml").write_text(yaml.safe_dump(short(data), sort_keys=False))
    assert run(["train", str(root / "run.yaml"), "--out", str(root / "run"), "--quiet"]) == 0
    return root / "run"


def test_a_config_of_a_run_is_given_again(first, tmp_path, capsys):
    config = str(first / "config.yaml")
    assert run(["train", config, "--out", str(tmp_path / "again"), "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["finished"] and found["step"] == 4 and found["validation_loss"] > 0
    assert same_state(state_of(first), state_of(tmp_path / "again"))
    assert rows_of(first) == rows_of(tmp_path / "again")
    # Overrides apply to it as to any other.
    assert resolve(read_values(config, ["schedule.steps=9"])).schedule.steps == 9


def test_a_config_of_a_run_with_a_source_begins_with_it(data, first, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(first, source)
    # The same settings as the first run's, so that it needs no programs of its own.
    same = {"dropout": values(data)["dropout"], "batch": values(data)["batch"]}
    text = yaml.safe_dump(short(data, recipe, **same), sort_keys=False)
    (tmp_path / "recipe.yaml").write_text(text)
    words = ["train", str(tmp_path / "recipe.yaml"), "--from", str(source)]
    assert run([*words, "--out", str(tmp_path / "one")]) == 0
    config = str(tmp_path / "one" / "config.yaml")
    assert run(["train", config, "--out", str(tmp_path / "two")]) == 0
    assert same_state(state_of(tmp_path / "one"), state_of(tmp_path / "two"))
    # The card of what was trained so.
    capsys.readouterr()
    assert run(["export", str(tmp_path / "two"), str(tmp_path / "hf"), "--quiet"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "1. train: from scratch\n2. train: from source@4, after 4 steps and 256 tokens\n" in card
    assert "|  | training 1 | training 2 |" in card
    assert "| data | text (weight 3.0), code (weight 1.0) | text (weight 3.0)" in card
    assert f"| batch | {SEQUENCES} sequences of {TINY.context} tokens |" in card
    assert "| AdamW | betas 0.9 and 0.95, eps 1e-08, weight decay 0.1, clip 1 |" in card
    assert "## Validation loss" in card and card.count("| start |") == 2
    # A source that has changed since is named.
    shutil.rmtree(source)
    assert run(["depth", "--map", "2:4", str(first), str(source)]) == 0
    assert run(["train", config, "--out", str(tmp_path / "three")]) == 2
    assert "which has changed since; --from" in capsys.readouterr().err


def test_each_data_set_has_a_loss_of_its_own(data, first):
    measured = [row for row in rows(first) if row["validation_loss"]]
    assert len(measured) == 2
    for row in measured:
        losses = json.loads(row["validation_losses"])
        # Five windows, in turn: three of the first data set and two of the second.
        mean = (3 * losses["text"] + 2 * losses["code"]) / 5
        assert float(row["validation_loss"]) == pytest.approx(mean, rel=1e-6)
        assert losses["text"] != losses["code"]
    sets = curves.collect_sets(rows(first))
    assert list(sets) == ["text", "code"] and sets["code"][0] == [0.0, 256.0]


def test_windows_are_counted_in_turn():
    assert count_in_turn([range(9), range(1), range(9)], 6) == [3, 1, 2]
    assert count_in_turn([range(2), range(1)], 6) == [2, 1]
    assert shorten_names(["a/books", "b/code/"]) == ["books", "code"]
    assert shorten_names(["a/x", "b/x"]) == ["a/x", "b/x"] and shorten_names(["a", "a/"])


def test_what_was_drawn_is_said_at_the_end_or_where_it_departs(data, tmp_path, capsys):
    corpus = open_corpus(resolve(short(data)), None)
    assert isinstance(corpus, Corpus)
    even = {name: 50 for name in corpus.mixture.shares}

    class Drawn:
        def counts(self, sequences):
            return even

    # Half of each, where three quarters were asked of one.
    assert corpus.departs(Drawn(), 100)
    even.update(zip(even, (75, 25), strict=True))
    assert not corpus.departs(Drawn(), 100)
    values_of = short(data, log={"every": 1})
    values_of["eval"] = {"every": 2, "windows": 5}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values_of, sort_keys=False))
    assert run(["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert said.count("validation loss by data set: text ") == 3
    assert said.count("drawn so far") == 1 and "MFU" not in said
    assert "  step 4/4  loss " in said and "tokens/s" in said and "left 0:00" in said
    # The same windows, or others after a change of them, which is an event.
    config = str(tmp_path / "run" / "config.yaml")
    words = ["--out", str(tmp_path / "next"), "eval.windows=3", "--quiet"]
    start = ["train", config, "--from", str(tmp_path / "run")]
    assert run([*start, *words]) == 0
    assert capsys.readouterr().err == ""
    events = [row["event"] for row in rows(tmp_path / "next") if row["event"]]
    assert events == ["start", "another validation set"]
    assert open_source(str(tmp_path / "next")).model.layer == 2
