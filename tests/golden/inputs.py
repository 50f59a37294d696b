"""The models that the cases start from, the same bytes on every machine.

Every number is a whole number from a counter-based generator times a power of two, and exact in its
dtype. Files are written by the descriptions of their formats, without the code under test.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

# name in files: the sizes of its dimensions
NEOX = {
    "gpt_neox.embed_in.weight": ("vocab", "embed"),
    "gpt_neox.layers.{layer}.input_layernorm.weight": ("embed",),
    "gpt_neox.layers.{layer}.input_layernorm.bias": ("embed",),
    "gpt_neox.layers.{layer}.post_attention_layernorm.weight": ("embed",),
    "gpt_neox.layers.{layer}.post_attention_layernorm.bias": ("embed",),
    "gpt_neox.layers.{layer}.attention.query_key_value.weight": ("qkv", "embed"),
    "gpt_neox.layers.{layer}.attention.query_key_value.bias": ("qkv",),
    "gpt_neox.layers.{layer}.attention.dense.weight": ("embed", "embed"),
    "gpt_neox.layers.{layer}.attention.dense.bias": ("embed",),
    "gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight": ("mlp", "embed"),
    "gpt_neox.layers.{layer}.mlp.dense_h_to_4h.bias": ("mlp",),
    "gpt_neox.layers.{layer}.mlp.dense_4h_to_h.weight": ("embed", "mlp"),
    "gpt_neox.layers.{layer}.mlp.dense_4h_to_h.bias": ("embed",),
    "gpt_neox.final_layer_norm.weight": ("embed",),
    "gpt_neox.final_layer_norm.bias": ("embed",),
    "embed_out.weight": ("vocab", "embed"),
}
LLAMA = {
    "model.embed_tokens.weight": ("vocab", "embed"),
    "model.layers.{layer}.input_layernorm.weight": ("embed",),
    "model.layers.{layer}.self_attn.q_proj.weight": ("queries", "embed"),
    "model.layers.{layer}.self_attn.k_proj.weight": ("keys", "embed"),
    "model.layers.{layer}.self_attn.v_proj.weight": ("keys", "embed"),
    "model.layers.{layer}.self_attn.o_proj.weight": ("embed", "queries"),
    "model.layers.{layer}.post_attention_layernorm.weight": ("embed",),
    "model.layers.{layer}.mlp.gate_proj.weight": ("mlp", "embed"),
    "model.layers.{layer}.mlp.up_proj.weight": ("mlp", "embed"),
    "model.layers.{layer}.mlp.down_proj.weight": ("embed", "mlp"),
    "model.norm.weight": ("embed",),
    "lm_head.weight": ("vocab", "embed"),
}
TABLES = {"gpt_neox": NEOX, "llama": LLAMA}
HEADS = ("embed_out.weight", "lm_head.weight")

# Random bits a number: one more, for a norm's weight around 1, still fits the dtype's mantissa.
BITS = {"float64": 48, "float32": 22, "float16": 9, "bfloat16": 6}
TAGS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ZARR = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "bfloat16"}
SLOTS = ("params", "mu", "nu")

COUNTERS = {"count": 70, "step": 75, "schedule_step": 80}
RECORD = {"tokens": 9000, "validation_loss": 3.5}
# Small files beside the weights, which growth carries along: text, and bytes that are no text.
BESIDE = {"tokenizer.json": b'{"version": "1.0"}', "spiece.model": b"\xff\x00\xfe"}

# At twice its width all matrices but attention.dense are above 1 MiB in float32, at three times in
# 16 bits; at its own width none is.
BIG = {"layer": 2, "embed": 192, "head": 4, "mlp": 400, "vocab": 800}
# The matrices of the mlp are above 1 MiB.
DEEP = {"layer": 3, "embed": 192, "head": 4, "mlp": 1600, "vocab": 130}
SMALL = {"layer": 5, "embed": 24, "head": 3, "mlp": 60, "vocab": 70}
GROUPED = {"layer": 2, "embed": 192, "kv": 2, "group": 2, "head_dim": 48, "mlp": 400, "vocab": 800}
# Here embed is not heads x head_dim.
FREE = {"layer": 3, "embed": 96, "kv": 2, "group": 3, "head_dim": 20, "mlp": 140, "vocab": 90}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 64}


@dataclass(frozen=True)
class Source:
    """A model to grow.

    form: directory, shards, checkpoint, or grid, a checkpoint whose arrays are in several chunks.
    options: fields of its config.json. numbers: the source whose numbers it holds, if not its own.
    moments: the dtype of mu and nu, that of the parameters by default.
    """

    form: str
    sizes: dict[str, int]
    dtype: str = "float32"
    tied: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    numbers: str = ""
    moments: str = ""

    @property
    def kind(self) -> str:
        return "llama" if "kv" in self.sizes else "gpt_neox"


SCALED_ROTARY = {"rope_scaling": SCALED}
SEQUENTIAL = {"use_parallel_residual": False}
SOURCES = {
    "neox": Source("directory", BIG),
    "neox_tied": Source("shards", BIG, tied=True, options=SEQUENTIAL),
    "neox_bf16": Source("directory", BIG, "bfloat16"),
    "neox_f16": Source("directory", BIG, "float16", options=SEQUENTIAL),
    "neox_f64": Source("directory", BIG, "float64"),
    "small": Source("directory", SMALL, options=SEQUENTIAL),
    "ck": Source("checkpoint", BIG),
    "ck_grid": Source("grid", BIG, numbers="ck"),
    "ck_tied": Source("checkpoint", BIG, tied=True, options=SEQUENTIAL),
    "ck_bf16": Source("checkpoint", BIG, "bfloat16", moments="float32"),
    "ck_small": Source("checkpoint", SMALL, tied=True),
    "ck_deep": Source("checkpoint", DEEP),
    "ck_deep_b": Source("checkpoint", DEEP),
    "ck_deep_c": Source("checkpoint", DEEP, "bfloat16"),
    "llama": Source("directory", GROUPED),
    "llama_tied": Source("shards", GROUPED, "bfloat16", tied=True, options=SCALED_ROTARY),
    "llama_free": Source("directory", FREE),
    "llama_f16": Source("directory", FREE, "float16", tied=True),
    "llama_f16_b": Source("directory", FREE, "float16", tied=True),
    "llama_ck": Source("checkpoint", GROUPED),
}
# Targets of `grow --like`: the content of a config.json, or the model section of a YAML file.
LIKE = {
    "clones.json": ("neox", {"layer": 3, "embed": 384, "head": 8, "mlp": 1000}),
    "pads.json": ("neox", {"layer": 3, "embed": 336, "head": 7, "mlp": 900}),
    "dims.json": ("neox", {"layer": 4, "embed": 320, "head": 4, "mlp": 800}),
    "tied.json": ("neox_tied", {"layer": 3, "embed": 336, "head": 7, "mlp": 900}),
    "grouped.json": ("llama", {"layer": 3, "embed": 384, "kv": 4, "mlp": 900}),
    "free.json": ("llama_free", {"layer": 4, "embed": 132, "kv": 4, "mlp": 200}),
    "clones.yaml": ("neox", {"layer": 4, "embed": 384, "head": 8, "mlp": 800}),
}


class Inputs:
    """The inputs below a directory, each made when it is first asked for."""

    def __init__(self, root: Path):
        self.root = root

    def path(self, name: str) -> Path:
        """Where the source or the target `name` lies."""
        path = self.root / name
        if path.exists():
            return path
        if name in LIKE:
            path.write_text(_target(name))
        else:
            write_source(path, name)
        return path


def write_source(path: Path, name: str) -> None:
    """Write the source of that name as a directory or a checkpoint."""
    source = SOURCES[name]
    path.mkdir()
    if source.form in ("directory", "shards"):
        _write_directory(path, source, name)
    else:
        _write_checkpoint(path, source, name)


def _target(name: str) -> str:
    """A file that describes a model to grow to. JSON is YAML as well."""
    base, sizes = LIKE[name]
    if name.endswith(".yaml"):
        return json.dumps({"model": sizes})
    return json.dumps(config(replace(SOURCES[base], sizes=SOURCES[base].sizes | sizes)))


def config(source: Source) -> dict[str, Any]:
    """The content of a source's config.json."""
    sizes = source.sizes
    common = {
        "model_type": source.kind,
        "vocab_size": sizes["vocab"],
        "hidden_size": sizes["embed"],
        "num_hidden_layers": sizes["layer"],
        "intermediate_size": sizes["mlp"],
        "max_position_embeddings": 64,
        "tie_word_embeddings": source.tied,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "use_cache": True,
    }
    own = _llama(sizes) if source.kind == "llama" else _neox(sizes)
    return common | own | source.options


