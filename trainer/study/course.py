"""The runs of a study, one after another in one process, each as `growkit train` would do it.

    OUT/runs/NAME-seedS-lrR[-budgetB]    a run's directory, with result.json when the run is done

A run that is done is not repeated, and a run that was interrupted resumes from its own checkpoints.
Decisions that need results are made on the way: the best learning rates, and the arms that take
further seeds.
"""

from __future__ import annotations

import gc
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from etils import epath

from growkit.checkpoint.files import encode_json, read_json
from growkit.errors import GrowkitError, UsageError
from trainer.config.sections import resolve
from trainer.devices.hosts import write_once
from trainer.log.report import Result, Show
from trainer.run.directory import find_changed_keys
from trainer.run.loop import DivergenceError
from trainer.study.design import SCRATCH, Design, Task
from trainer.study.outcome import FinishedRun, Outcome
from trainer.study.progress import Progress, RunProgress

RESULT = "result.json"

Values = dict[str, Any]


class Train(Protocol):
    """Trains a run by nested configuration values, or resumes it.

    start: the model to begin from, None for a new one. show: makes what the user sees of the run.
    """

    def __call__(
        self, values: Values, out: Path, start: str | None = None, *, show: Show
    ) -> Result: ...


@dataclass(frozen=True)
class PlannedRun:
    """A task with all that its run needs.

    source: the finished run that it begins from, None for one that starts anew.
    """

    task: Task
    name: str
    values: Values
    directory: Path
    source: FinishedRun | None

    @property
    def source_name(self) -> str | None:
        return None if self.source is None else self.source.run


