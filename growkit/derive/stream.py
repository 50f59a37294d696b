"""What only a computation tells: which rows write the stream, which norm is last, what norms
average over.

A row writes the stream if what its layer adds is affine in it while the layer's other half is
silent, and if the layer is silent without all such rows. Everything is tried on a tiny model in
float64.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from growkit.derive.network import State, load, run, wide
from growkit.derive.rows import ATTENTION, Draft

TOKENS = torch.tensor(
    [[3, 17, 9, 4, 30, 22, 11, 3, 8, 39, 5, 26], [7, 7, 12, 36, 19, 4, 28, 13, 33, 21, 6, 10]]
)
SMALL = 1e-11


@dataclass
class Layer:
    """One layer of a network: its module, and how its parameters' names begin."""

    index: int
    prefix: str

    def module(self, network: Any) -> nn.Module:
        return network.get_submodule(self.prefix)


class Bench:
    """One tiny model whose parameters are changed again and again, without loading it each time.

    Where files hold a parameter in another form than memory does (stacked experts), it is loaded
    anew.
    """

    def __init__(self, config: Any, state: State, memory: Mapping[str, str]):
        self.config, self.state, self.memory = config, state, memory
        self.network = load(config, state)
        self.held = dict(self.network.named_parameters()) | dict(self.network.named_buffers())

    def direct(self, name: str) -> bool:
        """Whether memory holds the parameter as files do."""
        held = self.held.get(self.memory.get(name, ""))
        return held is not None and torch.equal(held, self.state[name])

    def run(self, changed: State, watch: Callable[[Any], None]) -> None:
        """Compute with a changed state; `watch` hooks what it wants to see."""
        names = [name for name in changed if changed[name] is not self.state[name]]
        if not all(self.direct(name) for name in names):
            network = load(self.config, changed)
            watch(network)
            run(network, TOKENS)
            return
        handles: list[Any] = []
        watch(_Hooked(self.network, handles))
        with wide():
            for name in names:
                self.held[self.memory[name]].copy_(changed[name])
        run(self.network, TOKENS)
        with wide():
            for name in names:
                self.held[self.memory[name]].copy_(self.state[name])
        for handle in handles:
            handle.remove()


class _Hooked:
    """A network that remembers the hooks that are set on it, so that they can be taken away."""

    def __init__(self, network: Any, handles: list[Any]):
        self.network, self.handles = network, handles

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)


def scaled(
    state: State, names: Iterable[str], factor: float, offsets: Mapping[str, float]
) -> State:
    """A state with some parameters scaled; those with an offset in their effective value."""
    changed = dict(state)
    for name in names:
        offset = offsets.get(name, 0.0)
        changed[name] = (state[name] + offset) * factor - offset
    return changed


def added_by(bench: Bench, state: State, layer: Layer) -> torch.Tensor:
    """What a layer adds to the stream: its output less its input."""
    seen: dict[str, torch.Tensor] = {}

    def before(module: Any, args: Any, kwargs: Any) -> None:
        seen["in"] = first_tensor((*args, *kwargs.values())).clone()

    def after(module: Any, args: Any, output: Any) -> None:
        seen["out"] = first_tensor(
            output if isinstance(output, (tuple, list)) else (output,)
        ).clone()

    def watch(network: Any) -> None:
        module = layer.module(network)
        handles = getattr(network, "handles", [])
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))

    bench.run(state, watch)
    return seen["out"] - seen["in"]


def first_tensor(values: Iterable[Any]) -> torch.Tensor:
    return next(
        v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim() > 1
    )


def is_affine(at: Callable[[float], torch.Tensor]) -> bool:
    """Whether a quantity is affine in a factor, and depends on it."""
    zero, one, two = at(0.0), at(1.0), at(2.0)
    step = one - zero
    if not step.abs().max() > SMALL:
        return False
    return bool((two - one - step).abs().max() <= 1e-9 * step.abs().max())


def find_writers(bench: Bench, state: State, layer: Layer, drafts: Mapping[str, Draft]) -> set[str]:
    """The rows of one layer that write the stream; empty where the layer cannot be silenced.

    drafts: of the layer's parameters, by name in files.
    """
    offsets = {name: float(draft.offset) for name, draft in drafts.items()}
    rows: dict[str, list[str]] = {}
    for name, draft in drafts.items():
        rows.setdefault(draft.name, []).append(name)
    norms = {
        name for name in drafts if drafts[name].role == "norm" or "norm" in name.rsplit(".", 2)[-2]
    }
    found: set[str] = set()
    for half in split_halves(layer, drafts):
        others = [name for name in drafts if name not in half | norms]
        quiet = scaled(state, others, 0.0, offsets)
        for row, names in rows.items():
            if not drafts[names[0]].may_write or not set(names) <= half | norms:
                continue

            def add(t: float, names: Any = names, quiet: State = quiet) -> torch.Tensor:
                return added_by(bench, scaled(quiet, names, t, offsets), layer)

            if is_affine(add):
                found.add(row)
    found = last_of_square(found, {draft.name: draft for draft in drafts.values()})
    quiet = scaled(state, [n for row in found for n in rows[row]], 0.0, offsets)
    silent = added_by(bench, quiet, layer)
    return found if silent.abs().max() <= SMALL else set()


