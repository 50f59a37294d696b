"""More experts of a mixture: copies of the old ones, with their rows of the router.

Every expert is copied as often, in tiles, unless scores say which are worth more copies.

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

import numpy as np

from growkit.errors import UsageError, require_type
from growkit.growth.axes import tile
from growkit.growth.choice import Choice, share_out
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
    scores: np.ndarray | None = None,
) -> Plan:
    """The plan that copies every expert of a mixture as often, or some more often than others.

    config: the model's config.json, which says how its gate chooses. count: '8:16'. top: '2:4',
    experts a token; None for as many times more as there are experts. exact: refuse another
    function. scores: float [layer, expert], what each is worth, for copies by `share_out`; None for
    as many of each. Raises UsageError.
    """
    require_type("model", model, Architecture, MODEL_HINT)
    gate = read_gate(model.family, config)
    old = model.sizes["expert"]
    size = parse_pair("the number of experts", count, old)
    if scores is not None:
        return _plan_by_scores(model, config, gate, size, top, exact, scores)
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


def _plan_by_scores(
    model: Architecture,
    config: Mapping[str, Any],
    gate: Gate,
    size: int,
    top: str | None,
    exact: bool,
    scores: np.ndarray,
) -> Plan:
    """The plan that copies some experts more often than others. Raises UsageError."""
    old = model.sizes["expert"]
    _check_scores(model, gate, size, exact, scores)
    whole = -(-gate.top * size // old)
    chosen = whole if top is None else parse_pair("--top", top, gate.top)
    _check_top(chosen, size, whole)
    by_layer = tuple(tuple(share_out(each, size)) for each in np.asarray(scores, np.float64))
    values = _grow_values(gate, 1, chosen)
    fields = _name_fields(model, config, values, size)
    choice = Choice((gate.top, chosen), False, 0, fields, by_layer=by_layer)
    most = max(np.bincount(index).max() for index in by_layer)
    words = (
        f"expert {old} -> {size} by copies, from 1 to {most} of each by layer, {gate.top} -> "
        f"{chosen} of them a token"
    )
    first = choice.find_map(0, old)
    plan = build_plan("experts", words, model, {"expert": first}, experts=choice)
    return replace(plan, notes=_note_fields(model, config, choice))


def _check_scores(
    model: Architecture, gate: Gate, size: int, exact: bool, scores: np.ndarray
) -> None:
    """Raise UsageError for scores that say nothing, and where copies cannot differ in number."""
    old = model.sizes["expert"]
    if exact:
        raise UsageError(
            "--exact refuses --choose: copies of some experts and not of others change their "
            "weights; leave one of them out"
        )
    if "groups" in gate.values:
        raise UsageError(
            f"--choose is for gates without groups of experts, and this one has "
            f"{gate.values['groups']} groups of as many experts each; leave it out"
        )
    if not old < size <= MOST:
        raise UsageError(
            f"--choose makes more experts than the source's {old}, up to {MOST}; got {size}"
        )
    if np.shape(scores) != (model.layer, old) or not (np.isfinite(scores) & (scores >= 0)).all():
        raise UsageError(
            f"scores are a number of at least 0 for each of {old} experts in each of {model.layer} "
            f"layers, got an array of the shape {list(np.shape(scores))}"
        )


def _check_top(chosen: int, size: int, whole: int) -> None:
    """Raise UsageError for a number of experts a token that there are not."""
    if not 0 < chosen <= size:
        raise UsageError(
            f"--top asks for {chosen} experts a token, and there are {size}; between 1 and {size} "
            f"work, {whole} is the default"
        )


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
            f"nearest are {low * old} and {(low + 1) * old}, and --choose copies some more often"
        )


def _choose(
    model: Architecture, config: Mapping[str, Any], gate: Gate, times: int, chosen: int
) -> Choice:
    """What becomes of the gate's choice and of the fields that state it."""
    scaled = gate.shared or "scaling" in gate.values
    exact = chosen == gate.top * times and scaled
    alike = chosen // times if gate.shared and not exact and chosen % times == 0 else 0
    values = _grow_values(gate, times, chosen)
    fields = _name_fields(model, config, values, model.sizes["expert"] * times)
    return Choice((gate.top, chosen), exact, alike, fields)


def _name_fields(
    model: Architecture, config: Mapping[str, Any], values: Mapping[str, Any], size: int
) -> dict[str, Any]:
    """The configuration's fields of a gate's values and of the number of experts."""
    stated = model.family.experts
    fields = {stated[name]: values[name] for name in FIELDS if values.get(name) is not None}
    also = stated.get("also")
    if also in config:
        fields[also] = size
    return fields


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
