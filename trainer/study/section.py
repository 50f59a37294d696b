"""Reads a study from a configuration of the trainer with one more section:

study:
  learning_rates: [2e-3, 4e-3]    tried from scratch, and by each arm that gives none of its own
  scratch:                        ways to train from scratch; arms are held against the best
    cosine: {}
    wsd: {schedule: {kind: wsd, decay: 0.2}}
  seeds: [0, 1, 2]
  best: 2                         how many arms are run with every seed; 0 for all of them
  budgets: [0.5, 0.75, 1.0]       where arms end: shares of the from-scratch FLOPs, with sources
  sources:
    half: {share: 0.2, model: {layer: 3}}       # a share of the from-scratch FLOPs
    one: {steps: 0.8, model: {layer: 1}, schedule: {kind: constant}}     # of its steps
  arms:
    replicate: {from: half, grow: {map: "3:6"}}
    reset: {from: half, grow: {map: "3:6", moments: reset}, against: replicate}
    small: {from: half, control: true}          # the source, trained on for the same compute
    late: {from: one, learning_rates: source, grow: {map: "1:6"}, schedule: {kind: wsd, warmup: 0}}
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from growkit.errors import GrowkitError, UsageError, did_you_mean
from growkit.models.architecture import Architecture
from growkit.models.computation import LAYER_TYPES
from trainer.config.sections import build_architecture, resolve
from trainer.config.values import merge_values
from trainer.run.growth import plan_growth
from trainer.study.design import SCRATCH, Design, Part

KEYS = ("learning_rates", "scratch", "seeds", "best", "budgets", "sources", "arms")
# Sections that a source or an arm may give values of its own. Any other would make losses or FLOPs
# incomparable with those from scratch.
CHANGEABLE = ("grow", "schedule", "optimizer", "dropout")
NEW_SOURCE_KEYS = ("share", "steps", "model", "schedule", "optimizer", "dropout")
GROWN_SOURCE_KEYS = ("from", "share", "steps", *CHANGEABLE)
WAY_KEYS = ("schedule", "optimizer", "dropout")
ONE_WAY = ""  # the name of the only way to train from scratch, where none is stated
FROM_SOURCE = "source"  # learning_rates of an arm that goes on at its source's
ARM_KEYS = ("from", "learning_rates", "against", "control", *CHANGEABLE)
# Sizes in which a source may be smaller than the model that scratch trains.
SOURCE_SIZES = ("layer", "embed", "head", "kv", "head_dim", "mlp")
# Fields of config.json that a source of fewer layers states anew: they have an entry for each.
SOURCE_FIELDS = (LAYER_TYPES,)
# Keys of a schedule that follow from budgets and shares.
FIXED_SCHEDULE = ("steps", "tokens", "continued")

Values = dict[str, Any]


def read_design(values: Values) -> Design:
    """The study that nested configuration values describe. Raises UsageError."""
    base, section = _split_section(values)
    config = resolve(base)
    rates = _read_numbers(section, "learning_rates", [config.optimizer.learning_rate])
    sources: dict[str, Part] = {}
    for name, stated in _read_parts(section, "sources").items():
        sources[name] = _read_source(name, stated, base, sources)
    arms = {
        name: _read_arm(name, stated, base, sources, rates)
        for name, stated in _read_parts(section, "arms").items()
    }
    _require_other_arms(arms)
    _require_distinct_names(sources, arms)
    seeds = _read_numbers(section, "seeds", [config.seed])
    design = Design(
        base=base,
        ways=_read_ways(section, base),
        learning_rates=rates,
        seeds=tuple(int(seed) for seed in seeds),
        best=_read_best(section),
        budgets=tuple(sorted(_read_numbers(section, "budgets", [1.0]))),
        sources=sources,
        arms=arms,
    )
    _require_lengths(design)
    return design


def _split_section(values: Values) -> tuple[Values, Values]:
    """(the configuration that scratch trains with, the study section)."""
    base = {key: value for key, value in values.items() if key != "study"}
    if values.get("study") is None:
        raise UsageError(
            "the configuration has no study section; it says what to compare: sources and arms"
        )
    section = _require_section(values["study"], "study", KEYS)
    if not base.get("model"):
        raise UsageError(
            "a study needs a model section: the model that is trained from scratch and that arms "
            "end in"
        )
    if base.get("grow"):
        raise UsageError(
            "a study has no grow section of its own; give the grow section of each arm and source: "
            "study.arms.NAME.grow"
        )
    return base, section


def _require_section(value: Any, where: str, keys: tuple[str, ...] | None = None) -> Values:
    """A section that is not empty and has no other keys than these (None: any)."""
    if not isinstance(value, dict) or not value:
        raise UsageError(f"{where} must be a section of values, got {value!r}")
    for key in value:
        if keys is not None and key not in keys:
            near = did_you_mean(key, keys)
            raise UsageError(
                f"unknown key {where}.{key}; the keys here are {', '.join(keys)}{near}"
            )
    return value


def _read_parts(section: Values, kind: str) -> dict[str, Values]:
    """The sources or arms by name. Names must be usable as file names."""
    parts = _require_section(section.get(kind), f"study.{kind}")
    for name, stated in parts.items():
        _require_name(name, f"study.{kind}")
        _require_section(stated, f"study.{kind}.{name}")
    return parts


def _read_numbers(
    section: Values, key: str, default: list[float], where: str = "study"
) -> tuple[float, ...]:
    """Distinct finite numbers above 0; seeds are whole and at least 0."""
    stated = section.get(key, default)
    listed = stated if isinstance(stated, list) else [stated]
    try:
        numbers = [float(value) for value in listed]
    except (TypeError, ValueError):
        numbers = []
    allowed = _is_seed if key == "seeds" else _is_positive
    valid = bool(numbers) and all(allowed(number) for number in numbers)
    if not valid or len(set(numbers)) < len(numbers):
        rule = "whole numbers of at least 0" if key == "seeds" else "numbers above 0"
        raise UsageError(f"{where}.{key} must be a list of different {rule}, got {stated!r}")
    return tuple(numbers)


def _is_seed(number: float) -> bool:
    return math.isfinite(number) and number >= 0 and number == int(number)


def _is_positive(number: float) -> bool:
    return math.isfinite(number) and number > 0


def _read_best(section: Values) -> int:
    best = section.get("best", 0)
    if type(best) is not int or best < 0:
        raise UsageError(f"study.best must be a number of arms, or 0 for all, got {best!r}")
    return best


def _read_ways(section: Values, base: Values) -> dict[str, Values]:
    """What each way to train from scratch changes of the study's configuration."""
    if section.get("scratch") is None:
        return {ONE_WAY: {}}
    ways = {}
    for name, stated in _require_section(section["scratch"], "study.scratch").items():
        where = f"study.scratch.{name}"
        _require_name(name, "study.scratch")
        ways[name] = _read_own_values(stated, base, WAY_KEYS, where) if stated else {}
        if "learning_rate" in (ways[name].get("optimizer") or {}):
            raise UsageError(f"{where}: every way tries the rates of study.learning_rates")
    return ways


