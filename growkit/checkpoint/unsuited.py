"""Directories that hold no weights that could grow: adapters, GGUF, quantised models, encoders.

Each is named for what it is, with what to take instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from growkit.errors import GrowkitError

ADAPTER = "adapter_config.json"
GGUF = ".gguf"
# quant_method -> what it is called, and how its model gets its weights back.
LOAD = (
    "load it in transformers with quantization_config={}(dequantize=True), save it, and grow that"
)
FROM = "take the model that it was quantised from"
METHODS = {
    "fp8": ("fp8", LOAD.format("FineGrainedFP8Config")),
    "mxfp4": ("MXFP4", LOAD.format("Mxfp4Config")),
    "bitsandbytes": (
        "bitsandbytes",
        "load it in transformers, call model.dequantize(), save it, and grow that",
    ),
    "gptq": ("GPTQ", FROM),
    "awq": ("AWQ", FROM),
    "compressed-tensors": ("compressed-tensors", FROM),
}
# How names of quantised tensors end, where config.json does not say that they are.
PACKED = (
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".SCB",
    ".absmax",
    ".quant_map",
    "_proj_blocks",
)
# How classes of encoders end, and classes whose head is for another task than the next token.
ENCODERS = ("ForMaskedLM", "ForPreTraining")
OTHER_TASKS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)


def refuse_file(path: Path) -> None:
    """Raise GrowkitError for a file or a directory that is no model of transformers, by name."""
    if path.suffix == GGUF or (path.is_dir() and _has_gguf_alone(path)):
        raise GrowkitError(
            f"{path} is in GGUF, llama.cpp's format for inference; take the directory of "
            f"safetensors that it was made from"
        )
    if (path / ADAPTER).is_file() and not (path / "config.json").is_file():
        base = ""
        with suppress(OSError, ValueError, AttributeError):
            named = json.loads((path / ADAPTER).read_text()).get("base_model_name_or_path")
            base = f" of {named}" if isinstance(named, str) else ""
        raise GrowkitError(
            f"{path} is an adapter (LoRA){base} and no model: merge it into its base model with "
            f"peft's merge_and_unload, save that, and grow it"
        )


def _has_gguf_alone(path: Path) -> bool:
    names = [file.suffix for file in path.iterdir()]
    return GGUF in names and not {".safetensors", ".bin"} & set(names)


def refuse_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise GrowkitError for a config.json of quantised weights, or of an encoder."""
    quantised = config.get("quantization_config") or config.get("compression_config")
    if isinstance(quantised, dict):
        raise say_quantised(path, str(quantised.get("quant_method", "")))
    kind = config.get("model_type")
    if config.get("is_encoder_decoder") is True:
        raise GrowkitError(
            f"{path} is an encoder and a decoder ({kind!r}), and growkit grows decoders alone"
        )
    classes = config.get("architectures")
    named = classes if isinstance(classes, list) else []
    unsuited = (*ENCODERS, *OTHER_TASKS)
    if not named or not all(str(name).endswith(unsuited) for name in named):
        return
    if config.get("is_decoder"):
        return
    if str(named[0]).endswith(ENCODERS):
        raise GrowkitError(f"{path} is an encoder ({named[0]}), and growkit grows decoders alone")
    raise GrowkitError(
        f"{path} has a head for another task than the next token ({named[0]}), and growkit grows "
        "language models alone; grow the model that it was made from"
    )


def refuse_packed(path: Path, names: Iterable[str]) -> None:
    """Raise GrowkitError for tensors that are quantised by their names."""
    found = [name for name in names if name.endswith(PACKED)]
    if found:
        raise GrowkitError(
            f"{path} holds quantised weights, as {found[0]!r}, and growth needs the weights "
            f"themselves: {FROM}"
        )


def say_quantised(path: Path, method: str) -> GrowkitError:
    """The sentence about a method of quantisation."""
    called, remedy = METHODS.get(method.lower(), (method or "by some method", FROM))
    return GrowkitError(
        f"{path} is quantised ({called}), and growth needs the weights themselves: {remedy}"
    )