def split_halves(layer: Layer, drafts: Mapping[str, Draft]) -> list[set[str]]:
    """The parameters of the mixer of positions, and those of the mlp."""
    inner = {name: name.removeprefix(f"{layer.prefix}.").split(".")[0] for name in drafts}
    mixer = {
        name
        for name, child in inner.items()
        if ATTENTION.search(child.lower()) and "norm" not in child
    }
    rest = {name for name, child in inner.items() if name not in mixer and "norm" not in child}
    return [half for half in (mixer, rest) if half]


def last_of_square(found: set[str], drafts: Mapping[str, Draft]) -> set[str]:
    """Of several square matrices in one block the last alone writes the stream; the others are
    within it.
    """
    order = list(drafts)
    squares: dict[str, list[str]] = {}
    for name in found:
        draft = drafts[name]
        if draft.square:
            squares.setdefault(name.rsplit(".", 2)[0], []).append(name)
    dropped: set[str] = set()
    for names in squares.values():
        outputs = [
            n
            for n in names
            if re.search(r"(^|[._])(o|out|dense|c_proj|output|wo)", n.rsplit(".", 2)[1])
        ]
        kept = outputs or sorted(names, key=order.index)[-1:]
        dropped |= set(names) - set(kept)
    gone = {n.removesuffix("weight") + "bias" for n in dropped}
    return found - dropped - gone


def head_input(bench: Bench, state: State) -> torch.Tensor:
    """What the output head reads."""
    seen: list[torch.Tensor] = []

    def watch(network: Any) -> None:
        head = network.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        getattr(network, "handles", []).append(handle)

    bench.run(state, watch)
    return seen[0]


def find_final(bench: Bench, state: State, drafts: Mapping[str, Draft]) -> set[str]:
    """The parameters that the head's input is linear in together: those of the last norm."""
    offsets = {name: float(draft.offset) for name, draft in drafts.items()}
    candidates = {
        name
        for name, draft in drafts.items()
        if "{" not in draft.name and len(draft.shape) == 1 and draft.may_write
    }

    def enter(name: str, t: float) -> torch.Tensor:
        return head_input(bench, scaled(state, [name], t, offsets))

    found = {name for name in candidates if is_affine(partial(enter, name))}
    whole = head_input(bench, state)
    half = head_input(bench, scaled(state, found, 0.5, offsets))
    return found if found and (whole / 2 - half).abs().max() <= SMALL * whole.abs().max() else set()


def describe_norms(config: Any, state: State, drafts: Mapping[str, Draft]) -> None:
    """Fill in what norms add to their weights and how many entries they average over.

    Without an offset a weight of -1 gives something; one entry of the input moves all that it is
    averaged with.
    """
    network = load(config, state)
    norms = {}
    for name, draft in drafts.items():
        module = _find_module(network, draft.memory.rpartition(".")[0])
        if draft.role == "norm" and module is not None:
            norms[name] = module
    calls: dict[str, Any] = {}
    for name, module in norms.items():
        module.register_forward_pre_hook(
            lambda module, args, kwargs, n=name: calls.setdefault(n, (args, kwargs)),
            with_kwargs=True,
        )
    run(network, TOKENS)
    for name, module in norms.items():
        weight = getattr(module, drafts[name].memory.rpartition(".")[2], None)
        if name in calls and calls[name][0] and isinstance(weight, torch.Tensor):
            with wide():
                _describe_norm(module, weight, calls[name], drafts[name])


def _find_module(network: Any, path: str) -> nn.Module | None:
    try:
        return network.get_submodule(path)
    except AttributeError:
        return None


def _describe_norm(module: nn.Module, weight: torch.Tensor, call: Any, draft: Draft) -> None:
    (x, *rest), kwargs = call
    bias = getattr(module, "bias", None)
    kept = [(each, each.clone()) for each in (weight, bias) if isinstance(each, torch.Tensor)]
    if isinstance(bias, torch.Tensor):
        bias.zero_()
    weight.fill_(-1.0)
    silent = module(x, *rest, **kwargs)
    if isinstance(silent, torch.Tensor):
        draft.offset = bool(silent.abs().max() <= SMALL)
    for each, value in kept:
        each.copy_(value)
    if not isinstance(silent, torch.Tensor):
        return
    moved = x.clone()
    moved[(0,) * moved.dim()] += 1.0
    difference = (module(moved, *rest, **kwargs) - module(x, *rest, **kwargs)).abs() > SMALL
    draft.averages = int(difference.sum())
