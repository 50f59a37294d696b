"""One configuration of a type, as far as it can be read: its sizes, its rows, and a random model of
it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from growkit.derive import stream
from growkit.derive.network import (
    State,
    UnprovableError,
    build,
    file_state,
    load,
    make_config,
    wide,
)
from growkit.derive.rows import ATTENTION, Draft, Names, cut, draft_rows, find_names, link
from growkit.derive.sizes import (
    HIDDEN,
    LAYERS,
    Probe,
    Size,
    find_sizes,
    make_probe,
    shapes_of,
    size_of,
)

Choice = dict[tuple[str, int], int]


@dataclass
class Variant:
    """A tiny model of a type with some options set, and all that was found out about it."""

    kind: str
    probe: Probe
    sizes: dict[str, Size]
    names: Names
    drafts: list[Draft]
    config: Any
    state: State
    layer_field: str
    problems: list[str] = field(default_factory=list)
    leading: tuple[str, ...] = ()
    known: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, compute: Any) -> Any:
        """What `compute` gives, computed once."""
        if name not in self.known:
            self.known[name] = compute()
        return self.known[name]

    @property
    def coupled(self) -> bool:
        """Whether embed is heads x head_dim."""
        return "head_dim" in self.sizes and " / " in self.sizes["head_dim"].path

    @property
    def hidden(self) -> str | None:
        return self.probe.name(HIDDEN)

    @property
    def tied(self) -> bool:
        return bool(getattr(self.config, "tie_word_embeddings", False))

    def draft_of(self) -> dict[str, Draft]:
        """The row of each parameter, by its name in files."""
        rows = {draft.name: draft for draft in self.drafts}
        return {name: rows[self.names.template(name)[0]] for name in self.state}


def read_variant(kind: str, fields: Mapping[str, Any], like: Variant | None = None) -> Variant:
    """Everything about one configuration.

    like: the same type with other options, of whose rows the role in the stream is known. Raises
    UnprovableError where its layers are not one list.
    """
    probe = make_probe(kind, fields)
    probe.unsaved = find_unsaved(kind, probe)
    probe.known.clear()
    probe.__dict__.pop("base", None)
    sizes = {size.axis: size for size in find_sizes(probe)}
    layer_field, longer = lengthen(probe)
    names = find_names(probe, sizes, (layer_field, longer))
    config = make_config(kind, probe.fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(config)
    state = fill({n: t for n, t in file_state(network).items() if n not in probe.unsaved})
    drafts = draft_rows(probe, sizes, names, network)
    leading = find_leading(probe, drafts, names)
    variant = Variant(
        kind, probe, sizes, names, drafts, config, state, layer_field, leading=leading
    )
    for draft in drafts:
        cut_draft(draft, variant)
    _compute(variant, like)
    return variant


def find_unsaved(kind: str, probe: Probe) -> frozenset[str]:
    """Names that a new model has and a loaded one does not save, because they are tied."""
    config = make_config(kind, probe.fields)
    state = file_state(build(config))
    saved = file_state(load(config, state))
    return frozenset(probe.base.keys() - saved.keys())


def lengthen(probe: Probe) -> tuple[str, dict[str, Any]]:
    """The field of the number of layers, and what a model with one layer more has for it and its
    lists.
    """
    for name in LAYERS:
        count = probe.stated.get(name)
        if not isinstance(count, int):
            continue
        changed = longer_lists(probe, count) | {name: count + 1}
        shapes = shapes_of(probe.kind, probe.fields | changed)
        if shapes is not None and len(shapes) > len(probe.base):
            return name, changed
    raise UnprovableError("no field counts its layers")


def find_leading(probe: Probe, drafts: list[Draft], names: Names) -> tuple[str, ...]:
    """Fields that count the layers of one kind, which lie in front: one more makes one more of that
    kind.
    """
    fronts = {
        len(d.layers) for d in drafts if d.kind and d.layers == frozenset(range(len(d.layers)))
    }
    found = []
    for name, value in probe.stated.items():
        if isinstance(value, bool) or not isinstance(value, int) or value not in fronts:
            continue
        if value + 1 >= names.layers or isinstance(probe.stated.get("mlp_layer_types"), list):
            continue
        shapes = shapes_of(probe.kind, probe.fields | {name: value + 1})
        if shapes is not None and shapes.keys() != probe.base.keys() and len(shapes) > 1:
            before = {names.template(n)[0] for n in probe.base}
            if {names.template(n)[0] for n in shapes} == before:
                found.append(name)
    return tuple(found)


def longer_lists(probe: Probe, count: int) -> dict[str, Any]:
    """Lists with one entry a layer, the last one repeated."""
    changed = {
        name: [*entries, entries[-1]]
        for name, entries in probe.fields.items()
        if isinstance(entries, list) and len(entries) == count
    }
    if "attention_types" in probe.fields:
        kinds, times = probe.fields["attention_types"][0]
        changed["attention_types"] = [[kinds, times], [[kinds[0]], 1]]
    return changed


def fill(state: State, seed: int = 0) -> State:
    """A state with random numbers, so large that each parameter matters."""
    random = torch.Generator().manual_seed(seed)
    filled = {}
    with wide():
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                filled[name] = tensor.clone()
                continue
            noise = torch.randn(tensor.shape, generator=random, dtype=torch.float64)
            if tensor.dim() > 1:
                filled[name] = noise * min(1.0, 1.3 * tensor.shape[-1] ** -0.5)
            else:
                filled[name] = tensor.double() + 0.3 * noise
    return filled


def cut_draft(draft: Draft, variant: Variant) -> None:
    """Cut the dimensions of a row, knowing whether it lies in a layer's mixer and writes the
    stream.
    """
    products: set[tuple[str, ...]] = set()
    if variant.coupled:
        products = {tuple(a for a in ("head", "kv", "group", "head_dim") if a in variant.sizes)}
    inner = draft.name.partition("{layer}.")[2]
    mixer = (
        bool(ATTENTION.search(inner.split(".")[0].lower())) and "norm" not in inner.split(".")[0]
    )
    cut(draft, products, not mixer or draft.stream or draft.role == "embedding", mixer)


def _compute(variant: Variant, like: Variant | None) -> None:
    """What computations tell of the rows."""
    config, state, rows = variant.config, variant.state, variant.draft_of()
    stream.describe_norms(config, state, representatives(variant))
    if like is not None:
        _take_over(variant, like)
        return
    bench = stream.Bench(config, state, {name: rows[name].memory_of(name) for name in rows})
    for layer, drafts in layers_to_try(variant):
        writers = stream.find_writers(bench, state, layer, drafts)
        if not writers:
            variant.problems.append(f"nothing silences layer {layer.index}")
        for draft in drafts.values():
            draft.stream |= draft.name in writers
    for draft in variant.drafts:
        cut_draft(draft, variant)
    for name in stream.find_final(bench, state, rows):
        rows[name].final = True


def _take_over(variant: Variant, like: Variant) -> None:
    """Give rows the marks of the same rows of another variant; a new bias is as its weight. Proofs
    tell.
    """
    known = {link(draft): draft for draft in like.drafts}
    known |= {draft.name: draft for draft in like.drafts}
    for draft in variant.drafts:
        other = known.get(draft.name) or known.get(link(draft))
        if other is not None:
            draft.stream, draft.final = other.stream, other.final
        cut_draft(draft, variant)


def representatives(variant: Variant) -> dict[str, Draft]:
    """One parameter of each row, by its name."""
    return {draft.example: draft for draft in variant.drafts}


def layers_to_try(variant: Variant) -> list[tuple[stream.Layer, dict[str, Draft]]]:
    """As few layers as hold a parameter of every row."""
    rows = variant.draft_of()
    covered: set[str] = set()
    found = []
    for index in range(variant.names.layers):
        prefix = f"{variant.names.prefix}.{index}"
        drafts = {name: draft for name, draft in rows.items() if name.startswith(f"{prefix}.")}
        new = {draft.name for draft in drafts.values()} - covered
        if new:
            covered |= new
            found.append((stream.Layer(index, prefix), drafts))
    return found


def config_json(config: Any) -> dict[str, Any]:
    """A configuration as its file states it."""
    stated: dict[str, Any] = json.loads(config.to_json_string())
    return stated


def axis_size(variant: Variant, axis: str) -> int:
    """The size of an axis of the tiny model."""
    if axis == "embed" and variant.coupled:
        return variant.probe.value(str(variant.hidden))
    if axis == "layer":
        return variant.names.layers
    return size_of(axis, variant.probe, variant.sizes)
