"""A dense model on disk read as a mixture of one expert, or a few that are all chosen.

Every tensor of the mixture is a view of a dense one: the same, some of the mlp's units, or zeros.
What grows from here on is a mixture, and `growkit.surgery.grow` needs to know nothing else.

Moments of experts have no exact rule: a token that goes through some of them alone gives them other
gradients. So mu begins at zero, and nu follows the noise of the gradients. Of the part p that the
experts have of what the mlp gives, a copy that is chosen with k of E has p/k, for k/E of the
tokens: nu is p^2 / (k E) of the dense one, and for a down-projection that was multiplied by s
another 1/s^2. A router begins with the mean of the mlp's nu: with none under a large count its
first steps would be several times the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from growkit.checkpoint.optimizer import Optimizer
from growkit.checkpoint.tensor import BLOCK, Source, Tensor
from growkit.errors import UsageError
from growkit.growth.choice import Choice
from growkit.growth.plan import Plan
from growkit.growth.precision import wide_dtype
from growkit.growth.upcycling import Upcycling
from growkit.models.architecture import Architecture
from growkit.models.definition import list_defined
from growkit.models.fused import find_fused
from growkit.models.notation import Row
from growkit.models.upcycling import Origin, Upcycled, find_units, gives_back, holds_experts

# What is read of a model's files alone, and so can become another type's.
KINDS = ("huggingface", "hf_trainer", "checkpoint")
# The weight of a shared expert whose gate is zero, and its part of what the mlp gives.
GATED, SHARED_PART = 1 / 2, 1 / 3


def read_upcycled(source: Source, plan: Plan) -> Source:
    """The source as a plan's model: itself, or the mixture that a dense one is read as.

    Raises UsageError for a source of a kind that cannot become another type's.
    """
    if plan.upcycling is None:
        return source
    _require_kind(source)
    upcycled = plan.upcycling.express(source.model, source.config)
    view = _View(source, plan, plan.upcycling, upcycled)
    tensors = {slot: view.list_tensors(slot) for slot in source.tensors}
    return replace(
        source,
        config=dict(upcycled.config),
        tensors=tensors,
        known_model=upcycled.model,
        torch_optimizer=view.make_optimizer(),
        hashed=None,
    )


def express_source(source: Source, choice: Choice | None) -> Architecture:
    """The source's model as a plan with this choice of experts takes it.

    Raises UsageError for a model of another type than the plan is for.
    """
    if choice is None or choice.upcycling is None:
        return source.model
    return choice.upcycling.express(source.model, source.config).model


def _require_kind(source: Source) -> None:
    if source.kind in KINDS and source.around is None:
        return
    what = (
        "a text decoder within a larger model" if source.around else f"a {source.kind} checkpoint"
    )
    raise UsageError(
        f"--from-dense takes a model directory, a checkpoint of transformers' Trainer or one of "
        f"growkit's trainer, and {source.path} is {what}"
    )


@dataclass(frozen=True)
class _View:
    """The tensors of a dense model as a mixture's."""

    source: Source
    plan: Plan
    upcycling: Upcycling
    upcycled: Upcycled

    def list_tensors(self, slot: str) -> dict[str, Tensor]:
        """The tensors of a slot by the mixture's names."""
        dense = self.source.tensors[slot]
        found = {}
        for name, row, position, origin in self.upcycled.list_origins():
            if origin.row is None:
                found[name] = self._make_gate(slot, row, position[0])
                continue
            tensor = dense[origin.row.name_at(position[:1])]
            found[name] = self._cut(tensor, slot, row, origin) if origin.scaled else tensor
        return found

    def make_optimizer(self) -> Optimizer | None:
        """The optimizer of PyTorch, its groups and steps by the mixture's parameters.

        Each is in the group of the one that it comes from, a router in that of the mlp.
        """
        optimizer = self.source.torch_optimizer
        if optimizer is None:
            return None
        defined = [name for name, _ in list_defined(self.upcycled.model)]
        origins = self._name_origins()
        groups = tuple(
            replace(group, names=tuple(name for name in defined if origins[name] in members))
            for group, members in ((group, set(group.names)) for group in optimizer.groups)
        )
        steps = optimizer.steps
        return replace(
            optimizer,
            groups=groups,
            steps={name: steps[origins[name]] for name in defined if origins[name] in steps},
        )

    def _name_origins(self) -> dict[str, str]:
        """Each parameter of the mixture, as memory has it -> the dense one that it follows."""
        model = self.upcycled.model
        found = {}
        for name, _, position, origin in self.upcycled.list_origins():
            row = origin.row
            found[name] = row.name_at(position[:1]) if row else self._find_reader(position[0])
        for fused in find_fused(model).values():
            for position in fused.row.positions(model.sizes):
                first = next(fused.list_names(position, 1))
                if first in found:
                    found[fused.row.name_at(position)] = found[first]
        return found

    def _cut(self, tensor: Tensor, slot: str, row: Row, origin: Origin) -> Tensor:
        """The units of the mlp that a row has, times what the slot asks for."""
        if origin.expert is not None:
            place, _ = find_units(row)
            size = row.shape(self.upcycled.model.sizes)[place]
            tensor = cut_units(tensor, place, origin.expert * size, size)
        return multiply_tensor(tensor, self._find_factor(slot, row))

    def _find_factor(self, slot: str, row: Row) -> float:
        """What a slot's numbers of an mlp's row are multiplied by."""
        routed, upcycling = holds_experts(row), self.upcycling
        scale = 1.0
        if gives_back(row):
            scale = upcycling.scale if routed else self._scale_of_shared
        if slot == "params":
            return scale
        if self.plan.moments == "copy":
            return 1.0
        if slot == "mu":
            return 0.0
        if not routed:
            return GATED**2 if gives_back(row) else SHARED_PART**2
        # The rule of growth divides by copies^2: the share of each in the gradient, squared. That
        # holds where all are chosen.
        noise = upcycling.part**2 * upcycling.copies / upcycling.chosen
        return noise / scale**2 if gives_back(row) else noise

    @property
    def _scale_of_shared(self) -> float:
        """What the shared expert's down-projection is multiplied by: 0 to add nothing yet."""
        return SHARED_PART / GATED if self.upcycling.shared else 0.0

    def _make_gate(self, slot: str, row: Row, layer: int) -> Tensor:
        """A router, or the gate of a shared expert, before growth: zeros, nu a mean."""
        shape = row.shape(self.upcycled.model.sizes)
        routed = holds_experts(row)
        name = self._find_reader(layer)
        dtype = self.source.tensors[slot][name].dtype
        if slot in ("params", "mu"):
            return fill_tensor(shape, dtype, lambda: 0.0)
        factor = self.upcycling.copies**2 if routed and self.plan.moments != "copy" else 1.0
        tensor = self.source.tensors[slot][name]
        return fill_tensor(shape, dtype, cache(lambda: factor * find_mean(tensor)))

    def _find_reader(self, layer: int) -> str:
        """The dense mlp's first parameter that reads the stream, as a router does."""
        rows = self.upcycled.model.table.rows
        stated = self.upcycled.model.family.upcycled
        names = [stated[row.name] for row in rows if row.name in stated and len(row.stacked) > 1]
        dense = self.upcycled.dense.table.rows
        row = next(row for row in dense if row.name in names and not gives_back(row))
        return row.name_at((layer,))


