"""The mean of checkpoints: sums in float64, rounded once; moments and position of the last one."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from conftest import SMALL, contents_of, save_checkpoint, save_directory

from growkit.checkpoint.location import open_source
from growkit.checkpoint.rounding import round_to_dtype
from growkit.cli import run
from growkit.surgery import mean as mean_of


@pytest.fixture
def three(tmp_path):
    return [save_directory(tmp_path / f"hf{seed}", seed=seed) for seed in range(3)]


def values(path, slot="params"):
    return {name: tensor.read() for name, tensor in open_source(str(path)).tensors[slot].items()}


def mean(paths, weights):
    """The mean as written on paper."""
    every = [values(path) for path in paths]
    return {
        name: sum(w * each[name].astype(np.float64) for w, each in zip(weights, every, strict=True))
        / sum(weights)
        for name in every[0]
    }


@pytest.mark.parametrize("weights", [None, [1, 2, 5]])
def test_the_mean_of_three_directories(tmp_path, three, weights, capsys):
    options = ["--weights", ",".join(map(str, weights))] if weights else []
    before = [contents_of(path) for path in three]
    assert run(["average", *map(str, three), "--out", str(tmp_path / "out"), *options]) == 0
    said = capsys.readouterr().out
    assert "the mean of 3 models" in said and "no optimizer's moments" in said
    for name, wanted in mean(three, weights or [1, 1, 1]).items():
        assert np.abs(values(tmp_path / "out")[name] - wanted).max() < 6.1e-8 * max(
            1, np.abs(wanted).max()
        ), name
    assert [contents_of(path) for path in three] == before
    entry = open_source(str(tmp_path / "out")).lineage[-1]
    assert entry["operation"] == "average" and len(entry["averaged"]) == 3
    assert np.isclose(sum(entry["weights"]), 1)


def test_checkpoints_keep_the_last_ones_moments_and_position(tmp_path, capsys):
    paths = [
        save_checkpoint(tmp_path / f"ck{n}", seed=10 * n, step=n, validation_loss=3.0)
        for n in range(2)
    ]
    assert run(["average", *map(str, paths), "--out", str(tmp_path / "out")]) == 0
    assert f"the optimizer's moments are those of {paths[1]}, unchanged" in capsys.readouterr().out
    out, last = open_source(str(tmp_path / "out")), open_source(str(paths[1]))
    for slot in ("mu", "nu"):
        ours, theirs = values(tmp_path / "out", slot), values(paths[1], slot)
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    assert out.record == {
        key: value for key, value in last.record.items() if key != "validation_loss"
    }
    assert out.files == last.files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_sums_are_rounded_once(tmp_path, dtype):
    paths = [save_directory(tmp_path / f"hf{seed}", seed=seed, dtype=dtype) for seed in range(3)]
    assert (
        run(["average", *map(str, paths), "--out", str(tmp_path / "out"), "--weights", "1,1,2"])
        == 0
    )
    for name, wanted in mean(paths, [1, 1, 2]).items():
        found = values(tmp_path / "out")[name]
        assert str(found.dtype) == dtype
        spacing = float(ml_dtypes.finfo(found.dtype).eps) * np.abs(wanted)
        bound = 0.5001 if dtype != "float64" else 4
        assert (np.abs(found.astype(np.float64) - wanted) <= bound * spacing + 1e-16).all(), name


def test_sums_in_the_models_own_dtype_would_be_found_out(tmp_path, monkeypatch):
    paths = [
        save_directory(tmp_path / f"hf{seed}", seed=seed, dtype="bfloat16") for seed in range(3)
    ]
    monkeypatch.setattr(mean_of, "WIDE", ml_dtypes.bfloat16)
    assert run(["average", *map(str, paths), "--out", str(tmp_path / "out")]) == 0
    wanted = mean(paths, [1, 1, 1])
    gap = [
        np.abs(found.astype(np.float64) - wanted[name]).max()
        for name, found in values(tmp_path / "out").items()
    ]
    assert max(gap) > 2e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@np.errstate(over="ignore", invalid="ignore")
def test_the_mean_of_two_needs_no_float64(dtype):
    """Bit for bit what float64 gives: numbers of every exponent, subnormal and largest ones too."""
    kind = np.dtype(dtype)
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 8 * kind.itemsize, 1 << 17, dtype=np.uint64)
    one = bits.astype(f"u{kind.itemsize}").view(kind)
    one = one[np.isfinite(one)]
    other = random.permutation(one)
    # Of one exponent, whose sums round; and opposite ones, which leave little.
    other[::3] = one[::3] * kind.type(0.8)
    other[1::3] = -one[1::3] * kind.type(0.99)
    wanted = round_to_dtype("a", 0.5 * one.astype(float) + 0.5 * other.astype(float), kind)
    mean = mean_of.Mean("a", [0.5, 0.5], kind)
    assert mean.of([one, other]).tobytes() == wanted.tobytes()
    # Sums of the largest are too large for float32; all others it does alone.
    halved = np.empty_like(wanted)
    assert mean._halve_sums([one, other], halved) == (dtype == "float16")
    small = np.abs(wanted.astype(float)) < float(ml_dtypes.finfo(kind).max) / 4
    halved = np.empty_like(wanted[small])
    assert mean._halve_sums([one[small], other[small]], halved)
    assert halved.tobytes() == wanted[small].tobytes()
    ends = np.array([np.inf, np.nan, 1.0], kind)
    assert np.isinf(mean.of([ends, ends[[2, 1, 0]]])).tolist() == [True, False, True]


def test_the_last_kind_is_the_outputs(tmp_path, three):
    checkpoint = save_checkpoint(tmp_path / "ck")
    assert run(["average", str(three[0]), str(checkpoint), "--out", str(tmp_path / "a")]) == 0
    assert run(["average", str(checkpoint), str(three[0]), "--out", str(tmp_path / "b")]) == 0
    assert [open_source(str(tmp_path / name)).kind for name in "ab"] == [
        "checkpoint",
        "huggingface",
    ]
    ours, theirs = values(tmp_path / "a"), values(tmp_path / "b")
    assert all(np.abs(ours[name] - theirs[name]).max() < 1e-7 for name in ours)


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["hf0"], "an average is of two models or more"),
        (["hf0", "hf1", "hf0"], "is given twice; give it once, with a weight of 2"),
        (["hf0", "hf1", "--weights", "1"], "2 models, 1 weights"),
        (["hf0", "hf1", "--weights", "1,-1"], "a weight is a number above 0, got -1"),
        (["hf0", "hf1", "--weights", "1,nan"], "a weight is a number above 0, got nan"),
        (["hf0", "hf1", "--weights", "1 2"], "--weights takes numbers with commas between them"),
        (["hf0", "wide"], "only models of one shape have a mean: mlp is 64 in"),
        (["hf0", "nowhere"], "there is no such directory: nowhere"),
        (["hf0", "hf1", "--max-shard-size", "x"], "--max-shard-size is a number"),
    ],
)
def test_refusals(tmp_path, three, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    save_directory(tmp_path / "wide", SMALL.change(mlp=128))
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert run(["average", *arguments, "--out", "out"]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1, err
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_no_output_within_any_source(tmp_path, three, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for out in ("hf0", "hf1", "hf0/out"):
        assert run(["average", "hf0", "hf1", "--out", out, "--force"]) == 2
        assert "the output" in capsys.readouterr().err
