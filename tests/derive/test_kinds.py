"""Kinds of layers that a configuration states by a rule follow the map when a model grows in depth.

Each type's configuration is written as files of old versions have it: without the list, with the
rule's fields at values that are not the defaults. The layers of the grown model, as transformers
makes them, are of the kinds of those that they copy.
"""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from sweeping import call, describe_kind, find_layers, list_differences, save_tiny

from growkit.derive.derive import load_logits
from growkit.derive.kinds import Kinds, Lists, add_known, find_rule
from growkit.derive.network import CONFIG_MAPPING, set_plain
from growkit.derive.tiny import tiny_fields
from growkit.errors import GrowkitError, UsageError
from growkit.models import find_family
from growkit.models.layer_fields import follow_layers
from growkit.models.layer_rules import parse_rule
from growkit.models.tables import list_shipped

torch.set_num_threads(1)
SLOW = pytest.mark.slow
LAYERS = 4
MAP = [0, 1, 1, 2, 3, 3]
# (type, fields of an old config.json)
RULES = [
    ("gemma3_text", {"sliding_window_pattern": 3}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [0]}),
    *(
        pytest.param(*case, marks=SLOW)
        for case in [
            ("gemma3_text", {}),
            ("cohere2", {"sliding_window_pattern": 2}),
            ("afmoe", {"global_attn_every_n_layers": 2}),
            ("exaone4", {"sliding_window_pattern": 3}),
            ("exaone_moe", {"first_k_dense_replace": 2, "sliding_window_pattern": 2}),
            ("qwen2_moe", {"decoder_sparse_step": 3}),
            ("qwen3_next", {"full_attention_interval": 2}),
            ("qwen3_5_text", {"full_attention_interval": 2}),
            ("llama4_text", {"no_rope_layer_interval": 2, "interleave_moe_layer_step": 2}),
            ("smollm3", {"no_rope_layer_interval": 2}),
            ("olmo3", {}),
            ("gpt_oss", {}),
            ("lfm2", {"full_attn_idxs": [0, 2]}),
            ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
            ("qwen3", {"use_sliding_window": True, "max_window_layers": 3}),
        ]
    ),
]
LISTS = (
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "moe_layers",
    "full_attn_idxs",
    "mlp_only_layers",
)


def write_old(kind, fields, path):
    """A directory of a tiny model whose config.json states rules and no lists."""
    tiny = {name: value for name, value in tiny_fields(kind).items() if name not in LISTS}
    tiny |= {find_family(kind).fields["layer"]: LAYERS, **fields}
    save_tiny(kind, tiny, path)
    config = json.loads((path / "config.json").read_text())
    for name in LISTS:
        config.pop(name, None)
    (path / "config.json").write_text(json.dumps(config | fields))


def make_layers(kind, path):
    """The layers that transformers makes of a directory."""
    config = set_plain(transformers.AutoConfig.from_pretrained(path))
    with torch.device("meta"):
        network = transformers.AutoModelForCausalLM.from_config(config)
    row = next(row for row in find_family(kind).rows if "{layer}" in row.name)
    return getattr(*find_layers(network, row.name.partition(".{layer}")[0]))


@pytest.mark.parametrize("kind,fields", RULES)
def test_layers_keep_the_kinds_that_a_rule_gave_them(kind, fields, tmp_path):
    write_old(kind, fields, tmp_path / "source")
    source, out = tmp_path / "source", tmp_path / "out"
    words = ["depth", "--map", ",".join(map(str, MAP)), str(source), str(out), "--no-sync"]
    assert not call(words)
    old, new = make_layers(kind, source), make_layers(kind, out)
    for place, layer in enumerate(MAP):
        differences = list_differences(describe_kind(old[layer]), describe_kind(new[place]), False)
        assert not differences, f"layer {place} of {layer}"
    load_logits(out)