def cut_units(tensor: Tensor, place: int, first: int, count: int) -> Tensor:
    """`count` entries of a tensor from `first` on, along dimension `place`, not read yet."""
    shape = (*tensor.shape[:place], count, *tensor.shape[place + 1 :])
    if shape == tensor.shape:
        return tensor
    if place:
        along = (slice(None),) * place + (slice(first, first + count),)
        return Tensor(shape, tensor.dtype, lambda start, stop: tensor.rows(start, stop)[along])
    row = math.prod(shape[1:]) * tensor.dtype.itemsize
    span = tensor.span.part(first * row, count * row) if tensor.span else None
    return Tensor(
        shape, tensor.dtype, lambda start, stop: tensor.rows(first + start, first + stop), span
    )


def multiply_tensor(tensor: Tensor, factor: float) -> Tensor:
    """A tensor times a number, rounded once, not read yet."""
    if factor == 1.0:
        return tensor
    if factor == 0.0:
        return fill_tensor(tensor.shape, tensor.dtype, lambda: 0.0)

    def rows(start: int, stop: int) -> np.ndarray:
        array = tensor.rows(start, stop)
        wide = wide_dtype(array.dtype)
        product: np.ndarray = array.astype(wide) * np.asarray(factor, wide)
        return product.astype(array.dtype)

    return Tensor(tensor.shape, tensor.dtype, rows, stride=tensor.stride)


def fill_tensor(shape: tuple[int, ...], dtype: np.dtype, number: Callable[[], float]) -> Tensor:
    """A tensor of one number, which is found when it is read."""

    def rows(start: int, stop: int) -> np.ndarray:
        return np.full((stop - start, *shape[1:]), number(), dtype)

    return Tensor(shape, dtype, rows)


def find_mean(tensor: Tensor) -> float:
    """The mean of a tensor's numbers, in float64, a block in memory."""
    total = 0.0
    for start, stop in tensor.split_rows(BLOCK):
        total += float(tensor.rows(start, stop).astype(np.float64).sum())
    return total / max(1, math.prod(tensor.shape))
