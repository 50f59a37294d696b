"""`--scale`: copied layers with a share other than 0 and 1, against transformers with the outputs
of those layers multiplied by hand.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import save_directory

import growkit
from growkit.cli import run
from growkit.errors import UsageError
from growkit.growth.depth import plan_depth
from growkit.growth.layer_shares import scale_layers
from growkit.growth.width import plan_like, plan_width
from growkit.models import FAMILIES, find_family
from growkit.models.tables import read_shipped
from trainer.config.sections import Grow
from trainer.run.growth import plan_growth

LLAMA = FAMILIES["llama"].model(
    layer=3, embed=24, kv=2, group=2, head_dim=6, mlp=32, vocab=40, context=16, tied=False
)
# By family: the modules of a layer whose outputs go into the residual stream. GPT-NeoX's have
# biases; Gemma 2's are norms, whose weights have an offset of 1.
WRITERS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
# Gemma 2 is computed by eager attention alone, whose softmax is in float32.
LIMITS = {"llama": 1e-12, "gpt_neox": 1e-12, "gemma2": 1e-5}
SIZES = {"layer": 3, "embed": 24, "mlp": 32, "vocab": 40, "context": 16}
SCALES = {"layer=0.5": [1, 0.5, 1, 0.5, 1], "layer=0.9,0.25,1,1.5,0": [0.9, 0.25, 1, 1.5, 0]}


def save_model(path, kind):
    """A random model in float64 on disk."""
    grouped = {"kv": 2, "group": 2, "head_dim": 6}
    heads = {"head": 3, "head_dim": 8} if kind == "gpt_neox" else grouped
    model = find_family(kind).model(**SIZES, **heads, tied=kind == "gemma2")
    save_directory(path, model, "float64")
    return path


def load(path, kind):
    """transformers' model of a directory, in float64."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    network, report = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float64,
        attn_implementation="eager" if kind == "gemma2" else "sdpa",
        output_loading_info=True,
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return network.eval()


def compute_logits(network):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        # Repeated layers would share their place in a cache.
        return network(torch.arange(12).reshape(2, 6), use_cache=False).logits.numpy()


def repeat_by_hand(path, kind, shares):
    """transformers' logits of the source with its own layers repeated and their outputs scaled.

    The layers are computed one by one, so that nothing of growkit is in between.
    """
    network = load(path, kind)
    body = network.base_model
    places = (0, 0, 1, 1, 2)
    layers = [body.layers[place] for place in places]
    share = iter(())

    def scale(module, inputs, output):
        return output * next(share)

    for layer in body.layers:
        for name in WRITERS[kind]:
            layer.get_submodule(name).register_forward_hook(scale)
    body.layers = type(body.layers)(layers)
    body.config.num_hidden_layers = len(layers)
    if getattr(body.config, "layer_types", None):
        body.config.layer_types = [body.config.layer_types[place] for place in places]
    share = iter([each for each in shares for _ in WRITERS[kind]])
    logits = compute_logits(network)
    assert next(share, None) is None
    return logits


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", WRITERS)
def test_shares_are_what_transformers_finds_with_scaled_outputs(tmp_path, kind, scale):
    source = save_model(tmp_path / "small", kind)
    words = ["depth", "--map", "3:5", "--scale", scale, str(source), str(tmp_path / "grown")]
    assert run(words) == 0
    found = compute_logits(load(tmp_path / "grown", kind))
    by_hand = repeat_by_hand(source, kind, SCALES[scale])
    size = np.abs(by_hand).max()
    assert size > 0.1 and np.abs(found - by_hand).max() < LIMITS[kind] * size
    others = repeat_by_hand(source, kind, [1] * 5)
    assert np.abs(found - others).max() > 1e-3 * size, "the shares must be seen"


