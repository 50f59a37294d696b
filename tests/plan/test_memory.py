"""A step that does not fit is refused before the run begins; `remat: auto` takes what fits."""

from __future__ import annotations

import json
import logging

import jax
import numpy as np
import pytest

from growkit.cli import run
from trainer.config.sections import resolve
from trainer.config.values import read_values
from trainer.data.tokens import TokenWriter
from trainer.plan import memory, remedies
from trainer.plan.compiler import Memory
from trainer.run.checkpoint import find_last_step
from trainer.step.update import forget_programs


@pytest.fixture
def arguments(tmp_path):
    """A small run's command line."""
    (tmp_path / "tokens").mkdir()
    with TokenWriter(tmp_path / "tokens", 64) as writer:
        writer.add(np.random.default_rng(0).integers(0, 64, 2000))
    manifest = {**writer.summary(), "vocab_size": 64, "end_of_text": 0}
    (tmp_path / "tokens" / "manifest.json").write_text(json.dumps(manifest))
    model = "model={layer: 2, embed: 16, head: 2, mlp: 32, vocab: 64, context: 64, rotary_pct: 0.5}"
    sizes = [
        "batch.sequences=16",
        "schedule.steps=2",
        "schedule.warmup=1",
        "eval.windows=2",
        "data.held_out=0.3",
    ]
    data = f"data.train={tmp_path / 'tokens'}"
    return ["train", "tiny", "--out", str(tmp_path / "run"), model, data, *sizes]


def replace_remedies(monkeypatch, *changes):
    """Only these changes are remedies."""
    groups = [[(change,) for change in changes]]
    monkeypatch.setattr(remedies, "list_remedies", lambda config, mesh: groups)


def test_a_run_that_does_not_fit_ends_before_it_begins(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "find_available_memory", lambda devices: 2**20)
    # So little is refused by the estimate already, which tests/plan/test_estimate.py is about.
    monkeypatch.setattr(memory, "estimate_shortage", lambda *given: None)
    replace_remedies(monkeypatch, "batch.accumulation=16")
    assert run(arguments) == 1
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("growkit: the step does not fit: it needs")
    assert "; batch.accumulation=16 would make it fit, at" in sentence
    assert find_last_step(tmp_path / "run") is None
    # The sibling: with the memory of this machine the same command trains to the end.
    monkeypatch.undo()
    assert run(arguments) == 0
    said = capsys.readouterr().err
    assert "memory: a step takes" in said
    assert "attention: XLA, " in said


@pytest.mark.parametrize(
    ("remat", "available", "policy"),
    [
        ("auto", 35, "none"),
        ("auto", 25, "dots"),
        ("auto", 15, "half"),
        ("auto", 12, "full"),
        ("auto", 5, "full"),
        ("dots", 35, "dots"),
        ("dots", 5, "dots"),
    ],
)
def test_the_mildest_policy_that_fits_is_selected(remat, available, policy, monkeypatch):
    """A step is represented by the name of its policy here."""
    needs = {"none": 30, "dots": 20, "half": 15, "full": 10}

    def measure(config, layout, step, like):
        return Memory(0, 0, needs[step], 0, available)

    monkeypatch.setattr(memory, "measure_step", measure)
    config = resolve(read_values("tiny", [f"remat={remat}"]))
    assert memory.select_step(config, None, None, lambda each: each.remat) == policy


def test_a_run_takes_the_policy_that_fits(arguments, monkeypatch, capsys):
    """With `none` the step is pretended to need twice what there is, with `dots` a little."""
    needs = {"none": 2**21, "dots": 2**10}
    asked = []

    def measure(lowered, like, available):
        policy = "dots" if asked else "none"
        asked.append(policy)
        return Memory(0, 0, needs[policy], 0, available)

    monkeypatch.setattr(memory, "find_available_memory", lambda devices: 2**20)
    monkeypatch.setattr(memory, "measure_memory", measure)
    monkeypatch.setattr(memory, "estimate_shortage", lambda *given: None)
    assert run([*arguments, "remat=auto"]) == 0
    assert "with remat dots" in capsys.readouterr().err
    assert asked == ["none", "dots"]
    # The sibling: told to use `none`, the same run does not begin.
    asked.clear()
    forget_programs()
    replace_remedies(monkeypatch)
    other = [*arguments[:2], "--out", f"{arguments[3]}2", *arguments[4:]]
    assert run([*other, "remat=none"]) == 1
    assert "does not fit" in capsys.readouterr().err


@pytest.fixture
def compilations_logged():
    """In every thread, where `jax.log_compiles` is for its own."""
    jax.config.update("jax_log_compiles", True)
    yield
    jax.config.update("jax_log_compiles", False)


def test_a_run_compiles_its_step_once(arguments, caplog, compilations_logged):
    with caplog.at_level(logging.WARNING):
        assert run(arguments) == 0
    compiled = "Finished XLA compilation of jit(train_step)"
    assert sum(compiled in record for record in caplog.messages) == 1
