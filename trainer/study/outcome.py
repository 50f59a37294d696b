"""What the runs of a study say: losses at equal compute, and the compute that reaches the from-scratch loss.

Arithmetic over finished runs, nothing else. A run counts by its last validation loss, at the end of its own schedule:
losses on the way, at a high learning rate, are no measure of what a shorter run would have reached. Between two runs
of an arm the loss is taken as linear in the logarithm of FLOPs; beyond them nothing is said.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from growkit import __version__
from growkit.models.architecture import Architecture
from trainer.study.design import LARGEST_SHARE, SCRATCH, Design, Task
from trainer.study.evidence import FORMAT, Measurement


@dataclass(frozen=True)
class FinishedRun:
    """A run that is done. flops: its own; flops_before: its sources'; loss: the last validation's, nats a token."""

    name: str
    seed: int
    learning_rate: float
    budget: float | None
    tried: bool
    steps: int
    tokens: int
    flops: float
    flops_before: float
    loss: float
    seconds: float
    run: str

    @property
    def spent(self) -> float:
        """FLOPs of the run and its sources."""
        return self.flops + self.flops_before


@dataclass(frozen=True)
class Crossing:
    """FLOPs at which a loss was reached; at_most: by the shortest run already, so that fewer might have done."""

    flops: float
    at_most: bool


def compute_spread(values: Sequence[float | None]) -> Measurement:
    """The mean and sample standard deviation of a figure over seeds (None for a single one).

    Without a mean as soon as one seed has no figure, or no finite one.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known or len(known) < len(values):
        return Measurement(None, None, len(values))
    return Measurement(
        statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known)
    )


def find_crossing(points: Iterable[tuple[float, float]], target: float) -> Crossing | None:
    """Where the loss falls to `target` along (FLOPs, loss) points, the finite ones; None when none is as low."""
    ordered = sorted(point for point in points if math.isfinite(point[1]))
    if not math.isfinite(target):
        return None
    if ordered and ordered[0][1] <= target:
        return Crossing(ordered[0][0], at_most=True)
    for (flops, loss), (further, lower) in zip(ordered, ordered[1:], strict=False):
        if lower <= target:
            part = (loss - target) / (loss - lower)
            return Crossing(
                math.exp(math.log(flops) + part * math.log(further / flops)), at_most=False
            )
    return None


