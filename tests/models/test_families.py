"""Every family grows as transformers computes: through files, in float64, against transformers' own
classes.

Exact operators leave the logits as they were; depth by copies gives the logits of transformers' own
list of layers, put in another order. Each family's mutations (a row that says something wrong) must
be found out.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import random_tensors, save_tensors

from growkit.checkpoint.location import open_source, write_output
from growkit.growth.axes import make_map, tile
from growkit.growth.depth import plan_depth
from growkit.growth.plan import build_plan, combine_plans
from growkit.growth.width import plan_width
from growkit.models import FAMILIES
from growkit.models.architecture import Architecture
from growkit.models.table import Table
from growkit.surgery.grow import prepare_growth

SIZES = {"layer": 3, "embed": 24, "kv": 2, "group": 3, "head_dim": 4, "mlp": 20, "vocab": 40}
# kind -> variants: (values for the model, further fields of its config.json)
VARIANTS = {
    "llama": [
        ({"tied": True}, {}),
        ({"attention_bias": True, "mlp_bias": True}, {}),
    ],
    "mistral": [({"tied": True}, {}), ({}, {"sliding_window": 5})],
    "qwen2": [
        ({"tied": True}, {}),
        # By rule the layers from the second on have a window.
        ({}, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ({}, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}),
    ],
    "qwen3": [
        ({"tied": True}, {}),
        (
            {"attention_bias": True},
            {
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "use_sliding_window": True,
                "sliding_window": 5,
            },
        ),
    ],
}
# Of the largest logit, in float64.
BOUND = 1e-10
TOKENS = np.random.default_rng(1).integers(0, 40, (2, 17))
KV = make_map([0, 1, 0, 0], 2, [0.5, 1.0, 0.2, 0.3])
MLP = make_map([*range(20), 3, 3, 7], 20, [1, 1, 1, 0.5, 1, 1, 1, 0.9, *[1] * 12, 0.3, 0.2, 0.1])


def copy_width(model: Architecture):
    return build_plan("width", "", model, {"embed": tile(24, 48), "kv": KV, "mlp": MLP})


EXACT = {
    "identity": lambda model: plan_depth(model, "3:5", "identity"),
    "embed by copies": lambda model: build_plan("width", "", model, {"embed": tile(24, 48)}),
    "heads uneven": lambda model: build_plan("width", "", model, {"kv": KV}),
    "mlp uneven": lambda model: build_plan("width", "", model, {"mlp": MLP}),
    "width with noise": lambda model: replace(copy_width(model), noise=1.0, seed=3),
    "padding": lambda model: plan_width(model, embed=42, mlp=29),
    "all by copies": lambda model: combine_plans(
        "grow", [plan_depth(model, "3:4", "identity"), copy_width(model)], model
    ),
    "all with padding": lambda model: combine_plans(
        "grow", [plan_depth(model, "3:4", "identity"), plan_width(model, embed=36, heads=9)], model
    ),
}
CASES = [(kind, number) for kind, variants in VARIANTS.items() for number in range(len(variants))]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """(directory, its logits) of a family's variant, made once."""

    @cache
    def make(kind: str, number: int):
        values, fields = VARIANTS[kind][number]
        # A large eps shows whether padding scales it.
        model = FAMILIES[kind].model(**{**SIZES, "context": 64, "norm_eps": 1e-2, **values})
        path = save_model(tmp_path_factory.mktemp(kind) / "source", model, **fields)
        return path, compute_logits(path)

    return make


def save_model(path: Path, model: Architecture, **fields) -> Path:
    path.mkdir(parents=True)
    save_tensors(path / "model.safetensors", random_tensors(model, "float64"))
    (path / "config.json").write_text(json.dumps(model.config() | fields))
    return path


