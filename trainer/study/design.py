"""What a study compares: the configuration trained from scratch, sources, and arms that grow from them.

A study's file is a configuration of the trainer's with one section more:

    study:
      learning_rates: [2e-3, 4e-3]        tried from scratch, and by each arm that names none
      seeds: [0, 1, 2]
      best: 2                             the arms that are run with every seed; 0 for all of them
      budgets: [0.5, 0.75, 1.0]           where arms end: parts of the from-scratch FLOPs, their sources' included
      sources: {half: {share: 0.2, model: {layer: 3}}}
      arms:
        replicate: {from: half, grow: {map: "3:6"}}
        reset: {from: half, grow: {map: "3:6", moments: reset}, against: replicate}

Knows the section, its rules, and the length of every run; leaves training to `course`.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from growkit.errors import GrowkitError, UsageError, did_you_mean
from growkit.models.architecture import Architecture
from trainer.config.sections import Config, build_architecture, build_section, resolve
from trainer.config.values import merge_values
from trainer.run.growth import plan_growth

SCRATCH = "scratch"
SECTION = ("learning_rates", "seeds", "best", "budgets", "sources", "arms")
SOURCE, ARM = ("from", "share"), ("from", "learning_rates", "against")
# What a source or an arm may have otherwise than scratch: all else would make losses or FLOPs no longer comparable.
OTHERWISE, SETTLED = ("grow", "schedule", "optimizer", "dropout"), ("steps", "continued")
SMALLER = ("layer", "embed", "head", "mlp")
LARGEST_SHARE = 0.25


@dataclass(frozen=True)
class Task:
    """One training of a study. name: scratch, a source's or an arm's.

    learning_rate: one of several to try; None for the best of those tried. budget: the part of the from-scratch FLOPs
    at which an arm ends, 1 for scratch, None for a source.
    """

    name: str
    seed: int
    learning_rate: float | None = None
    budget: float | None = None


@dataclass(frozen=True)
class Part:
    """A source or an arm: the source it begins from, and its own values.

    share: a source's part of scratch's FLOPs. against: the arm that an arm differs from in one thing.
    """

    start: str | None
    values: Mapping[str, Any]
    model: Architecture
    share: float = 0.0
    learning_rates: tuple[float, ...] = ()
    against: str | None = None


@dataclass(frozen=True)
class Design:
    """A study, checked: every arm ends in the model that scratch trains."""

    base: Mapping[str, Any]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    best: int
    budgets: tuple[float, ...]
    sources: Mapping[str, Part]
    arms: Mapping[str, Part]

    @cached_property
    def config(self) -> Config:
        return resolve(dict(self.base))

    @cached_property
    def model(self) -> Architecture:
        return build_architecture(self.config.model)

    def count_flops_per_step(self, name: str) -> float:
        """FLOPs of a step of a run of that name, forward and backward."""
        config = self.config
        model = self.sources[name].model if name in self.sources else self.model
        context = config.model.context
        return config.batch.sequences * context * model.flops_per_token(context)

    def count_flops(self, task: Task) -> float:
        """FLOPs of a run, without its sources'."""
        return self.count_steps(task) * self.count_flops_per_step(task.name)

    @property
    def flops_of_scratch(self) -> float:
        return self.config.schedule.steps * self.count_flops_per_step(SCRATCH)

    def list_sources(self, name: str) -> list[str]:
        """The sources that a source or an arm comes from, the first one first."""
        start = (self.arms | self.sources)[name].start if name != SCRATCH else None
        return [*self.list_sources(start), start] if start else []

    def sum_shares(self, name: str) -> float:
        """The part of scratch's FLOPs spent on the sources of an arm or a source."""
        return sum(self.sources[source].share for source in self.list_sources(name))

    def count_steps(self, task: Task) -> int:
        """How many steps a run takes."""
        if task.name == SCRATCH:
            return self.config.schedule.steps
        if task.name in self.sources:
            own = self.sources[task.name].share
        else:
            own = task.budget - self.sum_shares(task.name)
        return round(own * self.flops_of_scratch / self.count_flops_per_step(task.name))

    def count_tokens(self, task: Task) -> int:
        """How many tokens a run takes."""
        config = self.config
        return self.count_steps(task) * config.batch.sequences * config.model.context

    def list_rates(self, name: str) -> tuple[float, ...]:
        """The learning rates to try for scratch or an arm."""
        return self.learning_rates if name == SCRATCH else self.arms[name].learning_rates

    def build_values(self, task: Task, learning_rate: float) -> dict[str, Any]:
        """The configuration of a run, as the trainer reads it. A source may have a learning rate of its own."""
        values = merge_values(
            copy.deepcopy(dict(self.base)), {"optimizer": {"learning_rate": learning_rate}}
        )
        if task.name != SCRATCH:
            part = (self.arms | self.sources)[task.name]
            noise = {"grow": {"seed": task.seed}} if part.start else {}
            values = merge_values(values, merge_values(noise, part.values)) | {"model": asdict(build_section(part.model))}
        return merge_values(values, {"seed": task.seed, "schedule": {"steps": self.count_steps(task)}})

    def find_warmup(self, arm: str) -> int:
        """Steps of the warm-up after an arm's growth."""
        return resolve(
            self.build_values(Task(arm, self.seeds[0], None, self.budgets[-1]), 1.0)
        ).schedule.warmup

    def list_tasks(self, chosen: list[str] | None = None) -> Iterator[Task]:
        """Every run, in order. chosen: the arms that take the further seeds; None while that is not known."""
        first, *further = self.seeds
        yield from (Task(SCRATCH, first, rate, 1.0) for rate in self.learning_rates)
        yield from (Task(name, first) for name in self._needed(self.arms))
        for name, arm in self.arms.items():
            yield from (Task(name, first, rate, self.budgets[0]) for rate in arm.learning_rates)
            yield from (Task(name, first, None, budget) for budget in self.budgets[1:])
        some = list(self.arms)[: self.best or None] if chosen is None else chosen
        for seed in further:
            yield Task(SCRATCH, seed, None, 1.0)
            yield from (Task(name, seed) for name in self._needed(some))
            yield from (Task(name, seed, None, budget) for name in some for budget in self.budgets)

    def _needed(self, arms: Iterable[str]) -> list[str]:
        """The sources that arms come from, each after its own."""
        return list(dict.fromkeys(source for arm in arms for source in self.list_sources(arm)))


