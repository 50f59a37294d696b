"""--table: a type that growkit ships no table for grows by a table that was derived for it."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import growkit
import growkit.models
from growkit.checkpoint.location import open_source
from growkit.cli import run
from growkit.derive.derive import load_logits, save
from growkit.derive.proof import BOUND, gap
from growkit.derive.tiny import tiny_fields
from growkit.derive.variant import read_variant
from growkit.errors import GrowkitError
from growkit.models.given import parse_given, use_family
from growkit.models.tables import list_shipped, read_text

torch.set_num_threads(1)
KIND = "olmo2"


@pytest.fixture
def hidden(monkeypatch):
    """growkit ships no table of the type."""
    others = tuple(kind for kind in list_shipped() if kind != KIND)
    monkeypatch.setattr(growkit.models, "list_shipped", lambda: others)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random model of the type, in float64, as transformers saves it."""
    place = tmp_path_factory.mktemp("models") / "source"
    save(read_variant(KIND, tiny_fields(KIND)), place)
    return place


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The table that growkit ships, as a file."""
    place = tmp_path_factory.mktemp("tables") / "olmo2.txt"
    place.write_text(read_text(KIND))
    return place


def test_a_derived_table_grows_a_type_that_is_not_shipped(hidden, source, tmp_path, capsys):
    assert run(["depth", "--map", "3:4", str(source), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    command = re.search(r"`growkit (derive olmo2 --out olmo2.txt)`", said)
    assert command and "--table olmo2.txt takes it" in said, said
    assert run(["inspect", str(source)]) == 1
    assert capsys.readouterr().err == said
    table = tmp_path / "olmo2.txt"
    assert run([*command[1].split()[:-1], str(table)]) == 0
    grown = tmp_path / "grown"
    words = ["width", "--embed", "2x", "--mlp", "40", "--table", str(table), "--check", "64"]
    assert run([*words, str(source), str(grown)]) == 0
    deeper = tmp_path / "deeper"
    words = ["depth", "--map", "3:5", "--method", "identity"]
    # What was grown by a table holds it.
    assert run([*words, str(grown), str(deeper)]) == 0
    for out in (grown, deeper):
        assert gap(load_logits(out), load_logits(source)) < BOUND
    assert "PRESERVED" in capsys.readouterr().out
    assert run(["verify", str(source), str(grown)]) == 0
    assert run(["verify", str(grown), str(deeper)]) == 0


def test_a_growth_states_its_table_and_verify_asks_for_no_other(
    hidden, source, table, tmp_path, capsys
):
    grown = tmp_path / "grown"
    given = ["--table", str(table)]
    assert run(["width", "--mlp", "2x", *given, str(source), str(grown)]) == 0
    (entry,) = json.loads((grown / "lineage.json").read_text())
    assert entry["table"] == table.read_text()
    assert run(["inspect", *given, str(source)]) == 0
    capsys.readouterr()
    assert run(["inspect", str(grown)]) == 0
    assert "note         the table is not one that growkit ships (sha256" in capsys.readouterr().out
    assert run(["diff", *given, str(source), str(grown)]) == 1
    like = ["grow", "--like", str(grown), *given]
    assert run([*like, str(source), str(tmp_path / "like")]) == 0
    config = tmp_path / "config.json"
    config.write_text((grown / "config.json").read_text().replace('_layers": 3', '_layers": 4'))
    assert run(["grow", "--like", str(config), str(grown), str(tmp_path / "deeper")]) == 0
    mean = tmp_path / "mean"
    assert run(["average", str(grown), str(grown / "."), "--out", str(mean)]) == 2
    again = tmp_path / "again"
    assert run(["width", "--mlp", "2x", *given, str(source), str(again)]) == 0
    assert run(["average", str(grown), str(again), "--out", str(mean)]) == 0
    assert open_source(str(mean)).lineage[-1]["table"] == table.read_text()
    assert run(["verify", *given, str(source), str(grown)]) == 0
    other = tmp_path / "other.txt"
    other.write_text(f"{table.read_text()}\n")
    capsys.readouterr()
    assert run(["verify", "--table", str(other), str(source), str(grown)]) == 2
    assert (
        "grown by another table than the one of --table: its own is not one that"
        in capsys.readouterr().err
    )


def test_a_table_holds_while_a_verb_runs_and_not_after(hidden, source, table):
    assert run(["inspect", "--table", str(table), str(source)]) == 0
    assert run(["inspect", str(source)]) == 1


def test_python_takes_a_table_too(hidden, source, table, tmp_path):
    opened = growkit.open_source(source, table=table)
    plan = growkit.plan_width(opened.model, mlp="2x")
    growkit.write_grown(opened, plan, tmp_path / "out")
    grown = growkit.open_source(tmp_path / "out")
    assert grown.model.mlp == 2 * opened.model.mlp


def test_what_is_wrong_with_a_table_is_one_sentence(source, table, tmp_path, capsys):
    def refuse(words, text):
        assert run(words) in (1, 2)
        said = capsys.readouterr().err
        assert text in said and said.count("\n") == 1, said

    absent = tmp_path / "absent.txt"
    refuse(["inspect", "--table", str(absent), str(source)], "there is no table file")
    refuse(["inspect", "--table", str(tmp_path), str(source)], "is no table file, which is text")
    wrong = tmp_path / "wrong.txt"
    for change, text in (
        (("kind = olmo2", "kind = olmo3"), "for 'olmo3' models, and this is a 'olmo2' model"),
        (("norm = rms", "norm = rmss"), "norm is 'layer' or 'rms', got 'rmss'; did you mean 'rms'"),
        (("growkit table 1", "growkit table 9"), "begins with 'growkit table 1'"),
        (("{layer}", "{layers}"), "is one of 'layers', no axis; did you mean 'layer'?"),
        (("embed = hidden_size", "embed = [3]"), "[fields] states a text for embed, got [3]"),
        (("rms_norm_eps = 1e", "norm_eps = 1e"), "[defaults] states no value of rms_norm_eps"),
        (("heads = kv", "heads = kw"), "heads names the axis 'kw', which has no field"),
    ):
        wrong.write_text(table.read_text().replace(*change))
        refuse(["inspect", "--table", str(wrong), str(source)], text)


def test_a_table_of_a_stranger_is_refused_or_read(source, table, tmp_path):
    """Every line left out, and every line cut in half: never anything but growkit's own errors."""
    lines = table.read_text().splitlines()
    refused = 0
    for place, line in enumerate(lines):
        for wrong in ([], [line[: len(line) // 2]]):
            text = "\n".join([*lines[:place], *wrong, *lines[place + 1 :]])
            try:
                family = parse_given(text)
                if family.kind == KIND:
                    with use_family(family):
                        open_source(str(source))
            except GrowkitError:
                refused += 1
    assert refused > len(lines)


@pytest.mark.parametrize(
    "kind,text",
    [
        ("lama", "'lama'; did you mean 'llama'?"),
        ("t5", "it is an encoder and a decoder, and growkit grows decoders"),
        ("vit", "it is an encoder or no model of text"),
        ("llava", "its text decoder is of the type 'llama'; derive that"),
        ("llama4", "the text decoder of llama4 models is of the type 'llama4_text'; derive that"),
        ("bart", "bart models are an encoder and a decoder"),
        ("dbrx", "does not build or run the tiny model that a proof needs ("),
        ("nowhere/llama", "there is no directory nowhere/llama"),
    ],
)
def test_what_cannot_be_derived_is_one_sentence(kind, text, capsys):
    assert run(["derive", kind]) in (1, 2)
    said = capsys.readouterr().err
    assert text in said and said.count("\n") == 1, said


def test_code_of_a_directory_is_never_run(tmp_path, capsys):
    place = tmp_path / "model"
    place.mkdir()
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (place / "config.json").write_text(json.dumps(config))
    (place / "own.py").write_text("raise SystemExit('the code was run')\n")
    assert run(["derive", str(place)]) == 2
    assert "the code that the directory names for it (auto_map) is never run" in (
        capsys.readouterr().err
    )
    (place / "config.json").write_text("{")
    assert run(["derive", str(place)]) == 1
    assert "is not valid JSON" in capsys.readouterr().err
    assert run(["derive", "olmo2", "--out", str(tmp_path / "no" / "x.txt")]) == 2
    assert "there is no directory" in capsys.readouterr().err
