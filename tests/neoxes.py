"""Checkpoints as gpt-neox and DeepSpeed save them, written with torch from a model of transformers.

Written from the sources of DeepSpeed (runtime/zero/stage_1_and_2.py of 0.8.3, zero/stage1.py of
0.3.15, runtime/pipe/module.py) and gpt-neox (megatron/checkpointing.py, model/utils.py), and from
nothing of growkit's.
"""

from __future__ import annotations

import enum
import json
import math
import random
import sys
import types
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

STEPS = 3
SKIPPED = 2
SLOTS = ("params", "exp_avg", "exp_avg_sq")
# Sizes whose groups do not divide by the ranks; two heads of 5.
SIZES = {
    "vocab_size": 46,
    "hidden_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 26,
    "max_position_embeddings": 16,
    "rotary_pct": 0.4,
}
NEOX = {
    "num_layers": 2,
    "hidden_size": 10,
    "num-attention-heads": 2,
    "max_position_embeddings": 16,
    "pos-emb": "rotary",
    "rotary_pct": 0.4,
    "no_weight_tying": True,
    "gpt_j_residual": True,
    "attention_config": [[["flash"], 2]],
    "zero_optimization": {"stage": 1},
    "pipe_parallel_size": 1,
}


def train_model(parallel: bool = True, tied: bool = False) -> dict[str, dict[str, Any]]:
    """slot -> name in files -> tensor, after some steps of torch's AdamW."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    more = {"use_parallel_residual": parallel, "tie_word_embeddings": tied}
    config = transformers.GPTNeoXConfig(**SIZES, **more)
    model = transformers.GPTNeoXForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        tokens = torch.randint(0, SIZES["vocab_size"], (4, 16))
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found: dict[str, dict[str, Any]] = {slot: {} for slot in SLOTS}
    for name, parameter in model.named_parameters():
        named = name.replace("lm_head", "embed_out")
        found["params"][named] = parameter.detach().clone()
        for slot in SLOTS[1:]:
            found[slot][named] = optimizer.state[parameter][slot].clone()
    return found


def list_modules(layers: int, tied: bool) -> list[tuple[int, str, str]]:
    """(layer of the pipeline, name in it, name in transformers), as the modules are built."""
    listed = [(0, "word_embeddings.weight", "gpt_neox.embed_in.weight")]
    inner = ("input_layernorm", "attention.query_key_value", "attention.dense")
    inner += ("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    for layer in range(layers):
        for module in inner:
            for kind in ("weight", "bias"):
                name = f"{module}.{kind}"
                listed.append((layer + 2, name, f"gpt_neox.layers.{layer}.{name}"))
    for kind in ("weight", "bias"):
        listed.append((layers + 3, f"norm.{kind}", f"gpt_neox.final_layer_norm.{kind}"))
    if not tied:
        listed.append((layers + 4, "final_linear.weight", "embed_out.weight"))
    return listed


def take_share(slot: str, name: str, tensor: Any, rank: int, ranks: int, parallel: bool) -> Any:
    """What one rank of tensor parallelism holds of a parameter or a moment."""
    if name.endswith(("dense.weight", "dense_4h_to_h.weight")):
        return tensor.chunk(ranks, dim=1)[rank].contiguous()
    if (
        "query_key_value" in name
        or "h_to_4h" in name
        or name.endswith(("word_embeddings.weight", "final_linear.weight"))
    ):
        return tensor.chunk(ranks, dim=0)[rank].contiguous()
    # Each rank adds its bias to its part of the sum; all have the gradient of the sum.
    if parallel and slot == "params" and name.endswith(("dense.bias", "dense_4h_to_h.bias")):
        return tensor / ranks
    return tensor.clone()


@dataclass
class Layout:
    """How a checkpoint is laid out.

    form: 'new', 'elastic' or 'bf16' of DeepSpeed 0.8 and later, 'old' of 0.3.15.
    """

    tp: int = 1
    dp: int = 1
    form: str = "new"
    intervals: int = 1
    low: str = "float16"
    parallel: bool = True
    tied: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    # Changes a rank's groups of names, before the vectors are made from them or after.
    before: Any = None
    after: Any = None
    # Changes the optimizer's state dict of a rank.
    state: Any = None


@contextmanager
def deepspeed_classes():
    """Stand-ins for the classes of DeepSpeed whose objects its checkpoints hold."""
    scaler = type("DynamicLossScaler", (), {"__module__": "deepspeed.runtime.fp16.loss_scaler"})
    stage = enum.IntEnum("ZeroStageEnum", {"optimizer_states": 1, "gradients": 2, "weights": 3})
    stage.__module__ = "deepspeed.runtime.zero.config"
    address = type("fragment_address", (), {"__module__": "deepspeed.utils.tensor_fragment"})
    made = {}
    for each in (scaler, stage, address):
        words = each.__module__.split(".")
        for count in range(1, len(words) + 1):
            name = ".".join(words[:count])
            made.setdefault(name, types.ModuleType(name))
        setattr(made[each.__module__], each.__name__, each)
    sys.modules.update(made)
    try:
        yield scaler, stage, address
    finally:
        for name in made:
            del sys.modules[name]


def save_neox(path: Path, trained: dict[str, dict[str, Any]], layout: Layout) -> Path:
    """Write a directory global_stepN."""
    torch = pytest.importorskip("torch")
    path.mkdir(parents=True)
    modules = list_modules(SIZES["num_hidden_layers"], layout.tied)
    for rank in range(layout.tp):
        held = {
            slot: {
                (layer, name): take_share(
                    slot, name, trained[slot][theirs], rank, layout.tp, layout.parallel
                )
                for layer, name, theirs in modules
            }
            for slot in SLOTS
        }
        low = getattr(torch, layout.low)
        for layer in sorted({layer for layer, _, _ in modules}):
            used = OrderedDict(
                (name, tensor.to(low))
                for (at, name), tensor in held["params"].items()
                if at == layer
            )
            if any(name.startswith("attention") for name in used):
                used["attention.rotary_emb.inv_freq"] = torch.ones(1)
            torch.save(used, path / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")
        with deepspeed_classes() as classes:
            save_rank(path, rank, held, layout, classes)
    (path / "configs").mkdir()
    settings = NEOX | {"model_parallel_size": layout.tp, "gpt_j_residual": layout.parallel}
    settings |= {"no_weight_tying": not layout.tied} | layout.settings
    (path / "configs" / "tiny.yml").write_text(json.dumps(settings, indent=2))
    (path / "configs" / "local.yml").write_text("# paths\ndata-path: /nowhere\n")
    return path


def save_rank(path: Path, rank: int, held: Any, layout: Layout, classes: Any) -> None:
    """The optimizer's files of one rank of tensor parallelism, and the file of its states."""
    torch = pytest.importorskip("torch")
    keys = list(held["params"])
    exempt = [key for key in keys if key[1].endswith("bias") or "norm" in key[1]]
    groups = [[key for key in keys if key not in exempt], exempt]
    if layout.before:
        layout.before(groups)
    vectors = [
        {slot: torch.cat([held[slot][key].reshape(-1) for key in group]) for slot in SLOTS}
        for group in groups
    ]
    if layout.after:
        layout.after(groups)
    make = make_old if layout.form == "old" else make_new
    for number, state in enumerate(make(vectors, layout, classes)):
        if layout.state:
            layout.state(state, number)
        saved = {"optimizer_state_dict": state, "ds_config": {"zero_optimization": {"stage": 1}}}
        if layout.form == "old":
            saved["param_shapes"] = OrderedDict(
                (name_of(key, layout), held["params"][key].shape) for key in keys
            )
        prefix = "bf16_" if layout.form == "bf16" else ""
        name = f"{prefix}zero_pp_rank_{number}_mp_rank_{rank:02d}_optim_states.pt"
        torch.save(saved, path / name)
    shapes = [
        OrderedDict((name_of(key, layout), held["params"][key].shape) for key in group)
        for group in groups
    ]
    states = {
        "module": None,
        "optimizer": None,
        "lr_scheduler": {"start_lr": 1e-3, "num_iters": STEPS, "decay_style": "cosine"},
        "skipped_steps": SKIPPED,
        "global_steps": STEPS + SKIPPED,
        "iteration": STEPS + SKIPPED,
        "args": {"num_layers": 2, "padded_vocab_size": SIZES["vocab_size"]},
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }
    if layout.form != "old":
        states["param_shapes"] = shapes
    torch.save(states, path / f"mp_rank_{rank:02d}_model_states.pt")


