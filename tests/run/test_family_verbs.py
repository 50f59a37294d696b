"""Anneal, study, evaluate and the model card, with models of other families than GPT-NeoX."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import yaml
from conftest import save_directory
from golden.words import tokenizer
from runs import NO_DROPOUT, rows, values

from growkit.checkpoint.location import open_source
from growkit.cli import run
from growkit.errors import UsageError
from growkit.lineage import Lineage
from growkit.models.llama import LLAMA
from trainer.config.model import Model, build_architecture
from trainer.run.anneal import plan_annealing
from trainer.run.begin import prepare
from trainer.run.stages import train
from trainer.study.section import read_design

COMMON = {"embed": 16, "head": 4, "kv": 2, "head_dim": 4, "mlp": 24, "vocab": 64, "context": 16}
SECTIONS = {
    "llama": Model(kind="llama", layer=2, **COMMON),
    "qwen3": Model(kind="qwen3", layer=2, **COMMON),
    "gemma2": Model(kind="gemma2", layer=2, config={"sliding_window": 5}, **COMMON),
    "gemma3_text": Model(kind="gemma3_text", layer=2, config={"sliding_window": 5}, **COMMON),
    "olmo2": Model(kind="olmo2", layer=2, **COMMON),
    "gpt2": Model(kind="gpt2", layer=2, embed=16, head=4, mlp=64, vocab=64, context=16),
}


def settings(data, name, **sections):
    return values(
        data,
        model=asdict(SECTIONS[name]),
        dropout=NO_DROPOUT,
        batch={"accumulation": 1},
        schedule={"steps": 4, "warmup": 1},
        checkpoint={"every": 4},
        eval={"every": 4, "windows": 4},
        log={"every": 1},
        **sections,
    )


def test_a_run_can_be_annealed_and_its_card_says_what_it_is(data, tmp_path):
    train(settings(data, "llama"), tmp_path / "run")
    planned, branch = plan_annealing(str(tmp_path / "run"), 1e-4, 2 * 4 * 16, [])
    setup = prepare(planned, tmp_path / "low", str(tmp_path / "run"), branch=branch)
    assert setup.first.model == build_architecture(SECTIONS["llama"])
    assert setup.first.config.schedule.steps == 2 and not (tmp_path / "low").exists()
    assert run(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "tags: [llama, growkit]" in card and "1. train" in card and "2. export" in card
    assert "# Llama, " in card and "| heads | 4 of 4 in 2 groups |" in card
    assert "| residual | sequential |" in card


@pytest.mark.slow
@pytest.mark.parametrize("name", SECTIONS)
def test_a_run_is_annealed(name, data, tmp_path):
    train(settings(data, name), tmp_path / "run")
    words = ["--to", "1e-4", "--tokens", str(2 * 4 * 16), "--out", str(tmp_path / "low")]
    assert run(["anneal", str(tmp_path / "run"), *words]) == 0
    found = [float(row["learning_rate"]) for row in rows(tmp_path / "low") if row["learning_rate"]]
    assert found == pytest.approx([(1e-3 + 1e-4) / 2, 1e-4], rel=1e-3)
    source = open_source(str(tmp_path / "low"))
    assert source.model == build_architecture(SECTIONS[name]) and int(source.record["count"]) == 6
    last = Lineage.read(source.lineage).last_training
    assert last.branch is not None and last.branch.verb == "anneal"
    assert run(["export", str(tmp_path / "low"), str(tmp_path / "hf"), "--check"]) == 0


STUDY = {
    "learning_rates": [4e-3],
    "seeds": [0],
    "best": 1,
    "budgets": [1.0],
    "sources": {"half": {"share": 0.5, "model": {"layer": 1}}},
    "arms": {"grown": {"from": "half", "grow": {"map": "1:2"}}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2", "gpt2"])
def test_a_study_of_another_family(name, data, tmp_path):
    stated = settings(data, name) | {"study": STUDY}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(stated))
    assert run(["study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    losses = [each["loss"] for each in results["runs"]]
    assert len(losses) == 3 and np.isfinite(losses).all()


@pytest.mark.parametrize("name", SECTIONS)
def test_a_study_is_designed_for_a_family(name, data):
    """Widths of grouped heads too."""
    narrow = {"embed": 8, "head": 2, "mlp": 12}
    narrow |= {"mlp": 32} if name == "gpt2" else {"kv": 1, "head_dim": 4}
    study = {
        **STUDY,
        "sources": {"narrow": {"share": 0.2, "model": narrow}},
        "arms": {"clone": {"from": "narrow", "grow": {"embed": "2x"}}},
    }
    design = read_design(settings(data, name) | {"study": study})
    assert design.arms["clone"].model == design.model
    assert design.count_flops_per_step("narrow") < design.count_flops_per_step("clone")


def test_an_arm_whose_layers_are_of_other_kinds_is_refused(data):
    """Two layers of Gemma 2 slide and do not; replicated they are not the four of scratch."""
    stated = settings(data, "gemma2")
    stated["model"] |= {"layer": 4}
    half = {"half": {"share": 0.2, "model": {"layer": 2}}}
    stacked = {"from": "half", "grow": {"map": "2:4", "depth_method": "stack"}}
    study = {**STUDY, "sources": half, "arms": {"stacked": stacked}}
    design = read_design(stated | {"study": study})
    assert design.arms["stacked"].model == design.model
    study["arms"] = {"replicated": {"from": "half", "grow": {"map": "2:4"}}}
    words = "layer 1 is of the kind sliding_attention and not full_attention"
    with pytest.raises(UsageError, match=words):
        read_design(stated | {"study": study})


def test_a_source_states_the_kinds_of_its_own_layers(data):
    full, slides = "full_attention", "sliding_attention"
    stated = settings(data, "gemma2")
    stated["model"] |= {"layer": 4}
    stated["model"]["config"] = {"sliding_window": 5, "layer_types": [full, full, slides, slides]}
    model = {"layer": 2, "config": {"layer_types": [full, slides]}}
    study = {
        **STUDY,
        "sources": {"half": {"share": 0.2, "model": model}},
        "arms": {"replicated": {"from": "half", "grow": {"map": "2:4"}}},
    }
    design = read_design(stated | {"study": study})
    assert design.sources["half"].model.kinds == (full, slides)
    assert design.arms["replicated"].model == design.model
    model["config"] = {"sliding_window": 4}
    words = "unknown key study.sources.half.model.config.sliding_window; the keys here are layer_t"
    with pytest.raises(UsageError, match=words):
        read_design(stated | {"study": study})


MODEL = LLAMA.model(layer=2, embed=32, kv=2, group=2, head_dim=8, mlp=48, vocab=272, context=32)
TEXT = "the words that were made by them are not what he said, but how long they would be there. "


@pytest.mark.slow
def test_evaluate_answers_in_jax_as_transformers_does(tmp_path):
    """The sibling is another model."""
    pytest.importorskip("lm_eval", reason="growkit[eval] is not installed")
    pytest.importorskip("accelerate", reason="growkit[eval] is not installed")
    stated = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    stated |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "data" / "bpb").mkdir(parents=True)
    (tmp_path / "data" / "bpb" / "a.txt").write_text(TEXT * 3)
    for number, name in enumerate(("one", "other")):
        directory = save_directory(tmp_path / name, MODEL, seed=number)
        (directory / "tokenizer.json").write_text(tokenizer())
        (directory / "tokenizer_config.json").write_text(json.dumps(stated))
    assert run(["import", str(tmp_path / "one"), str(tmp_path / "checkpoint")]) == 0
    models = [str(tmp_path / name) for name in ("checkpoint", "one", "other")]
    words = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "figures.json")]
    assert run(["evaluate", *models, "--tasks", "bpb", *words]) == 0
    record = json.loads((tmp_path / "figures.json").read_text())
    ours, theirs, other = ([*list_figures(model)] for model in record["models"])
    assert ours and ours == pytest.approx(theirs, rel=1e-4)
    assert other != pytest.approx(theirs, rel=1e-2)


def list_figures(model):
    for result in model["results"]:
        for figure in result["figures"].values():
            yield figure["value"]