class Outcome:
    """The finished runs of a study, as far as it has come."""

    def __init__(self, study: Design, runs: Sequence[FinishedRun]):
        self.study, self.runs = study, list(runs)

    def find_best_rate(self, name: str) -> float | None:
        """The learning rate of the lowest loss among those tried, at the first seed; None before any was."""
        tried = [run for run in self.runs if run.name == name and run.tried]
        return (
            min(tried, key=lambda run: (run.loss, run.learning_rate)).learning_rate
            if tried
            else None
        )

    def select_runs(self, name: str, seed: int | None = None) -> list[FinishedRun]:
        """The runs of scratch or an arm at its best learning rate, by compute."""
        rate = self.find_best_rate(name)
        chosen = [run for run in self.runs if run.name == name and run.learning_rate == rate]
        return sorted(
            (run for run in chosen if seed in (None, run.seed)), key=lambda run: run.spent
        )

    def find_complete_seeds(self, name: str) -> list[int]:
        """The seeds for which an arm, and scratch beside it, is complete."""
        counts = {seed: len(self.select_runs(name, seed)) for seed in self.study.seeds}
        return [
            s
            for s, count in counts.items()
            if count == len(self.study.budgets) and self.select_runs(SCRATCH, s)
        ]

    def find_crossing(self, name: str, seed: int) -> Crossing | None:
        """Where an arm reaches the from-scratch loss of the same seed, its sources' FLOPs included."""
        points = [(run.spent, run.loss) for run in self.select_runs(name, seed)]
        return find_crossing(points, self.select_runs(SCRATCH, seed)[-1].loss)

    def compute_saving(self, name: str, seed: int, sources: bool = True) -> float | None:
        """The part of the from-scratch FLOPs saved at equal loss, the sources' FLOPs counted or not (Gopher's way)."""
        found = self.find_crossing(name, seed)
        if found is None:
            return None
        before = 0.0 if sources else self.select_runs(name, seed)[0].flops_before
        return 1 - (found.flops - before) / self.select_runs(SCRATCH, seed)[-1].flops

    def choose_best_arms(self) -> list[str]:
        """The arms that take the further seeds: those that save most at the first one."""
        if not self.study.best:
            return list(self.study.arms)
        within = [name for name in self.study.arms if self.study.sum_shares(name) <= LARGEST_SHARE]
        ranked = sorted(
            within or self.study.arms, key=lambda name: self._order(name, self.study.seeds[0])
        )
        return ranked[: self.study.best]

    def _order(self, name: str, seed: int) -> tuple[float, float]:
        """Arms in order of compute to the from-scratch loss, in percent; those that tie by the loss at one budget.

        Budgets are met to a step, so that arms which reach it in their shortest run tie: there it is that run's loss.
        """
        found, runs = self.find_crossing(name, seed), self.select_runs(name, seed)
        if found is None:
            return (math.inf, runs[-1].loss)
        percent = round(100 * found.flops / self.select_runs(SCRATCH, seed)[-1].flops)
        return (percent, runs[0].loss if found.at_most else runs[-1].loss)

    def describe_arm(self, name: str) -> dict[str, Any]:
        """What is reported of an arm."""
        part, seeds = self.study.arms[name], self.find_complete_seeds(name)
        growth = part.values.get("grow") or {}
        ends = [self.select_runs(name, seed) for seed in seeds]
        return {
            "name": name,
            "operator": ", ".join(f"{key} {value}" for key, value in growth.items()),
            "sources": self.study.list_sources(name),
            "source": describe_sizes(self.study.sources[self.study.list_sources(name)[-1]].model),
            "share": self.study.sum_shares(name),
            "within_share": self.study.sum_shares(name) <= LARGEST_SHARE,
            "rewarmup": self.study.find_warmup(name),
            "learning_rate": self.find_best_rate(name),
            "reached": bool(seeds) and all(self.find_crossing(name, seed) is not None for seed in seeds),
            "at_least": any(
                (found := self.find_crossing(name, seed)) and found.at_most for seed in seeds
            ),
            "saved": asdict(compute_spread([self.compute_saving(name, seed) for seed in seeds])),
            "saved_without_source": asdict(
                compute_spread([self.compute_saving(name, seed, sources=False) for seed in seeds])
            ),
            "loss": asdict(compute_spread([runs[-1].loss for runs in ends])),
            "against": part.against,
            "difference": None if part.against is None else asdict(self.compare_arms(name)),
            "ahead": asdict(
                compute_spread(
                    [
                        self.select_runs(SCRATCH, s)[-1].loss - r[-1].loss
                        for s, r in zip(seeds, ends, strict=True)
                    ]
                )
            ),
        }

    def compare_arms(self, name: str) -> Measurement | None:
        """The last loss minus that of the arm it is held against, seed by seed; None where it is held against none."""
        against = self.study.arms[name].against
        if against is None:
            return None
        seeds = [seed for seed in self.find_complete_seeds(name) if seed in self.find_complete_seeds(against)]
        return compute_spread(
            [self.select_runs(name, seed)[-1].loss - self.select_runs(against, seed)[-1].loss for seed in seeds]
        )

    def summarize(self) -> dict[str, Any]:
        """The study as `results.json` holds it."""
        study, scratch = self.study, self.select_runs(SCRATCH)
        first = study.list_sources(next(iter(study.arms)))[-1]
        return {
            "format": FORMAT,
            "growkit": __version__,
            "target": describe_sizes(study.model),
            "source": describe_sizes(study.sources[first].model),
            "tokens": {
                "scratch": scratch[-1].tokens,
                "source": study.count_tokens(Task(first, study.seeds[0])),
            },
            "seeds": list(study.seeds),
            "scratch": {
                "learning_rate": self.find_best_rate(SCRATCH),
                "flops": scratch[-1].flops,
                "loss": asdict(compute_spread([run.loss for run in scratch])),
            },
            "arms": [self.describe_arm(name) for name in study.arms],
            "runs": [
                asdict(run) | {"loss": run.loss if math.isfinite(run.loss) else None}
                for run in self.runs
            ],
        }


def describe_sizes(model: Architecture) -> dict[str, int]:
    """What a model is, in numbers."""
    kept = ("layer", "embed", "head", "mlp", "vocab", "context")
    return {name: getattr(model, name) for name in kept} | {"parameters": model.parameters}
