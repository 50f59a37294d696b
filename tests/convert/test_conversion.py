"""Conversion is a copy, bit for bit, before or after growth; transformers reads the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import BESIDE, SMALL, random_tensors, save_checkpoint, save_directory, save_tensors

from convert.directory import convert_to_directory
from growkit.checkpoint.huggingface import read_header
from growkit.checkpoint.location import open_source
from growkit.checkpoint.tensor import map_tensors
from growkit.cli import run
from growkit.errors import GrowkitError
from growkit.models import read_config, require_trained

TIED = SMALL.change(tied=True, parallel_residual=False)
DTYPES = ["float32", "bfloat16", "float16", "float64"]


def bytes_of(path: Path, slot: str = "params") -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a model on disk: dtype, shape, bytes."""
    tensors = open_source(str(path)).tensors[slot]
    return {name: (str(t.dtype), t.shape, t.read().tobytes()) for name, t in tensors.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("shared") / "ck")


@pytest.mark.parametrize("model", [SMALL, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_and_out_again_is_bit_for_bit(tmp_path, dtype, model):
    extra = {
        "eos_token_id": 5,
        "attention_dropout": 0.1,
        "use_cache": False,
        "architectures": ["Mine"],
        "own": [1],
    }
    hf = save_directory(tmp_path / "hf", model, dtype, **extra)
    assert run(["import", str(hf), str(tmp_path / "ck")]) == 0
    assert run(["export", str(tmp_path / "ck"), str(tmp_path / "out")]) == 0
    assert bytes_of(hf) == bytes_of(tmp_path / "ck") == bytes_of(tmp_path / "out")
    assert next(iter(bytes_of(hf).values()))[0] == dtype
    before, after = (
        json.loads((path / "config.json").read_text()) for path in (hf, tmp_path / "out")
    )
    assert (
        after == before | {"torch_dtype": dtype, "dtype": dtype} and extra.items() <= after.items()
    )
    source = open_source(str(tmp_path / "ck"))
    assert list(source.tensors) == ["params"] and source.record["count"] == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in BESIDE} == BESIDE


def test_a_flipped_bit_would_be_seen(tmp_path):
    hf = save_directory(tmp_path / "hf")
    before = bytes_of(hf)
    content = bytearray((hf / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (hf / "model.safetensors").write_bytes(content)
    assert bytes_of(hf) != before


def test_export_after_growth_is_growth_after_export(tmp_path, checkpoint):
    for words in (
        ["depth", "--map", "3:5", checkpoint, tmp_path / "grown"],
        ["export", tmp_path / "grown", tmp_path / "out"],
        ["export", checkpoint, tmp_path / "small"],
        ["depth", "--map", "3:5", tmp_path / "small", tmp_path / "other"],
    ):
        assert run(list(map(str, words))) == 0
    assert (
        bytes_of(tmp_path / "out") == bytes_of(tmp_path / "other") != bytes_of(tmp_path / "small")
    )
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "other")]
    assert files[0] == files[1]
    configs = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "other")
    ]
    assert configs[0] == configs[1] and configs[0]["num_hidden_layers"] == 5
    assert (
        run(["depth", "--map", "0,1,1,2,2", str(tmp_path / "small"), str(tmp_path / "third")]) == 0
    )
    assert bytes_of(tmp_path / "third") != bytes_of(tmp_path / "out")


def test_lineage_survives(tmp_path, checkpoint):
    steps = (
        ["depth", "--map", "3:4", checkpoint, tmp_path / "grown"],
        ["export", tmp_path / "grown", tmp_path / "hf"],
        ["depth", "--map", "4:6", tmp_path / "hf", tmp_path / "more"],
        ["import", tmp_path / "more", tmp_path / "back"],
    )
    for words in steps:
        assert run(list(map(str, words))) == 0
    lineage = open_source(str(tmp_path / "back")).lineage
    assert [entry["operation"] for entry in lineage] == ["depth", "export", "depth", "import"]
    # An export keeps names of what came before it, and no paths of this machine.
    named = [Path(words[-2]).name for words in steps[:2]]
    whole = [str(words[-2]) for words in steps[2:]]
    assert [entry["source"]["path"] for entry in lineage] == named + whole
    assert lineage[0]["source"]["fingerprint"] == open_source(str(checkpoint)).fingerprint
    assert lineage[0]["source"]["step"] == 70 and lineage[0]["maps"]["layer"]["index"] == [
        0,
        0,
        1,
        2,
    ]
    card = (tmp_path / "hf" / "README.md").read_text()
    assert (
        "1. depth: layer 3 to 4 by replicate: floor(i*3/4), function not preserved, after 70 steps"
        in card
    )
    assert "2. export to float32" in card and str(tmp_path) not in card


