"""Names of tensors as files have them, of several versions of transformers and of base models."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import random_tensors, save_tensors

from growkit.checkpoint.location import open_source
from growkit.checkpoint.naming import name_tensors
from growkit.checkpoint.tensor import wrap_array
from growkit.cli import run
from growkit.models.fields import Frozen
from growkit.models.tables import read_shipped

SIZES = {"layer": 3, "embed": 16, "kv": 2, "group": 2, "head_dim": 4, "vocab": 40}
MIXTRAL = read_shipped("mixtral").model(**SIZES, mlp=12, expert=4)


def save(path, model, tensors, **fields):
    path.mkdir()
    save_tensors(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(model.config() | fields))
    return path


def opens_as(path, tensors):
    """Whether a directory holds these tensors, by the names of the table."""
    found = open_source(str(path)).tensors["params"]
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name].read(), array)
        # As copies of layers are written: by the bytes of the file.
        assert b"".join(found[name].read_bytes()) == array.tobytes()
    return True


def fuse(tensors):
    """Experts as transformers 5 holds them in memory, and names of it."""
    fused = {}
    for name, array in tensors.items():
        found = re.match(r"(.*)\.block_sparse_moe\.(?:experts\.(\d+)\.(w\d)|(gate))\.weight", name)
        if found is None:
            fused[name] = array
        elif found[4]:
            fused[f"{found[1]}.mlp.gate.weight"] = array
        else:
            fused.setdefault((found[1], found[3]), []).append(array)
    layers = {layer for layer, _ in (key for key in fused if isinstance(key, tuple))}
    for layer in sorted(layers):
        gate, down, up = (np.stack(fused.pop((layer, part))) for part in ("w1", "w2", "w3"))
        fused[f"{layer}.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        fused[f"{layer}.mlp.experts.down_proj"] = down
    return fused


def test_experts_one_by_one_or_fused(tmp_path):
    tensors = random_tensors(MIXTRAL)
    fused = fuse(tensors)
    assert len(fused) == len(tensors) - 3 * (4 * 3 - 2)
    assert opens_as(save(tmp_path / "apart", MIXTRAL, tensors), tensors)
    assert opens_as(save(tmp_path / "fused", MIXTRAL, fused), tensors)
    for name in ("apart", "fused"):
        words = ["depth", "--map", "3:5", str(tmp_path / name), str(tmp_path / f"{name}-grown")]
        assert run(words) == 0
    grown = [(tmp_path / f"{n}-grown/model.safetensors").read_bytes() for n in ("apart", "fused")]
    assert grown[0] == grown[1]


@pytest.mark.parametrize("before", ["", "language_model.model.", "model.language_model."])
def test_names_with_other_first_words(tmp_path, before):
    tensors = random_tensors(MIXTRAL)
    renamed = {
        before + name.removeprefix("model.") if name.startswith("model.") else name: array
        for name, array in tensors.items()
    }
    if before.startswith("language_model."):
        renamed["language_model.lm_head.weight"] = renamed.pop("lm_head.weight")
    assert opens_as(save(tmp_path / "model", MIXTRAL, renamed), tensors)


GPT2 = read_shipped("gpt2").model(layer=3, embed=16, head=4, mlp=12, vocab=40, position=8)


def test_gpt2_as_the_hub_has_it(tmp_path):
    """A base model's names without the first word, and causal masks that it carried."""
    tensors = random_tensors(GPT2)
    held = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    for layer in range(3):
        held[f"h.{layer}.attn.bias"] = np.ones((1, 1, 8, 8), np.uint8)
        held[f"h.{layer}.attn.masked_bias"] = np.float32(-1e4).reshape(())
    assert opens_as(save(tmp_path / "model", GPT2, held), tensors)


def test_what_transformers_does_not_load_is_left_behind(tmp_path):
    """Layers beyond the model's, for the token after the next; not a grown model's layer."""
    family = replace(MIXTRAL.family, unread=(r"model\.layers\.3.*",))
    tensors = {name: wrap_array(array) for name, array in random_tensors(MIXTRAL).items()}
    extra = {f"model.layers.3.{part}.weight": wrap_array(np.zeros(3)) for part in ("eh", "enorm")}
    extra["model.layers.3.input_layernorm.weight"] = wrap_array(np.zeros(16))
    model = replace(MIXTRAL, family=family)
    named = name_tensors(tensors | extra, model, {}, tmp_path)
    assert named.tensors.keys() == tensors.keys()
    assert named.notes == (
        "model.layers.3.eh.weight and 2 tensors more left behind: transformers does not load them",
    )
    deep = replace(model, sizes=Frozen({**MIXTRAL.sizes, "layer": 4}))
    found = name_tensors(tensors | extra, deep, {}, tmp_path).tensors
    assert found.keys() - tensors.keys() == {"model.layers.3.input_layernorm.weight"}


def test_layer_norms_of_tensorflow(tmp_path):
    tensors = random_tensors(GPT2)
    held = {
        re.sub(
            r"(ln_\w+)\.weight$", r"\1.gamma", re.sub(r"(ln_\w+)\.bias$", r"\1.beta", name)
        ): array
        for name, array in tensors.items()
    }
    assert held.keys() != tensors.keys()
    assert opens_as(save(tmp_path / "model", GPT2, held), tensors)
