"""Parameter groups for the optimizer of a grown model, and which of its parameters are trained."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from growkit.checkpoint.location import open_source
from growkit.checkpoint.naming import find_name
from growkit.checkpoint.optimizer import NAMES, Scalar
from growkit.checkpoint.tensor import Source
from growkit.errors import GrowkitError, UsageError
from growkit.growth.new import find_new_layers
from growkit.lineage import Lineage
from growkit.models.fused import list_parameters
from growkit.models.notation import Row
from growkit.surgery.groups import CLIP, RATE, make_groups

# What wrappers put before the names of a model's parameters.
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
# torch adds this to a norm before it divides by it.
TINY = 1e-6


def param_groups(
    model: torch.nn.Module,
    directory: str | os.PathLike[str],
    lr: float | None = None,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
) -> list[dict[str, Any]]:
    """The parameter groups with which an optimizer of PyTorch trains a grown model.

    directory: the model on disk. If it holds an optimizer.pt, the groups are that file's: same
    parameters, order, learning rates, eps and decay, so that the file loads into the optimizer
    (`trainer.train(resume_from_checkpoint=directory)`). lr then replaces the rates, each times its
    group's factor; weight_decay and eps are the file's. If it holds none, groups are made of the
    factors of its growths, for AdamW with these lr, weight_decay and eps; norms and biases do not
    decay.

    Frozen parameters are left out. Raises GrowkitError if the model is not the directory's,
    UsageError if lr is missing.
    """
    source = open_source(os.fspath(directory))
    source.require_readable()
    named = _name_parameters(model, source)
    if source.torch_optimizer is not None and source.torch_optimizer.universal is None:
        return list(_follow_file(named, source, lr))
    if lr is None:
        raise UsageError(f"{directory} holds no optimizer.pt with learning rates: give lr")
    options = {"lr": lr, "weight_decay": weight_decay, "eps": eps}
    return list(_follow_lineage(named, source, options))


def freeze_old(model: torch.nn.Module, directory: str | os.PathLike[str]) -> list[str]:
    """Train only the layers that the last growth added, as LLaMA-Pro does (arXiv 2401.02415).

    Sets requires_grad of every parameter. Returns the names of those that are trained. Raises
    UsageError if the last thing that was done to the model at `directory` added no layers.
    """
    source = open_source(os.fspath(directory))
    growth = Lineage.read(source.lineage).last_growth(source.path)
    new = find_new_layers([growth.plan_within(source.model)])
    if not new:
        raise UsageError(
            f"the last growth of {directory} added no layers, so there is nothing new to train "
            "alone"
        )
    named = _name_parameters(model, source)
    rows = list_parameters(source.model)
    trained = []
    for own, parameter in model.named_parameters():
        name = _table_name(own, source)
        is_new = name in named and _is_in(name, rows[name], new)
        parameter.requires_grad_(is_new)
        if is_new:
            trained.append(own)
    return trained


def clip_grad_norm_(optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
    """Scale all gradients so that their norm is max_norm at most; returns the norm before.

    Squared gradients are summed with the weights that split groups state, so that the norm is the
    one that the small model would have; torch.nn.utils.clip_grad_norm_ counts every copy, and the
    ratio of the two drifts. Groups without weights count once.
    """
    squares = []
    gradients = []
    for group in optimizer.param_groups:
        weight = float(group.get(CLIP, 1.0))
        for parameter in group["params"]:
            if parameter.grad is not None:
                gradients.append(parameter.grad)
                squares.append(weight * _square(parameter.grad))
    if not squares:
        return torch.tensor(0.0)
    norm = torch.stack([each.to(squares[0].device) for each in squares]).sum().sqrt()
    factor = torch.clamp(max_norm / (norm + TINY), max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device, gradient.dtype))
    return norm


def _square(gradient: torch.Tensor) -> torch.Tensor:
    """The sum of squares, in float32 or wider."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.detach().to(wide).square().sum()


def _table_name(name: str, source: Source) -> str:
    """The name in files of a module's parameter, without what wrappers add."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return find_name(name, source.model)


def _name_parameters(
    model: torch.nn.Module, source: Source
) -> dict[str, tuple[str, torch.nn.Parameter]]:
    """Name in files -> (name in the model, parameter). Raises GrowkitError for another model."""
    named = {_table_name(own, source): (own, each) for own, each in model.named_parameters()}
    wanted = list_parameters(source.model)
    for name, row in wanted.items():
        if name not in named:
            raise GrowkitError(f"the model has no parameter {name!r}, and {source.path} has")
        shape = tuple(named[name][1].shape)
        stored = row.shape(source.model.sizes)
        if shape != stored:
            raise GrowkitError(
                f"{name!r} has the shape {list(shape)} in the model and {list(stored)} in "
                f"{source.path}: load the model from there"
            )
    extra = sorted(named.keys() - wanted.keys())
    if extra:
        raise GrowkitError(f"{source.path} has no parameter {extra[0]!r}, and the model has")
    return named


def _is_in(name: str, row: Row, layers: frozenset[int]) -> bool:
    """Whether a parameter is one of these layers'."""
    position = row.match(name) or ()
    return bool(row.stacked) and row.stacked[0].name == "layer" and position[0] in layers


def _follow_file(
    named: Mapping[str, tuple[str, torch.nn.Parameter]], source: Source, lr: float | None
) -> Iterator[dict[str, Any]]:
    """The groups of an optimizer.pt, with the model's parameters."""
    assert source.torch_optimizer is not None
    for group in source.torch_optimizer.groups:
        options = {
            key: torch.tensor(value.value) if isinstance(value, Scalar) else value
            for key, value in group.options.items()
        }
        trained = [named[name] for name in group.names if named[name][1].requires_grad]
        if not trained:
            continue
        if NAMES in options:
            options[NAMES] = [own for own, _ in trained]
        if lr is not None:
            options |= {"lr": lr * options.get(RATE, 1.0)}
            options.pop("initial_lr", None)
        yield {"params": [parameter for _, parameter in trained], **options}


def _follow_lineage(
    named: Mapping[str, tuple[str, torch.nn.Parameter]], source: Source, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Groups by decay and by the factors of the growths that no training has followed."""
    growths = Lineage.read(source.lineage).growths_owed()
    plans = [growth.plan_within(source.model) for growth in growths]
    rows = list_parameters(source.model)
    trained = [(name, rows[name]) for name in named if named[name][1].requires_grad]
    for group in make_groups(source.model, trained, plans, options):
        stated = dict(group.options)
        if NAMES in stated:
            stated[NAMES] = [named[name][0] for name in group.names]
        if group.names:
            yield {"params": [named[name][1] for name in group.names], **stated}
