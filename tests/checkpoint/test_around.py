"""Text decoders within larger models grow; what lies around them is carried along bit for bit."""

from __future__ import annotations

import json
import re
import shutil

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from safetensors.torch import load_file, save_file

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


def change(source, out, scale, skip=()):
    """A copy of a directory whose numbers are others; whole numbers stay."""
    shutil.copytree(source, out)
    state = load_file(source / "model.safetensors")
    changed = {
        name: tensor * scale if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
        if name not in skip
    }
    save_file(changed, out / "model.safetensors", {"format": "pt"})
    return out


def test_all_of_a_larger_model_is_averaged(tmp_path, capsys):
    source = save("gemma3", tmp_path / "source")
    other = change(source, tmp_path / "other", 2.0)
    command = ["average", str(source), str(other), "--weights", "1,3"]
    assert run([*command, "--out", str(tmp_path / "out")]) == 0
    count = len(open_source(str(source)).around.others)
    said = capsys.readouterr().out
    assert f"note: the {count} tensors around the text decoder are averaged too" in said
    assert "growth carries" not in said
    state = load_file(source / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.allclose(found[name], tensor * 1.75, rtol=1e-12, atol=0.0), name
    before, after = (
        json.loads((path / "config.json").read_text()) for path in (other, tmp_path / "out")
    )
    assert after == before
    load(tmp_path / "out")


def save_text(source, path):
    """The decoder of a larger model alone, as a directory of its own."""
    opened = open_source(str(source))
    path.mkdir()
    state = {
        name: torch.from_numpy(tensor.read()) for name, tensor in opened.tensors["params"].items()
    }
    save_file(state, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(opened.config))
    return path


def refuse_mean(capsys, one, other, said, code=2):
    assert run(["average", str(one), str(other), "--out", str(one.parent / "no")]) == code
    assert said in capsys.readouterr().err
    assert not (one.parent / "no").exists()


def test_what_lies_around_must_be_alike_for_a_mean(tmp_path, capsys):
    source = save("gemma3", tmp_path / "source")
    around = open_source(str(source)).around
    name = next(iter(around.others))
    fewer = change(source, tmp_path / "fewer", 1.0, (name,))
    refuse_mean(capsys, source, fewer, f"only models of one shape have a mean: {name} is [")
    other = change(source, tmp_path / "config", 1.0)
    config = json.loads((other / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 1
    (other / "config.json").write_text(json.dumps(config))
    refuse_mean(capsys, source, other, "vision_config.num_attention_heads is 2 in")
    config["vision_config"]["num_attention_heads"] = 2
    config["transformers_version"] = "4.0.0"
    (other / "config.json").write_text(json.dumps(config))
    assert run(["average", str(source), str(other), "--out", str(tmp_path / "mean")]) == 0
    plain = tmp_path / "plain"
    save_text(source, plain)
    refuse_mean(
        capsys, source, plain, "source is a text decoder within a larger model, and", code=2
    )


def test_whole_numbers_have_no_mean(tmp_path, capsys):
    source = save("gemma3", tmp_path / "source")
    state = load_file(source / "model.safetensors")
    for place, number in (("a", 3), ("b", 3), ("c", 4)):
        shutil.copytree(source, tmp_path / place)
        more = state | {"vision.count": torch.tensor([number])}
        save_file(more, tmp_path / place / "model.safetensors", {"format": "pt"})
    a, b, c = (tmp_path / name for name in "abc")
    assert run(["average", str(a), str(b), "--out", str(tmp_path / "mean")]) == 0
    assert load_file(tmp_path / "mean" / "model.safetensors")["vision.count"].tolist() == [3]
    refuse_mean(capsys, a, c, "'vision.count' holds whole numbers, which have no mean", code=1)
