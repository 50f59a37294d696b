"""How a dense model lies in the table of a mixture: as one expert, or a few that are all chosen.

A mixture's table file states it:

    [upcycling]
    from = ["llama", "mistral"]        the dense model types that it was proved for
    windows = all                      which layers may have a sliding window: all, or list
    window = sliding_window            the field of its size
    switch = use_sliding_window        and the one without which it counts as null
    every = decoder_sparse_step        the field by which every n-th layer alone has experts
    fields = {"output_router_logits": false}    what else a new configuration states
    why = ...                          why no dense model becomes one, where none does

    [upcycled]
    row of the mixture = row of the dense model, or zeros

All other rows are the dense model's, name for name. `zeros` is for routers and for the gates of
shared experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from growkit.errors import UsageError
from growkit.models.architecture import Architecture
from growkit.models.computation import FULL, LAYER_TYPES, SLIDING
from growkit.models.family import Family, bare_condition
from growkit.models.fields import Frozen
from growkit.models.notation import Axis, Position, Row
from growkit.models.rotary import FIELDS as ROTARY_FIELDS
from growkit.models.rotary import write_rotary

ZEROS = "zeros"
# Fields of a dense config.json that a mixture's states anew.
REPLACED = ("model_type", "architectures", "auto_map", LAYER_TYPES)


@dataclass(frozen=True)
class Layout:
    """How the dense mlp is laid out in the mixture.

    experts: as how many experts of 1/experts of its units each. every: each how many-th layer has
    experts. normalised: whether the weights of the chosen experts sum to 1.
    """

    experts: int = 1
    every: int = 1
    normalised: bool = True


@dataclass(frozen=True)
class Origin:
    """Where a parameter of the mixture comes from.

    row: the dense model's, None for zeros. scaled: whether it is the mlp's, and not a parameter
    that both models have. expert: which part of the mlp's units it holds, None for all of them.
    """

    row: Row | None
    scaled: bool = False
    expert: int | None = None


@dataclass(frozen=True)
class Upcycled:
    """A dense model as a mixture all of whose experts are chosen.

    dense: the model as it is. model: the same as a mixture, whose layers without experts are known.
    config: its config.json, every value written out.
    """

    dense: Architecture
    model: Architecture
    config: Mapping[str, Any]

    @cached_property
    def _dense_rows(self) -> dict[str, Row]:
        return {row.name: row for row in self.dense.table.rows}

    def list_origins(self) -> Iterator[tuple[str, Row, Position, Origin]]:
        """Every parameter of the mixture, with where it comes from."""
        stated = self.model.family.upcycled
        for name, row, position in self.model.table.names(self.model.sizes):
            dense = stated.get(row.name, row.name)
            if dense == ZEROS:
                yield name, row, position, Origin(None)
                continue
            scaled = row.name in stated
            expert = position[1] if len(position) > 1 else None
            yield name, row, position, Origin(self._dense_rows[dense], scaled, expert)

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers that have experts."""
        kind = next((row.kind for row in self.model.table.rows if holds_experts(row)), "")
        return self.model.layers[kind] if kind else tuple(range(self.model.layer))


def holds_experts(row: Row) -> bool:
    """Whether a row is of an expert, or a router's."""
    return "expert" in row.axes or any(axis.name == "expert" for axis in row.stacked)


