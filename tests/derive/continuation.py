"""A tiny model of any type trained by AdamW in float64, by hand: parameters and moments are held by
their names in files, transformers computes the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from growkit.derive.network import memory_names, name_as_files, wide
from growkit.derive.proof import Grown, network_of
from growkit.derive.stream import TOKENS
from growkit.growth.multipliers import compute_multipliers
from growkit.growth.plan import Plan
from growkit.growth.tree import grow
from growkit.models.architecture import Architecture

RATE, DECAY, EPS = 3e-3, 0.1, 1e-4
BETAS = (0.9, 0.95)
Arrays = dict[str, np.ndarray]


@dataclass
class Training:
    """A model in training. factors: what multiplies the rate and eps of each parameter."""

    model: Architecture
    held: Grown
    mu: Arrays = field(default_factory=dict)
    nu: Arrays = field(default_factory=dict)
    count: int = 0
    factors: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.network = network_of(self.held)
        self.network.requires_grad_(True)
        self.rows = {name: row for name, row, _ in self.model.table.names(self.model.sizes)}
        names = memory_names(self.network)
        parameters = dict(self.network.named_parameters())
        # Experts that memory holds as one array are put together from files at each step.
        self.direct = {
            name: parameters[known]
            for name, known in names.items()
            if known in parameters and parameters[known].shape == self.held.state[name].shape
        }
        zeros = {name: np.zeros(tensor.shape) for name, tensor in self.held.state.items()}
        self.mu = self.mu or zeros
        self.nu = self.nu or {name: array.copy() for name, array in zeros.items()}

    def step(self) -> float:
        """One step of AdamW; the loss before it."""
        loss, gradients = self.compute()
        self.count += 1
        for name, tensor in self.held.state.items():
            gradient = gradients[name].numpy()
            self.mu[name] = BETAS[0] * self.mu[name] + (1 - BETAS[0]) * gradient
            self.nu[name] = BETAS[1] * self.nu[name] + (1 - BETAS[1]) * gradient**2
            tensor -= torch.from_numpy(np.asarray(self.change(name, tensor.numpy())))
        self.put_back()
        return loss

    def change(self, name: str, value: np.ndarray) -> np.ndarray:
        """What a step takes from a parameter: the rate has a factor, decay has none."""
        mean = self.mu[name] / (1 - BETAS[0] ** self.count)
        square = self.nu[name] / (1 - BETAS[1] ** self.count)
        direction = mean / (np.sqrt(square) + EPS * self.factor("eps", name))
        decay = DECAY * value if self.rows[name].decays else 0.0
        return RATE * (self.factor("learning_rate", name) * direction + decay)

    def factor(self, what: str, name: str) -> Any:
        """The factor of a parameter, of one unit of its stacked axes."""
        node: Any = self.factors.get(what, 1.0)
        if node == 1.0:
            return 1.0
        row = self.rows[name]
        for key in row.path:
            node = node[key]
        array = np.asarray(node)
        return array if array.ndim == 0 else array.reshape(array.shape[len(row.stacked) :])

    def compute(self) -> tuple[float, dict[str, torch.Tensor]]:
        """The loss of the next token, and its gradient by names in files."""
        self.network.zero_grad()
        with wide(), torch.enable_grad():
            logits = self.network(TOKENS, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
            loss.backward()
        # Buffers that are saved have none.
        gradients = {
            name: torch.zeros_like(each) for name, each in self.network.state_dict().items()
        }
        for name, parameter in self.network.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad
        return float(loss.detach()), name_as_files(self.network, gradients)

    def put_back(self) -> None:
        """Give the network the parameters as they are now."""
        if self.direct.keys() < self.held.state.keys():
            self.network = network_of(self.held)
            self.network.requires_grad_(True)
            return
        with torch.no_grad():
            for name, parameter in self.direct.items():
                parameter.copy_(self.held.state[name])


def grow_training(training: Training, plan: Plan, config: dict[str, Any]) -> Training:
    """A training grown by growkit's own API, moments and multipliers with it."""
    state = {
        "params": {name: tensor.numpy() for name, tensor in training.held.state.items()},
        "mu": training.mu,
        "nu": training.nu,
    }
    grown = grow({slot: nest(arrays, plan.model) for slot, arrays in state.items()}, plan)
    params, mu, nu = (flatten(grown[slot], plan.grown) for slot in ("params", "mu", "nu"))
    held = Grown(config, {name: torch.from_numpy(array.copy()) for name, array in params.items()})
    factors = compute_multipliers(plan.grown, [plan])
    return Training(plan.grown, held, mu, nu, training.count, factors)


def nest(arrays: Arrays, model: Architecture) -> dict[str, Any]:
    """Arrays by names in files as a tree, without the first word that trees leave out."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *path, last = inner_name(name, model).split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = array
    return tree


def flatten(tree: dict[str, Any], model: Architecture) -> Arrays:
    """The arrays of a tree by names in files."""
    found = {}
    for name, _, _ in model.table.names(model.sizes):
        node: Any = tree
        for key in inner_name(name, model).split("."):
            node = node[key]
        found[name] = node
    return found


def inner_name(name: str, model: Architecture) -> str:
    return name.removeprefix(f"{model.family.prefix}.") if model.family.prefix else name
