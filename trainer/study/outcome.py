"""What the runs of a study say: losses at equal compute, and compute to the from-scratch loss.

Only arithmetic over finished runs. A run counts by its last validation loss, at the end of its own
schedule: a loss on the way, at a high learning rate, does not measure what a shorter run would
reach. Between two runs of an arm the loss is interpolated linearly in the logarithm of FLOPs; there
is no extrapolation beyond them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from growkit import __version__
from growkit.models.architecture import Architecture
from trainer.study.design import HEADLINE_SHARE, SCRATCH, Design, Task
from trainer.study.evidence import FORMAT, Measurement


@dataclass(frozen=True)
class FinishedRun:
    """A run that is done.

    tried: whether it is one of several learning rates to choose from. flops: its own; flops_before:
    its sources'. loss: the last validation's, in nats a token, infinite for a run that diverged.
    run: the name of its directory. way: how it was trained from scratch, where there are several.
    """

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
    way: str = ""

    @property
    def spent(self) -> float:
        """FLOPs of the run and its sources."""
        return self.flops + self.flops_before


@dataclass(frozen=True)
class Crossing:
    """The FLOPs at which a loss was reached. at_most: by the shortest run; fewer might do."""

    flops: float
    at_most: bool


def compute_spread(values: Sequence[float | None]) -> Measurement:
    """The mean and sample standard deviation of a figure over seeds.

    The mean is None when any seed has no finite figure, the deviation for fewer than two seeds.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known or len(known) < len(values):
        return Measurement(None, None, len(values))
    std = statistics.stdev(known) if len(known) > 1 else None
    return Measurement(statistics.fmean(known), std, len(known))


def find_crossing(points: Iterable[tuple[float, float]], target: float) -> Crossing | None:
    """Where the loss falls to `target` along (FLOPs, loss) points; None when it does not.

    Points whose loss is not finite are left out.
    """
    ordered = sorted(point for point in points if math.isfinite(point[1]))
    if not ordered or not math.isfinite(target):
        return None
    shortest, first_loss = ordered[0]
    if first_loss <= target:
        return Crossing(shortest, at_most=True)
    for (flops, loss), (more_flops, lower) in zip(ordered, ordered[1:], strict=False):
        if lower <= target:
            part = (loss - target) / (loss - lower)
            logarithm = math.log(flops) + part * math.log(more_flops / flops)
            return Crossing(math.exp(logarithm), at_most=False)
    return None