def read_design(values: dict[str, Any]) -> Design:
    """The study that nested values describe. Raises UsageError."""
    base = {key: value for key, value in values.items() if key != "study"}
    if values.get("study") is None:
        raise UsageError(
            "the configuration has no study section, which says what to compare: its sources and arms"
        )
    section = _section(values["study"], "study", SECTION)
    if not base.get("model"):
        raise UsageError(
            "a study needs a model section: the model that is trained from scratch and grown to"
        )
    if base.get("grow"):
        raise UsageError(
            "a study's grow sections are those of its arms and sources: study.arms.NAME.grow"
        )
    config = resolve(base)
    rates = _numbers(section, "learning_rates", [config.optimizer.learning_rate])
    sources: dict[str, Part] = {}
    for name, stated in _parts(section, "sources").items():
        sources[name] = _source(name, stated, base, sources)
    arms = {
        name: _arm(name, stated, base, sources, rates)
        for name, stated in _parts(section, "arms").items()
    }
    for name, arm in arms.items():
        if arm.against is not None and (arm.against not in [*arms] or arm.against == name):
            near = did_you_mean(str(arm.against), arms)
            raise UsageError(
                f"study.arms.{name}.against names another arm, got {arm.against!r}{near}"
            )
    if clash := sorted(
        (sources.keys() & arms.keys()) | ({SCRATCH} & (sources.keys() | arms.keys()))
    ):
        raise UsageError(
            f"study: the name {clash[0]!r} is given twice; scratch, sources and arms share one set of names"
        )
    seeds = tuple(int(seed) for seed in _numbers(section, "seeds", [config.seed]))
    budgets = tuple(sorted(_numbers(section, "budgets", [1.0])))
    best = section.get("best", 0)
    if type(best) is not int or best < 0:
        raise UsageError(f"study.best is a number of arms, 0 for all, got {best!r}")
    made = Design(base, rates, seeds, best, budgets, sources, arms)
    _check_lengths(made)
    return made


