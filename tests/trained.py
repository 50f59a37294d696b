"""Checkpoints of transformers' Trainer, made without it: a directory and what torch.save writes."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, random_tensors, save_directory

from growkit.models.architecture import Architecture

GROUP = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "amsgrad": False,
    "foreach": None,
    "fused": None,
    "initial_lr": 2e-3,
}
ADAM = ("exp_avg", "exp_avg_sq")
STEPS = 20


def in_groups(model: Architecture) -> list[list[str]]:
    """The names of a GPT-NeoX model's parameters in the Trainer's two groups: its definition."""
    names = [name for name, _, _ in model.table.names(model.sizes)]
    last = [name for name in names if "final" in name or "embed_out" in name]
    names = [name for name in names if name not in last] + last
    exempt = [name for name in names if "norm" in name or "bias" in name]
    return [[name for name in names if name not in exempt], exempt]


def make_state(model: Architecture = SMALL, entries=ADAM, dtype="float32", groups=None) -> dict:
    """A state dict of random moments as torch has it in memory."""
    torch = pytest.importorskip("torch")
    groups = groups or in_groups(model)
    moments = {
        entry: random_tensors(model, "float32", seed) for seed, entry in enumerate(entries, 10)
    }
    state, listed = {}, []
    for names in groups:
        first = len(state)
        for name in names:
            entry = {"step": torch.tensor(float(STEPS))}
            for key, tensors in moments.items():
                array = np.square(tensors[name]) if "sq" in key or "2" in key else tensors[name]
                entry[key] = torch.from_numpy(array).to(getattr(torch, dtype))
            state[len(state)] = entry
        listed.append(GROUP | {"params": list(range(first, len(state)))})
    listed[-1]["weight_decay"] = 0.0
    return {"state": state, "param_groups": listed}


def save_trained(path: Path, model: Architecture = SMALL, state=None, **options) -> Path:
    """A checkpoint directory of the Trainer."""
    torch = pytest.importorskip("torch")
    save_directory(path, model)
    state = state or make_state(model, **options)
    torch.save(state, path / "optimizer.pt")
    rates = [group["initial_lr"] for group in state["param_groups"]]
    schedule = {"base_lrs": rates, "last_epoch": STEPS, "_last_lr": rates, "lr_lambdas": [{}] * 2}
    torch.save(schedule, path / "scheduler.pt")
    torch.save(OrderedDict(cpu=torch.get_rng_state()), path / "rng_state.pth")
    (path / "training_args.bin").write_bytes(b"\x80\x02csomewhere\nArguments\n.")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": STEPS, "epoch": 0.5}))
    return path


def load_state(path: Path) -> dict:
    """What torch reads of an optimizer.pt, by its safe unpickler."""
    torch = pytest.importorskip("torch")
    return torch.load(path / "optimizer.pt", weights_only=True)
