"""An export is given away: it names what it was made of, and tells no path of the machine."""

from __future__ import annotations

import json

import pytest
from conftest import save_directory

from convert.privacy import name_path, strip_paths
from growkit.checkpoint.location import open_source
from growkit.cli import run


@pytest.mark.parametrize(
    "path,name",
    [
        ("/home/ann/acme/tokens", "tokens"),
        ("~/runs/a", "a"),
        ("acme/tokens/", "tokens"),
        ("gs://acme-bucket/ann/tokens", "tokens"),
        ("C:\\Users\\ann\\tokens", "tokens"),
        ("/home/ann/run/checkpoints/30", "run@30"),
        ("/c/hub/models--a--pythia-14m/snapshots/0123456789ab", "a/pythia-14m@01234567"),
        ("tokens", "tokens"),
        ("/", "."),
    ],
)  # fmt: skip
def test_names_of_paths(path, name):
    assert name_path(path) == name


def test_values_that_are_no_paths_stay():
    value = {
        "operation": "width",
        "method": "copies of mlp; 1/sqrt(embed) of a /embed b",
        "maps": {"layer": {"index": [0, 1], "share": [1.0, 0.5]}},
        "source": {"fingerprint": "ab/cd", "kind": "checkpoint", "count": 3},
        "optimizer": {"rates": "x0.5 for embed_in/weight"},
        "rate": "12 tokens/s",
    }
    assert strip_paths(value) == value


def test_paths_anywhere_in_an_entry():
    value = {
        "source": {"path": "ann/acme/run"},
        "config": {
            "data": {"train": {"ann/a/tok": 1, "ann/b/tok": 2}, "validation": ["/x/ann/v"]},
            "from": "../ann/run",
            "note": "began from /home/ann/run with care",
        },
        "/home/ann/key": 1,
    }
    stripped = strip_paths(value)
    assert "ann" not in json.dumps(stripped)
    assert stripped["config"]["data"]["train"] == {"tok": 1, "tok (2)": 2}
    assert stripped["config"]["note"] == "began from run with care"


@pytest.mark.parametrize("private", [False, True])
def test_an_export_tells_no_path(tmp_path, private):
    home = tmp_path / "ann.smith" / "acme"
    save_directory(home / "model", _name_or_path=str(home / "base"))
    settings = {"name_or_path": str(home / "tok"), "bos_token": "</s>", "chat_template": "/a/b {x}"}
    (home / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert run(["depth", "--map", "3:4", str(home / "model"), str(home / "grown")]) == 0
    share = tmp_path / "share"
    options = ["--private-lineage"] if private else []
    assert run(["export", str(home / "grown"), str(share), *options]) == 0
    told = {path.name for path in share.iterdir() if b"ann.smith" in path.read_bytes()}
    if private:
        assert told == {"lineage.json", "config.json", "tokenizer_config.json"}
        return
    assert not told
    assert json.loads((share / "config.json").read_text())["_name_or_path"] == "base"
    kept = json.loads((share / "tokenizer_config.json").read_text())
    assert kept["bos_token"] == "</s>" and kept["name_or_path"] == "tok"
    grown = open_source(str(home / "grown"))
    lineage = open_source(str(share)).lineage
    assert lineage[-1]["source"]["fingerprint"] == grown.fingerprint
    assert lineage[-1]["source"]["path"] == "grown"
    assert lineage[0]["maps"] == grown.lineage[0]["maps"]
