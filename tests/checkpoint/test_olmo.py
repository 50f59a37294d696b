"""Unsharded checkpoints of OLMo 2 become trainer checkpoints, moments and step included.

The files are written as olmo/safetensors_util.py of allenai/OLMo writes them.
"""

from __future__ import annotations

import base64
import pathlib
import pickle
import random

import numpy as np
import pytest
import yaml
from conftest import random_tensors

from growkit.checkpoint.location import open_source
from growkit.cli import run
from growkit.models import read_config

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

STEPS = 20
CONFIG = {
    "model_type": "olmo2",
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
SETTINGS = {
    "d_model": 16,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "mlp_hidden_size": 24,
    "weight_tying": False,
    "rope": True,
    "rope_theta": 500000,
    "include_bias": False,
    "layer_norm_type": "rms",
    "layer_norm_eps": "1e-6",
    "attention_layer_norm": True,
    "norm_after": True,
    "max_sequence_length": 32,
    "vocab_size": 45,
    "embedding_size": 48,
    "eos_token_id": 40,
    "pad_token_id": 41,
}
SINGLE = {
    "attn_out": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "ff_out": "mlp.down_proj",
    "attn_norm": "post_attention_layernorm",
    "ff_norm": "post_feedforward_layernorm",
}
JOINED = {
    "att_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "ff_proj": ("mlp.up_proj", "mlp.gate_proj"),
}


def encode(*keys, pickled=False):
    return base64.urlsafe_b64encode(pickle.dumps((keys, pickled))).decode("ascii")


def to_olmo(tensors):
    """The tensors of transformers' OLMo 2 under OLMo's names."""
    found = {
        "transformer.wte.weight": tensors["model.embed_tokens.weight"],
        "transformer.ln_f.weight": tensors["model.norm.weight"],
        "transformer.ff_out.weight": tensors["lm_head.weight"],
    }
    for layer in range(2):
        ours, theirs = f"transformer.blocks.{layer}", f"model.layers.{layer}"
        for name, other in SINGLE.items():
            found[f"{ours}.{name}.weight"] = tensors[f"{theirs}.{other}.weight"]
        for name, parts in JOINED.items():
            joined = [tensors[f"{theirs}.{part}.weight"] for part in parts]
            found[f"{ours}.{name}.weight"] = np.concatenate(joined)
    return {name: torch.from_numpy(array) for name, array in found.items()}


def save_olmo(path, wrapped="", numbered=False, **settings):
    """Write a directory; returns the slots by transformers' names."""
    path.mkdir()
    model = read_config(CONFIG)
    slots = {slot: random_tensors(model, "float32", n) for n, slot in enumerate(("p", "m", "v"))}
    slots["v"] = {name: np.square(array) for name, array in slots["v"].items()}
    made = {slot: to_olmo(tensors) for slot, tensors in slots.items()}
    save_file({encode(n): t for n, t in made["p"].items()}, path / "model.safetensors")
    options = bytearray(pickle.dumps([{"lr": 3e-4, "params": ["x"]}]))
    pickled = torch.frombuffer(options, dtype=torch.uint8)
    optim = {encode("param_groups", pickled=True): pickled}
    for number, name in enumerate(made["p"]):
        key = number if numbered else wrapped + name
        optim[encode("state", key, "exp_avg")] = made["m"][name]
        optim[encode("state", key, "exp_avg_sq")] = made["v"][name]
        optim[encode("state", key, "step")] = torch.tensor(float(STEPS))
    save_file(optim, path / "optim.safetensors")
    written = {"model": SETTINGS | settings, "optimizer": {"name": "adamw"}}
    (path / "config.yaml").write_text(yaml.safe_dump(written))
    state = {
        "global_step": STEPS + 1,
        "checkpoints": [pathlib.PosixPath("/somewhere/step10")],
        "rng": {"python": random.getstate(), "numpy": np.random.get_state()},
    }
    torch.save(state, path / "train.pt")
    return slots


@pytest.mark.parametrize("wrapped", ["", "_fsdp_wrapped_module."])
def test_parameters_moments_and_count(tmp_path, capsys, wrapped):
    slots = save_olmo(tmp_path / "ck", wrapped)
    assert run(["import", str(tmp_path / "ck"), str(tmp_path / "out")]) == 0
    assert f"with moments; step {STEPS + 1}, count {STEPS}" in capsys.readouterr().out
    found = open_source(str(tmp_path / "out"))
    assert found.record["count"] == STEPS and found.config["rms_norm_eps"] == 1e-6
    for slot, tensors in zip(("params", "mu", "nu"), slots.values(), strict=True):
        assert found.tensors[slot].keys() == tensors.keys()
        for name, array in tensors.items():
            assert found.tensors[slot][name].read().tobytes() == array.tobytes(), (slot, name)
    assert run(["depth", "--map", "2:3", str(tmp_path / "out"), str(tmp_path / "grown")]) == 0


def refused(path, tmp_path, capsys, *said, verb=("import",)):
    capsys.readouterr()
    assert run([*verb, str(path), str(tmp_path / "no")]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and all(each in err for each in said), err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "settings,said",
    [
        ({"norm_after": False}, "norm_after is False"),
        ({"layer_norm_type": "default"}, "layer_norm_type is 'default'"),
        ({"layer_norm_eps": "x"}, "layer_norm_eps must be a number"),
        ({"n_heads": "x"}, "n_heads must be a whole number"),
        ({"n_kv_heads": 4}, "att_proj.weight has 32 rows, and its parts 48"),
    ],
)
def test_settings_of_another_model(tmp_path, capsys, settings, said):
    save_olmo(tmp_path / "ck", **settings)
    refused(tmp_path / "ck", tmp_path, capsys, said)


def test_it_is_imported_before_it_grows(tmp_path, capsys):
    save_olmo(tmp_path / "ck")
    refused(tmp_path / "ck", tmp_path, capsys, "`growkit import", verb=("depth", "--map", "2:3"))


class Foreign:
    def __reduce__(self):
        return print, ("run",)


def test_names_that_are_pickles_of_more_are_refused(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    save_olmo(tmp_path / "ck")
    file = tmp_path / "ck" / "model.safetensors"
    held = load_file(file)
    for name, said in (
        (encode(Foreign()), "a pickle of builtins.print; nothing of it was run"),
        ("plain.name", "is no name of OLMo's"),
        (encode("other.weight"), "no parameter for 'other.weight'"),
    ):
        save_file(held | {name: torch.zeros(2)}, file)
        refused(tmp_path / "ck", tmp_path, capsys, said)
    file.unlink()
    refused(tmp_path / "ck", tmp_path, capsys, "model.safetensors is missing")


def test_parameters_by_number_are_not_read(tmp_path, capsys):
    save_olmo(tmp_path / "ck", numbered=True)
    refused(tmp_path / "ck", tmp_path, capsys, "keys parameters by number")


@pytest.mark.parametrize("step", [torch.tensor(float("nan")), torch.zeros(0)])
def test_a_step_that_is_none(tmp_path, capsys, step):
    save_olmo(tmp_path / "ck")
    file = tmp_path / "ck" / "optim.safetensors"
    tensors = load_file(file)
    tensors[encode("state", "transformer.wte.weight", "step")] = step
    save_file(tensors, file)
    assert run(["import", str(tmp_path / "ck"), str(tmp_path / "out")]) == 1
    assert "the step of a parameter is no number" in capsys.readouterr().err


def test_keys_that_are_none(tmp_path, capsys):
    save_olmo(tmp_path / "ck")
    file = tmp_path / "ck" / "optim.safetensors"
    save_file(load_file(file) | {encode("state", ["x"], "exp_avg"): torch.zeros(1)}, file)
    assert run(["import", str(tmp_path / "ck"), str(tmp_path / "out")]) == 1
    assert "is no name of OLMo's" in capsys.readouterr().err