def name_of(key: tuple[int, str], layout: Layout) -> str:
    if key[0] == 0 and layout.tied:
        return f"tied_modules.embed.{key[1]}"
    return f"{key[0]}.{key[1]}"


def make_new(vectors: Any, layout: Layout, classes: Any) -> list[dict[str, Any]]:
    """The state dicts of DeepSpeedZeroOptimizer, one for each rank of data parallelism."""
    torch = pytest.importorskip("torch")
    scaler, stage, address = classes
    states = []
    for rank in range(layout.dp):
        masters, moments, paddings = [], {}, []
        for group, slots in enumerate(vectors):
            lean = slots["params"].numel()
            alignment = 2 * layout.dp
            size = math.ceil(lean / alignment) * alignment // layout.dp
            padding = min(size, max(0, (rank + 1) * size - lean))
            paddings.append(padding)
            parts = {}
            for slot, vector in slots.items():
                full = torch.cat([vector, torch.zeros(size * layout.dp - lean)])
                parts[slot] = full[rank * size : (rank + 1) * size].clone()
            master = parts.pop("params")
            masters.append(master if layout.form == "bf16" else master[: size - padding])
            if layout.form == "elastic":
                parts = {slot: part[: size - padding] for slot, part in parts.items()}
            else:
                parts["step"] = torch.tensor(float(STEPS))
            moments[group] = parts
        groups = [{"lr": 1e-3, "params": [n]} for n in range(len(vectors))]
        base: Any = {"state": moments, "param_groups": groups}
        if layout.form == "elastic":
            base = list(moments.values())
        states.append(
            {
                "loss_scaler": scaler(),
                "dynamic_loss_scale": True,
                "base_optimizer_state": base,
                "single_partition_of_fp32_groups": masters,
                "zero_stage": stage.optimizer_states,
                "group_paddings": paddings,
                "partition_count": [layout.dp] * len(vectors),
                "param_slice_mappings": [OrderedDict(first=address())],
            }
        )
        if layout.form == "elastic":
            states[-1]["base_optimizer_state_step"] = STEPS
    return states