def find_headline_arm(arms: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The arm that saves most of those whose sources are small enough; None where none saves.

    arms: as `Outcome.describe_arm` gives them.
    """
    reached = [arm for arm in arms if arm["within_share"] and arm["saved"]["mean"] is not None]
    return max(reached, key=_rank_for_headline, default=None)


def _rank_for_headline(arm: dict[str, Any]) -> tuple[int, int, float]:
    """Most seeds first, then whole percents saved, as arms are chosen, then the lowest loss."""
    percent = round(100 * arm["saved"]["mean"])
    return arm["saved"]["runs"], percent, -arm["loss"]["mean"]


class Outcome:
    """The runs of a study that are finished so far."""

    def __init__(self, study: Design, runs: Sequence[FinishedRun]):
        self.study = study
        self.runs = list(runs)

    def find_best_rate(self, name: str) -> float | None:
        """The learning rate with the lowest loss of those tried; None before any was tried."""
        best = self._find_best_try(name)
        return None if best is None else best.learning_rate

    def _find_best_try(self, name: str) -> FinishedRun | None:
        """The run with the lowest loss of those tried: for its learning rate and its way."""
        only = self.study.takes_rate_of_source(name)
        tried = [run for run in self.runs if run.name == name and (run.tried or only)]
        return min(tried, key=lambda run: (run.loss, run.learning_rate), default=None)

    def select_runs(self, name: str, seed: int | None = None) -> list[FinishedRun]:
        """The runs of scratch or an arm at its best learning rate and way, in order of compute.

        seed: None for all of them.
        """
        best = self._find_best_try(name)
        if best is None:
            return []
        chosen = [
            run
            for run in self.runs
            if run.name == name
            and (run.learning_rate, run.way) == (best.learning_rate, best.way)
            and seed in (None, run.seed)
        ]
        return sorted(chosen, key=lambda run: run.spent)

    def _find_scratch(self, seed: int) -> FinishedRun:
        """The run from scratch that a seed's arms are compared with."""
        return self.select_runs(SCRATCH, seed)[-1]

    def find_complete_seeds(self, name: str) -> list[int]:
        """The seeds for which all runs of an arm, and scratch, are finished."""
        complete = []
        for seed in self.study.seeds:
            finished = len(self.select_runs(name, seed)) == len(self.study.budgets)
            if finished and self.select_runs(SCRATCH, seed):
                complete.append(seed)
        return complete

    def find_crossing(self, name: str, seed: int) -> Crossing | None:
        """Where an arm reaches the same seed's from-scratch loss, its sources' FLOPs included."""
        points = [(run.spent, run.loss) for run in self.select_runs(name, seed)]
        return find_crossing(points, self._find_scratch(seed).loss)

    def compute_saving(self, name: str, seed: int, sources: bool = True) -> float | None:
        """The share of from-scratch's FLOPs saved at equal loss; None where that is not reached.

        sources: whether the sources' FLOPs count (Gopher leaves them out).
        """
        found = self.find_crossing(name, seed)
        if found is None:
            return None
        flops = found.flops
        if not sources:
            flops -= self.select_runs(name, seed)[0].flops_before
        return 1 - flops / self._find_scratch(seed).flops

    def choose_best_arms(self) -> list[str]:
        """The arms that take the further seeds: those that save most at the first seed.

        Controls are not chosen among, and take all seeds.
        """
        arms = list(self.study.arms)
        if not self.study.best:
            return arms
        controls = self.study.controls
        grown = [name for name in arms if name not in controls]
        eligible = [name for name in grown if self._is_eligible(name)]
        ranked = sorted(eligible or grown, key=self._rank)
        return [*ranked[: self.study.best], *controls]

    def _is_eligible(self, name: str) -> bool:
        """Whether an arm grows, from sources that are small enough for the headline."""
        if self.study.arms[name].control:
            return False
        return self.study.sum_shares(name) <= HEADLINE_SHARE

    def _rank(self, name: str) -> tuple[float, float]:
        """(percent of scratch's FLOPs to its loss, a loss that decides ties), at the first seed.

        Budgets are met to within a step, so arms that reach the loss with their shortest run tie in
        percent: there that run's loss decides, elsewhere the longest run's.
        """
        seed = self.study.seeds[0]
        runs = self.select_runs(name, seed)
        found = self.find_crossing(name, seed)
        if found is None:
            return math.inf, runs[-1].loss
        percent = round(100 * found.flops / self._find_scratch(seed).flops)
        deciding = runs[0] if found.at_most else runs[-1]
        return percent, deciding.loss

    def compare_arms(self, name: str) -> Measurement | None:
        """The last loss minus that of the arm that it is held against, seed by seed.

        None for an arm that is held against no other.
        """
        against = self.study.arms[name].against
        if against is None:
            return None
        others = self.find_complete_seeds(against)
        differences = []
        for seed in self.find_complete_seeds(name):
            if seed in others:
                mine = self.select_runs(name, seed)[-1].loss
                theirs = self.select_runs(against, seed)[-1].loss
                differences.append(mine - theirs)
        return compute_spread(differences)

    def describe_arm(self, name: str) -> dict[str, Any]:
        """An arm as `results.json` holds it."""
        arm = self.study.arms[name]
        sources = self.study.list_sources(name)
        growth = arm.values.get("grow") or {}
        difference = self.compare_arms(name)
        return {
            "name": name,
            "operator": ", ".join(f"{key} {value}" for key, value in growth.items()),
            "sources": sources,
            "source": describe_sizes(self.study.sources[sources[-1]].model),
            "share": self.study.sum_shares(name),
            "control": arm.control,
            "within_share": self._is_eligible(name),
            "rewarmup": self.study.find_warmup(name),
            "grown_at": self._list_growth_times(name),
            "learning_rate": self.find_best_rate(name),
            **self._describe_savings(name),
            "against": arm.against,
            "difference": None if difference is None else asdict(difference),
            "ahead": asdict(self._measure_lead(name)),
        }

    def _list_growth_times(self, name: str) -> list[float]:
        """After which part of its steps an arm grew, budget by budget; none for a control."""
        if self.study.arms[name].control:
            return []
        return [self.study.find_growth_time(name, budget) for budget in self.study.budgets]

    def _describe_savings(self, name: str) -> dict[str, Any]:
        """Whether an arm reached the from-scratch loss, what it saved, and its own last loss."""
        seeds = self.find_complete_seeds(name)
        crossings = [self.find_crossing(name, seed) for seed in seeds]
        found = [crossing for crossing in crossings if crossing is not None]
        with_sources = [self.compute_saving(name, seed) for seed in seeds]
        without_sources = [self.compute_saving(name, seed, sources=False) for seed in seeds]
        losses = [self.select_runs(name, seed)[-1].loss for seed in seeds]
        return {
            "reached": bool(seeds) and len(found) == len(crossings),
            "at_least": any(crossing.at_most for crossing in found),
            "saved": asdict(compute_spread(with_sources)),
            "saved_without_source": asdict(compute_spread(without_sources)),
            "loss": asdict(compute_spread(losses)),
        }

    def _measure_lead(self, name: str) -> Measurement:
        """The loss from scratch minus an arm's last, seed by seed."""
        leads = []
        for seed in self.find_complete_seeds(name):
            leads.append(self._find_scratch(seed).loss - self.select_runs(name, seed)[-1].loss)
        return compute_spread(leads)

    def summarize(self) -> dict[str, Any]:
        """The study as `results.json` holds it."""
        study = self.study
        scratch = self.select_runs(SCRATCH)
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
                "way": scratch[-1].way,
                "learning_rate": self.find_best_rate(SCRATCH),
                "flops": scratch[-1].flops,
                "loss": asdict(compute_spread([run.loss for run in scratch])),
            },
            "arms": [self.describe_arm(name) for name in study.arms],
            "runs": [_describe_run(run) for run in self.runs],
        }


def _describe_run(run: FinishedRun) -> dict[str, Any]:
    loss = run.loss if math.isfinite(run.loss) else None  # JSON has no infinity
    return asdict(run) | {"loss": loss}


def describe_sizes(model: Architecture) -> dict[str, int]:
    """A model's sizes and its number of parameters."""
    return {
        "layer": model.layer,
        "embed": model.embed,
        "head": model.head_count,
        "mlp": model.mlp,
        "vocab": model.vocab,
        "context": model.context,
        "parameters": model.parameters,
    }
