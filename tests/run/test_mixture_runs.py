"""Mixtures through the trainer and its verbs: training, logs, export, import, growth."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
from runs import NO_DROPOUT, recipe, rows, send_at, state_of, values

from growkit.checkpoint.location import open_source
from growkit.cli import run
from trainer.run.begin import begin, prepare
from trainer.run.loop import Run
from trainer.run.stages import train

pytestmark = pytest.mark.slow

GATE = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
MODEL = {
    "kind": "mixtral",
    "layer": 2,
    "embed": 16,
    "head": 4,
    "kv": 2,
    "head_dim": 4,
    "mlp": 24,
    "vocab": 64,
    "context": 16,
    "config": GATE,
}
SECTIONS = {
    "dropout": NO_DROPOUT,
    "batch": {"accumulation": 1},
    "checkpoint": {"every": 2},
    "eval": {"every": 4, "windows": 4},
    "log": {"every": 1},
}


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run of a mixture, four steps long."""
    out = tmp_path_factory.mktemp("mixture") / "run"
    stated = values(data, **SECTIONS | {"schedule": {"steps": 4, "warmup": 1}})
    train(stated | {"model": MODEL}, out)
    return out


def read_loads(out):
    return [json.loads(line) for line in (out / "experts.jsonl").read_text().splitlines()]


def test_the_log_says_how_busy_the_experts_are(trained):
    loads = read_loads(trained)
    assert [line["step"] for line in loads] == [1, 2, 3, 4]
    plain = [row for row in rows(trained) if row["loss"]]
    for line, row in zip(loads, plain, strict=True):
        load = np.asarray(line["load"])
        assert load.shape == (2, 4) and np.abs(load.sum(1) - 1).max() < 1e-3
        assert float(row["busiest"]) == pytest.approx(load.max(), abs=1e-3)
        assert float(row["idlest"]) == pytest.approx(load.min(), abs=1e-3)
        assert 2.0 <= float(row["balance_loss"]) < 4.0


def test_a_mixture_is_exported_and_imported(trained, tmp_path, capsys):
    assert run(["export", str(trained), str(tmp_path / "hf"), "--check"]) == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["num_local_experts"] == config["num_experts"] == 4
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| mlp | 4 experts of 24, 2 per token |" in card
    assert run(["import", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    ours, theirs = (open_source(str(path)).stack() for path in (trained, tmp_path / "back"))
    name = ("layers", "block_sparse_moe", "experts", "w2", "weight")
    for key in name:
        ours, theirs = ours[key], theirs[key]
    assert ours.shape == (2, 4, 16, 24) and (ours == theirs).all()
    capsys.readouterr()
    assert run(["inspect", str(trained)]) == 0
    assert "mlp 4 experts of 24, 2 per token" in capsys.readouterr().out


GROWTHS = {
    "depth": ["depth", "--map", "2:4", "--method", "identity"],
    "experts": ["experts", "4:8", "--exact"],
}


@pytest.mark.parametrize("verb", GROWTHS)
def test_a_checkpoint_of_a_mixture_grows_and_trains_on(verb, trained, data, tmp_path, capsys):
    out = tmp_path / "grown"
    assert run([*GROWTHS[verb], str(trained), str(out)]) == 0
    assert "preserved" in capsys.readouterr().out
    assert run(["verify", str(trained), str(out)]) == 0
    source = open_source(str(out))
    assert {"mu", "nu"} <= source.tensors.keys()
    if verb == "experts":
        assert source.model.gate.top == 4 and source.model.sizes["expert"] == 8
    schedule = {"steps": 8, "warmup": 1, "continued": True}
    stated = recipe(data, **SECTIONS | {"schedule": schedule})
    train(stated, tmp_path / "on", start=str(out))
    # The first validation was compared with the source's last one, and training went on.
    assert len(read_loads(tmp_path / "on")) == 8
    assert len(read_loads(tmp_path / "on")[-1]["load"]) == source.model.layer


def test_a_resumed_run_is_the_uninterrupted_one(data, tmp_path):
    stated = values(data, **SECTIONS | {"schedule": {"steps": 4, "warmup": 1}})
    train(stated | {"model": MODEL}, tmp_path / "whole")
    setup = prepare(stated | {"model": MODEL}, tmp_path / "cut")
    send_at(Run(begin(setup)), 2, signal.SIGTERM).go()
    train(stated | {"model": MODEL}, tmp_path / "cut")
    ours, theirs = state_of(tmp_path / "cut"), state_of(tmp_path / "whole")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert read_loads(tmp_path / "cut") == read_loads(tmp_path / "whole")
