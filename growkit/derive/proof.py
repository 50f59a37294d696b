"""Growth proved: a tiny model, grown by growkit, computed by transformers in float64, against its
source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from growkit.derive.lists import find_numbers
from growkit.derive.network import (
    CONFIG_MAPPING,
    State,
    load,
    name_as_files,
    run,
    set_plain,
    wide,
)
from growkit.derive.sizes import LAYERS
from growkit.derive.stream import TOKENS
from growkit.derive.variant import Variant, config_json
from growkit.growth.axes import AxisMap, insert, make_map, tile
from growkit.growth.padding import MU
from growkit.growth.plan import Plan, build_plan
from growkit.growth.rule import find_source, grow_array
from growkit.models.architecture import Architecture
from growkit.models.family import Family
from growkit.models.layer_fields import follow_layers

# Of the largest logit.
BOUND = 1e-10
# Of the largest gradient of a row.
GRADIENTS = 1e-8
# Some parameters have no gradient (a bias of keys); rounding alone is no difference.
SMALLEST = 1e-6


@dataclass
class Grown:
    """A model in memory: its configuration as a file states it, and its parameters as files hold
    them.
    """

    config: dict[str, Any]
    state: State


def source_of(variant: Variant) -> Grown:
    return Grown(config_json(variant.config), variant.state)


def read_model(family: Family, source: Grown) -> Architecture:
    """The model of a source, measured; its files checked as growkit checks any."""
    shapes = {name: tuple(tensor.shape) for name, tensor in source.state.items()}
    model = family.read(source.config).measure(shapes)
    model.table.check_covered(shapes, model.sizes, model.fields)
    return model


def grow(source: Grown, plan: Plan) -> Grown:
    """A source grown in memory, by the rules that growth on disk follows."""
    state = {}
    for name, row, position in plan.grown.table.names(plan.grown.sizes):
        array = source.state[row.name_at(find_source(plan, row, position))].numpy()
        grown = grow_array(array, row, plan, 0, position)
        state[name] = torch.from_numpy(np.array(grown, order="C"))
    config = plan.grown.config(source.config)
    if "layer" in plan.maps:
        index = plan.maps["layer"].index.tolist()
        config = follow_layers(config, source.config, plan.model.family, index)
    return Grown(config, state)


def network_of(model: Grown) -> Any:
    """transformers' model of a configuration and parameters."""
    config_class = CONFIG_MAPPING[model.config["model_type"]]
    # As transformers reads a file: infinities are tagged in it.
    config = config_class.from_dict(config_class._decode_special_floats(deepcopy(model.config)))
    return load(set_plain(config), model.state)