def make_old(vectors: Any, layout: Layout, classes: Any) -> list[dict[str, Any]]:
    """The elastic state dicts of FP16_DeepSpeedZeroOptimizer_Stage1; no step is in them."""
    torch = pytest.importorskip("torch")
    states = []
    for rank in range(layout.dp):
        masters, moments = [], []
        for slots in vectors:
            lean = slots["params"].numel()
            size = math.ceil(lean / (layout.intervals * layout.dp))
            total = size * layout.intervals * layout.dp
            parts: list[dict[str, Any]] = []
            for interval in range(layout.intervals):
                start = (interval * layout.dp + rank) * size
                kept = size - min(size, max(0, start + size - lean))
                full = {
                    slot: torch.cat([vector, torch.zeros(total - lean)])[start : start + size]
                    for slot, vector in slots.items()
                }
                parts.append({slot: part.clone()[:kept] for slot, part in full.items()})
            masters.append([part.pop("params") for part in parts])
            moments.append(parts)
        states.append(
            {
                "loss_scaler": classes[0](),
                "base_optimizer_state": moments,
                "zero_stage": 1,
                "partition_count": layout.dp,
                "num_comm_intervals_per_group": [layout.intervals] * len(vectors),
                "local_sub_partitions_of_fp32_groups": masters,
            }
        )
    return states
