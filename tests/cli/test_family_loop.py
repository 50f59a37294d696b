"""The whole way of a model of another family: import, grow, train on, grow on the way, export.

A run that was stopped goes on to the same bits.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from golden.command import command
from golden.words import text, tokenizer
from runs import assert_as_if_uninterrupted, new_run, same_state, send_at, state_of

from growkit.checkpoint.location import open_source
from growkit.errors import UsageError
from growkit.lineage import Lineage
from trainer.config.model import Model

sys.path.append(str(Path(__file__).parents[1] / "model"))
from decoders import DEFAULT, MODELS, compute_theirs, save_model  # noqa: E402

RECIPE = {
    "dropout": {"hidden": 0, "attention": 0, "embedding": 0},
    "precision": {"params": "float32", "compute": "float32"},
    "data": {"held_out": 0.05},
    "batch": {"sequences": 4},
    "optimizer": {"learning_rate": 0.003},
    "schedule": {"steps": 4, "warmup": 2},
    "checkpoint": {"every": 2, "minutes": 0},
    "eval": {"every": 2, "windows": 4},
    "log": {"every": 1},
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A directory with a text, its tokens, a tokenizer and a recipe."""
    root = tmp_path_factory.mktemp("tokens")
    (root / "text.txt").write_text(text(1500))
    (root / "tokenizer.json").write_text(tokenizer())
    (root / "recipe.yaml").write_text(json.dumps(RECIPE))
    words = ["--tokenizer", str(root / "tokenizer.json"), "--out", str(root / "ids")]
    command(["tokenize", str(root / "text.txt"), *words, "--processes", "1"])
    return root


SOME = [name if name == "qwen3" else pytest.param(name, marks=pytest.mark.slow) for name in DEFAULT]


@pytest.mark.parametrize("name", SOME)
def test_from_a_directory_to_a_directory(name, tokens, tmp_path):
    kind, fields = MODELS[name]
    source = save_model(tmp_path / "source", kind, fields | {"vocab_size": 272})
    shutil.copy(tokens / "tokenizer.json", source)
    command(["import", str(source), str(tmp_path / "imported")])
    recipe, data = str(tokens / "recipe.yaml"), f"data.train={tokens / 'ids'}"
    run = str(tmp_path / "run")
    growth = ["grow.map=4:5", "grow.heads=2x", "grow.mlp=2x", "grow.at=2"]
    begin = ["train", recipe, "--from", str(tmp_path / "imported"), "--out", run, data, *growth]
    command(begin)
    command(["export", f"{run}@4", str(tmp_path / "out"), "--check"])
    trained = open_source(f"{run}@4")
    assert (trained.model.layer, trained.model.mlp) == (5, 2 * 48 if name != "gpt2" else 256)
    assert len(trained.model.kinds) in (0, 5)
    ids = np.random.default_rng(0).integers(0, 272, (2, 24))
    theirs = compute_theirs(tmp_path / "out", ids, "float32")
    from trainer.model.decoder import compute_logits

    ours = compute_logits(trained, ids)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    out = open_source(str(tmp_path / "out"))
    for tensor, array in trained.tensors["params"].items():
        assert np.array_equal(array.read(), out.tensors["params"][tensor].read())
    operations = [entry.operation for entry in Lineage.read(out.lineage)]
    assert operations == ["import", "train", "grow", "train", "export"]


WINDOWS = Model(
    kind="gemma3_text",
    layer=3,
    embed=16,
    head=2,
    kv=1,
    head_dim=8,
    mlp=32,
    vocab=64,
    context=16,
    config={
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits(data, tmp_path):
    sections = {"model": asdict(WINDOWS), "precision": {"compute": "bfloat16"}}
    new_run(data, tmp_path / "whole", **sections).go()
    send_at(new_run(data, tmp_path / "parts", **sections), 5, signal.SIGTERM).go()
    assert 0 < int(state_of(tmp_path / "parts")["step"]) < 12
    new_run(data, tmp_path / "parts", **sections).go()
    assert_as_if_uninterrupted(tmp_path / "parts", tmp_path / "whole")
    without = {**sections["model"], "config": {"sliding_window": 6}}
    new_run(data, tmp_path / "other", **(sections | {"model": without})).go()
    assert not same_state(state_of(tmp_path / "other"), state_of(tmp_path / "whole"))


def test_a_family_that_is_not_trained_is_named(tmp_path):
    from growkit.models import read_config, require_trained

    cohere = read_config({"model_type": "cohere"})
    with pytest.raises(UsageError, match="'cohere' model, which growkit grows but does not train"):
        require_trained(cohere, tmp_path)
    with pytest.raises(
        UsageError, match="rotary positions of the type 'longrope', and the trainer"
    ):
        longrope = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
        llama = read_config({"model_type": "llama", "rope_parameters": longrope})
        require_trained(llama, tmp_path)