def logits_of(model: Grown) -> torch.Tensor:
    return run(network_of(model), TOKENS)


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference of logits, over the largest logit."""
    if ours.shape != theirs.shape:
        return float("inf")
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    return difference if difference == difference else float("inf")


def uneven(size: int) -> AxisMap:
    """Twice the units, with more copies of some than of others, and shares that differ."""
    added = [0] * max(1, size - 1) + ([1] if size > 1 else [])
    index = [*range(size), *added]
    weight = np.random.default_rng(size).uniform(0.5, 1.5, len(index))
    sums = np.bincount(index, weights=weight, minlength=size)
    return make_map(index, size, (weight / sums[index]).tolist())


def even(size: int, times: int = 2) -> AxisMap:
    return tile(size, times * size)


def measure_gap(
    family: Family, variant: Variant, maps: Mapping[str, AxisMap], pads: Mapping[str, int] = {}
) -> float:  # noqa: B006
    """The gap of a growth; infinite where something refuses it."""
    source = source_of(variant)
    model = read_model(family, source)
    plan = build_plan("width", "", model, dict(maps), dict(pads))
    return gap(logits_of(grow(source, plan)), source_logits(variant))


def source_logits(variant: Variant) -> torch.Tensor:
    """The logits of the tiny model itself."""
    logits: torch.Tensor = variant.once("logits", lambda: logits_of(source_of(variant)))
    return logits


def gradient_gap(family: Family, variant: Variant, maps: Mapping[str, AxisMap]) -> float:
    """How far the gradient of a grown model is from the grown gradient, of its row.

    The gradient of a fixed linear function of the logits, by autograd; grown by the rule of mu,
    which is linear in gradients. That proves which axes a row reads and which it writes.
    """
    source = source_of(variant)
    plan = build_plan("width", "", read_model(family, source), dict(maps))
    before, after = gradients_of(source), gradients_of(grow(source, plan))
    worst = 0.0
    for name, row, position in plan.grown.table.names(plan.grown.sizes):
        old = before[row.name_at(find_source(plan, row, position))].numpy()
        expected = torch.from_numpy(np.array(grow_array(old, row, plan, MU, position)))
        largest = max(float(expected.abs().max()), SMALLEST)
        worst = max(worst, float((after[name] - expected).abs().max()) / largest)
    return worst


def gradients_of(model: Grown) -> State:
    """The gradient of a fixed linear function of the logits, named as files are."""
    network = network_of(model)
    random = torch.Generator().manual_seed(1)
    with wide(), torch.enable_grad():
        for parameter in network.parameters():
            parameter.requires_grad_()
        logits = network(TOKENS, use_cache=False).logits
        weights = torch.randn(logits.shape, generator=random, dtype=torch.float64)
        (logits * weights).sum().backward()
    # Buffers that are saved have none.
    gradients = {name: torch.zeros_like(held) for name, held in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad
    return name_as_files(network, gradients)


def depth_gap(family: Family, variant: Variant, index: Sequence[int]) -> tuple[float, float]:
    """Depth by copies against transformers' own layers in that order; and how far it is from the
    source.
    """
    source = source_of(variant)
    model = read_model(family, source)
    plan = build_plan("depth", "", model, {"layer": make_map(index, model.layer)})
    ours = logits_of(grow(source, plan))
    return gap(ours, reordered_logits(source, variant, index)), gap(ours, source_logits(variant))


def reordered_logits(source: Grown, variant: Variant, index: Sequence[int]) -> torch.Tensor:
    """Logits of transformers' own list of layers in another order, each with its kind."""
    network = network_of(source)
    prefix, _, last = variant.names.prefix.rpartition(".")
    holder = network.get_submodule(prefix)
    return run(reorder_layers(network, holder, last, index, find_numbers(variant)), TOKENS)


def reorder_layers(
    network: Any, holder: Any, last: str, index: Sequence[int], numbers: Sequence[str] = ()
) -> Any:
    """A network with its list of layers, `last` of the module `holder`, in another order.

    numbers: fields of its configuration that list numbers of layers.
    """
    layers = getattr(holder, last)
    moved = torch.nn.ModuleList([deepcopy(layers[layer]) for layer in index])
    setattr(holder, last, moved)
    config = network.config.get_text_config()
    for name in numbers:
        listed = getattr(config, name, None)
        if isinstance(listed, list):
            setattr(config, name, [new for new, old in enumerate(index) if old in listed])
    renumber(config, len(layers), index, numbers)
    for number, layer in enumerate(moved):
        for module in layer.modules():
            for name in ("layer_idx", "layer_id", "layer_number", "layer_index"):
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, number)
    for module in network.modules():
        for name in LAYERS:
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, len(index))
    return network


def renumber(config: Any, layers: int, index: Sequence[int], others: Sequence[str] = ()) -> None:
    """Make a configuration's number of layers and its lists by layer those of another order."""
    for name, entries in list(vars(config).items()):
        if isinstance(entries, list) and len(entries) == layers and name not in others:
            with suppress(AttributeError):
                setattr(config, name, [entries[layer] for layer in index])
    for name in LAYERS:
        if getattr(config, name, None) == layers:
            setattr(config, name, len(index))


def identity_map(size: int) -> AxisMap:
    return insert(size, size + 2)
