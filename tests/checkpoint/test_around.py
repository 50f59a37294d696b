"""Text decoders within larger models grow; what lies around them is carried along bit for bit."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from safetensors.torch import load_file

from growkit.checkpoint.location import open_source
from growkit.cli import run
from growkit.derive import proof
from growkit.derive.network import CONFIG_MAPPING, set_plain, wide
from growkit.derive.network import run as compute
from growkit.derive.stream import TOKENS
from growkit.derive.tiny import tiny_fields
from growkit.derive.variant import fill

torch.set_num_threads(1)
# No token of a picture.
TEXT = TOKENS % 37
BOUND = 1e-10
SLOW = pytest.mark.slow
SEEN = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
IMAGE = {"image_token_id": 39, "image_token_index": 39}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
QWEN = {"vision_start_token_id": 37, "video_token_id": 38, "image_token_id": 39}
# type -> (its decoder, fields of its vision, further fields)
WHOLE = {
    "gemma3": ("gemma3_text", SEEN, IMAGE | {"mm_tokens_per_image": 4}),
    "llava": ("llama", SEEN | {"model_type": "clip_vision_model"}, IMAGE),
    "mistral3": ("mistral", SEEN | {"model_type": "pixtral", "head_dim": 8}, IMAGE),
    "paligemma": ("gemma2", SEEN | {"model_type": "siglip_vision_model"}, IMAGE),
    "idefics3": ("llama", SEEN, IMAGE),
    "llama4": (
        "llama4_text",
        SEEN
        | {"intermediate_size": 64, "vision_output_dim": 16, "projector_input_dim": 16}
        | {"projector_output_dim": 16},
        IMAGE,
    ),
    "qwen2_5_vl": (
        "qwen2",
        {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
        | {"out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 16},
        QWEN,
    ),
}
KINDS = [
    kind if kind in ("gemma3", "qwen2_5_vl") else pytest.param(kind, marks=SLOW) for kind in WHOLE
]


def make_config(kind):
    decoder, vision, fields = WHOLE[kind]
    text = {"model_type": decoder, **tiny_fields(decoder)}
    if kind == "qwen2_5_vl":
        text |= {"model_type": "qwen2_5_vl_text", "rope_parameters": ROPE}
        del text["sliding_window"]
    config = CONFIG_MAPPING[kind](text_config=text, vision_config=vision, **fields)
    return set_all_plain(config)


def set_all_plain(config):
    set_plain(config.get_text_config())
    return set_plain(config)


def save(kind, path):
    """A tiny random model of a type, saved by transformers."""
    config = make_config(kind)
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    with torch.random.fork_rng(), wide():
        torch.manual_seed(0)
        network = mapping[type(config)](config).eval()
        state = network.state_dict()
        filled = fill(state)
        for name, tensor in state.items():
            tensor.copy_(filled[name])
        network.tie_weights()
        network.save_pretrained(path)
    return path


def load(path):
    config = set_all_plain(transformers.AutoConfig.from_pretrained(path))
    with wide():
        network, report = transformers.AutoModelForImageTextToText.from_pretrained(
            path, config=config, dtype=torch.float64, output_loading_info=True
        )
    assert not any(report.values()), report
    return network.eval()


def reorder(path, index):
    """Logits of transformers' own layers of the decoder in another order."""
    network = load(path)
    lists = [
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.ModuleList) and re.search(r"(language|text)_model", name)
    ]
    holder, _, last = min(lists, key=len).rpartition(".")
    network = proof.reorder_layers(network, network.get_submodule(holder), last, index)
    return compute(network, TEXT)


def grow(path, name, *words):
    out = path.parent / name
    assert run([*words, str(path), str(out), "--no-sync"]) == 0
    return out


def check_carried(source, out):
    """What is not the decoder's is there with the same bits and the same configuration."""
    before, after = (load_file(path / "model.safetensors") for path in (source, out))
    opened = open_source(str(source))
    around = opened.around
    assert around.others
    assert "training, import and export take the decoder alone" in opened.notes[-1]
    assert all(torch.equal(before[name], after[name]) for name in around.others)
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, out))
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed <= {"text_config"} and before.keys() == after.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_grows_and_the_rest_is_carried(kind, tmp_path, capsys):
    source = save(kind, tmp_path / "source")
    logits = compute(load(source), TEXT)
    silent = grow(source, "silent", "depth", "--map", "3:5", "--method", "identity")
    assert proof.gap(compute(load(silent), TEXT), logits) < BOUND
    wide_one = grow(source, "wide", "width", "--mlp", "2x")
    assert proof.gap(compute(load(wide_one), TEXT), logits) < BOUND
    deep = grow(source, "deep", "depth", "--map", "0,1,1,2")
    assert proof.gap(compute(load(deep), TEXT), reorder(source, [0, 1, 1, 2])) < BOUND
    for out in (silent, wide_one, deep):
        check_carried(source, out)
    assert run(["verify", str(source), str(deep)]) == 0
    like = grow(source, "like", "grow", "--like", str(deep))
    assert proof.gap(compute(load(like), TEXT), reorder(source, [0, 0, 1, 2])) < BOUND
    twice = grow(deep, "twice", "width", "--mlp", "2x")
    assert proof.gap(compute(load(twice), TEXT), compute(load(deep), TEXT)) < BOUND
    assert run(["width", "--embed", "2x", str(source), str(tmp_path / "no")]) == 2
    assert "embed of a" in capsys.readouterr().err