def _require_name(name: Any, where: str) -> None:
    """Raise UsageError for a name that cannot be a file's."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
        raise UsageError(
            f"{where}: a name must be text of letters, digits and . _ + -, got {name!r}"
        )


def _read_source(name: str, stated: Values, base: Values, earlier: Mapping[str, Part]) -> Part:
    """A source: a smaller model that is trained anew, or one grown from an earlier source."""
    where = f"study.sources.{name}"
    if "from" in stated:
        values = _read_own_values(stated, base, GROWN_SOURCE_KEYS, where)
        start = _read_start(stated, earlier, where)
        model = _grow_model(values, earlier[start].model, where)
        return Part(start, values, model, _read_share(stated, base, model, where))
    values = _read_own_values(stated, base, NEW_SOURCE_KEYS, where)
    sizes = _require_section(values.get("model"), f"{where}.model", (*SOURCE_SIZES, "config"))
    if "config" in sizes:
        _require_section(sizes["config"], f"{where}.model.config", SOURCE_FIELDS)
    model = build_architecture(resolve(merge_values(base, values)).model)
    return Part(None, values, model, _read_share(stated, base, model, where))


def _read_arm(
    name: str,
    stated: Values,
    base: Values,
    sources: Mapping[str, Part],
    rates: tuple[float, ...],
) -> Part:
    """An arm: it grows a source into scratch's model. rates: those tried from scratch."""
    where = f"study.arms.{name}"
    values = _read_own_values(stated, base, ARM_KEYS, where)
    if "learning_rate" in (values.get("optimizer") or {}):
        raise UsageError(
            f"{where}: an arm tries several learning rates; give them as {where}.learning_rates"
        )
    start = _read_start(stated, sources, where)
    control = _read_control(stated, where)
    if control:
        model = sources[start].model
    else:
        model = _grow_model(values, sources[start].model, where)
        _require_target(model, build_architecture(resolve(base).model), where)
    own = _read_arm_rates(stated, rates, where)
    if len(own) > len(rates):
        raise UsageError(
            f"{where} tries {len(own)} learning rates and scratch {len(rates)}: scratch must try "
            "at least as many"
        )
    against = stated.get("against")
    return Part(start, values, model, learning_rates=own, against=against, control=control)


def _read_control(stated: Values, where: str) -> bool:
    """Whether an arm trains its source on, without growth."""
    control = stated.get("control", False)
    if not isinstance(control, bool):
        raise UsageError(f"{where}.control must be true or false, got {control!r}")
    if control and "grow" in stated:
        raise UsageError(f"{where} is a control, which does not grow; leave its grow section out")
    return control


def _read_arm_rates(stated: Values, rates: tuple[float, ...], where: str) -> tuple[float, ...]:
    """The learning rates that an arm tries; none where it goes on at its source's."""
    if stated.get("learning_rates") == FROM_SOURCE:
        return ()
    return _read_numbers(stated, "learning_rates", list(rates), where)