def express_dense(
    dense: Architecture, config: Mapping[str, Any], family: Family, layout: Layout
) -> Upcycled:
    """A dense model as a mixture of a family.

    config: the dense model's config.json. Raises UsageError where the mixture has no place for what
    the dense model has, or asks for more.
    """
    _check_family(dense, family)
    options = {name: dense.options[name] for name in family.options if name in dense.options}
    options |= _choose_options(dense, family)
    table = family.select_rows(options)
    _check_rows(dense, family, table.rows)
    sizes = _find_sizes(dense, family, table.rows, layout)
    stated = {axis: size for axis, size in sizes.items() if axis in family.fields}
    gate = _write_gate(family, layout)
    computed = {name: value for name, value in gate.items() if name in family.computed_fields}
    written = family.model(**stated, **options, **computed).config(_carry(dense, config))
    written |= write_rotary(dense.ropes[""], ROTARY_FIELDS, config)
    written |= gate
    written |= _write_windows(dense, family)
    written |= family.upcycling.get("fields", {})
    written |= _write_every(dense, family, layout)
    if dense.headless:
        written["architectures"] = [family.class_name.replace("ForCausalLM", "Model")]
    model = replace(family.read(written), headless=dense.headless)
    layers = _find_kinds(model, layout)
    model = replace(model, sizes=Frozen(sizes), layers=Frozen({**model.layers, **layers}))
    return Upcycled(dense, model, written)


def list_shared(family: Family) -> tuple[str, ...]:
    """The rows of a shared expert, which every token goes through."""
    return tuple(
        row.name
        for row in family.rows
        if family.upcycled.get(row.name, ZEROS) != ZEROS and not holds_experts(row)
    )


def _check_family(dense: Architecture, family: Family) -> None:
    """Raise UsageError for types of which it is not known that one holds the other."""
    types = family.upcycling.get("from", ())
    if dense.kind not in types:
        known = f"{', '.join(types)} models do" if types else "no dense model does"
        raise UsageError(
            f"a {dense.family.title} model does not become a {family.title} mixture; {known}"
        )


def _choose_options(dense: Architecture, family: Family) -> dict[str, bool]:
    """The options of the mixture that the dense model has none of, as its parameters say."""
    names = {row.name for row in dense.table.rows}
    found = {}
    for option in family.options:
        rows = [
            row.name
            for row in family.rows
            if option in (bare_condition(condition) for condition in row.conditions)
            or option in row.conditions
        ]
        if option not in dense.options and rows:
            found[option] = bool(names.intersection(rows))
    return found


def _check_rows(dense: Architecture, family: Family, rows: tuple[Row, ...]) -> None:
    """Raise UsageError unless each side's parameters have a place on the other."""
    ours = {row.name: row for row in dense.table.rows}
    used = set()
    for row in rows:
        origin = family.upcycled.get(row.name, row.name)
        used.add(origin)
        if origin == ZEROS or (dense.headless and row.role == "head"):
            continue
        same = origin in ours and (row.name in family.upcycled or ours[origin].blocks == row.blocks)
        if not same:
            raise UsageError(
                f"a {family.title} model has {row.name} of the axes {_name_axes(row)}, and a "
                f"{dense.family.title} model has nothing of the kind"
            )
    left = [name for name in ours if name not in used]
    if left:
        raise UsageError(
            f"a {family.title} model has no place for {left[0]} of this {dense.family.title} model"
        )


def _name_axes(row: Row) -> str:
    return " ".join(dict.fromkeys(name for part in row.parts for name in part.names))


def _find_sizes(
    dense: Architecture, family: Family, rows: tuple[Row, ...], layout: Layout
) -> dict[str, int]:
    """The size of every axis of the mixture. Raises UsageError for units that do not divide."""
    sizes = {axis: dense.sizes[axis] for axis in family.fields if axis in dense.sizes}
    sizes |= {"expert": layout.experts}
    ours = {row.name: row for row in dense.table.rows}
    for row in rows:
        origin = family.upcycled.get(row.name, ZEROS)
        if origin == ZEROS:
            # The one output of a gate has no field: the files alone state its size.
            sizes |= {axis: 1 for axis in row.axes if axis not in sizes}
            continue
        place, axis = find_units(row)
        units = ours[origin].shape(dense.sizes)[place]
        sizes[axis.name] = _divide(units, layout.experts) if len(row.stacked) > 1 else units
    return sizes


def find_units(row: Row) -> tuple[int, Axis]:
    """The dimension and the axis of an expert's own units: those beside the stream's."""
    return next(
        (place, terms[0][0])
        for place, terms in enumerate(row.blocks)
        if terms[0][0].name != "embed"
    )


