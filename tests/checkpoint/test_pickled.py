"""Directories that hold `pytorch_model.bin` alone grow as those of safetensors do."""

from __future__ import annotations

import builtins
import json
import os

import ml_dtypes
import numpy as np
import pytest
from conftest import SMALL, random_tensors, save_directory

from growkit.checkpoint.location import open_source
from growkit.cli import run

torch = pytest.importorskip("torch")


def as_torch(array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory of safetensors and the same model pickled, in the working directory."""
    monkeypatch.chdir(tmp_path)
    save_directory(tmp_path / "safe", dtype="bfloat16")
    save_directory(tmp_path / "old", dtype="bfloat16")
    (tmp_path / "old/model.safetensors").unlink()
    return tmp_path


def pickle(place):
    """The tensors, and a buffer of whole numbers that old checkpoints carry."""
    tensors = {name: as_torch(array) for name, array in random_tensors(SMALL, "bfloat16").items()}
    tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    return tensors


def check_grows_alike(place):
    for name in ("safe", "old"):
        words = ["depth", "--map", "3:5", name, f"{name}-grown", "--no-sync"]
        assert run(words) == 0
    ours, theirs = (
        (place / name / "model.safetensors").read_bytes() for name in ("safe-grown", "old-grown")
    )
    assert ours == theirs


@pytest.mark.parametrize("archive", [True, False], ids=["mapped", "before torch 1.6"])
def test_one_file_grows_as_safetensors_do(place, archive):
    path = place / "old/pytorch_model.bin"
    torch.save(pickle(place), path, _use_new_zipfile_serialization=archive)
    check_grows_alike(place)
    assert open_source("old").dtype == ml_dtypes.bfloat16


def test_shards_grow_as_safetensors_do(place):
    tensors = pickle(place)
    names = {name: f"pytorch_model-{n % 2 + 1}.bin" for n, name in enumerate(tensors)}
    for file in set(names.values()):
        torch.save({name: tensors[name] for name in names if names[name] == file}, f"old/{file}")
    index = {"metadata": {}, "weight_map": names}
    (place / "old/pytorch_model.bin.index.json").write_text(json.dumps(index))
    check_grows_alike(place)


def test_safetensors_come_first(place):
    (place / "safe/pytorch_model.bin").write_text("not read")
    assert run(["inspect", "safe"]) == 0


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_a_pickle_that_calls_something_is_refused(place, capsys):
    torch.save({"a": Harm()}, place / "old/pytorch_model.bin")
    assert run(["inspect", "old"]) == 1
    assert "torch does not read old/pytorch_model.bin as weights alone" in capsys.readouterr().err
    assert not (place / "harmed").exists()


def test_other_numbers_are_refused(place, capsys):
    tensors = pickle(place)
    name = next(iter(tensors))
    torch.save(tensors | {name: tensors[name].to(torch.int8)}, place / "old/pytorch_model.bin")
    assert run(["inspect", "old"]) == 1
    assert f"the tensor {name!r} has dtype int8" in capsys.readouterr().err


def test_without_torch_a_sentence_says_so(place, capsys, monkeypatch):
    torch.save(pickle(place), place / "old/pytorch_model.bin")
    before = builtins.__import__

    def no_torch(name, *rest, **given):
        if name == "torch":
            raise ImportError(name)
        return before(name, *rest, **given)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    assert run(["inspect", "old"]) == 2
    assert "torch, which is not installed; pip install 'growkit[hf]'" in capsys.readouterr().err