def load_network(path: Path):
    """transformers' model of a directory; norms, float32 there, compute in their input's dtype."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    network, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="sdpa", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    assert not report["mismatched_keys"]
    for module in network.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = widen_norm(torch, module)
    return network.eval()


def widen_norm(torch, module):
    def normalise(x):
        variance = x.square().mean(-1, keepdim=True)
        return module.weight * x * torch.rsqrt(variance + module.variance_epsilon)

    return normalise


def logits_of(network) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return network(torch.from_numpy(TOKENS)).logits.numpy()


def compute_logits(path: Path) -> np.ndarray:
    return logits_of(load_network(path))


def grow(path: Path, plan_of, out: Path) -> Path:
    source = open_source(str(path))
    write_output(out, "huggingface", prepare_growth(source, plan_of(source.model)), [source])
    return out


def gap(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("operator", EXACT)
@pytest.mark.parametrize("kind,number", CASES)
def test_exact_growth_keeps_the_logits(kind, number, operator, sources, tmp_path):
    path, logits = sources(kind, number)
    assert np.abs(logits).max() > 0.5
    out = grow(path, EXACT[operator], tmp_path / "out")
    assert gap(compute_logits(out), logits) < BOUND


@pytest.mark.parametrize("layers", ["3:5", "0,2,1,0,2"])
@pytest.mark.parametrize("kind,number", CASES)
def test_depth_by_copies_is_transformers_layers_in_that_order(
    kind, number, layers, sources, tmp_path
):
    torch = pytest.importorskip("torch")
    path, logits = sources(kind, number)
    source = open_source(str(path))
    index = plan_depth(source.model, layers).maps["layer"].index.tolist()
    out = grow(path, lambda model: plan_depth(model, layers), tmp_path / "out")
    network = load_network(path)
    inner = network.model
    inner.layers = torch.nn.ModuleList([deepcopy(inner.layers[layer]) for layer in index])
    network.config.num_hidden_layers = len(index)
    if getattr(network.config, "layer_types", None):
        kinds = list(network.config.layer_types)
        network.config.layer_types = [kinds[layer] for layer in index]
    for number_, layer in enumerate(inner.layers):
        layer.self_attn.layer_idx = number_
        # A deep copy's norms still call the forward of the original: bind them to their own
        # weights.
        for module in layer.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = widen_norm(torch, module)
    expected = logits_of(network)
    ours = compute_logits(out)
    assert gap(ours, expected) < BOUND
    assert gap(ours, logits) > 1e-3


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_defaults_are_transformers(kind):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(kind)
    assert FAMILIES[kind].read(theirs.to_dict()).values == FAMILIES[kind].read({}).values


@pytest.mark.parametrize("kind,number", CASES)
def test_a_configuration_goes_through_transformers(kind, number, sources):
    transformers = pytest.importorskip("transformers")
    path, _ = sources(kind, number)
    model = open_source(str(path)).model
    theirs = transformers.AutoConfig.from_pretrained(path)
    assert FAMILIES[kind].read(theirs.to_dict()) == model
    assert FAMILIES[kind].read(model.config()) == model


def break_row(monkeypatch, right: str, wrong: str, kind: str) -> None:
    """Have a family's table say something else."""
    family = FAMILIES[kind]
    assert right in family.text, right
    broken = replace(family, text=family.text.replace(right, wrong))
    monkeypatch.setitem(FAMILIES, kind, broken)


WRONG_ROWS = {
    "o_proj does not write the stream": (
        "{/layer}.self_attn.o_proj.weight ",
        "{layer}.self_attn.o_proj.weight  ",
    ),
    "down_proj does not read mlp": ("embed /mlp", "embed mlp "),
    "heads before groups": ("(kv group head_dim) /embed", "(group kv head_dim) /embed"),
    "queries do not read embed": ("(kv group head_dim) /embed ", "(kv group head_dim) embed  "),
    "a norm is a bias": ("ones    norm  ", "ones    bias  "),
}  # fmt: skip


def test_queries_that_do_not_follow_eps_are_another_function(sources, tmp_path, monkeypatch):
    """Norms over queries share the configuration's eps, which padding scales."""
    path, logits = sources("qwen3", 0)
    monkeypatch.setattr(Table, "normalises_queries", False)
    out = grow(path, EXACT["padding"], tmp_path / "out")
    assert gap(compute_logits(out), logits) > 1e-3


def test_kinds_by_rule_would_change(sources, tmp_path):
    """Without the list that growth writes, Qwen2's rule gives other layers a window."""
    path, _ = sources("qwen2", 2)
    out = grow(path, lambda model: plan_depth(model, "3:5", "identity"), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["layer_types"] == ["full_attention"] * 5
    logits = compute_logits(out)
    del config["layer_types"]
    (out / "config.json").write_text(json.dumps(config))
    assert gap(compute_logits(out), logits) > 1e-3


@pytest.mark.parametrize("wrong", WRONG_ROWS)
@pytest.mark.parametrize("kind", VARIANTS)
def test_a_wrong_row_is_another_function(kind, wrong, sources, tmp_path, monkeypatch):
    path, logits = sources(kind, 0)
    break_row(monkeypatch, *WRONG_ROWS[wrong], kind)
    gaps = []
    for operator in ("all by copies", "all with padding"):
        out = grow(path, EXACT[operator], tmp_path / operator)
        gaps.append(gap(compute_logits(out), logits))
    assert max(gaps) > 1e-4
