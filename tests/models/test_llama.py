"""Llama by its table: growth of grouped-query models keeps the logits of transformers' own class,
on files.

In float64 the class's norms are computed in float64 too: by themselves they round to float32, under
which an error of 3e-7 would hide. In float32 the class is taken as it is. Every operator has
mutations that are found out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import BESIDE, random_tensors, save_directory, save_tensors

from growkit.checkpoint.huggingface import INDEX
from growkit.checkpoint.location import open_source, write_output
from growkit.checkpoint.tensor import copy_tensor, wrap_array
from growkit.cli import run
from growkit.errors import GrowkitError, UsageError
from growkit.growth.axes import make_map, tile
from growkit.growth.depth import plan_depth
from growkit.growth.plan import build_plan, combine_plans
from growkit.growth.width import plan_like, plan_width
from growkit.models import llama, read_config
from growkit.models.architecture import Architecture
from growkit.models.llama import LLAMA
from growkit.surgery.grow import prepare_growth

SMALL = LLAMA.model(
    layer=3, embed=24, kv=2, group=3, head_dim=4, mlp=20, vocab=96, context=32, norm_eps=0.05
)
TOKENS = np.random.default_rng(1).integers(0, SMALL.vocab, (2, 17))
# Largest difference over largest logit.
BOUNDS = {"float64": 1e-12, "float32": 1e-5}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def save(path: Path, model: Architecture = SMALL, dtype: str = "float32", **config) -> Path:
    """A Hugging Face directory of random parameters, norms too, in the form that transformers 4
    wrote.
    """
    return save_directory(path, model, dtype, **config)


def network_of(path: Path, dtype: str = "float32"):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    network, report = transformers.LlamaForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="sdpa", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    if dtype == "float64":
        for module in network.modules():
            if isinstance(module, transformers.models.llama.modeling_llama.LlamaRMSNorm):
                module.forward = wide_norm(torch, module)
    return network.eval()


def wide_norm(torch, module):
    """RMSNorm in the dtype of its input."""
    return lambda x: (
        module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    )


def logits_of(path: Path, dtype: str = "float32") -> np.ndarray:
    torch = pytest.importorskip("torch")
    # Models this small wait for threads longer than they compute.
    torch.set_num_threads(1)
    with torch.no_grad():
        return network_of(path, dtype)(torch.from_numpy(TOKENS)).logits.double().numpy()


def write_grown(source, plan, out: Path, change=None, **options) -> Path:
    """The grown directory; change(name, array) gives what a mutation makes of a parameter."""
    contents = prepare_growth(source, plan)
    if change:
        recipes = contents.recipes["params"]
        for name, recipe in recipes.items():
            recipes[name] = copy_tensor(wrap_array(change(name, values(recipe))))
    write_output(out, "huggingface", contents, [source], **options)
    return out


def values(recipe) -> np.ndarray:
    """The array a recipe makes, its bytes copied or computed."""
    if recipe.copied is None:
        ((_, array),) = recipe.pieces()
        return array
    content = recipe.copied.path.read_bytes()[recipe.copied.offset :][: recipe.copied.size]
    return np.frombuffer(content, recipe.dtype).reshape(recipe.shape)


def gap(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


KV = make_map([0, 1, 0, 0], 2, [0.5, 1.0, 0.2, 0.3])
MLP = make_map([*range(20), 3, 3, 7], 20, [1, 1, 1, 0.5, 1, 1, 1, 0.9, *[1] * 12, 0.3, 0.2, 0.1])
EXACT = {
    "clone embed": lambda model: build_plan("width", "", model, {"embed": tile(24, 48)}),
    "kv heads uneven": lambda model: build_plan("width", "", model, {"kv": KV}),
    "mlp uneven": lambda model: build_plan("width", "", model, {"mlp": MLP}),
    "identity depth": lambda model: plan_depth(model, "3:5", "identity"),
    "pad embed": lambda model: plan_width(model, embed=42, mlp=20),
    "clone with noise": lambda model: replace(
        build_plan("width", "", model, {"embed": tile(24, 48)}), noise=1.0
    ),
    "all by copies": lambda model: combine_plans(
        "grow",
        [
            plan_depth(model, "3:5", "identity"),
            build_plan("width", "", model, {"embed": tile(24, 48), "kv": KV, "mlp": MLP}),
        ],
        model,
    ),
    "all with padding": lambda model: combine_plans(
        "grow",
        [plan_depth(model, "3:4", "identity"), plan_width(model, embed=36, heads=9, spread=0.5)],
        model,
    ),
    "like another model": lambda model: plan_like(model, model.change(embed=36, kv=3, mlp=30)),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """(directory, its logits) by (tied, dtype), made once."""
    found = {}

    def source(tied: bool, dtype: str):
        if (tied, dtype) not in found:
            path = save(tmp_path_factory.mktemp("llama") / "hf", SMALL.change(tied=tied), dtype)
            found[tied, dtype] = open_source(str(path)), logits_of(path, dtype)
        return found[tied, dtype]

    return source


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("growth", EXACT)
def test_exact_growth_keeps_transformers_logits(growth, tied, dtype, sources, tmp_path):
    source, logits = sources(tied, dtype)
    plan = EXACT[growth](source.model)
    assert plan.preserved and plan.grown.parameters > plan.model.parameters
    out = write_grown(source, plan, tmp_path / "out")
    assert np.abs(logits).max() > 1
    assert gap(logits_of(out, dtype), logits) < BOUNDS[dtype]
    assert open_source(str(out)).model == plan.grown


@pytest.mark.parametrize("text,method", [("3:5", "replicate"), ("0,0,1,2", None)])
def test_copied_layers_are_another_function(text, method, sources, tmp_path):
    source, logits = sources(True, "float64")
    plan = plan_depth(source.model, text, method)
    assert not plan.preserved
    assert gap(logits_of(write_grown(source, plan, tmp_path / "out"), "float64"), logits) > 1e-2


# A place of the table, what it wrongly says, and for a tied or an untied head.
WRONG_ROWS = {
    "group and kv swapped in queries": ("(kv group head_dim)", "(group kv head_dim)", True),
    "group and kv swapped in o_proj": ("(/kv /group /head_dim)", "(/group /kv /head_dim)", True),
    "o_proj does not read kv": ("(/kv /group /head_dim)", "(kv /group /head_dim)", True),
    "o_proj does not read its layer": ("{/layer}.self_attn", "{layer}.self_attn", True),
    "down_proj does not read its layer": ("{/layer}.mlp", "{layer}.mlp", True),
    "down_proj does not read mlp": ("embed /mlp", "embed mlp", True),
    "queries do not read embed": ("(kv group head_dim) /embed", "(kv group head_dim) embed", True),
    "keys do not read embed": (
        "k_proj.weight          (kv head_dim) /embed",
        "k_proj.weight          (kv head_dim) embed",
        True,
    ),
    "keys inside out": (
        "k_proj.weight          (kv head_dim)",
        "k_proj.weight          (head_dim kv)",
        True,
    ),
    "values inside out": (
        "v_proj.weight          (kv head_dim)",
        "v_proj.weight          (head_dim kv)",
        True,
    ),
    "gate does not read embed": (
        "gate_proj.weight             mlp /embed",
        "gate_proj.weight             mlp embed",
        True,
    ),
    "up does not read embed": (
        "up_proj.weight               mlp /embed",
        "up_proj.weight               mlp embed",
        True,
    ),
    "tied norm does not read embed": (
        "/embed                        ones",
        "embed                        ones",
        True,
    ),
    "untied head does not read embed": ("vocab /embed", "vocab embed", False),
    "embedding read": ("vocab embed ", "vocab /embed ", True),
}


def break_table(monkeypatch, text: str) -> None:
    """Let every model have the rows of another table of Llama, for its own options."""
    family = replace(LLAMA, text=text)
    table = property(lambda self: family.select_rows(self.options))
    monkeypatch.setattr(Architecture, "table", table)


@pytest.mark.parametrize("wrong", WRONG_ROWS)
def test_a_wrong_row_is_another_function(wrong, sources, monkeypatch, tmp_path):
    right, left, tied = WRONG_ROWS[wrong]
    assert right in llama.TABLE
    source, logits = sources(tied, "float64")
    break_table(monkeypatch, llama.TABLE.replace(right, left))
    out = write_grown(source, EXACT["all by copies"](source.model), tmp_path / "out")
    assert gap(logits_of(out, "float64"), logits) > 1e-3


# Biases: rows of their own, as the configuration has them.

BIASED = {
    "attention": {"attention_bias": True},
    "mlp": {"mlp_bias": True},
    "both": {"attention_bias": True, "mlp_bias": True},
}


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """(source, its logits in float64) of a model with biases, by which of them; made once."""
    found = {}

    def source(which: str):
        if which not in found:
            model = SMALL.change(tied=which == "both", **BIASED[which])
            path = save(tmp_path_factory.mktemp("biased") / "hf", model, "float64")
            found[which] = open_source(str(path)), logits_of(path, "float64")
        return found[which]

    return source


@pytest.mark.parametrize("which", BIASED)
@pytest.mark.parametrize("growth", ["all by copies", "all with padding", "pad embed"])
def test_a_biased_model_grows_exactly(growth, which, biased, sources, tmp_path):
    source, logits = biased(which)
    biases = [name for name in source.tensors["params"] if name.endswith(".bias")]
    # In each layer q, k, v and o have one under attention_bias; gate, up and down under mlp_bias.
    assert len(biases) == SMALL.layer * {"attention": 4, "mlp": 3, "both": 7}[which]
    assert gap(sources(source.model.tied, "float64")[1], logits) > 1e-3, "biases must be seen"
    plan = EXACT[growth](source.model)
    out = write_grown(source, plan, tmp_path / "out")
    assert gap(logits_of(out, "float64"), logits) < BOUNDS["float64"]
    assert open_source(str(out)).model == plan.grown


WRONG_BIASES = {
    "o_proj's reads no layer": ("{/layer}.self_attn.o_proj.bias", "{layer}.self_attn.o_proj.bias"),
    "down_proj's reads no layer": ("{/layer}.mlp.down_proj.bias", "{layer}.mlp.down_proj.bias"),
    "q_proj's inside out": (
        "q_proj.bias            (kv group head_dim)",
        "q_proj.bias            (group kv head_dim)",
    ),
    "gate_proj's reads mlp": (
        "gate_proj.bias               mlp ",
        "gate_proj.bias               /mlp ",
    ),
    "up_proj's reads mlp": (
        "up_proj.bias                 mlp ",
        "up_proj.bias                 /mlp ",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_BIASES)
def test_a_wrong_row_of_a_bias_is_another_function(wrong, biased, monkeypatch, tmp_path):
    right, left = WRONG_BIASES[wrong]
    assert right in llama.TABLE
    source, logits = biased("both")
    break_table(monkeypatch, llama.TABLE.replace(right, left))
    out = write_grown(source, EXACT["all by copies"](source.model), tmp_path / "out")
    assert gap(logits_of(out, "float64"), logits) > 1e-3


def rolled(part: str, start: int):
    """Copies of other units than the rest of the model copies."""

    def change(name: str, array: np.ndarray) -> np.ndarray:
        return (
            np.concatenate([array[:start], np.roll(array[start:], 1, axis=0)])
            if part in name
            else array
        )

    return change


WRONG_VALUES = {
    "gate copies other units": ("mlp uneven", rolled("gate_proj", 19)),
    "up copies other units": ("mlp uneven", rolled("up_proj", 19)),
    "keys copy other heads": ("kv heads uneven", rolled("k_proj", 2)),
    "values copy other heads": ("kv heads uneven", rolled("v_proj", 2)),
    "norms keep their scale": (
        "pad embed",
        lambda name, x: x * np.sqrt(42 / 24) if "norm" in name else x,
    ),
    "the new entries are not zero": (
        "pad embed",
        lambda name, x: (
            np.where(np.arange(x.shape[1]) < 24, x, 0.1) if "embed_tokens" in name else x
        ),
    ),
    "copied layers still write": (
        "identity depth",
        lambda name, x: x + 0.01 if ".1.mlp.down_proj" in name else x,
    ),
}


@pytest.mark.parametrize("wrong", WRONG_VALUES)
def test_a_wrong_parameter_is_another_function(wrong, sources, tmp_path):
    growth, change = WRONG_VALUES[wrong]
    source, logits = sources(False, "float64")
    plan = EXACT[growth](source.model)
    assert (
        gap(logits_of(write_grown(source, plan, tmp_path / "out", change), "float64"), logits)
        > 1e-3
    )


def test_padding_needs_the_rescaled_eps_and_the_rule_of_rms_norm(sources, monkeypatch, tmp_path):
    source, logits = sources(True, "float64")
    plan = EXACT["pad embed"](source.model)
    assert plan.grown.norm_eps == pytest.approx(0.05 * 24 / 42)
    kept = replace(plan, grown=plan.grown.change(norm_eps=0.05))
    assert gap(logits_of(write_grown(source, kept, tmp_path / "eps"), "float64"), logits) > 1e-3
    monkeypatch.setattr(Architecture, "norm", "layer")
    assert gap(logits_of(write_grown(source, plan, tmp_path / "mean"), "float64"), logits) > 1e-3


UNEVEN = np.where(np.arange(48) == 47, 0, tile(24, 48).index)
WRONG_MAPS = {
    "embed unequal": {"embed": make_map(UNEVEN, 24, 1 / np.bincount(UNEVEN)[UNEVEN])},
    "a head over one": {"kv": make_map([0, 1, 0, 0], 2, [0.5, 1.0, 0.5, 0.5])},
    "mlp copied": {"mlp": make_map(MLP.index, 20)},
}


@pytest.mark.parametrize("wrong", WRONG_MAPS)
def test_maps_that_do_not_preserve(wrong, sources, tmp_path):
    source, logits = sources(True, "float64")
    plan = build_plan("width", "", source.model, WRONG_MAPS[wrong])
    assert not plan.preserved
    assert gap(logits_of(write_grown(source, plan, tmp_path / "out"), "float64"), logits) > 1e-3


# Files


def test_shards_on_either_side(tmp_path):
    source = open_source(str(save(tmp_path / "hf")))
    network = network_of(tmp_path / "hf")
    network.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    many = open_source(str(tmp_path / "many"))
    assert len(many.weights) > 3 and many.model == source.model
    for name, tensor in source.tensors["params"].items():
        assert np.array_equal(many.tensors["params"][name].read(), tensor.read())
    out = write_grown(many, EXACT["all with padding"](many.model), tmp_path / "out", shard=12_000)
    assert (out / INDEX).exists() and len(list(out.glob("*.safetensors"))) > 3
    assert gap(logits_of(out), logits_of(tmp_path / "hf")) < BOUNDS["float32"]


def test_the_verb_depth_and_its_lineage(tmp_path, capsys):
    path = save(tmp_path / "hf", dtype="bfloat16")
    assert run(["depth", "--map", "3:5", str(path), str(tmp_path / "out")]) == 0
    assert "layer 3 -> 5" in capsys.readouterr().out
    source, out = open_source(str(path)), open_source(str(tmp_path / "out"))
    assert out.model == SMALL.change(layer=5) and out.files == BESIDE
    assert out.lineage[-1]["maps"]["layer"]["index"] == [0, 0, 1, 1, 2]
    for layer, origin in enumerate([0, 0, 1, 1, 2]):
        name = "model.layers.{}.mlp.gate_proj.weight"
        ours, theirs = (
            out.tensors["params"][name.format(layer)],
            source.tensors["params"][name.format(origin)],
        )
        assert np.array_equal(ours.read(), theirs.read())


def test_a_stray_head_and_old_buffers_are_passed_over(tmp_path):
    tied = SMALL.change(tied=True)
    path, tensors = save(tmp_path / "hf", tied), random_tensors(tied)
    stray = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
    }
    save_tensors(path / "model.safetensors", tensors | stray)
    assert open_source(str(path)).tensors["params"].keys() == tensors.keys()
    other = {"output.weight": stray["lm_head.weight"]}
    save_tensors(path / "model.safetensors", tensors | other)
    with pytest.raises(
        GrowkitError, match="no row of the axis table covers the parameter 'output.weight'"
    ):
        open_source(str(path))


@pytest.mark.parametrize(
    "name,said",
    [
        (
            "model.layers.0.self_attn.q_proj.bias",
            "row is model.layers.{layer}.self_attn.q_proj.weight",
        ),
        (
            "model.layers.1.self_attn.v_proj.scale",
            "row is model.layers.{layer}.self_attn.v_proj.weight",
        ),
        ("model.layers.2.mlp.gate.weight", "row is model.layers.{layer}.mlp.gate_proj.weight"),
        ("model.embed_token.weight", "row is model.embed_tokens.weight"),
        (
            "model.layers.3.mlp.up_proj.weight",
            "belongs to layer 3, but the configuration says num_hidden_layers = 3",
        ),
    ],
)
def test_a_parameter_that_no_row_covers(name, said, tmp_path):
    path = save(tmp_path / "hf")
    save_tensors(
        path / "model.safetensors", random_tensors(SMALL) | {name: np.ones(24, np.float32)}
    )
    with pytest.raises(GrowkitError) as refusal:
        open_source(str(path))
    assert said in str(refusal.value) and repr(name) in str(refusal.value)


def test_parameters_that_contradict_the_configuration(tmp_path):
    path = save(tmp_path / "hf")
    tensors = random_tensors(SMALL)
    for name, said in {
        "1.self_attn.k_proj": ("num_key_value_heads = 2, head_dim = 4, hidden_size = 24"),
        "1.self_attn.q_proj": ("num_attention_heads / num_key_value_heads = 3, head_dim = 4"),
        "0.mlp.down_proj": "hidden_size = 24, intermediate_size = 20",
    }.items():
        name = f"model.layers.{name}.weight"
        save_tensors(path / "model.safetensors", tensors | {name: tensors[name][:-1]})
        with pytest.raises(GrowkitError) as refusal:
            open_source(str(path))
        assert said in str(refusal.value) and repr(name) in str(refusal.value)
    del tensors["lm_head.weight"]
    save_tensors(path / "model.safetensors", tensors)
    with pytest.raises(GrowkitError, match="'lm_head.weight' is missing"):
        open_source(str(path))


# Configurations


def without(config: dict, *fields: str) -> dict:
    return {key: value for key, value in config.items() if key not in fields}


@pytest.mark.parametrize("rope", [PLAIN | {"rope_theta": 500.0}, SCALED | {"rope_theta": 500.0}])
@pytest.mark.parametrize("tied", [True, False])
def test_a_configuration_goes_through(rope, tied):
    transformers = pytest.importorskip("transformers")
    model = SMALL.change(tied=tied, rope=rope, activation="gelu")
    written = model.config()
    assert read_config(written) == model
    assert read_config(without(written, "rope_scaling", "rope_theta")) == model
    assert read_config(without(written, "rope_parameters")) == model
    theirs = transformers.LlamaConfig.from_dict(written)
    assert (theirs.num_attention_heads, theirs.num_key_value_heads, theirs.head_dim) == (6, 2, 4)
    assert {key: theirs.rope_parameters[key] for key in rope} == rope
    assert read_config(theirs.to_dict()) == model
    assert model.config({"pad_token_id": 7, "hidden_size": 1})["pad_token_id"] == 7
    assert read_config(model.config({"pad_token_id": 7, "hidden_size": 1, "head_dim": 9})) == model


def test_the_older_name_of_a_rotary_type():
    four = without(SMALL.config(), "rope_parameters") | {
        "rope_scaling": {"type": "linear", "factor": 2.0}
    }
    assert read_config(four).rope == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


def test_the_fields_a_configuration_may_leave_out_are_transformers_defaults():
    transformers = pytest.importorskip("transformers")
    theirs = read_config(transformers.LlamaConfig().to_dict())
    assert read_config({"model_type": "llama"}) == theirs
    assert (
        read_config({"model_type": "llama", "num_key_value_heads": None, "head_dim": None})
        == theirs
    )
    old = without(SMALL.config(), "head_dim", "num_key_value_heads")
    assert read_config(old) == SMALL.change(kv=6, group=1)


def test_scaled_rotary_positions_are_kept(tmp_path):
    plain, path = (
        save(tmp_path / "plain"),
        save(tmp_path / "hf", rope_scaling=SCALED, rope_parameters=None),
    )
    logits = logits_of(path)
    assert gap(logits_of(plain), logits) > 1e-3
    source = open_source(str(path))
    out = write_grown(source, EXACT["all with padding"](source.model), tmp_path / "out")
    assert gap(logits_of(out), logits) < BOUNDS["float32"]


@pytest.mark.parametrize(
    "change,said",
    [
        (
            {"num_key_value_heads": 4},
            "num_attention_heads must be a multiple of num_key_value_heads, got 6 and 4",
        ),
        (
            {"num_key_value_heads": 0},
            "num_key_value_heads must be a whole number of at least 1, got 0",
        ),
        ({"head_dim": 5}, "head_dim must be even"),
        (
            {"head_dim": None, "hidden_size": 25},
            "hidden_size must be a multiple of num_attention_heads, got 25 and 6; the nearest for "
            "hidden_size are 24 and 30",
        ),
        ({"head_dim": 0}, "head_dim must be a whole number of at least 1, got 0"),
        ({"intermediate_size": 2.5}, "intermediate_size must be a whole number, got 2.5"),
        ({"rms_norm_eps": "small"}, "a value of the wrong kind"),
        ({"rope_parameters": 3}, "a value of the wrong kind"),
        (
            {"model_type": "t5"},
            "the architecture is 't5', and growkit knows 'gpt_neox', 'llama'",
        ),
        ({"model_type": "llama_4"}, "did you mean 'llama'?"),
    ],
)
def test_configurations_that_are_refused(change, said):
    with pytest.raises(GrowkitError) as refusal:
        read_config(SMALL.config() | change)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


# What growth and the trainer refuse


@pytest.mark.parametrize(
    "asked,said",
    [
        ({"head_dim": 8}, "head_dim of a Llama model stays 4"),
        (
            {"heads": 9},
            "multiple of num_attention_heads, got 24 and 9; with 9 heads the nearest for embed: 27",
        ),
        ({"heads": 8}, "heads come in groups of 3"),
        ({"embed": 25}, "got 25 and 6; with 6 heads the nearest for embed: 30"),
    ],
)
def test_widths_that_are_refused(asked, said):
    with pytest.raises(UsageError) as refusal:
        plan_width(SMALL, **asked)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_transformers_refuses_the_sizes_that_are_refused():
    transformers = pytest.importorskip("transformers")
    with pytest.raises(Exception, match="not a multiple of the number of attention heads"):
        transformers.LlamaConfig.from_dict(SMALL.change(embed=25).config())


def test_a_partial_rotary_is_not_computed_by_the_class():
    """Why head_dim is refused: with half of a head to rotate, the class rotates all of it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    half = PLAIN | {"partial_rotary_factor": 0.5}
    config = transformers.LlamaConfig.from_dict(SMALL.config() | {"rope_parameters": half})
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    assert rotary(torch.zeros(1), torch.arange(3)[None])[0].shape[-1] == SMALL.head_dim