def _section(value: Any, where: str, keys: tuple[str, ...] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise UsageError(f"{where} is a section of values, got {value!r}")
    for key in value if keys else ():
        if key not in keys:
            raise UsageError(
                f"unknown key {where}.{key}; the keys here are {', '.join(keys)}{did_you_mean(key, keys)}"
            )
    return value


def _parts(section: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """The sources or arms, by names that can be those of files."""
    parts = _section(section.get(kind), f"study.{kind}")
    for name, stated in parts.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
            raise UsageError(
                f"study.{kind}: a name is text of letters, digits and . _ + -, got {name!r}"
            )
        _section(stated, f"study.{kind}.{name}")
    return parts


def _numbers(
    section: dict[str, Any], key: str, default: list[float], where: str = "study"
) -> tuple[float, ...]:
    """Distinct finite numbers above 0; seeds are whole and at least 0."""
    stated = section.get(key, default)
    try:
        numbers = [float(value) for value in (stated if isinstance(stated, list) else [stated])]
    except (TypeError, ValueError):
        numbers = []
    seeds = key == "seeds"
    right = [
        n
        for n in numbers
        if math.isfinite(n) and (n > 0 or seeds and n == 0) and (not seeds or n == int(n))
    ]
    if not numbers or right != numbers or len(set(numbers)) < len(numbers):
        rule = "whole numbers of at least 0" if seeds else "numbers above 0"
        raise UsageError(f"{where}.{key} is a list of different {rule}, got {stated!r}")
    return tuple(numbers)


def _source(
    name: str, stated: dict[str, Any], base: dict[str, Any], earlier: Mapping[str, Part]
) -> Part:
    """A source: a smaller model trained anew, or grown from an earlier source."""
    where = f"study.sources.{name}"
    if "from" in stated:
        values = _own(stated, base, (*SOURCE, *OTHERWISE), where)
        return Part(
            stated["from"],
            values,
            _grown(where, stated["from"], values, earlier),
            _share(stated, where),
        )
    values = _own(stated, base, ("share", "model", *OTHERWISE[1:]), where)
    _section(values.get("model"), f"{where}.model", SMALLER)
    return Part(None, values, build_architecture(resolve(merge_values(base, values)).model), _share(stated, where))


def _arm(
    name: str,
    stated: dict[str, Any],
    base: dict[str, Any],
    sources: Mapping[str, Part],
    rates: tuple[float, ...],
) -> Part:
    """An arm: it grows a source into the model that scratch trains."""
    where = f"study.arms.{name}"
    values = _own(stated, base, (*ARM, *OTHERWISE), where)
    if "learning_rate" in (values.get("optimizer") or {}):
        raise UsageError(
            f"{where}: an arm's learning rates are those it tries; give them as {where}.learning_rates"
        )
    start = stated.get("from")
    model, target = _grown(where, start, values, sources), build_architecture(resolve(base).model)
    if model.sizes != target.sizes:
        sizes = ((axis, size, target.sizes[axis]) for axis, size in model.sizes.items())
        ends = ", ".join(
            f"{axis} {size} and not {wanted}" for axis, size, wanted in sizes if size != wanted
        )
        raise UsageError(f"{where} does not end in the model that is trained from scratch: {ends}")
    own = _numbers(stated, "learning_rates", list(rates), where)
    if len(own) > len(rates):
        raise UsageError(
            f"{where} tries {len(own)} learning rates and scratch {len(rates)}: scratch must have at least as many"
        )
    return Part(start, values, model, learning_rates=own, against=stated.get("against"))


def _own(
    stated: dict[str, Any], base: dict[str, Any], keys: tuple[str, ...], where: str
) -> dict[str, Any]:
    """A part's own values for the trainer, checked: all that it states may be otherwise than scratch's."""
    _section(stated, where, keys)
    values = {key: value for key, value in stated.items() if key in ("model", *OTHERWISE)}
    schedule = values.get("schedule")
    for key in SETTLED:
        if isinstance(schedule, dict) and key in schedule:
            raise UsageError(
                f"{where}.schedule.{key}: budgets and shares say how long a run is, and each begins anew"
            )
    try:
        if resolve(merge_values(base, values)).grow.at:
            raise UsageError("grow.at: a study grows a model at the start of a run")
    except UsageError as problem:
        raise UsageError(f"{where}: {problem}") from None
    return values


def _share(stated: dict[str, Any], where: str) -> float:
    try:
        share = float(stated["share"])
    except (KeyError, TypeError, ValueError):
        share = math.nan
    if not 0 < share < 1:
        raise UsageError(
            f"{where}.share is the part of the from-scratch FLOPs that it is trained for, above 0 and below 1, got "
            f"{stated.get('share')!r}"
        )
    return share


def _grown(where: str, start: Any, values: dict[str, Any], sources: Mapping[str, Part]) -> Architecture:
    """The model that a grow section makes of a source's."""
    if not isinstance(start, str) or start not in sources:
        near = did_you_mean(str(start), sources)
        raise UsageError(
            f"{where}.from names a source given before it ({', '.join(sources)}), got {start!r}{near}"
        )
    try:
        plan = plan_growth(resolve({"grow": values.get("grow")}).grow, sources[start].model)
    except GrowkitError as problem:
        raise UsageError(f"{where}: {problem}") from None
    if plan is None:
        raise UsageError(
            f"{where} grows nothing: give it a grow section, as {{map: 3:6}} or {{embed: 2x}}"
        )
    return plan.grown


def _check_lengths(study: Design) -> None:
    """Raise UsageError for a run that would have no step, or be shorter than its warm-up."""
    for task in study.list_tasks(list(study.arms)):
        try:
            resolve(study.build_values(task, 1.0))
        except UsageError as problem:
            budget = f" with a budget of {task.budget:g} of scratch's FLOPs" if task.budget else ""
            spent = (
                f", of which its sources take {study.sum_shares(task.name):g}"
                if study.sum_shares(task.name)
                else ""
            )
            raise UsageError(f"study: {task.name}{budget}{spent}: {problem}") from None
