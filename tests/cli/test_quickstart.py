"""The quickstart: it keeps to a directory of its own; the whole of it is slow."""

from __future__ import annotations

import json

import pytest

from growkit.cli import quickstart, run


def test_a_directory_with_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / "note.txt").write_text("mine")
    assert run(["quickstart", "--out", str(tmp_path)]) == 2
    assert "exists and is not a quickstart's" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_a_quickstart_of_other_sizes_is_left_alone(tmp_path, capsys):
    (tmp_path / quickstart.MARK).write_text("{}")
    assert run(["quickstart", "--out", str(tmp_path)]) == 2
    assert "of other sizes" in capsys.readouterr().err


def test_the_standard_library_is_text_everywhere():
    texts = quickstart.read_standard_library(4_000_000)
    assert 2_000_000 < sum(len(text) for _, text in texts) < 6_000_000
    assert all(name.endswith(".py") and text.strip() for name, text in texts)
    assert texts == quickstart.read_standard_library(4_000_000)


def test_the_whole_way_small(tmp_path, capsys, monkeypatch):
    """All six parts with a few steps each, then again from what is there."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(quickstart, "TEXT_BYTES", 300_000)
    monkeypatch.setattr(quickstart, "SOURCE_STEPS", 8)
    monkeypatch.setattr(quickstart, "FURTHER_STEPS", 6)
    monkeypatch.setattr(
        quickstart, "RECIPE", quickstart.RECIPE | {"eval": {"every": 4, "windows": 8}}
    )
    monkeypatch.setattr(
        quickstart,
        "make_schedule",
        lambda steps, warmup, peak: {"schedule": {"steps": steps, "warmup": 2}},
    )
    out = tmp_path / "quickstart"
    assert run(["quickstart", "--out", str(out)]) == 0
    first = capsys.readouterr().out
    assert (
        "small model, trained on for the same compute" in first
        and "logits of transformers and of JAX" in first
    )
    assert "next:\n  growkit inspect " in first
    assert (out / "curves.png").stat().st_size > 10_000 and (out / "table.md").exists()
    config = json.loads((out / "huggingface" / "config.json").read_text())
    assert config["num_hidden_layers"] == quickstart.GROWN_LAYERS
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert run(["quickstart", "--out", str(out)]) == 0
    table = first[first.index("| model") : first.index("further")]
    assert table in capsys.readouterr().out
    assert written == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