def test_a_source_that_breaks_the_rule_grows_in_depth():
    assert plan_depth(SMALL.change(embed=25), "3:4").grown == SMALL.change(embed=25, layer=4)


def test_embed_alone_takes_the_heads_along_where_they_fill_it():
    plan = plan_width(SMALL, embed="2x")
    assert (plan.grown.sizes["kv"], plan.grown.embed) == (4, 48) and plan.preserved
    assert any("heads 6 -> 12" in note for note in plan.notes)
    loose = SMALL.change(head_dim=8)
    assert plan_width(loose, embed="2x").grown.sizes["kv"] == 2


@pytest.mark.parametrize(
    "other,said",
    [
        ({"vocab": 97}, "growth keeps vocab: the source has 96, the target 97"),
        ({"tied": True}, "growth keeps tied: the source has False, the target True"),
        ({"activation": "relu"}, "growth keeps activation: the source has silu, the target relu"),
        ({"mlp_bias": True}, "growth keeps mlp_bias: the source has False, the target True"),
        (
            {"rotary_base": 500.0},
            "growth keeps rotary_base: the source has 10000.0, the target 500.0",
        ),
        (
            {"rope": SCALED},
            "growth keeps rope: the source has {'rope_type': 'default'}, the target",
        ),
    ],
)
def test_targets_of_another_kind_are_refused(other, said):
    with pytest.raises(UsageError) as refusal:
        plan_like(SMALL, SMALL.change(embed=48, kv=4, **other))
    assert said in str(refusal.value)


def test_a_target_may_have_another_context_and_eps():
    plan = plan_like(SMALL, SMALL.change(embed=48, kv=4, context=64, norm_eps=1e-5))
    assert plan.grown.context == 32 and plan.grown.norm_eps == SMALL.norm_eps
    assert any("context stays 32; the target's 64" in note for note in plan.notes)
