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

from growkit.checkpoint.tensor import json_bytes
from growkit.errors import UsageError
from trainer.config import resolve
from trainer.directory import write_whole
from trainer.loop import Diverged
from trainer.report import Result
from trainer.study.design import SCRATCH, Design, Task
from trainer.study.outcome import Finished, Outcome
from trainer.study.progress import Beside, Progress

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
                rate = task.learning_rate or self._rate(task.name)
                self.progress.begin(f"[{number}/{len(self.tasks)}] {self._name(task, rate)}", left)
                stopped = self._do(task, rate)
                if stopped is not None:
                    return stopped
                self._prune()
                self.after(self.outcome)
        return None

    def _order(self) -> Iterator[tuple[Task, float]]:
        """The runs in order, the arms that take further seeds chosen on the way; with the FLOPs from each on."""
        first = self.study.seeds[0]
        for further in (False, True):
            self.tasks = list(self.study.tasks(self.outcome.best_arms() if further else None))
            flops = [self.study.steps(task) * self.study.flops_per_step(task.name) for task in self.tasks]
            for number, task in enumerate(self.tasks):
                if (task.seed != first) == further:
                    yield task, sum(flops[number:])

    def _rate(self, name: str) -> float:
        """The learning rate settled for a run: the best tried, for a source the best from scratch."""
        return self.outcome.best_rate(SCRATCH if name in self.study.sources else name)

    def _name(self, task: Task, rate: float) -> str:
        budget = f"-budget{task.budget:g}" if task.name in self.study.arms else ""
        return f"{task.name}-seed{task.seed}-lr{rate:g}{budget}"

    def _directory(self, task: Task, rate: float) -> Path:
        return self.out / "runs" / self._name(task, rate)

    def _do(self, task: Task, rate: float) -> int | None:
        """Do a run, or read that it was done; returns the signal that stopped it."""
        values, directory = self.study.values(task, rate), self._directory(task, rate)
        source = self._source(task)
        start = None if source is None else str(self.out / "runs" / source.run)
        begun_from = source and source.run
        done = self._read(directory, values, begun_from)
        if done is None:
            began = time.monotonic()
            loss, stopped = self._train(task, values, directory, start)
            if stopped is not None:
                return stopped
            done = self._made(task, resolve(values).optimizer.learning_rate, source, loss, time.monotonic() - began)
            self._write(directory, values, begun_from, done)
            words = "did not stay finite" if math.isinf(loss) else f"loss {loss:.4f} in {done.seconds:.0f} s"
            self.progress.end(done.flops, words)
        tried = task.learning_rate is not None
        self.outcome.runs.append(replace(done, tried=tried))
        return None

    def _source(self, task: Task) -> Finished | None:
        """The finished run that a run begins from."""
        chain = self.study.chain(task.name)
        return next(
            (run for run in self.outcome.runs if chain and (run.name, run.seed) == (chain[-1], task.seed)), None
        )

    def _train(
        self, task: Task, values: dict[str, Any], directory: Path, start: str | None
    ) -> tuple[float, int | None]:
        """The last validation loss of a run, infinite where it did not stay finite; the signal that stopped it."""

        def show(name: str, steps: int, first: int) -> Beside:
            return Beside(self.progress, self.study.flops_per_step(task.name))

        try:
            result = self.train(values, directory, start, show=show)
        except Diverged:
            return math.inf, None
        finally:
            # What has ended lies in cycles, and the next model needs its room.
            gc.collect()
        return (math.nan if result.validation_loss is None else result.validation_loss), result.signal

    def _made(self, task: Task, rate: float, source: Finished | None, loss: float, seconds: float) -> Finished:
        config = self.study.config
        steps = self.study.steps(task)
        return Finished(
            name=task.name,
            seed=task.seed,
            learning_rate=rate,
            budget=task.budget,
            tried=task.learning_rate is not None,
            steps=steps,
            tokens=steps * config.batch.sequences * config.model.context,
            flops=steps * self.study.flops_per_step(task.name),
            flops_before=source.spent if source else 0.0,
            loss=loss,
            seconds=seconds,
            run=self._name(task, rate),
        )

    def _read(self, directory: Path, values: dict[str, Any], start: str | None) -> Finished | None:
        """A run that was done before. Raises UsageError when it was done by other values."""
        path = directory / RESULT
        if not path.exists():
            return None
        kept = json.loads(path.read_text())
        if (kept["values"], kept["from"]) != (json.loads(json.dumps(values)), start):
            raise UsageError(f"{directory} was trained by other values than the study has now; name another --out")
        run = kept["finished"]
        return Finished(**run | {"loss": math.inf if run["loss"] is None else run["loss"]})

    def _write(self, directory: Path, values: dict[str, Any], start: str | None, done: Finished) -> None:
        run = asdict(done) | {"loss": None if math.isinf(done.loss) else done.loss}
        content = json_bytes({"values": values, "from": start, "finished": run})
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(epath.Path(directory / RESULT), content)

    def _prune(self) -> None:
        """Keep the checkpoints of sources, and of the first seed's longest run of each arm, as models to evaluate."""
        last = {SCRATCH: 1.0} | dict.fromkeys(self.study.arms, self.study.budgets[-1])
        for run in self.outcome.runs:
            best = run.learning_rate == self.outcome.best_rate(run.name)
            kept = run.name in self.study.sources or (
                best and (run.seed, run.budget) == (self.study.seeds[0], last[run.name])
            )
            if not kept:
                shutil.rmtree(self.out / "runs" / run.run / "checkpoints", ignore_errors=True)
