"""Distributed checkpoints of PyTorch, as several processes would write them.

torch's own planner and writer write them in one process, each tensor cut into pieces.
"""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch.distributed.checkpoint")

import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter  # noqa: E402
from torch.distributed.checkpoint._nested_dict import flatten_state_dict  # noqa: E402
from torch.distributed.checkpoint.default_planner import (  # noqa: E402
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (  # noqa: E402
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (  # noqa: E402
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
STEPS = 3
# What torch warns of where there is one process.
ALONE = "torch.distributed is disabled"


def make_llama(seed: int = 0, dtype=None, **fields):
    """A tiny Llama of transformers, its norms random too."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | fields))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network if dtype is None else network.to(dtype)


def make_optimizer(network, lr: float = 1e-3):
    """AdamW with two groups, as trainers have."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim == 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.1)


def train(network, optimizer, steps: int = STEPS) -> None:
    """A few steps on random tokens."""
    tokens = torch.randint(0, LLAMA["vocab_size"], (2, 8))
    for _ in range(steps):
        network(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def take_state(network, optimizer, flattened: bool = False):
    """(model's, optimizer's) state dicts by names."""
    options = StateDictOptions(flatten_optimizer_state_dict=flattened)
    return get_state_dict(network, optimizer, options=options)


class Writer(DefaultSavePlanner):
    """Gives the writer what each item of the plan is."""

    def __init__(self, held):
        super().__init__()
        self.held = held

    def resolve_data(self, write_item):
        value = self.held[write_item.index]
        if write_item.type != WriteItemType.BYTE_IO:
            return value
        content = io.BytesIO()
        torch.save(value, content)
        return content


def save_sharded(path: Path, state: dict, ranks: int = 2, axis=lambda key: 0) -> Path:
    """Save a state dict as `ranks` processes would that hold each tensor cut along an axis."""
    flat, mappings = flatten_state_dict(state)
    held = {}
    plans = [[] for _ in range(ranks)]
    for number, (key, value) in enumerate(flat.items()):
        if not torch.is_tensor(value):
            index = MetadataIndex(key)
            held[index] = value
            plans[number % ranks].append(WriteItem(index, WriteItemType.BYTE_IO))
            continue
        for rank, (offsets, part) in enumerate(cut(value, ranks, axis(key))):
            index = MetadataIndex(key, offsets)
            held[index] = part
            chunk = ChunkStorageMetadata(torch.Size(offsets), part.size())
            properties = TensorProperties.create_from_tensor(value)
            data = TensorWriteData(chunk, properties, value.size())
            plans[rank].append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
    made, metadata = create_default_global_save_plan([SavePlan(items) for items in plans])
    metadata.planner_data = mappings
    writer = FileSystemWriter(path, sync_files=False)
    writer.set_up_storage_writer(True)
    path.mkdir(parents=True, exist_ok=True)
    made = writer.prepare_global_plan(made)
    results = [writer.write_data(plan, Writer(held)).wait() for plan in made]
    writer.finish(metadata, results)
    return path


def cut(value, ranks: int, axis: int):
    """(offsets, part) of each process; the first ones have more where it does not divide."""
    if value.ndim == 0:
        yield (), value.detach().clone()
        return
    begin = 0
    for part in torch.tensor_split(value.detach(), ranks, dim=axis % value.ndim):
        offsets = [0] * value.ndim
        offsets[axis % value.ndim] = begin
        begin += part.shape[axis % value.ndim]
        yield tuple(offsets), part.contiguous()


def save_config(path: Path, network) -> Path:
    """config.json as transformers writes it, in a directory."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(network.config.to_diff_dict()))
    return path


def load_strictly(state: dict, path: Path) -> dict:
    """What torch loads of a checkpoint into a state dict; every key must be there."""
    planner = DefaultLoadPlanner(allow_partial_load=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ALONE)
        dcp.load(state, storage_reader=FileSystemReader(path), planner=planner, no_dist=True)
    return state


def save_whole(state: dict, path: Path) -> Path:
    """Save a state dict as one process does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ALONE)
        dcp.save(state, storage_writer=FileSystemWriter(path), no_dist=True)
    return path


def load_into(network, optimizer, path: Path, bare: bool, flattened: bool, name="optimizer"):
    """Load a checkpoint into a model and its optimizer, as torchtitan or a loop of one's own
    does.
    """
    model_state, optimizer_state = take_state(network, optimizer, flattened)
    state = {name: optimizer_state} | (model_state if bare else {"model": model_state})
    load_strictly(state, path)
    model_state = {key: state[key] for key in model_state} if bare else state["model"]
    set_state_dict(
        network,
        optimizer,
        model_state_dict=model_state,
        optim_state_dict=state[name],
        options=StateDictOptions(flatten_optimizer_state_dict=flattened),
    )
    return state
