"""Directories that hold `pytorch_model.bin` alone grow as those of safetensors do."""

from __future__ import annotations

import json
import os
import subprocess
import sys

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
    said = capsys.readouterr().err
    assert "old/pytorch_model.bin names posix.system" in said and "nothing of it was run" in said
    assert not (place / "harmed").exists()


def test_other_numbers_are_refused(place, capsys):
    tensors = pickle(place)
    name = next(iter(tensors))
    torch.save(tensors | {name: tensors[name].to(torch.int8)}, place / "old/pytorch_model.bin")
    assert run(["inspect", "old"]) == 1
    assert f"the tensor {name!r} has dtype int8" in capsys.readouterr().err


def test_torch_is_not_needed(place):
    torch.save(pickle(place), place / "old/pytorch_model.bin")
    code = (
        "import sys; from growkit.cli import run\n"
        "assert run(['depth', '--map', '3:5', 'old', 'out', '--no-sync']) == 0\n"
        "assert not {'torch', 'transformers', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "content,said",
    [
        ([1, 2], "holds no tensors by name, but a list"),
        ({"a": torch.zeros(3, 2).T}, "has the strides [1, 2] for the shape [2, 3]"),
    ],
)
def test_what_is_no_dict_of_plain_tensors(place, capsys, content, said):
    torch.save(content, place / "old/pytorch_model.bin")
    assert run(["inspect", "old"]) == 1
    assert said in capsys.readouterr().err


def cut(data):
    return data[:-4]


def other_magic(data):
    return data.replace(b"\x6c\xfc\x9c\x46", b"\x6c\xfc\x9c\x47", 1)


def other_order(data):
    place = data.index(b"\x88", data.index(b"little_endian"))
    return data[:place] + b"\x89" + data[place + 1 :]


def other_count(data):
    """The last storage says that it is longer than its tensor."""
    last = random_tensors(SMALL, "bfloat16")["embed_out.weight"]
    place = data.index(last.tobytes())
    return data[: place - 8] + (last.size + 1).to_bytes(8, "little") + data[place:]


@pytest.mark.parametrize(
    "change,said",
    [
        (cut, "its last storage ends behind its end"),
        (other_magic, "another magic number"),
        (other_order, "the other byte order"),
        (other_count, "is not where it should be"),
        (lambda data: data[:200], "its pickle cannot be read"),
        (lambda data: b"", "its pickle cannot be read"),
    ],
)
def test_damaged_files_of_old_versions(place, capsys, change, said):
    path = place / "old/pytorch_model.bin"
    torch.save(pickle(place), path, _use_new_zipfile_serialization=False)
    path.write_bytes(change(path.read_bytes()))
    assert run(["inspect", "old"]) == 1
    err = capsys.readouterr().err
    assert "is no file of torch.save, or is cut off" in err and said in err, err


def test_an_old_file_that_calls_something_is_refused(place, capsys):
    path = place / "old/pytorch_model.bin"
    torch.save({"a": Harm()}, path, _use_new_zipfile_serialization=False)
    assert run(["inspect", "old"]) == 1
    assert "names posix.system" in capsys.readouterr().err
    assert not (place / "harmed").exists()