@pytest.mark.parametrize("kind", list_shipped())
def test_rules_are_those_of_the_table(kind):
    """A rule that is shipped can be read, of fields that have values."""
    family = find_family(kind)
    for text in (*family.rules.values(), *family.checked.values()):
        assert parse_rule(text)[1] <= family.defaults.keys()


SMALL = {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}


def follow(kind, config, index):
    family = find_family(kind)
    given = {"model_type": kind, **config}
    return follow_layers({**given, family.fields["layer"]: len(index)}, given, family, index)


def test_a_map_that_would_change_a_kind_is_refused_with_the_nearest_that_works():
    config = SMALL | {"expert_layer_period": 2, "expert_layer_offset": 1}
    with pytest.raises(UsageError) as refusal:
        follow("jamba", config, [0, 0, 1, 2, 3, 3])
    said = str(refusal.value)
    assert "new layer 1, a copy of layer 0, would not (attention: layer % attn_layer_period" in said
    assert said.endswith("the nearest that works is --map 0-1,0-1,2-3")
    assert follow("jamba", config, [0, 1, 0, 1, 2, 3])["num_hidden_layers"] == 6


def test_layers_counted_up_to_the_last_follow():
    config = {"num_hidden_layers": 4, "moe_layer_start_index": 1, "moe_layer_end_index": 3}
    grown = follow("ernie4_5_moe", config | {"moe_layer_interval": 1}, [0, 0, 1, 2, 3, 3])
    assert (grown["moe_layer_start_index"], grown["moe_layer_end_index"]) == (2, 5)


def test_a_list_that_is_repeated_becomes_one_entry_a_layer():
    grown = follow("recurrent_gemma", {"num_hidden_layers": 4}, [0, 1, 1, 2, 3])
    assert grown["block_types"] == ["recurrent"] * 3 + ["attention", "recurrent"]


def test_a_field_that_is_null_leaves_the_kinds_open():
    config = {"num_hidden_layers": 4, "sliding_window_pattern": None}
    with pytest.raises(UsageError, match="has sliding_window_pattern null and lacks layer_types"):
        follow("exaone4", config, [0, 0, 1, 2, 3])
    stated = config | {"layer_types": ["full_attention"] * 4}
    assert len(follow("exaone4", stated, [0, 0, 1, 2, 3])["layer_types"]) == 5


@pytest.mark.parametrize(
    "text", ["open('x')", "layer.real", "[layer]", "layer ** 9", "layer if", "lambda: 1"]
)
def test_a_rule_computes_nothing_else(text):
    with pytest.raises(GrowkitError, match="rule of layers"):
        parse_rule(text)


def test_defaults_come_in_the_order_in_which_rules_state_them():
    """Not in a set's, which another process has otherwise, nor in the configuration's."""
    stated = {
        "moe_layer_end_index": 27,
        "moe_layer_start_index": 1,
        "moe_layer_interval": 1,
        "attn_layer_offset": 4,
        "attn_layer_period": 8,
    }
    found = Kinds()
    add_known(found, stated)
    assert list(found.checked) == ["attention", "sparse"]
    assert list(found.defaults) == [
        "attn_layer_period",
        "attn_layer_offset",
        "moe_layer_interval",
        "moe_layer_start_index",
        "moe_layer_end_index",
    ]
    found = Kinds()
    add_known(found, stated | {"moe_layer_interval": None, "attn_layer_period": None})
    assert not found.checked and not found.defaults


def test_a_wrong_rule_is_not_found():
    """The rule of one type's class is not that of another, nor of a list that follows no rule."""
    stated = CONFIG_MAPPING["gemma3_text"]().to_dict()
    found = find_rule(Lists("gemma3_text", "layer_types", "num_hidden_layers", False), stated)
    assert found is not None and "(layer + 1) % sliding_window_pattern" in found[0]
    stated = CONFIG_MAPPING["gemma2"]().to_dict()
    assert find_rule(Lists("gemma2", "layer_types", "num_hidden_layers", False), stated) is None
