"""Fields of a configuration about single layers follow the map; everything else stays as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest

from growkit.errors import UsageError
from growkit.growth.depth import plan_depth
from growkit.growth.width import plan_width
from growkit.models.gpt_neox import GPT_NEOX
from growkit.models.layer_fields import follow_layers, follow_list
from growkit.models.llama import LLAMA

INDEX = [0, 0, 1, 2, 2]
MODEL = LLAMA.model(layer=3, embed=24, kv=2, group=3, head_dim=4, mlp=20, vocab=40)


@pytest.mark.parametrize(
    "name,entries,followed",
    [
        ("layer_types", ["a", "b", "c"], ["a", "a", "b", "c", "c"]),
        ("mlp_layer_types", ["dense", "sparse", "sparse"], ["dense"] * 2 + ["sparse"] * 3),
        ("no_rope_layers", [0, 1, 1], [0, 0, 1, 1, 1]),
        ("no_rope_layers", [0, 1, 2], [0, 0, 1, 2, 2]),
        ("mlp_only_layers", [0, 2], [0, 1, 3, 4]),
        ("mlp_only_layers", [0, 1, 2], [0, 1, 2, 3, 4]),
        ("attn_layer_idx", [1], [2]),
        ("num_heads_per_layer", [2, 4, 2], [2, 2, 4, 2, 2]),
        ("eos_token_id", [1, 2, 3], None),
        ("architectures", ["LlamaForCausalLM"], None),
        ("layer_types", ["a", "b"], None),
        ("mlp_only_layers", [2, 1], None),
        ("mlp_only_layers", [7], None),
    ],
)
def test_lists_follow_the_map(name, entries, followed):
    assert follow_list(name, entries, 3, INDEX) == followed


def test_every_list_of_a_configuration_follows():
    before = MODEL.config() | {
        "layer_types": ["a", "b", "c"],
        "mlp_layer_types": ["x", "y", "z"],
        "eos_token_id": [1, 2, 3],
        "quant": {"layers": [0, 1, 2]},
    }
    grown = plan_depth(MODEL, "0,0,1,2,2").grown
    after = follow_layers(grown.update(before), before, LLAMA, INDEX)
    assert after["layer_types"] == ["a", "a", "b", "c", "c"]
    assert after["mlp_layer_types"] == ["x", "x", "y", "z", "z"]
    changed = {key for key in after if after[key] != before.get(key)}
    assert changed == {"num_hidden_layers", "layer_types", "mlp_layer_types"}


def test_names_that_a_family_knows_follow_too():
    """`offsets` says nothing by its name; a family that knows it holds numbers of layers does."""
    assert follow_list("offsets", [0, 2], 3, INDEX) is None
    assert follow_list("offsets", [0, 2], 3, INDEX, numbers=("offsets",)) == [0, 1, 3, 4]


def test_kinds_that_repeat_are_written_where_they_were_left_out():
    family = replace(LLAMA, patterns={"layer_types": ("a", "b")})
    before = MODEL.config()
    assert follow_layers(before, before, family, INDEX)["layer_types"] == ["a", "a", "b", "a", "a"]
    stated = before | {"layer_types": ["x", "y", "z"]}
    assert follow_layers(stated, stated, family, INDEX)["layer_types"] == ["x", "x", "y", "z", "z"]


def test_kinds_that_must_be_stated_are_asked_for():
    family = replace(LLAMA, stated=("layer_types",))
    before = MODEL.config()
    with pytest.raises(UsageError, match="config.json lacks layer_types"):
        follow_layers(before, before, family, INDEX)
    stated = before | {"layer_types": ["x", "y", "z"]}
    assert follow_layers(stated, stated, family, [0, 1, 2])["layer_types"] == ["x", "y", "z"]


def test_layers_that_are_counted_stay_in_front():
    family = replace(LLAMA, leading=("first_k_dense_replace",))
    before = MODEL.config() | {"first_k_dense_replace": 1}
    assert follow_layers(before, before, family, INDEX)["first_k_dense_replace"] == 2
    with pytest.raises(UsageError, match="must stay in front, .* has others from 1 on"):
        follow_layers(before, before, family, [0, 1, 0, 2])


@pytest.mark.parametrize("family", [GPT_NEOX, LLAMA], ids=lambda family: family.kind)
def test_growth_changes_sizes_alone(family):
    """What a configuration leaves out stays left out, whatever its default."""
    sizes = {"layer": 3, "embed": 24, "mlp": 20, "vocab": 40, "context": 64}
    heads = {"head": 3} if family is GPT_NEOX else {"kv": 3, "group": 2, "head_dim": 4}
    model = family.model(**sizes, **heads)
    stated = [path for path in family.fields.values() if "/" not in path]
    stated += ["num_attention_heads", *family.options.values()]
    defaults = family.read({}).config()
    config = {"model_type": family.kind} | {
        path: value for path, value in model.config().items() if path in stated
    }
    bare = {path: value for path, value in config.items() if value != defaults.get(path)}
    assert family.read(bare) == model
    wide = plan_width(model, embed=48).grown.update(bare)
    changed = {path for path in wide if wide[path] != bare.get(path)}
    assert changed == {"hidden_size", "intermediate_size", "num_attention_heads"} | (
        set() if family is GPT_NEOX else {"num_key_value_heads"}
    )
    assert plan_depth(model, "3:4").grown.update(bare) == bare | {"num_hidden_layers": 4}


def test_a_size_that_follows_from_others_is_written_when_it_no_longer_does():
    """Without head_dim in the configuration it is embed / heads, which more heads alone change."""
    model = LLAMA.model(layer=1, embed=24, kv=2, group=3, mlp=20, vocab=40)
    bare = {path: value for path, value in model.config().items() if path != "head_dim"}
    grown = plan_width(model, heads=12)
    assert grown.grown.update(bare)["head_dim"] == 4
    assert LLAMA.read(grown.grown.update(bare)) == grown.grown