def gives_back(row: Row) -> bool:
    """Whether a row of an mlp is the down-projection, which sums over its units."""
    return find_units(row)[1].read


def _divide(units: int, parts: int) -> int:
    """The units of each part. Raises UsageError where they do not divide."""
    if units % parts:
        near = [n for n in range(1, units + 1) if units % n == 0]
        low = max(n for n in near if n < parts)
        high = min((n for n in near if n > parts), default=units)
        raise UsageError(
            f"--granularity {parts} does not divide the mlp's {units} units; {low} and {high} do"
        )
    return units // parts


def _carry(dense: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """The dense config.json without what the mixture states anew or has none of."""
    options = dense.family.options.values()
    computed = dense.family.computation.fields if dense.family.computation else {}
    dropped = {*REPLACED, *options, *computed, *dense.family.fields.values()}
    return {name: value for name, value in config.items() if name not in dropped}


def _write_gate(family: Family, layout: Layout) -> dict[str, Any]:
    """The fields of the gate, every one of them. Raises UsageError for weights it cannot have."""
    stated = family.experts
    written = dict(family.expert_defaults)
    written[stated["top"]] = layout.experts
    normalised = stated["normalised"]
    if isinstance(normalised, str):
        written[normalised] = layout.normalised
    elif normalised != layout.normalised:
        raise UsageError(
            f"--gate softmax is for types whose configuration can say so; the weights of the "
            f"chosen experts of a {family.title} model always sum to 1"
        )
    if "also" in stated:
        written[stated["also"]] = layout.experts
    return written


def _write_every(dense: Architecture, family: Family, layout: Layout) -> dict[str, int]:
    """The field that says which layers have experts. Raises UsageError where there is none."""
    field = family.upcycling.get("every")
    if not 1 <= layout.every <= dense.layer:
        raise UsageError(
            f"--every {layout.every} gives no layer experts: the source has {dense.layer} layers; "
            f"1 gives them to all, 2 to every second"
        )
    if field is None and layout.every != 1:
        raise UsageError(
            f"--every {layout.every} leaves layers without experts, and a {family.title} model has "
            f"them in every layer; leave it out, or give another type by --to"
        )
    return {} if field is None else {field: layout.every}


def _write_windows(dense: Architecture, family: Family) -> dict[str, Any]:
    """The fields of sliding windows. Raises UsageError for windows that the mixture cannot have."""
    size, layers = _find_windows(dense)
    stated = family.upcycling
    written: dict[str, Any] = {}
    if "switch" in stated:
        written[stated["switch"]] = any(layers)
    kinds = stated.get("windows", "none")
    if kinds == "list":
        written[LAYER_TYPES] = [SLIDING if window else FULL for window in layers]
    elif any(layers) and not (kinds == "all" and all(layers)):
        raise UsageError(
            f"this {dense.family.title} model has a sliding window in {sum(layers)} of "
            f"{len(layers)} layers, and a {family.title} model has it in {kinds}"
        )
    if "window" in stated:
        written[stated["window"]] = size if any(layers) else None
    return written


def _find_windows(dense: Architecture) -> tuple[int | None, list[bool]]:
    """The size of the window, and which layers have it."""
    computation = dense.family.computation
    windows = computation.windows if computation else ""
    number = dense.number("window") if windows else None
    if number is None:
        return None, [False] * dense.layer
    if windows == "list":
        return int(number), [kind == SLIDING for kind in dense.kinds]
    return int(number), [True] * dense.layer


def _find_kinds(model: Architecture, layout: Layout) -> dict[str, tuple[int, ...]]:
    """The layers of each kind, where some have experts and others a dense mlp."""
    family = model.family
    kinds = {row.kind for row in family.rows if row.kind}
    sparse = {row.kind for row in family.rows if row.kind and holds_experts(row)}
    has = [(layer + 1) % layout.every == 0 for layer in range(model.layer)]
    return {
        kind: tuple(layer for layer, held in enumerate(has) if held == (kind in sparse))
        for kind in kinds
    }
