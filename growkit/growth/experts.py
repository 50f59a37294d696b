"""More experts of a mixture: every expert copied as often, in tiles, with its row of the router.

Copies of an expert have equal scores, so a gate that chooses m times as many of m times as many
experts chooses all copies of what it chose. Where scores are divided by a sum over all or over the
chosen, each copy has 1/m of the weight, and the function is the source's. Where they are not (a
sigmoid that is not normalised), the factor on the experts' sum is divided by m.

Experts and router rows write the axis `expert`: values stay, gradients are 1/m of the source's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from growkit.errors import UsageError, require_type
from growkit.growth.axes import tile
from growkit.growth.choice import Choice
from growkit.growth.plan import MODEL_HINT, Plan, build_plan
from growkit.models.architecture import Architecture
from growkit.models.gates import FIELDS, Gate, read_gate

MOST = 1 << 16

_PAIR = re.compile(r"\s*([0-9]{1,6})\s*:\s*([0-9]{1,6})\s*")


def parse_pair(what: str, text: str, current: int) -> int:
    """The second number of '8:16', whose first must be the source's. Raises UsageError."""
    found = _PAIR.fullmatch(text)
    if found is None:
        raise UsageError(
            f"{what} is written FROM:TO, as {current}:{2 * current}; got {text[:40]!r}"
        )
    before, after = int(found[1]), int(found[2])
    if before != current:
        raise UsageError(f"{what} {text} begins with {before}, and the source has {current}")
    return after


def plan_experts(
    model: Architecture,
    config: Mapping[str, Any],
    count: str,
    top: str | None = None,
    exact: bool = False,
) -> Plan:
    """The plan that copies every expert of a mixture as often.

    config: the model's config.json, which says how its gate chooses. count: '8:16'. top: '2:4',
    experts a token; None for as many times more as there are experts. exact: refuse another
    function. Raises UsageError.
    """
    require_type("model", model, Architecture, MODEL_HINT)
    gate = read_gate(model.family, config)
    old = model.sizes["expert"]
    size = parse_pair("the number of experts", count, old)
    _check_count(old, size)
    times = size // old
    chosen = gate.top * times if top is None else parse_pair("--top", top, gate.top)
    if not 0 < chosen <= size:
        raise UsageError(
            f"--top asks for {chosen} experts a token, and there are {size}; between 1 and {size} "
            f"work, {gate.top * times} keeps the function"
        )
    choice = _choose(model, config, gate, times, chosen)
    if exact and not choice.exact:
        raise UsageError(_describe_refusal(gate, times, chosen))
    words = f"expert {old} -> {size} by copies, {gate.top} -> {chosen} of them a token"
    plan = build_plan("experts", words, model, {"expert": tile(old, size)}, experts=choice)
    return replace(plan, notes=_note_fields(model, config, choice))


def _check_count(old: int, size: int) -> None:
    """Raise UsageError unless every expert can have as many copies, and more than one."""
    if size > MOST:
        raise UsageError(f"{size} experts are more than growkit makes: {MOST} at most")
    if size == old:
        raise UsageError(f"nothing grows: the source has {old} experts already")
    if size % old or size < old:
        low = max(2, size // old)
        raise UsageError(
            f"every expert needs as many copies, and {size} is not a multiple of {old}; the "
            f"nearest are {low * old} and {(low + 1) * old}"
        )


def _choose(
    model: Architecture, config: Mapping[str, Any], gate: Gate, times: int, chosen: int
) -> Choice:
    """What becomes of the gate's choice and of the fields that state it."""
    stated = model.family.experts
    scaled = gate.shared or "scaling" in gate.values
    exact = chosen == gate.top * times and scaled
    alike = chosen // times if gate.shared and not exact and chosen % times == 0 else 0
    values = _grow_values(gate, times, chosen)
    fields = {stated[name]: values[name] for name in FIELDS if values.get(name) is not None}
    also = stated.get("also")
    if also in config:
        fields[also] = model.sizes["expert"] * times
    return Choice((gate.top, chosen), exact, alike, fields)


def _grow_values(gate: Gate, times: int, chosen: int) -> dict[str, Any]:
    """The values of the gate's fields that change."""
    values: dict[str, Any] = {"top": chosen}
    for name in ("groups", "chosen_groups"):
        # A group is a run of neighbours: copies in tiles make `times` of each group.
        if name in gate.values:
            values[name] = gate.values[name] * times
    if not gate.shared and "scaling" in gate.values:
        # The weights of the chosen are added up, and there are more of them.
        values["scaling"] = gate.values["scaling"] * gate.top / chosen
    if "auxiliary" in gate.values:
        # The loss is experts x sum of (part of the tokens x mean score): it grows with `chosen`.
        values["auxiliary"] = gate.values["auxiliary"] * gate.top / chosen
    return values


def _note_fields(model: Architecture, config: Mapping[str, Any], choice: Choice) -> tuple[str, ...]:
    """What changes in the configuration beside the number of experts and of those a token."""
    top = model.family.experts["top"]
    also = model.family.experts.get("also")
    before = {**model.family.expert_defaults, **config}
    return tuple(
        f"{name} {before[name]:g} -> {value:g}"
        for name, value in choice.fields.items()
        if name not in (top, also) and before[name] != value
    )


def _describe_refusal(gate: Gate, times: int, chosen: int) -> str:
    """Why a growth is not exact."""
    whole = gate.top * times
    if chosen != whole:
        return (
            f"--exact refuses {chosen} experts a token: the {gate.top} that the source chooses "
            f"have {whole} copies; leave --top out, or give --top {gate.top}:{whole}"
        )
    return (
        "--exact refuses this gate: the weights of the chosen experts do not sum to 1, and no "
        "field of the configuration scales them"
    )
