"""Numbers that no model should hold are counted, told, and refused with --strict."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from conftest import save_checkpoint, save_directory

from growkit import open_source, plan_depth, write_grown
from growkit.checkpoint.numbers import Findings, is_sound
from growkit.cli import run
from growkit.errors import GrowkitError

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slot", ["params", "mu", "nu"])
@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf"])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_number_in_a_thousand_is_found(dtype, slot, value, place):
    block = np.square(np.random.default_rng(0).normal(size=1000)).astype(dtype)
    findings = Findings()
    findings.look(slot, "w", block)
    assert not findings and findings.describe() == ""
    block[place] = np.float64(value.replace("-nan", "nan"))
    if value == "-nan":
        block[place] = -block[place]
    findings.look(slot, "w", block)
    assert findings.nonfinite == {slot: {"w": 1}} and not findings.negative
    assert "NaN or infinite (in w)" in findings.describe()


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_numbers_that_are_numbers(dtype):
    limits = ml_dtypes.finfo(dtype)
    block = np.asarray([limits.max, limits.min, limits.tiny, 0.0, -0.0], dtype)
    assert is_sound(block, squares=False)
    findings = Findings()
    findings.look("params", "w", block)
    findings.look("nu", "w", np.abs(block))
    findings.look("nu", "w", np.asarray([0.0, -0.0, 1.0], dtype))
    assert not findings


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_squares(dtype):
    findings = Findings()
    for slot in ("params", "mu", "nu"):
        findings.look(slot, "w", np.asarray([1.0, -1e-6, 0.0, -3.0], dtype))
    assert findings.negative == {"nu": {"w": 2}} and not findings.nonfinite


def spoil(path, value: float, count: int, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + 4 * count] = np.full(count, value, np.float32).tobytes()
    path.write_bytes(raw)


@pytest.mark.parametrize("words", [["depth", "--map", "3:4"], ["width", "--embed", "2x"]])
def test_weights_copied_or_computed(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    size = (save_directory(tmp_path / "model") / "model.safetensors").stat().st_size
    spoil(tmp_path / "model" / "model.safetensors", np.nan, 3, size - 400)
    assert run([*words, "model", "out"]) == 0
    err = capsys.readouterr().err
    assert "warning: " in err and "weights are NaN or infinite" in err
    assert len(err.splitlines()) == 1
    assert run([*words, "--strict", "model", "strict"]) == 1
    assert "because of --strict" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize(
    "value,said", [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (-1e-20, "negative")]
)
@pytest.mark.parametrize("words", [["depth", "--map", "3:4"], ["width", "--embed", "2x"]])
def test_second_moments(tmp_path, monkeypatch, capsys, words, value, said):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "ck")
    spoil(tmp_path / "ck/state/nu.layers.mlp.dense_h_to_4h.weight/0.0.0", value, 500, 0)
    assert run([*words, "ck", "out", "--no-verify"]) == 0
    err = capsys.readouterr().err
    assert "second moments are" in err and said in err


def test_an_average_and_a_conversion(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        save_directory(tmp_path / name)
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    spoil(tmp_path / "a" / "model.safetensors", np.inf, 1, size - 400)
    assert run(["average", "a", "b", "--out", "mean"]) == 0
    assert "1 weight is NaN or infinite" in capsys.readouterr().err
    assert run(["import", "a", "ck"]) == 0
    assert "1 weight is NaN or infinite" in capsys.readouterr().err
    assert run(["export", "--strict", "ck", "out"]) == 1


def test_from_python_they_are_a_warning(tmp_path):
    size = (save_directory(tmp_path / "model") / "model.safetensors").stat().st_size
    spoil(tmp_path / "model" / "model.safetensors", np.nan, 2, size - 400)
    source = open_source(tmp_path / "model")
    plan = plan_depth(source.model, "3:4")
    with pytest.warns(UserWarning, match="out: 2 weights are NaN or infinite"):
        write_grown(source, plan, tmp_path / "out")
    with pytest.raises(GrowkitError, match="because of --strict"):
        write_grown(source, plan, tmp_path / "other", strict=True)
    assert not (tmp_path / "other").exists()
