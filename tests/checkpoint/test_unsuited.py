"""What is no model that could grow is named for what it is, in one sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import SMALL, random_tensors, save_directory, save_tensors

from growkit.cli import run
from growkit.errors import GrowkitError
from growkit.models.notation import parse_table
from growkit.models.table import Table


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_directory(tmp_path / "model")
    return tmp_path


def refused(capsys, name, *said):
    """One line of refusal, with all these words."""
    assert run(["depth", "--map", "3:5", name, "out"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    for words in said:
        assert words in lines[0]


def change(place, **fields):
    path = place / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "method,said",
    [
        ("fp8", ["quantised (fp8)", "FineGrainedFP8Config(dequantize=True)"]),
        ("mxfp4", ["quantised (MXFP4)", "Mxfp4Config(dequantize=True)"]),
        ("bitsandbytes", ["quantised (bitsandbytes)", "model.dequantize()"]),
        ("gptq", ["quantised (GPTQ)", "take the model that it was quantised from"]),
        ("awq", ["quantised (AWQ)", "take the model that it was quantised from"]),
        ("new", ["quantised (new)"]),
    ],
)
def test_quantised_weights(place, capsys, method, said):
    change(place, quantization_config={"quant_method": method})
    refused(capsys, "model", *said)


def test_quantised_weights_that_config_does_not_state(place, capsys):
    tensors = random_tensors(SMALL)
    name = next(name for name in tensors if name.endswith("dense.weight"))
    packed = tensors | {name.replace(".weight", ".qweight"): np.zeros((4, 4), np.float32)}
    save_tensors(place / "model/model.safetensors", packed)
    refused(capsys, "model", "holds quantised weights, as 'gpt_neox.layers", "qweight")


def test_an_encoder_and_a_decoder(place, capsys):
    change(place, is_encoder_decoder=True, model_type="t5")
    refused(capsys, "model", "an encoder and a decoder ('t5')")


def test_an_encoder(place, capsys):
    change(place, model_type="bert", architectures=["BertForMaskedLM"])
    refused(capsys, "model", "is an encoder (BertForMaskedLM)")


def test_an_encoder_that_config_does_not_name(place, capsys):
    pytest.importorskip("transformers")
    change(place, model_type="distilbert", architectures=None)
    refused(
        capsys, "model", "no causal language model of the type, as of encoders, so that no table"
    )


def test_an_adapter(place, capsys):
    (place / "lora").mkdir()
    stated = {"base_model_name_or_path": "some/base", "peft_type": "LORA"}
    (place / "lora/adapter_config.json").write_text(json.dumps(stated))
    save_tensors(place / "lora/adapter_model.safetensors", {"a": np.zeros(3, np.float32)})
    refused(capsys, "lora", "an adapter (LoRA) of some/base", "merge_and_unload")


@pytest.mark.parametrize("name", ["small", "small/model.gguf"])
@pytest.mark.parametrize("config", [False, True])
def test_gguf(place, capsys, name, config):
    (place / "small").mkdir()
    (place / "small/model.gguf").write_bytes(b"GGUF")
    if config:
        (place / "small/config.json").write_text(json.dumps(SMALL.config()))
    refused(capsys, name, "is in GGUF", "directory of safetensors")


def test_a_table_that_covers_a_part(place, capsys):
    tensors = random_tensors(SMALL)
    extra = {f"value_head.{n}.weight": np.zeros(3, np.float32) for n in range(2)}
    save_tensors(place / "model/model.safetensors", tensors | extra)
    said = f"covers only a part: 2 of {len(tensors) + 2} tensors have no row"
    refused(capsys, "model", said, "the first is 'value_head.0.weight'")


def test_two_rows_of_one_name():
    rows = parse_table("a.weight embed normal matrix\na.weight mlp normal matrix")
    with pytest.raises(GrowkitError, match="two rows of the table match the parameter 'a.weight'"):
        Table(rows).check_covered({"a.weight": (4,)}, {"embed": 4, "mlp": 4}, {})


def test_sizes_that_contradict_shapes(place, capsys):
    change(place, intermediate_size=48)
    refused(capsys, "model", "contradicts the parameter", "intermediate_size = 48")


def test_a_head_of_another_task(place, capsys):
    change(place, model_type="llama", architectures=["LlamaForSequenceClassification"])
    refused(capsys, "model", "another task than the next token (LlamaForSequenceClassification)")
