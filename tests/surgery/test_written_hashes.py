"""Hashes of what was written: damage is found before a model is used, and verify says which side
changed.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import xxhash
from conftest import SMALL, random_tensors, save_checkpoint, save_directory, save_tensors

from growkit.checkpoint import raw, reading
from growkit.checkpoint.location import open_source
from growkit.cli import run
from growkit.growth.depth import plan_depth
from growkit.surgery.grow import prepare_growth


@pytest.fixture
def place(tmp_path, monkeypatch):
    save_directory(tmp_path / "model")
    save_checkpoint(tmp_path / "ck")
    monkeypatch.chdir(tmp_path)
    return tmp_path


WAYS = {
    "depth": ["depth", "--map", "3:5"],
    "width": ["width", "--embed", "2x", "--mlp", "3x"],
    "padded": ["width", "--embed", "40", "--method", "pad", "--heads", "5"],
}


@pytest.mark.parametrize("words", WAYS.values(), ids=WAYS)
def test_every_tensor_of_a_directory_has_its_hash(place, words):
    assert run([*words, "model", "out"]) == 0
    stated = json.loads((place / "out" / "lineage.json").read_text())[-1]["hashes"]
    assert stated["algorithm"] == "xxh3_64"
    tensors = open_source("out").tensors["params"]
    assert stated["arrays"] == {
        name: xxhash.xxh3_64_hexdigest(tensor.read().tobytes()) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("words", WAYS.values(), ids=WAYS)
def test_every_array_of_a_checkpoint_has_its_hash(place, words):
    assert run([*words, "ck", "out"]) == 0
    stated = json.loads((place / "out" / "meta" / "metadata").read_text())["hashes"]
    state = place / "out" / "state"
    assert stated["arrays"] == {
        directory.name: xxhash.xxh3_64_hexdigest(next(directory.glob("[0-9]*")).read_bytes())
        for directory in state.iterdir()
        if directory.is_dir()
    }
    assert {"count", "nu.layers.mlp.dense_h_to_4h.weight"} <= stated["arrays"].keys()


def test_hashes_are_of_one_output_only(place):
    assert run([*WAYS["depth"], "model", "a"]) == 0
    assert run(["depth", "--map", "5:6", "a", "b"]) == 0
    lineage = json.loads((place / "b" / "lineage.json").read_text())
    assert ["hashes" in entry for entry in lineage] == [False, True]
    assert run(["import", "b", "c"]) == 0
    meta = json.loads((place / "c" / "meta" / "metadata").read_text())
    assert not any("hashes" in entry for entry in meta["lineage"]) and "hashes" in meta


def flip(path, at: int = 9) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


USES = {
    "depth": ["depth", "--map", "3:5", "ck", "out"],
    "width": ["width", "--embed", "2x", "ck", "out"],
    "export": ["export", "ck", "out"],
    "average": ["average", "ck", "other", "--out", "out"],
}


@pytest.mark.parametrize("words", USES.values(), ids=USES)
@pytest.mark.parametrize("array", ["params.layers.mlp.dense_4h_to_h.bias/0.0", "count/0"])
def test_one_flipped_bit_is_found_before_anything_is_written(place, capsys, words, array):
    save_checkpoint(place / "other", seed=5)
    flip(place / "ck" / "state" / array, 2)
    assert run(words) == 1
    err = capsys.readouterr().err
    assert f"ck is damaged: the bytes of '{array.split('/')[0]}'" in err and "--no-verify" in err
    assert not (place / "out").exists()
    assert run([*words, "--no-verify"]) == 0


def test_a_grown_directory_is_checked_too(place, capsys):
    assert run([*WAYS["depth"], "model", "out"]) == 0
    flip(place / "out" / "model.safetensors", -5)
    assert run(["depth", "--map", "5:6", "out", "more"]) == 1
    assert "out is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("hashes", [[1], {"arrays": {}}, {"algorithm": "xxh3_64", "arrays": [1]}])
def test_hashes_that_are_none(place, capsys, hashes):
    path = place / "ck" / "meta" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hashes": hashes}))
    assert run(["inspect", "ck"]) == 1
    assert '"hashes" must hold an algorithm' in capsys.readouterr().err


@pytest.mark.parametrize("side", ["source", "output"])
@pytest.mark.parametrize("kind", ["model", "ck"])
def test_verify_says_which_side_changed(place, capsys, side, kind):
    assert run([*WAYS["depth"], kind, "out"]) == 0
    path = place / (kind if side == "source" else "out")
    if kind == "model":
        flip(path / "model.safetensors", -2000)
    else:
        flip(path / "state" / "params.layers.mlp.dense_4h_to_h.weight" / "0.0.0", 4000)
    capsys.readouterr()
    assert run(["verify", kind, "out"]) == 1
    err = capsys.readouterr().err
    if side == "output":
        assert "out was changed after it was written" in err
    else:
        assert f"out is byte for byte what was written, so {kind} is not what it was" in err


def test_an_older_checkpoint_without_hashes_is_used_as_before(place):
    path = place / "ck" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta["hashes"]
    path.write_text(json.dumps(meta))
    assert open_source("ck").hashed is None
    assert run([*WAYS["depth"], "ck", "out"]) == 0


def test_a_large_tensor_is_hashed_piece_by_piece(tmp_path):
    """Several pieces of a mebibyte a tensor, in order and not."""
    model = SMALL.change(embed=512, mlp=2048, vocab=3000)
    path = save_directory(tmp_path / "model", model)
    save_tensors(path / "model.safetensors", random_tensors(model))
    for number, words in enumerate((WAYS["depth"], ["width", "--embed", "2x"])):
        out = tmp_path / f"out{number}"
        assert run([*words, str(path), str(out)]) == 0
        assert open_source(str(out)).hashed.find_changed() == []
    source = open_source(str(path))
    recipes = prepare_growth(source, plan_depth(source.model, "3:4")).recipes["params"]
    assert max(recipe.size for recipe in recipes.values()) > 4 << 20
    assert all(np.dtype(recipe.dtype) == np.float32 for recipe in recipes.values())


@pytest.mark.parametrize("words", [WAYS["depth"], ["width", "--embed", "2x"], ["export"]])
def test_comparing_takes_no_second_read(place, monkeypatch, words):
    read = []

    def count(file, buffer, offset, path):
        read.append(len(buffer))
        raw_read(file, buffer, offset, path)

    raw_read = raw.read_into
    for module in (raw, reading):
        monkeypatch.setattr(module, "read_into", count)
    totals = []
    for number, options in enumerate((["--no-verify"], [])):
        read.clear()
        assert run([*words, *options, "ck", f"out{number}"]) == 0
        totals.append(sum(read))
    # What the output has no use for is not read for its hash either: growth in depth that does not
    # preserve the function begins with mu zero, and an export has no moments. 100 bytes are
    # counters.
    assert totals[0] > 0 and totals[1] <= totals[0] + 100


def test_layers_in_another_order_are_compared(place, capsys):
    words = ["depth", "--map", "2,1,0,1"]
    assert run([*words, "ck", "out"]) == 0
    flip(place / "ck" / "state" / "params.layers.mlp.dense_4h_to_h.weight" / "0.0.0", 4000)
    assert run([*words, "ck", "other"]) == 1
    assert "ck is damaged" in capsys.readouterr().err and not (place / "other").exists()
