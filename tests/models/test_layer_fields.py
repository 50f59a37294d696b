"""Fields of a configuration about single layers follow the map; everything else stays as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest

from growkit.errors import GrowkitError, UsageError
from growkit.growth.depth import plan_depth
from growkit.growth.width import plan_width
from growkit.models import FAMILIES, find_family
from growkit.models.fields import Frozen
from growkit.models.gpt_neox import GPT_NEOX
from growkit.models.layer_fields import BY_LAYER, OTHER_LISTS, follow_layers, follow_list
from growkit.models.llama import LLAMA
from growkit.models.qwen3 import QWEN3
from growkit.models.tables import list_shipped

INDEX = [0, 0, 1, 2, 2]
MODEL = LLAMA.model(layer=3, embed=24, kv=2, group=3, head_dim=4, mlp=20, vocab=40)


NAMED = replace(
    LLAMA,
    by_layer=("no_rope_layers", "num_heads_per_layer"),
    numbers=("mlp_only_layers", "attn_layer_indices"),
    other_lists=("mlp_multipliers",),
)


@pytest.mark.parametrize(
    "name,entries,followed",
    [
        ("layer_types", ["a", "b", "c"], ["a", "a", "b", "c", "c"]),
        ("mlp_layer_types", ["dense", "sparse", "sparse"], ["dense"] * 2 + ["sparse"] * 3),
        ("no_rope_layers", [0, 1, 1], [0, 0, 1, 1, 1]),
        ("no_rope_layers", [0, 1, 2], [0, 0, 1, 2, 2]),
        ("mlp_only_layers", [0, 2], [0, 1, 3, 4]),
        ("mlp_only_layers", [0, 1, 2], [0, 1, 2, 3, 4]),
        ("mlp_only_layers", [2, 1], [2, 3, 4]),
        ("attn_layer_indices", [1], [2]),
        ("num_heads_per_layer", [2, 4, 2], [2, 2, 4, 2, 2]),
        ("mlp_multipliers", [0.5, 1.0, 1.0], None),
        ("eos_token_id", [1, 2, 3], None),
        ("architectures", ["LlamaForCausalLM"], None),
        ("layer_types", ["a", "b"], None),
    ],
)
def test_lists_follow_the_map(name, entries, followed):
    assert follow_list(name, entries, 3, INDEX, NAMED) == followed


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


@pytest.mark.parametrize("entries", [[0, 1, 2], ["a", "b", "c"]])
@pytest.mark.parametrize("name", ["mlp_only_layers", "offsets", "block_types"])
def test_a_list_as_long_as_the_layers_is_not_guessed_about(name, entries):
    """Whatever its name says: it may be numbers of layers, an entry for each, or neither."""
    with pytest.raises(UsageError, match=f"{name} in config.json has 3 entries, as many as"):
        follow_list(name, entries, 3, INDEX, LLAMA)
    assert follow_list(name, entries[:2], 3, INDEX, LLAMA) is None


@pytest.mark.parametrize("kind", [*FAMILIES, *list_shipped()])
def test_families_know_all_lists_of_their_configuration(kind):
    """Every list of transformers' own default configuration is named in the family's data."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[kind]().to_dict()
    family = find_family(kind)
    named = {*BY_LAYER, *OTHER_LISTS, *family.by_layer, *family.numbers, *family.other_lists}
    lists = {name for name, value in config.items() if isinstance(value, list | tuple)}
    assert lists - named == set()


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


def test_what_is_left_out_of_a_ratio_has_its_default():
    """group is heads / kv: given alone, it multiplies the default number of key heads."""
    model = LLAMA.model(group=2)
    assert (model.sizes["group"], model.sizes["kv"], model.head_count) == (2, 32, 64)
    assert QWEN3.model(group=3, kv=2).head_count == 6


def test_a_changed_model_keeps_what_only_its_files_say():
    family = replace(LLAMA, text=LLAMA.text.replace("{layer}.mlp.up", "{layer:gated}.mlp.up"))
    known = replace(
        family.model(layer=3, embed=24, kv=2, group=3, head_dim=4, mlp=20),
        layers=Frozen({"gated": (0, 2)}),
        headless=True,
    )
    changed = known.change(initializer_range=0.5)
    assert changed.layers == {"gated": (0, 2)} and changed.headless
    assert changed.table.has(next(row for row in family.rows if row.kind), 2)
    assert not any(row.role == "head" for row in changed.table.rows)
    with pytest.raises(GrowkitError, match="layers are of several kinds .gated"):
        known.change(layer=4)
    assert known.change(layer=3, mlp=40).layers == known.layers