def test_lineage_and_verify(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_directory(tmp_path / "small", LLAMA, "float64")
    assert run(["depth", "--map", "3:5", "--scale", "layer=0.5", "small", "out", "--check"]) == 0
    shown = capsys.readouterr().out
    assert "not preserved: each layer's output is multiplied by its share" in shown
    assert "share    1  0.5    1  0.5    1" in shown and "with shares of 0.5, 1" in shown
    assert run(["verify", "small", "out"]) == 0
    entry = json.loads((tmp_path / "out" / "lineage.json").read_text())[-1]
    assert entry["maps"]["layer"]["share"] == [1, 0.5, 1, 0.5, 1]
    assert entry["function"] == "not preserved"
    weight = "model.layers.1.mlp.down_proj.weight"
    old, new = (growkit.open_source(name).tensors["params"] for name in ("small", "out"))
    halved = old["model.layers.0.mlp.down_proj.weight"].read() * 0.5
    assert np.array_equal(new[weight].read(), halved)
    # Verify reads the shares: with others it finds the writers of copied layers.
    entry["maps"]["layer"]["share"][1] = 0.75
    (tmp_path / "out" / "lineage.json").write_text(json.dumps([entry]))
    assert run(["verify", "small", "out"]) == 1
    assert "model.layers.1." in capsys.readouterr().err


def test_a_share_of_zero_is_identity_growth():
    ours = plan_depth(LLAMA, "3:5", scale=0)
    theirs = plan_depth(LLAMA, "3:5", "identity")
    assert ours.maps["layer"].share.tolist() == theirs.maps["layer"].share.tolist()
    assert ours.preserved and not plan_depth(LLAMA, "3:5", scale=0.5).preserved
    # Copies that stand apart from their originals, as SOLAR has them, are damped too.
    apart = plan_depth(LLAMA, "0-2,1-2", scale="layer=0.25").maps["layer"]
    assert apart.share.tolist() == [1, 1, 1, 0.25, 0.25]


def test_growth_to_another_models_sizes_and_in_a_run():
    larger = LLAMA.change(layer=5, mlp=64)
    plan = plan_like(LLAMA, larger, scale="layer=0.5")
    assert plan.maps["layer"].share.tolist() == [1, 0.5, 1, 0.5, 1] and plan.grown == larger
    assert plan_like(LLAMA, LLAMA.change(layer=5), scale=[1, 0.5, 1, 0.5, 1]).grown.layer == 5
    grown = plan_growth(Grow(map="3:5", scale="layer=0.5"), LLAMA)
    assert grown.maps["layer"].share.tolist() == [1, 0.5, 1, 0.5, 1]
    with pytest.raises(UsageError, match="set grow.map too"):
        plan_growth(Grow(embed="2x", scale="layer=0.5"), LLAMA)


BAD = {
    "0.5": "--scale takes layer=SHARE for copied layers, as layer=0.5, .*; got '0.5'",
    "layer=half": "got 'layer=half'",
    "layer=": "got 'layer='",
    "mlp=0.5": "for layers alone, as layer=0.5; got 'mlp'",
    "layer=nan": "finite and at least 0, got nan",
    "layer=-0.5": "finite and at least 0, got -0.5",
    "layer=1e999": "finite and at least 0, got inf",
    "layer=1,0.5": "lists 2 shares, and the map makes 5 layers; give one share for all .*, or 5",
}


@pytest.mark.parametrize("text", BAD)
def test_scales_that_are_refused(text):
    with pytest.raises(UsageError, match=BAD[text]):
        plan_depth(LLAMA, "3:5", scale=text)


def test_growths_that_take_no_scale():
    with pytest.raises(UsageError, match="identity gives copies a share of 0, and --scale another"):
        plan_depth(LLAMA, "3:5", "identity", "layer=0.5")
    with pytest.raises(UsageError, match="the map lists each layer once"):
        plan_depth(LLAMA, "2,1,0", scale="layer=0.5")
    with pytest.raises(UsageError, match="the target has no more layers"):
        plan_like(LLAMA, LLAMA.change(mlp=64), scale="layer=0.5")
    with pytest.raises(UsageError, match="this growth copies none"):
        scale_layers(plan_width(LLAMA, mlp="2x"), 0.5)
    with pytest.raises(TypeError, match="scale must be of type"):
        plan_depth(LLAMA, "3:5", scale=object())
    bert = read_shipped("bert").model(
        layer=2, embed=8, head=2, head_dim=4, mlp=16, vocab=9, context=8
    )
    with pytest.raises(UsageError, match="take no shares: .*; leave --scale out"):
        plan_depth(bert, "2:4", scale="layer=0.5")
