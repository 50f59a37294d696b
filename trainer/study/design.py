"""What a study compares: a model trained from scratch, and arms that grow from smaller sources.

Every arm ends in the model that scratch trains. All runs are known, with their lengths, before the
first one begins; `trainer.study.section` reads a design from a configuration.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from growkit.models.architecture import Architecture
from trainer.config.sections import Config, build_architecture, build_section, resolve
from trainer.config.values import merge_values

SCRATCH = "scratch"  # the name of the runs that train from scratch
# An arm whose sources take a larger share of the from-scratch FLOPs is reported, but neither takes
# the further seeds nor is named as the best arm.
HEADLINE_SHARE = 0.25


@dataclass(frozen=True)
class Task:
    """One training run of a study. name: scratch, a source's or an arm's.

    learning_rate: one of several to try; None for the best of those tried, or a source's or its
    source's. budget: the share of the from-scratch FLOPs at which an arm ends, 1 for scratch, None
    for a source. way: which of the ways to train from scratch; None for the best of those tried.
    """

    name: str
    seed: int
    learning_rate: float | None = None
    budget: float | None = None
    way: str | None = None


@dataclass(frozen=True)
class Part:
    """A source or an arm. start: the source it begins from; None for a source that is trained anew.

    values: what it changes of the study's configuration. share: a source's share of scratch's
    FLOPs. learning_rates: those that an arm tries; none where its rate is its source's. against:
    another arm, from which this one differs in one thing. control: an arm that does not grow: its
    source, trained on for the same compute.
    """

    start: str | None
    values: Mapping[str, Any]
    model: Architecture
    share: float = 0.0
    learning_rates: tuple[float, ...] = ()
    against: str | None = None
    control: bool = False


@dataclass(frozen=True)
class Design:
    """A study that was checked.

    base: the configuration that scratch trains with. ways: what each way to train from scratch
    changes of it, by name; the best one is what arms are held against. best: how many arms take the
    further seeds, 0 for all. budgets: shares of the from-scratch FLOPs, in increasing order.
    """

    base: Mapping[str, Any]
    ways: Mapping[str, Mapping[str, Any]]
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
        """The model that scratch trains and every arm ends in."""
        return build_architecture(self.config.model)

    @cached_property
    def parts(self) -> Mapping[str, Part]:
        """Sources and arms by name."""
        return {**self.sources, **self.arms}

    @property
    def flops_of_scratch(self) -> float:
        return self.config.schedule.steps * self.count_flops_per_step(SCRATCH)

    def count_flops_per_step(self, name: str) -> float:
        """FLOPs of a step, forward and backward, of scratch, a source or an arm."""
        model = self.model if name == SCRATCH else self.parts[name].model
        context = self.config.model.context
        return self.config.batch.sequences * context * model.flops_per_token(context)

    def count_flops(self, task: Task) -> float:
        """FLOPs of a run, without its sources'."""
        return self.count_steps(task) * self.count_flops_per_step(task.name)

    def list_sources(self, name: str) -> list[str]:
        """The sources that a source or an arm comes from, the first one first."""
        start = None if name == SCRATCH else self.parts[name].start
        if start is None:
            return []
        return [*self.list_sources(start), start]

    def sum_shares(self, name: str) -> float:
        """The share of scratch's FLOPs that goes to the sources of an arm or a source."""
        return sum(self.sources[source].share for source in self.list_sources(name))

    def count_steps(self, task: Task) -> int:
        """Steps of a run."""
        if task.name == SCRATCH:
            return self.config.schedule.steps
        if task.budget is None:
            share = self.sources[task.name].share
        else:
            share = task.budget - self.sum_shares(task.name)
        return round(share * self.flops_of_scratch / self.count_flops_per_step(task.name))

    def count_tokens(self, task: Task) -> int:
        """Tokens of a run."""
        return self.count_steps(task) * self.config.batch.sequences * self.config.model.context

    def list_rates(self, name: str) -> tuple[float, ...]:
        """The learning rates to try for scratch or an arm."""
        if name == SCRATCH:
            return self.learning_rates
        return self.arms[name].learning_rates

    @property
    def controls(self) -> list[str]:
        """The arms that do not grow."""
        return [name for name, arm in self.arms.items() if arm.control]

    def takes_rate_of_source(self, name: str) -> bool:
        """Whether an arm goes on at the learning rate that its source was trained with."""
        return name in self.arms and not self.arms[name].learning_rates

    def find_growth_time(self, arm: str, budget: float) -> float:
        """The part of all steps, its sources' and its own, at which an arm becomes the target."""
        seed = self.seeds[0]
        before = sum(self.count_steps(Task(name, seed)) for name in self.list_sources(arm))
        return before / (before + self.count_steps(Task(arm, seed, None, budget)))

    def build_values(self, task: Task, learning_rate: float) -> dict[str, Any]:
        """The configuration of a run. A source's own learning rate replaces `learning_rate`."""
        values = copy.deepcopy(dict(self.base))
        values = merge_values(values, {"optimizer": {"learning_rate": learning_rate}})
        if task.name == SCRATCH:
            values = merge_values(values, self.ways[task.way or next(iter(self.ways))])
        else:
            part = self.parts[task.name]
            if part.start and not part.control:
                # Noise of growth differs between seeds, unless the part states a seed for it.
                values = merge_values(values, {"grow": {"seed": task.seed}})
            values = merge_values(values, part.values)
            values["model"] = asdict(build_section(part.model))
        steps = self.count_steps(task)
        return merge_values(values, {"seed": task.seed, "schedule": {"steps": steps, "tokens": 0}})

    def find_warmup(self, arm: str) -> int:
        """Steps of the learning rate's warm-up after an arm's growth."""
        task = Task(arm, self.seeds[0], None, self.budgets[-1])
        return resolve(self.build_values(task, 1.0)).schedule.warmup

    def list_tasks(self, chosen: list[str] | None = None) -> Iterator[Task]:
        """Every run, in order. chosen: the arms that take further seeds; None while unknown."""
        first, *further = self.seeds
        if chosen is None:
            chosen = list(self.arms)[: self.best or None]
        yield from self._list_first_tasks(first)
        for seed in further:
            yield Task(SCRATCH, seed, None, 1.0)
            for name in self._list_needed_sources(chosen):
                yield Task(name, seed)
            for name in chosen:
                for budget in self.budgets:
                    yield Task(name, seed, None, budget)

    def _list_first_tasks(self, seed: int) -> Iterator[Task]:
        """The first seed: all learning rates at the smallest budget, the best one at the others."""
        for way in self.ways:
            for rate in self.learning_rates:
                yield Task(SCRATCH, seed, rate, 1.0, way)
        for name in self._list_needed_sources(self.arms):
            yield Task(name, seed)
        smallest, *larger = self.budgets
        for name, arm in self.arms.items():
            tried: tuple[float | None, ...] = arm.learning_rates or (None,)
            yield from (Task(name, seed, rate, smallest) for rate in tried)
            for budget in larger:
                yield Task(name, seed, None, budget)

    def _list_needed_sources(self, arms: Iterable[str]) -> list[str]:
        """The sources that arms come from, each after the one that it comes from itself."""
        needed = [source for arm in arms for source in self.list_sources(arm)]
        return list(dict.fromkeys(needed))
