"""Unsharded checkpoints of AI2's OLMo 2, with AdamW's moments.

    step1000-unsharded/config.yaml          the settings of the training
    step1000-unsharded/model.safetensors    the parameters
    step1000-unsharded/optim.safetensors    the moments, and each parameter's step
    step1000-unsharded/train.pt             the step of the training

OLMo names a tensor of its safetensors files by the base64 of a pickle of the keys that lead to it,
as ("state", "transformer.wte.weight", "exp_avg"). These pickles are read without running anything:
one that names a class or function is refused. Values that are pickles themselves (the options of
the groups) are left unread. Sources: olmo/safetensors_util.py and scripts/convert_olmo2_to_hf.py of
allenai/OLMo.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from growkit.checkpoint.carried import list_beside, require_inside
from growkit.checkpoint.files import read_regular
from growkit.checkpoint.optimizer import require_step
from growkit.checkpoint.safetensors import read_header
from growkit.checkpoint.tensor import Source, Tensor
from growkit.checkpoint.torch_pickle import Foreign, read_pickle
from growkit.checkpoint.zero import open_state
from growkit.errors import GrowkitError

KIND = "olmo"
SETTINGS = "config.yaml"
MODEL, OPTIMIZER, STATE = "model.safetensors", "optim.safetensors", "train.pt"
ENTRIES = {"exp_avg": "mu", "exp_avg_sq": "nu"}
LIMIT = 1_000_000
# Any tensor may hold bytes: those of pickles, which are not read.
ANY_NAME = ("",)
# FSDP's word in the names of parameters.
WRAPPED = "_fsdp_wrapped_module."
# OLMo's names in a layer -> transformers'.
LAYER = {
    "attn_out": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "ff_out": "mlp.down_proj",
    "attn_norm": "post_attention_layernorm",
    "ff_norm": "post_feedforward_layernorm",
}
ENDS = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "transformer.ff_out.weight": "lm_head.weight",
}
# Settings that transformers' OLMo 2 has one value for; what is not set has OLMo's default.
FIXED: dict[str, tuple[Any, Any]] = {
    # setting: (the value, OLMo's default)
    "attention_layer_norm": (True, False),
    "norm_after": (True, False),
    "layer_norm_type": ("rms", "default"),
    "activation_type": ("swiglu", "swiglu"),
    "block_type": ("sequential", "sequential"),
    "rope": (True, False),
    "alibi": (False, False),
    "include_bias": (False, True),
    "clip_qkv": (None, None),
    "scale_logits": (False, False),
    "embedding_layer_norm": (False, False),
}


def open_olmo(path: Path) -> Source:
    """Open an unsharded checkpoint of OLMo 2; reads headers alone.

    It cannot be grown as it is, and `Source.refusal` says what to do. Raises GrowkitError, naming
    the file, for what is missing, and for a model that is not OLMo 2.
    """
    settings = _read_settings(path)
    config = _make_config(path, settings)
    model = {keys[0]: tensor for keys, tensor in _read_tensors(path / MODEL) if len(keys) == 1}
    slots: dict[str, dict[str, Tensor]] = {"params": model, "mu": {}, "nu": {}}
    steps = []
    for keys, tensor in _read_tensors(path / OPTIMIZER):
        if len(keys) != 3 or keys[0] != "state":
            continue
        if type(keys[1]) is int:
            raise GrowkitError(
                f"{path / OPTIMIZER} keys parameters by number, as OLMo saves without FSDP; growkit"
                " reads those by name"
            )
        if keys[2] in ENTRIES:
            slots[ENTRIES[keys[2]]][str(keys[1]).replace(WRAPPED, "")] = tensor
        elif keys[2] == "step":
            steps.append(tensor)
    beside = list_beside(path, (SETTINGS, MODEL, OPTIMIZER, STATE))
    return Source(
        path=path,
        kind=KIND,
        config=config,
        tensors={slot: dict(_rename(path, config, tensors)) for slot, tensors in slots.items()},
        weights=[path / MODEL, path / OPTIMIZER],
        lineage=[],
        record=_read_record(path, steps),
        read_files=beside.read,
        notes=beside.notes,
        refusal=f"{path} is a checkpoint of OLMo: `growkit import {path} OUT` makes a trainer "
        "checkpoint of it, with its moments, and that grows",
    )


def _read_settings(path: Path) -> Mapping[str, Any]:
    """The section of the model. Raises GrowkitError for what is not OLMo 2."""
    import yaml

    require_inside(path, path / SETTINGS)
    try:
        found = yaml.safe_load(read_regular(path / SETTINGS, LIMIT))
    except (yaml.YAMLError, UnicodeError, RecursionError, ValueError):
        raise GrowkitError(f"{path / SETTINGS} is no YAML that can be read") from None
    model = found.get("model") if isinstance(found, Mapping) else None
    if not isinstance(model, Mapping):
        raise GrowkitError(f"{path / SETTINGS} has no section 'model'")
    for name, (wanted, default) in FIXED.items():
        value = model.get(name, default)
        if value != wanted:
            raise GrowkitError(
                f"{path / SETTINGS}: {name} is {value!r}, and OLMo 2 in transformers has {wanted!r}"
            )
    return model


def _make_config(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json. The vocabulary's padding is kept."""

    def take(name: str, default: int | None = None) -> int:
        value = settings.get(name)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise GrowkitError(f"{path / SETTINGS}: {name} must be a whole number from 1")
        return value

    def take_number(name: str, default: float) -> float:
        try:
            # YAML reads 1e-6 as text, for want of a point.
            return float(settings.get(name, default))
        except (TypeError, ValueError):
            raise GrowkitError(f"{path / SETTINGS}: {name} must be a number") from None

    heads = take("n_heads")
    single = 1 if settings.get("multi_query_attention") else heads
    return {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "vocab_size": take("embedding_size", settings.get("vocab_size")),
        "hidden_size": take("d_model"),
        "num_hidden_layers": take("n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": take("n_kv_heads", single),
        "intermediate_size": take("mlp_hidden_size", take("mlp_ratio", 4) * take("d_model")) // 2,
        "max_position_embeddings": take("max_sequence_length", 1024),
        "rms_norm_eps": take_number("layer_norm_eps", 1e-5),
        "rope_theta": take_number("rope_theta", 10_000),
        "initializer_range": take_number("init_std", 0.02),
        "tie_word_embeddings": bool(settings.get("weight_tying", True)),
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": settings.get("eos_token_id"),
        "pad_token_id": settings.get("pad_token_id"),
    }


def _read_tensors(path: Path) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """The keys and the tensor of each entry that is no pickle itself."""
    if not path.exists():
        raise GrowkitError(f"{path} is missing")
    require_inside(path.parent, path)
    for name, tensor in read_header(path, ANY_NAME).items():
        keys, pickled = _decode(path, name)
        if not pickled:
            yield keys, tensor


def _decode(path: Path, name: str) -> tuple[tuple[Any, ...], bool]:
    """The keys that a name stands for, and whether its value is a pickle."""
    try:
        value = read_pickle(base64.urlsafe_b64decode(name.encode()))
    except Foreign as problem:
        raise GrowkitError(
            f"{path}: a tensor's name is a pickle of {problem.args[0]}; nothing of it was run"
        ) from None
    except (GrowkitError, binascii.Error, UnicodeError, ValueError):
        value = None
    if not isinstance(value, tuple) or len(value) != 2 or not _are_keys(value[0]):
        raise GrowkitError(f"{path}: {name[:40]!r} is no name of OLMo's")
    return value[0], bool(value[1])


def _are_keys(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(key) in (str, int) for key in value)


def _rename(
    path: Path, config: Mapping[str, Any], tensors: Mapping[Any, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors by transformers' names, joined ones cut into their parts."""
    width = config["hidden_size"] // config["num_attention_heads"]
    kv = width * config["num_key_value_heads"]
    cuts = {
        "att_proj": {
            "self_attn.q_proj": config["hidden_size"],
            "self_attn.k_proj": kv,
            "self_attn.v_proj": kv,
        },
        # The first half goes on as it is, the second through the activation.
        "ff_proj": {
            "mlp.up_proj": config["intermediate_size"],
            "mlp.gate_proj": config["intermediate_size"],
        },
    }
    for name, tensor in tensors.items():
        words = str(name).split(".")
        if name in ENDS:
            yield ENDS[name], tensor
        elif words[:2] == ["transformer", "blocks"] and len(words) == 5 and words[3] in LAYER:
            yield f"model.layers.{words[2]}.{LAYER[words[3]]}.weight", tensor
        elif words[:2] == ["transformer", "blocks"] and len(words) == 5 and words[3] in cuts:
            parts = cuts[words[3]]
            if tensor.row_count != sum(parts.values()):
                raise GrowkitError(
                    f"{path}: {name} has {tensor.row_count:,} rows, and its parts "
                    f"{sum(parts.values()):,}"
                )
            first = 0
            for part, count in parts.items():
                yield f"model.layers.{words[2]}.{part}.weight", _cut(tensor, first, count)
                first += count
        else:
            raise GrowkitError(f"{path}: OLMo 2 in transformers has no parameter for {name!r}")


def _cut(tensor: Tensor, first: int, count: int) -> Tensor:
    """Some rows of a tensor, not read yet."""
    size = tensor.size // tensor.row_count
    span = tensor.span.part(first * size, count * size) if tensor.span else None
    shape = (count, *tensor.shape[1:])
    return Tensor(shape, tensor.dtype, lambda a, b: tensor.rows(first + a, first + b), span)


def _read_step(path: Path, tensor: Tensor) -> int:
    """A parameter's step. Raises GrowkitError for what is no count."""
    if tensor.shape not in ((), (1,)):
        raise GrowkitError(f"{path / OPTIMIZER}: the step of a parameter is no number")
    step = float(tensor.read().reshape(-1)[0])
    require_step(path / OPTIMIZER, "a parameter", step)
    return int(step)


def _read_record(path: Path, steps: list[Tensor]) -> dict[str, Any]:
    """The step of the training, and how many steps AdamW took: of the parameter with most."""
    count = max((_read_step(path, tensor) for tensor in steps), default=0)
    step = count
    if (path / STATE).is_file():
        require_inside(path, path / STATE)
        stated = open_state(path / STATE).value.get("global_step")
        step = stated if type(stated) is int and stated >= 0 else count
    return {"step": step, "schedule_step": step, "count": count}