def _read_own_values(stated: Values, base: Values, keys: tuple[str, ...], where: str) -> Values:
    """The values that a source or an arm changes, checked together with those that it does not."""
    _require_section(stated, where, keys)
    values = {key: value for key, value in stated.items() if key in ("model", *CHANGEABLE)}
    schedule = values.get("schedule")
    for key in FIXED_SCHEDULE:
        if isinstance(schedule, dict) and key in schedule:
            raise UsageError(
                f"{where}.schedule.{key}: budgets and shares say how long a run is, and each run "
                "begins a new schedule"
            )
    try:
        if resolve(merge_values(base, values)).grow.at:
            raise UsageError("grow.at: a study grows a model at the start of a run only")
    except UsageError as problem:
        raise UsageError(f"{where}: {problem}") from None
    return values


def _read_share(stated: Values, base: Values, model: Architecture, where: str) -> float:
    """The share of the from-scratch FLOPs that a source is trained for, by `share` or `steps`."""
    if "share" in stated and "steps" in stated:
        raise UsageError(f"{where} has a share and steps; give one of them")
    if "steps" not in stated:
        return _read_part(stated, "share", "FLOPs", where)
    target = resolve(base).model
    whole = build_architecture(target).flops_per_token(target.context)
    steps = _read_part(stated, "steps", "steps", where)
    return steps * model.flops_per_token(target.context) / whole


def _read_part(stated: Values, key: str, what: str, where: str) -> float:
    """A number above 0 and below 1. Raises UsageError."""
    try:
        part = float(stated[key])
    except (KeyError, TypeError, ValueError):
        part = math.nan
    if not 0 < part < 1:
        raise UsageError(
            f"{where}.{key} must be the share of the from-scratch {what} that it is trained for, "
            f"above 0 and below 1, got {stated.get(key)!r}"
        )
    return part


def _read_start(stated: Values, sources: Mapping[str, Part], where: str) -> str:
    start = stated.get("from")
    if not isinstance(start, str) or start not in sources:
        near = did_you_mean(str(start), sources)
        raise UsageError(
            f"{where}.from names a source given before it ({', '.join(sources)}), got "
            f"{start!r}{near}"
        )
    return start


def _grow_model(values: Values, source: Architecture, where: str) -> Architecture:
    """The model that a part's grow section makes of its source's."""
    try:
        plan = plan_growth(resolve({"grow": values.get("grow")}).grow, source)
    except GrowkitError as problem:
        raise UsageError(f"{where}: {problem}") from None
    if plan is None:
        raise UsageError(
            f"{where} grows nothing: give it a grow section, such as {{map: 3:6}} or {{embed: 2x}}"
        )
    return plan.grown


def _require_target(model: Architecture, target: Architecture, where: str) -> None:
    """Raise UsageError where an arm's growth ends in another model than scratch trains."""
    different = [
        f"{axis} {size} and not {target.sizes[axis]}"
        for axis, size in model.sizes.items()
        if size != target.sizes[axis]
    ]
    if different:
        raise UsageError(
            f"{where} does not end in the model that is trained from scratch: "
            f"{', '.join(different)}"
        )
    for layer, (kind, other) in enumerate(zip(model.kinds, target.kinds, strict=True)):
        if kind != other:
            raise UsageError(
                f"{where} does not end in the model that is trained from scratch: layer {layer} is "
                f"of the kind {kind} and not {other}, because copies keep the kind of their source"
            )


def _require_other_arms(arms: Mapping[str, Part]) -> None:
    """Raise UsageError for an arm that is compared with itself or with no arm."""
    for name, arm in arms.items():
        if arm.against is None:
            continue
        if arm.against == name or arm.against not in list(arms):
            near = did_you_mean(str(arm.against), arms)
            raise UsageError(
                f"study.arms.{name}.against names another arm, got {arm.against!r}{near}"
            )


def _require_distinct_names(sources: Mapping[str, Part], arms: Mapping[str, Part]) -> None:
    twice = sources.keys() & arms.keys()
    reserved = {SCRATCH} & (sources.keys() | arms.keys())
    clashes = sorted(twice | reserved)
    if clashes:
        raise UsageError(
            f"study: the name {clashes[0]!r} is given twice; scratch, sources and arms share one "
            "set of names"
        )


def _require_lengths(design: Design) -> None:
    """Raise UsageError for a run that would have no step, or be shorter than its warm-up."""
    for task in design.list_tasks(list(design.arms)):
        try:
            resolve(design.build_values(task, 1.0))
        except UsageError as problem:
            budget = ""
            if task.budget:
                budget = f" with a budget of {task.budget:g} of scratch's FLOPs"
            spent = ""
            share = design.sum_shares(task.name)
            if share:
                spent = f", of which its sources take {share:g}"
            raise UsageError(f"study: {task.name}{budget}{spent}: {problem}") from None