class Course:
    """A study in progress in the directory `out`.

    after: called with the outcome so far after each run. quiet: whether warnings alone are shown.
    """

    def __init__(
        self,
        study: Design,
        out: Path,
        train: Train,
        after: Callable[[Outcome], None],
        quiet: bool = False,
    ):
        self.study = study
        # Absolute: a run that is resumed must name its source as it did before.
        self.out = out.absolute()
        self.train = train
        self.after = after
        self.quiet = quiet
        self.outcome = Outcome(study, [])
        self.tasks: list[Task] = []

    def go(self) -> int | None:
        """Do every run that is not done; returns the signal that stopped it, None at the end."""
        with Progress(self.quiet) as self.progress:
            for number, (task, left) in enumerate(self._order_tasks(), 1):
                run = self._plan_run(task)
                self.progress.begin(f"[{number}/{len(self.tasks)}] {run.name}", left)
                stopped = self._do(run)
                if stopped is not None:
                    return stopped
                self._remove_checkpoints()
                self.after(self.outcome)
        return None

    def _order_tasks(self) -> Iterator[tuple[Task, float]]:
        """(task, FLOPs of it and of all tasks after it that are not done).

        First those of the first seed; then, with the best arms known, those of the further seeds.
        """
        first = self.study.seeds[0]
        for further in (False, True):
            chosen = self.outcome.choose_best_arms() if further else None
            self.tasks = list(self.study.list_tasks(chosen))
            flops = [self._count_flops_to_do(task) for task in self.tasks]
            for number, task in enumerate(self.tasks):
                if (task.seed != first) == further:
                    yield task, sum(flops[number:])

    def _count_flops_to_do(self, task: Task) -> float:
        if self._is_done(task):
            return 0.0
        return self.study.count_flops(task)

    def _is_done(self, task: Task) -> bool:
        """Whether there is a result of a task, even if its learning rate is not known yet."""
        rate = "*" if task.learning_rate is None else f"{task.learning_rate:g}"
        if task.name == SCRATCH and task.way is None:
            task = replace(task, way="*" if any(self.study.ways) else "")
        pattern = f"{self._name_run(task, rate)}/{RESULT}"
        return any((self.out / "runs").glob(pattern))

    def _plan_run(self, task: Task) -> PlannedRun:
        if task.name == SCRATCH and task.way is None:
            task = replace(task, way=self.outcome.select_runs(SCRATCH)[0].way)
        source = self._find_source(task)
        rate = task.learning_rate or self._find_rate(task.name, source)
        values = self.study.build_values(task, rate)
        # Read back from the values: a source may state a learning rate of its own.
        rate = resolve(values).optimizer.learning_rate
        name = self._name_run(task, f"{rate:g}")
        return PlannedRun(task, name, values, self.out / "runs" / name, source)

    def _find_rate(self, name: str, source: FinishedRun | None) -> float:
        """The best learning rate of those tried; for a source, of those tried from scratch.

        source: where a run begins; an arm may go on at its rate.
        """
        if source is not None and self.study.takes_rate_of_source(name):
            return source.learning_rate
        tried = SCRATCH if name in self.study.sources else name
        best = self.outcome.select_runs(tried)[0]
        if tried == SCRATCH and math.isinf(best.loss):
            rates = ", ".join(f"{rate:g}" for rate in self.study.learning_rates)
            raise GrowkitError(
                f"no run from scratch stayed finite at any learning rate ({rates}); try lower ones"
            )
        return best.learning_rate

    def _name_run(self, task: Task, rate: str) -> str:
        budget = f"-budget{task.budget:g}" if task.name in self.study.arms else ""
        way = f"-{task.way}" if task.way else ""
        return f"{task.name}{way}-seed{task.seed}-lr{rate}{budget}"

    def _find_source(self, task: Task) -> FinishedRun | None:
        """The finished run that a task begins from; None for one that starts anew."""
        sources = self.study.list_sources(task.name)
        if not sources:
            return None
        for run in self.outcome.runs:
            if run.name == sources[-1] and run.seed == task.seed:
                return run
        return None

    def _do(self, run: PlannedRun) -> int | None:
        """Do a run unless it is done; returns the signal that stopped it, or arrived at its end."""
        signal = None
        done = self._read_result(run)
        if done is None:
            begun = time.monotonic()
            result = self._train(run)
            if result is not None and result.signal is not None:
                return result.signal
            done = self._finish(run, result, time.monotonic() - begun)
            signal = None if result is None else result.heard
        tried = run.task.learning_rate is not None
        self.outcome.runs.append(replace(done, tried=tried))
        return signal

    def _train(self, run: PlannedRun) -> Result | None:
        """Train a run; None when it diverged."""

        def show(name: str, steps: int, first: int) -> RunProgress:
            return RunProgress(self.progress, self.study.count_flops_per_step(run.task.name), first)

        start = None if run.source is None else str(self.out / "runs" / run.source.run)
        try:
            return self.train(run.values, run.directory, start, show=show)
        except DivergenceError as problem:
            name = run.task.name
            if name in self.study.sources:
                raise GrowkitError(
                    f"{run.directory}: {problem}; a source needs a lower learning rate: "
                    f"study.sources.{name}.optimizer.learning_rate"
                ) from None
            return None
        finally:
            # The ended run is kept alive by reference cycles, and the next model needs its memory.
            gc.collect()

    def _finish(self, run: PlannedRun, result: Result | None, seconds: float) -> FinishedRun:
        """Record a run that ended. result: None for one that diverged."""
        if result is None:
            loss = math.inf
            words = "did not stay finite"
        else:
            loss = result.validation_loss or math.nan
            words = f"loss {loss:.4f} in {seconds:.0f} s"
        done = self._describe_finished(run, loss, seconds)
        self._write_result(run, done)
        self.progress.end(done.flops, words)
        return done

    def _describe_finished(self, run: PlannedRun, loss: float, seconds: float) -> FinishedRun:
        task = run.task
        return FinishedRun(
            name=task.name,
            seed=task.seed,
            learning_rate=resolve(run.values).optimizer.learning_rate,
            budget=task.budget,
            way=task.way or "",
            tried=task.learning_rate is not None,
            steps=self.study.count_steps(task),
            tokens=self.study.count_tokens(task),
            flops=self.study.count_flops(task),
            flops_before=0.0 if run.source is None else run.source.spent,
            loss=loss,
            seconds=seconds,
            run=run.name,
        )

    def _read_result(self, run: PlannedRun) -> FinishedRun | None:
        """The result of a run that is done; None for any other.

        Raises UsageError when the run was trained with other values, GrowkitError for a file that
        is damaged.
        """
        path = run.directory / RESULT
        if not path.exists():
            return None
        kept = read_json(path)
        try:
            return self._take_result(kept, run)
        except (AttributeError, KeyError, TypeError):
            raise GrowkitError(
                f"{path} is damaged: it is not what a study writes there; remove it, and the study "
                "takes the result from the run again"
            ) from None

    def _take_result(self, kept: Any, run: PlannedRun) -> FinishedRun:
        """What a result's file says. Raises UsageError when the run had other values."""
        changed = find_changed_keys(kept["values"], run.values)
        # A run may be resumed with other validation windows, but losses of other windows cannot be
        # compared.
        if kept["values"].get("eval") != run.values.get("eval"):
            changed.append("eval")
        if kept["from"] != run.source_name:
            changed.append(f"its source ({kept['from']} then, {run.source_name} now)")
        if changed:
            raise UsageError(
                f"{run.directory} was trained with other values of {', '.join(changed)}; "
                "name another --out"
            )
        finished = kept["finished"]
        if finished["loss"] is None:
            finished["loss"] = math.inf
        return FinishedRun(**finished)

    def _write_result(self, run: PlannedRun, done: FinishedRun) -> None:
        finished = asdict(done)
        if math.isinf(done.loss):
            finished["loss"] = None  # JSON has no infinity
        content = {"values": run.values, "from": run.source_name, "finished": finished}
        run.directory.mkdir(parents=True, exist_ok=True)
        write_once(epath.Path(run.directory / RESULT), encode_json(content))

    def _remove_checkpoints(self) -> None:
        """Remove the checkpoints that no later run and no evaluation needs."""
        for run in self.outcome.runs:
            if not self._is_kept(run):
                checkpoints = self.out / "runs" / run.run / "checkpoints"
                shutil.rmtree(checkpoints, ignore_errors=True)

    def _is_kept(self, run: FinishedRun) -> bool:
        """Sources are kept; so is, of scratch and each arm, the first seed's longest best run."""
        if run.name in self.study.sources:
            return True
        longest = 1.0 if run.name == SCRATCH else self.study.budgets[-1]
        is_best = run in self.outcome.select_runs(run.name)
        return is_best and run.seed == self.study.seeds[0] and run.budget == longest