def test_growth_keeps_count_and_files_of_a_checkpoint(tmp_path, checkpoint):
    assert run(["depth", "--map", "3:4", str(checkpoint), str(tmp_path / "grown")]) == 0
    source = open_source(str(tmp_path / "grown"))
    assert source.record == open_source(str(checkpoint)).record and source.files == BESIDE
    ours, theirs = bytes_of(tmp_path / "grown", "nu"), bytes_of(checkpoint, "nu")
    for name, layer in (
        ("gpt_neox.layers.1.mlp.dense_h_to_4h.weight", 0),
        ("gpt_neox.layers.3.attention.dense.bias", 2),
    ):
        number = name.split(".")[2]
        assert ours[name] == theirs[name.replace(f".{number}.", f".{layer}.", 1)]
    assert not any(
        np.frombuffer(raw, np.float32).any()
        for _, _, raw in bytes_of(tmp_path / "grown", "mu").values()
    )


def test_export_in_another_dtype_rounds_once(tmp_path):
    hf = save_directory(tmp_path / "hf", SMALL, "float64")
    tensors = random_tensors(SMALL, "float64")
    # Just above and below the middle between 1 and the next bfloat16, by less than float32 sees.
    edge = np.array(
        [1 + 2**-8 + 2**-40, 1 + 2**-8 - 2**-40, -1 - 2**-8 - 2**-40, 1 + 2**-8, 0.0, 1e-300]
    )
    wanted = np.array([1 + 2**-7, 1, -1 - 2**-7, 1, 0, 0])
    tensors["gpt_neox.final_layer_norm.bias"][: len(edge)] = edge
    save_tensors(hf / "model.safetensors", tensors)
    assert run(["export", str(hf), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    found = (
        open_source(str(tmp_path / "out"))
        .tensors["params"]["gpt_neox.final_layer_norm.bias"]
        .read()
    )
    assert np.array_equal(found[: len(edge)].astype(np.float64), wanted)
    assert not np.array_equal(
        edge.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64), wanted
    )


def test_moments_that_stay_behind_are_said_with_the_way_to_take_them(checkpoint, tmp_path, capsys):
    assert run(["export", str(checkpoint), str(tmp_path / "out")]) == 0
    words = "; the optimizer's moments stay behind (--optimizer hf takes them along)\n"
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_export_in_a_narrower_dtype_is_the_nearest(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    hf = save_directory(tmp_path / "hf")
    assert run(["export", str(hf), str(tmp_path / "out"), "--dtype", dtype]) == 0
    found = open_source(str(tmp_path / "out")).tensors["params"]
    for name, array in random_tensors(SMALL).items():
        theirs = torch.from_numpy(array).to(getattr(torch, dtype)).float().numpy()
        assert np.array_equal(found[name].read().astype(np.float32), theirs), name


def test_a_number_too_large_is_refused(tmp_path, capsys):
    hf = save_directory(tmp_path / "hf")
    tensors = random_tensors(SMALL)
    tensors["gpt_neox.embed_in.weight"][3, 3] = 70000
    save_tensors(hf / "model.safetensors", tensors)
    assert run(["export", str(hf), str(tmp_path / "out"), "--dtype", "float16"]) == 1
    said = capsys.readouterr().err
    assert (
        "'gpt_neox.embed_in.weight' holds 70000, but the largest float16 is 65504; bfloat16" in said
    )
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    "model", [SMALL.change(norm_eps=0.1, rotary_pct=0.5, rotary_base=500.0), TIED]
)
def test_transformers_reads_the_configuration(tmp_path, model):
    transformers = pytest.importorskip("transformers")
    save_directory(tmp_path / "hf", model, eos_token_id=7)
    assert run(["export", str(tmp_path / "hf"), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert isinstance(config, transformers.GPTNeoXConfig)
    rope = config.rope_parameters
    assert (rope["partial_rotary_factor"], rope["rope_theta"]) == (
        model.rotary_pct,
        model.rotary_base,
    )
    assert rope["rope_type"] == "default"
    assert config.layer_norm_eps == model.norm_eps and config.eos_token_id == 7
    assert (
        config.use_parallel_residual == model.options["parallel_residual"]
        and config.tie_word_embeddings == model.tied
    )
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 32, 4)
    assert config.max_position_embeddings == model.context and str(config.dtype) == "torch.bfloat16"
    # And back, as transformers writes it.
    config.save_pretrained(tmp_path / "again")
    assert read_config(json.loads((tmp_path / "again" / "config.json").read_text())) == model


def test_rotary_fields_of_both_generations_are_read():
    full = SMALL.change(rotary_pct=0.5, rotary_base=500.0).config()
    four = {key: value for key, value in full.items() if key != "rope_parameters"}
    five = {
        key: value for key, value in full.items() if key not in ("rotary_pct", "rotary_emb_base")
    }
    # Stale fields of generation 4 beside those of 5: transformers 5 goes by the latter.
    stale = full | {"rotary_pct": 1.0, "rotary_emb_base": 7}
    for config in (full, four, five, stale, five | {"rope_scaling": None}):
        model = read_config(config)
        assert (model.rotary_pct, model.rotary_base, model.rotary) == (0.5, 500.0, 4)
    assert read_config(four | {"rope_theta": 123.0}).rotary_base == 500.0
    bare = {key: value for key, value in four.items() if not key.startswith("rotary")}
    assert (read_config(bare).rotary_pct, read_config(bare).rotary_base) == (0.25, 10000.0)
    assert (
        read_config(five | {"rope_parameters": {"rope_theta": 9.0}, "rotary_pct": 0.5}).rotary_pct
        == 0.5
    )


@pytest.mark.parametrize(
    "change,said",
    [
        (
            {"model_type": "t5"},
            "the architecture is 't5', and growkit knows 'gpt_neox', 'llama'.* only",
        ),
        ({"model_type": "gptneox"}, "did you mean 'gpt_neox'?"),
        ({"num_attention_heads": 5}, "got 32 and 5; the nearest for hidden_size are 30 and 35"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number of at least 1, got 0"),
        ({"vocab_size": "96"}, "vocab_size must be a whole number, got '96'"),
        ({"intermediate_size": 64.0}, "intermediate_size must be a whole number, got 64.0"),
        ({"layer_norm_eps": "small"}, "config.json holds a value of the wrong kind"),
        ({"rope_parameters": [1]}, "config.json holds a value of the wrong kind"),
        (
            {"rope_parameters": None, "rotary_pct": 0.0},
            r"between 2 and head_dim, got int\(8 x 0.0\) = 0",
        ),
        ({"rope_parameters": None, "rotary_pct": 0.4}, r"must be even .* = 3"),
    ],
)
def test_configurations_that_describe_no_model(change, said):
    with pytest.raises(GrowkitError, match=said):
        read_config(SMALL.config() | change)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.25,
    "short_factor": [1.0],
    "long_factor": [2.0],
}
# (options, fields of config.json, what training and conversion say)
ONLY_GROWN = {
    "activation": (
        {"activation": "gelu_fast"},
        {},
        "has hidden_act 'gelu_fast', and the trainer computes 'gelu' or",
    ),
    "longrope of transformers 5": (
        {},
        {"rope_parameters": LONGROPE},
        "has rotary positions of the type 'longrope', and the trainer computes 'default' or",
    ),
}
REFUSING = {
    "import": lambda hf, out: ["import", hf, out],
    "export": lambda hf, out: ["export", hf, out],
    "generate": lambda hf, out: ["generate", hf, "--prompt", "a"],
    "train": lambda hf, out: ["train", "tiny", "--from", hf, "--out", out],
}


@pytest.mark.parametrize("what", ONLY_GROWN)
def test_what_the_trainer_does_not_compute_is_kept_by_growth_and_refused_elsewhere(
    tmp_path, capsys, what
):
    options, fields, said = ONLY_GROWN[what]
    hf = save_directory(tmp_path / "hf", SMALL.change(**options), **fields)
    source = open_source(str(hf))
    for verb, arguments in REFUSING.items():
        assert run(arguments(str(hf), str(tmp_path / verb))) == 2, verb
        assert said in capsys.readouterr().err, verb
        assert not (tmp_path / verb).exists()
    assert run(["width", "--heads", "6", "--head-dim", "12", str(hf), str(tmp_path / "grown")]) == 0
    grown = open_source(str(tmp_path / "grown")).model
    kept = {name: value for name, value in source.model.options.items() if name in options}
    assert kept == options and kept.items() <= grown.options.items()
    assert (grown.embed, grown.rotary) == (72, source.model.rotary)
    own = {"partial_rotary_factor"}
    for name in source.model.rope.keys() - own:
        assert grown.rope[name] == source.model.rope[name], name
    assert grown.rope["rope_type"] in ("default", "longrope")


def test_what_the_trainer_computes_is_not_refused(tmp_path):
    for model in (SMALL, TIED):
        assert require_trained(model, "hf") is model


def test_weights_of_other_formats_are_never_carried(tmp_path):
    hf = save_directory(tmp_path / "hf")
    weights = (
        "pytorch_model.bin",
        "tf_model.h5",
        "flax_model.msgpack",
        "model.gguf",
        "rng_state.pth",
        "optimizer.bin",
    )
    for name in (
        *weights,
        "pytorch_model.bin.index.json",
        "model.safetensors.index.fp16.json",
        ".hidden",
    ):
        (hf / name).write_text("old")
    with open(hf / "corpus.txt", "wb") as file:
        file.truncate(200_000_000)
    (hf / "onnx").mkdir()
    for name in ("merges.txt", "special_tokens_map.json", "generation_config.json"):
        (hf / name).write_text("{}")
    carried = {*BESIDE, "merges.txt", "special_tokens_map.json", "generation_config.json"}
    assert run(["depth", "--map", "3:4", str(hf), str(tmp_path / "grown")]) == 0
    own = {"config.json", "lineage.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "grown").iterdir()} == carried | own
    assert run(["import", str(hf), str(tmp_path / "ck")]) == 0
    assert set(open_source(str(tmp_path / "ck")).files) == carried
    assert run(["export", str(tmp_path / "ck"), str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == carried | own | {"README.md"}


def test_an_export_keeps_each_tensors_dtype(tmp_path):
    tensors = random_tensors(SMALL, "bfloat16")
    norm = "gpt_neox.final_layer_norm.weight"
    tensors[norm] = random_tensors(SMALL)[norm]
    hf = save_directory(tmp_path / "hf")
    save_tensors(hf / "model.safetensors", tensors)
    assert run(["export", str(hf), str(tmp_path / "out")]) == 0
    assert bytes_of(tmp_path / "out") == bytes_of(hf)
    assert {str(t.dtype) for t in read_header(tmp_path / "out" / "model.safetensors").values()} == {
        "bfloat16",
        "float32",
    }
    assert run(["export", str(hf), str(tmp_path / "wide"), "--dtype", "float32"]) == 0
    assert {dtype for dtype, _, _ in bytes_of(tmp_path / "wide").values()} == {"float32"}


def test_check_compares_with_transformers(tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    hf = save_directory(tmp_path / "hf")
    assert run(["export", str(hf), str(tmp_path / "out"), "--check"]) == 0
    assert "check: logits of transformers and of JAX differ by at most" in capsys.readouterr().out
    assert run(["export", str(hf), str(tmp_path / "narrow"), "--check", "--dtype", "bfloat16"]) == 0
    # A small error is found; where nothing was rounded, even the last bit of bfloat16.
    monkeypatch.setattr("convert.directory.copy_tensor", with_last_bit_flipped)
    narrow = save_directory(tmp_path / "bf16", dtype="bfloat16")
    assert run(["export", str(narrow), str(tmp_path / "wrong"), "--check"]) == 1
    assert "transformers computes other logits" in capsys.readouterr().err


def with_last_bit_flipped(tensor):
    return map_tensors(
        [tensor], tensor.dtype, lambda array: (array.view(np.uint16) ^ 1).view(array.dtype)
    )


def test_check_without_transformers_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    hf = save_directory(tmp_path / "hf")
    assert run(["export", str(hf), str(tmp_path / "out"), "--check"]) == 1
    assert "torch is not installed; pip install 'growkit[hf]' brings it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_runs_and_steps_are_sources(tmp_path, checkpoint):
    for step, loss in ((100, 2.5), (200, 2.0), (300, None)):
        path = Path(shutil.copytree(checkpoint, tmp_path / "run" / "checkpoints" / str(step)))
        meta = json.loads((path / "meta" / "metadata").read_text())
        meta["record"] |= {} if loss is None else {"validation_loss": loss}
        (path / "meta" / "metadata").write_text(json.dumps(meta))
    (tmp_path / "run" / "checkpoints" / "400.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "run" / "checkpoints" / "500").mkdir()
    found = {at: open_source(f"{tmp_path}/run{at}").path.name for at in ("", "@100", "@best")}
    assert found == {"": "300", "@100": "100", "@best": "200"}
    for at, said in (
        ("@150", "no checkpoint '150'; it has 100, 200, 300, and 'best'"),
        ("@last", "no checkpoint 'last'"),
    ):
        with pytest.raises(GrowkitError, match=said):
            open_source(f"{tmp_path}/run{at}")
    for step in (100, 200):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    with pytest.raises(GrowkitError, match="has a validation loss; name a step, as .*run@300"):
        open_source(f"{tmp_path}/run@best")


def test_an_unknown_dtype_is_refused(tmp_path):
    source = open_source(str(save_directory(tmp_path / "hf")))
    with pytest.raises(GrowkitError, match="got 'bfloat'; did you mean 'bfloat16'?"):
        convert_to_directory(source, "bfloat")
