"""Names as files have them: base models, heads under other names or said to be tied, buffers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import SMALL, random_tensors, save_tensors

from growkit.checkpoint.location import open_source, write_output
from growkit.errors import GrowkitError
from growkit.growth.depth import plan_depth
from growkit.models.llama import LLAMA
from growkit.surgery.comparison import compare_sources
from growkit.surgery.grow import prepare_growth

SMALL_LLAMA = LLAMA.model(layer=3, embed=24, kv=2, group=3, head_dim=4, mlp=20, vocab=40)
HEAD, EMBEDDING = "embed_out.weight", "gpt_neox.embed_in.weight"


def save(path, model, tensors, **config):
    path.mkdir()
    save_tensors(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(model.config() | config))
    return open_source(str(path))


def test_a_head_that_differs_from_the_embedding_is_kept(tmp_path):
    tensors = random_tensors(SMALL)
    source = save(tmp_path / "source", SMALL, tensors, tie_word_embeddings=True)
    assert not source.model.tied and HEAD in source.tensors["params"]
    assert HEAD in source.notes[0] and EMBEDDING in source.notes[0]
    contents = prepare_growth(source, plan_depth(source.model, "3:5", "identity"))
    write_output(tmp_path / "out", "huggingface", contents, [source])
    grown = open_source(str(tmp_path / "out"))
    assert grown.config["tie_word_embeddings"] is False and not grown.notes
    assert np.array_equal(grown.tensors["params"][HEAD].read(), tensors[HEAD])
    headless = {name: array for name, array in tensors.items() if name != HEAD}
    tied = save(tmp_path / "tied", SMALL.change(tied=True), headless)
    verdicts = {tensor.verdict for tensor in compare_sources(source, tied)}
    assert "only in A" in verdicts


@pytest.mark.parametrize("flipped", [False, True])
def test_a_head_that_is_the_embedding_is_dropped(flipped, tmp_path):
    """One number that differs, the last one, makes it another head."""
    tensors = random_tensors(SMALL)
    tensors[HEAD] = tensors[EMBEDDING].copy()
    tensors[HEAD][-1, -1] += flipped
    source = save(tmp_path / "source", SMALL, tensors, tie_word_embeddings=True)
    assert source.model.tied != flipped and (HEAD in source.tensors["params"]) == flipped


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model", [SMALL, SMALL_LLAMA], ids=["gpt_neox", "llama"])
def test_a_base_model_is_read_without_prefix_and_head(model, tied, tmp_path):
    model = model.change(tied=tied)
    family = model.family
    whole = random_tensors(model)
    bare = {
        name.removeprefix(f"{family.prefix}."): array
        for name, array in whole.items()
        if name != family.head_name
    }
    classes = [family.class_name.replace("ForCausalLM", "Model")]
    source = save(tmp_path / "source", model, bare, architectures=classes)
    assert set(source.tensors["params"]) == set(whole) - {family.head_name}
    contents = prepare_growth(source, plan_depth(source.model, "0,0,1,2"))
    write_output(tmp_path / "out", "huggingface", contents, [source])
    grown = open_source(str(tmp_path / "out"))
    assert grown.model.layer == 4 and family.head_name not in grown.tensors["params"]
    first = next(name for name in whole if ".1." in name)
    again = first.replace(".1.", ".2.")
    assert np.array_equal(grown.tensors["params"][again].read(), whole[first])


def test_a_missing_head_is_refused_where_the_class_has_one(tmp_path):
    tensors = random_tensors(SMALL)
    del tensors[HEAD]
    with pytest.raises(GrowkitError, match=f"the parameter '{HEAD}' is missing"):
        save(tmp_path / "source", SMALL, tensors)


def test_a_head_under_the_other_name_is_found(tmp_path):
    tensors = random_tensors(SMALL)
    tensors["lm_head.weight"] = tensors.pop(HEAD)
    source = save(tmp_path / "source", SMALL, tensors)
    assert np.array_equal(source.tensors["params"][HEAD].read(), tensors["lm_head.weight"])


def test_two_names_of_one_parameter_are_refused(tmp_path):
    tensors = random_tensors(SMALL)
    tensors["lm_head.weight"] = tensors[HEAD]
    with pytest.raises(GrowkitError) as refusal:
        save(tmp_path / "source", SMALL, tensors)
    said = str(refusal.value)
    assert "twice" in said and "'lm_head.weight'" in said and f"'{HEAD}'" in said


@pytest.mark.parametrize(
    "name",
    [
        "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "layers.1.self_attn.rotary_emb.inv_freq",
        "model.position_ids",
    ],
)
def test_old_buffers_are_skipped(name, tmp_path):
    tensors = random_tensors(SMALL_LLAMA) | {name: np.ones(2, np.float32)}
    source = save(tmp_path / "source", SMALL_LLAMA, tensors)
    assert name not in source.tensors["params"]
