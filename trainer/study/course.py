"""The runs of a study, one after another in one process, each by the trainer as `growkit train` would do it.

    OUT/runs/NAME-seedS-lrR[-budgetB]    a run's directory, and its result.json when it is done

A run that is done is not done again, and one that was cut off is resumed by its own checkpoints. Knows the order, what
is decided on the way (learning rates, the arms that take further seeds) and which checkpoints to keep; leaves what runs
there are to `design` and what they say to `outcome`.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from etils import epath

from growkit.checkpoint.files import encode_json
from growkit.errors import GrowkitError, UsageError
from trainer.config.sections import resolve
from trainer.devices.hosts import write_once
from trainer.log.report import Result
from trainer.run.directory import find_changed_keys
from trainer.run.loop import DivergenceError
from trainer.study.design import SCRATCH, Design, Task
from trainer.study.outcome import FinishedRun, Outcome
from trainer.study.progress import Progress, RunProgress

RESULT = "result.json"
# train(values, out, start, show=...): a run by nested configuration values, as the verb does it.
Train = Callable[..., Result]


class Course:
    """A study on its way in the directory `out`. after: called with what is known after each run."""

    def __init__(self, study: Design, out: Path, train: Train, after: Callable[[Outcome], None]):
        # Absolute, because a run that is resumed must name its source as before.
        self.study, self.out, self.train, self.after = study, out.absolute(), train, after
        self.outcome = Outcome(study, [])

    def go(self) -> int | None:
        """Do every run that is not done; returns the signal that stopped it, None at the end."""
        with Progress() as self.progress:
            for number, (task, left) in enumerate(self._order(), 1):
                # A source may have a learning rate of its own.
                values = self.study.build_values(task, task.learning_rate or self._rate(task.name))
                name = self._named(task, f"{resolve(values).optimizer.learning_rate:g}")
                self.progress.begin(f"[{number}/{len(self.tasks)}] {name}", left)
                stopped = self._do(task, values, name)
                if stopped is not None:
                    return stopped
                self._prune()
                self.after(self.outcome)
        return None

    def _order(self) -> Iterator[tuple[Task, float]]:
        """The runs in order, the arms that take further seeds chosen on the way; with the FLOPs left from each on."""
        first = self.study.seeds[0]
        for further in (False, True):
            self.tasks = list(self.study.list_tasks(self.outcome.choose_best_arms() if further else None))
            flops = [0.0 if self._is_done(task) else self.study.count_flops(task) for task in self.tasks]
            for number, task in enumerate(self.tasks):
                if (task.seed != first) == further:
                    yield task, sum(flops[number:])

    def _is_done(self, task: Task) -> bool:
        """Whether there is a result of a run, be its learning rate not known yet."""
        rate = "*" if task.learning_rate is None else f"{task.learning_rate:g}"
        return any((self.out / "runs").glob(f"{self._named(task, rate)}/{RESULT}"))

    def _rate(self, name: str) -> float:
        """The learning rate settled for a run: the best tried, for a source the best from scratch."""
        tried = SCRATCH if name in self.study.sources else name
        rate = self.outcome.find_best_rate(tried)
        if tried == SCRATCH and math.isinf(self.outcome.select_runs(tried)[0].loss):
            rates = ", ".join(f"{each:g}" for each in self.study.learning_rates)
            raise GrowkitError(
                f"from scratch no run stayed finite at any learning rate ({rates}); try lower ones"
            )
        return rate

    def _named(self, task: Task, rate: str) -> str:
        budget = f"-budget{task.budget:g}" if task.name in self.study.arms else ""
        return f"{task.name}-seed{task.seed}-lr{rate}{budget}"

    def _do(self, task: Task, values: dict[str, Any], name: str) -> int | None:
        """Do a run, or read that it was done; returns the signal that stopped it, or came at its end."""
        source, directory, signal = self._source(task), self.out / "runs" / name, None
        done = self._read(directory, values, source and source.run)
        if done is None:
            began = time.monotonic()
            loss, signal, ended = self._train(task, values, directory, source)
            if not ended:
                return signal
            done = self._made(task, values, name, source, loss, time.monotonic() - began)
            self._write(directory, values, source and source.run, done)
            words = (
                "did not stay finite"
                if math.isinf(loss)
                else f"loss {loss:.4f} in {done.seconds:.0f} s"
            )
            self.progress.end(done.flops, words)
        self.outcome.runs.append(replace(done, tried=task.learning_rate is not None))
        return signal

    def _source(self, task: Task) -> FinishedRun | None:
        """The finished run that a run begins from."""
        chain = self.study.list_sources(task.name)
        return next(
            (
                run
                for run in self.outcome.runs
                if chain and (run.name, run.seed) == (chain[-1], task.seed)
            ),
            None,
        )

    def _train(
        self, task: Task, values: dict[str, Any], directory: Path, source: FinishedRun | None
    ) -> tuple[float, int | None, bool]:
        """A run's last validation loss, infinite where it did not stay finite; a signal that came; whether it ended."""

        def show(name: str, steps: int, first: int) -> RunProgress:
            return RunProgress(self.progress, self.study.count_flops_per_step(task.name), first)

        start = None if source is None else str(self.out / "runs" / source.run)
        try:
            result = self.train(values, directory, start, show=show)
        except DivergenceError as problem:
            if task.name in self.study.sources:
                own = f"study.sources.{task.name}.optimizer.learning_rate"
                raise GrowkitError(
                    f"{directory}: {problem}; a source needs a lower learning rate: {own}"
                ) from None
            return math.inf, None, True
        finally:
            # What has ended lies in cycles, and the next model needs its room.
            gc.collect()
        return result.validation_loss or math.nan, result.heard, result.signal is None

    def _made(
        self,
        task: Task,
        values: dict[str, Any],
        name: str,
        source: FinishedRun | None,
        loss: float,
        seconds: float,
    ) -> FinishedRun:
        return FinishedRun(
            name=task.name,
            seed=task.seed,
            learning_rate=resolve(values).optimizer.learning_rate,
            budget=task.budget,
            tried=task.learning_rate is not None,
            steps=self.study.count_steps(task),
            tokens=self.study.count_tokens(task),
            flops=self.study.count_flops(task),
            flops_before=source.spent if source else 0.0,
            loss=loss,
            seconds=seconds,
            run=name,
        )

    def _read(self, directory: Path, values: dict[str, Any], source: str | None) -> FinishedRun | None:
        """A run that was done before. Raises UsageError when it was done by other values."""
        path = directory / RESULT
        if not path.exists():
            return None
        kept = json.loads(path.read_text())
        changed = find_changed_keys(kept["values"], values)
        # Which windows a loss is of may change in a run that is resumed, and not between runs that are compared.
        changed += [] if kept["values"].get("eval") == values.get("eval") else ["eval"]
        if kept["from"] != source:
            changed.append(f"its source ({kept['from']} then, {source} now)")
        if changed:
            raise UsageError(
                f"{directory} was trained by other values of {', '.join(changed)}; name another --out"
            )
        run = kept["finished"]
        return FinishedRun(**run | {"loss": math.inf if run["loss"] is None else run["loss"]})

    def _write(
        self, directory: Path, values: dict[str, Any], start: str | None, done: FinishedRun
    ) -> None:
        run = asdict(done) | {"loss": None if math.isinf(done.loss) else done.loss}
        content = encode_json({"values": values, "from": start, "finished": run})
        directory.mkdir(parents=True, exist_ok=True)
        write_once(epath.Path(directory / RESULT), content)

    def _prune(self) -> None:
        """Keep the checkpoints of sources, and of the first seed's longest run of each arm, as models to evaluate."""
        last = {SCRATCH: 1.0} | dict.fromkeys(self.study.arms, self.study.budgets[-1])
        for run in self.outcome.runs:
            best = run.learning_rate == self.outcome.find_best_rate(run.name)
            kept = run.name in self.study.sources or (
                best and (run.seed, run.budget) == (self.study.seeds[0], last[run.name])
            )
            if not kept:
                shutil.rmtree(self.out / "runs" / run.run / "checkpoints", ignore_errors=True)