def _neox(sizes: Mapping[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "num_attention_heads": sizes["head"],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
    }


def _llama(sizes: Mapping[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": sizes["kv"] * sizes["group"],
        "num_key_value_heads": sizes["kv"],
        "head_dim": sizes["head_dim"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    }


def shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """The shape of one layer's parameter, by its name in files with {layer} in it."""
    sizes = dict(source.sizes)
    if source.kind == "llama":
        sizes["keys"] = sizes["kv"] * sizes["head_dim"]
        sizes["queries"] = sizes["group"] * sizes["keys"]
    else:
        sizes["qkv"] = 3 * sizes["embed"]
    return {
        name: tuple(sizes[axis] for axis in axes)
        for name, axes in TABLES[source.kind].items()
        if not (source.tied and name in HEADS)
    }


def array(origin: str, slot: str, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The numbers of one parameter, or moment, in their dtype; bfloat16 as the uint16 of its bits.

    Parameters lie in [-1/2, 1/2), weights of norms in [1/2, 3/2), mu in [-1/128, 1/128), nu in
    (0, 1/1024].
    """
    bits = BITS[dtype]
    digest = hashlib.sha256(f"{origin} {slot} {name}".encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    whole = generator.random_raw(math.prod(shape)) >> np.uint64(64 - bits)
    centred = whole.astype(np.int64) - (1 << (bits - 1))
    if slot == "nu":
        values = (whole.astype(np.int64) + 1) * 2.0 ** -(bits + 10)
    elif slot == "mu":
        values = centred * 2.0 ** -(bits + 6)
    else:
        values = centred * 2.0**-bits + (1.0 if "norm.weight" in name else 0.0)
    return _narrowed(values, dtype).reshape(shape)


def _narrowed(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "bfloat16":
        return values.astype(dtype)
    # Exact, because no number has more bits than bfloat16 keeps.
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _layers(source: Source, name: str) -> list[str]:
    """The names in files of one row of the table, one a layer where it has layers."""
    if "{layer}" not in name:
        return [name]
    return [name.replace("{layer}", str(layer)) for layer in range(source.sizes["layer"])]


def _write_directory(path: Path, source: Source, origin: str) -> None:
    tensors = {
        name: (source.dtype, array(origin, "params", name, shape, source.dtype))
        for row, shape in shapes(source).items()
        for name in _layers(source, row)
    }
    if source.form == "shards":
        _write_shards(path, tensors | _unread(source, origin))
    else:
        _write_safetensors(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(config(source)))
    for name, content in BESIDE.items():
        (path / name).write_bytes(content)


def _unread(source: Source, origin: str) -> dict[str, tuple[str, np.ndarray]]:
    """What files may hold and no model reads: a tied head once more, a buffer of old versions."""
    head = "lm_head.weight" if source.kind == "llama" else "embed_out.weight"
    shape = (source.sizes["vocab"], source.sizes["embed"])
    llama = source.kind == "llama"
    embedding = "model.embed_tokens.weight" if llama else "gpt_neox.embed_in.weight"
    found = {head: (source.dtype, array(origin, "params", embedding, shape, source.dtype))}
    buffer = ("float32", np.ones(6, np.float32))
    if source.kind == "llama":
        return found | {"model.rotary_emb.inv_freq": buffer}
    return found | {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": buffer}


def _write_shards(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    names = list(tensors)
    half = len(names) // 2
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        _write_safetensors(path / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    header, offset = {}, 0
    for name, (dtype, values) in tensors.items():
        offsets = [offset, offset + values.nbytes]
        header[name] = {"dtype": TAGS[dtype], "shape": values.shape, "data_offsets": offsets}
        offset += values.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, values in tensors.values():
            file.write(values.tobytes())


def _write_checkpoint(path: Path, source: Source, origin: str) -> None:
    state = path / "state"
    state.mkdir()
    keys = [_write_slot(state, source, origin, slot) for slot in SLOTS]
    for name, value in COUNTERS.items():
        _write_zarr(state / name, np.asarray(value, np.int32), "<i4", grid=False)
    described = {
        str(key): {"key_metadata": [{"key": part, "key_type": 2} for part in key]}
        for key in [*sum(keys, []), *((name,) for name in COUNTERS)]
    }
    about = {"use_ocdbt": False, "use_zarr3": False, "tree_metadata": described}
    (state / "_METADATA").write_text(json.dumps(about))
    meta = {"config": config(source), "lineage": [], "record": RECORD}
    files = {
        "tokenizer.json": {"text": BESIDE["tokenizer.json"].decode()},
        "spiece.model": {"base64": base64.b64encode(BESIDE["spiece.model"]).decode()},
    }
    for item, content in (("meta", meta), ("files", files)):
        (path / item).mkdir()
        (path / item / "metadata").write_text(json.dumps(content))
    (path / "_CHECKPOINT_METADATA").write_text("{}")


def _write_slot(state: Path, source: Source, origin: str, slot: str) -> list[tuple[str, ...]]:
    """Write the arrays of a slot, layers stacked first; returns their paths in the tree."""
    dtype = source.moments if slot != "params" and source.moments else source.dtype
    paths = []
    for row, shape in shapes(source).items():
        names = _layers(source, row)
        layers = [array(source.numbers or origin, slot, name, shape, dtype) for name in names]
        values = np.stack(layers) if "{layer}" in row else layers[0]
        parts = row.replace(".{layer}", "").split(".")
        key = (slot, *(parts[1:] if len(parts) > 2 else parts))
        _write_zarr(state / ".".join(key), values, ZARR[dtype], source.form == "grid")
        paths.append(key)
    return paths


def _write_zarr(path: Path, values: np.ndarray, dtype: str, grid: bool) -> None:
    """An array in Zarr version 2, uncompressed: as one chunk, or in halves along its last two axes.

    Sizes that are halved must be even.
    """
    chunks = list(values.shape)
    if grid:
        chunks[-2:] = [size // 2 for size in chunks[-2:]]
    path.mkdir()
    (path / ".zarray").write_text(json.dumps(_zarr_header(values.shape, chunks, dtype)))
    counts = [size // chunk for size, chunk in zip(values.shape, chunks, strict=True)]
    for place in np.ndindex(*counts):
        starts = [at * chunk for at, chunk in zip(place, chunks, strict=True)]
        cut = tuple(slice(at, at + chunk) for at, chunk in zip(starts, chunks, strict=True))
        name = ".".join(map(str, place)) or "0"
        (path / name).write_bytes(values[cut].tobytes())


def _zarr_header(shape: Sequence[int], chunks: Sequence[int], dtype: str) -> dict[str, Any]:
    return {
        "chunks": chunks,
        "compressor": None,
        "dimension_separator": ".",
        "dtype": dtype,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": shape,
        "zarr_format": 2,
    }
