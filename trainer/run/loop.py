"""The loop of a run, one stage of it: from a `Beginning` to the last step, a growth, or a signal.

This is the only place where training has state. The loop dispatches step n before it reads the
metrics of step n-1, so that the device never waits for the host. It validates, asks the tasks,
saves, obeys signals, and stops at numbers that are not finite. What a step computes is
`trainer.step`'s, what a batch is `trainer.data`'s, and how a run begins is in
`trainer.run.begin`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from typing import Any, TypeVar

import jax

from growkit.errors import GrowkitError
from trainer.log.history import EARLIER
from trainer.log.report import Report, Result, Show
from trainer.log.speed import Stopwatch, Utilization
from trainer.plan.memory import require_fit, select_step
from trainer.run import announcement, growth
from trainer.run.begin import Beginning
from trainer.run.checkpoint import Snapshot
from trainer.run.interrupt import AbandonedError, Interrupt
from trainer.run.later import import_later
from trainer.run.metrics import Metrics
from trainer.run.position import Position
from trainer.run.validation import Validation, compute_validation_loss
from trainer.run.watch import Watch
from trainer.step.plateau import compute_reduction, reduce_learning_rate
from trainer.step.update import State, TrainStep, make_eval_step, make_train_step

T = TypeVar("T")


class DivergenceError(GrowkitError):
    """A loss or a gradient was not finite."""


class Run:
    """A stage of a run in progress. Make it, then call `go` once."""

    def __init__(self, beginning: Beginning) -> None:
        self.setup = beginning.setup
        self.data = self.setup.data
        self.stage = beginning.stage
        self.config = self.stage.config
        self.model = self.stage.model
        self.layout = self.stage.layout
        self.directory = beginning.directory
        self.checkpoints = self.directory.checkpoints
        self.history = self.directory.history
        self.grows = beginning.grows
        self.source_record = beginning.source_record
        self.resumed = beginning.resumed
        self.notes = beginning.notes
        self.first = beginning.step
        self.step = beginning.step
        self._take(beginning.snapshot)
        self.metrics = Metrics(self.directory, self.setup.writers, self.position, self.first)
        self.utilization = self._measure_utilization()
        self.multipliers = growth.find_multipliers(self.config.optimizer, self.lineage, self.model)
        # The losses of before a growth say nothing of plateaus after it.
        losses = self.history.list_validation_losses() if self.resumed else []
        self.reduction = compute_reduction(losses, self.config.schedule, self.lineage)
        self.train_step: TrainStep
        # With `remat: auto` choosing the step compiles, which is the business of `go`.
        if self.config.remat != "auto":
            self.train_step = self._select_step()
        self.eval_step = make_eval_step(self.config, self.model, self.layout)
        self.evaluated = False
        self.compiling = False
        self.tasks = self.setup.questions.bind(
            self.config, self.model, self.layout, self.files, self.directory.path
        )
        self.saved_at = time.monotonic()

    def _take(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot that nothing else keeps: each step donates its state's memory."""
        self.state = snapshot.state
        self.model_config = snapshot.model_config
        self.lineage = snapshot.lineage
        self.files = snapshot.files
        self.record_before = snapshot.record
        self.position = Position(
            self.config, self.model, self.data.mixture, snapshot.record, self.first
        )

    def _measure_utilization(self) -> Utilization:
        devices = self.layout.mesh.devices
        flops = self.model.flops_per_token(self.config.model.context)
        return Utilization(devices.flat[0], devices.size, flops)

    def _select_step(self) -> TrainStep:
        """Make the program of a step at the present learning rate; `remat: auto` compiles some."""
        config = reduce_learning_rate(self.config, self.reduction)
        stage = self.stage
        given = (self.model, self.multipliers, self.layout, self.lineage.grown_at, stage.part)
        self.compiled = False
        return select_step(
            config, self.layout, stage.like, lambda each: make_train_step(each, *given)
        )

    def go(self, show: Show = Report) -> Result:
        """Train to the end of the stage, or until a signal. The run is saved either way.

        show: what the user sees of it.
        """
        self.until = self._find_last_step()
        path = self.directory.path
        with (
            Interrupt() as self.interrupt,
            show(path.name, self.config.schedule.steps, self.first) as self.report,
            closing(self.setup.writers),
            closing(self.setup.trace),
            Watch(self.interrupt.agreement, self.config.log.stalled, self.report.say, path),
        ):
            self.setup.writers.begin(path, self.first)
            self._announce()
            with suppress(AbandonedError):
                self._compile()
                self._pause_at_first()
                self._train()
            self._finish()
        return self._result()

    def _find_last_step(self) -> int:
        """The step at which this stage ends; with growth at a plateau it may end earlier."""
        at = self.config.grow.at
        if self.grows and at != "plateau":
            return int(at)
        return self.config.schedule.steps

    def _announce(self) -> None:
        """Say what is trained, on what, and where it begins."""
        given = (self.setup, self.stage, self.lineage, self.position, self.utilization)
        self._say_all([*self.notes, *announcement.describe_run(*given)])
        if self.resumed:
            self.report.say(f"resumed at step {self.first}")
        else:
            self._say_event(announcement.describe_start(self.lineage, self.step))
        marked = self.multipliers is not None and self.multipliers.new is not None
        self._say_all(growth.describe_growths(self.lineage, self.model, self.config.dropout))
        self._say_all(growth.describe_new(self.config, self.stage.part, self.model, marked))
        if self.position.new:
            event = f"data stream {self.position.number} begins"
            self.report.say(f"the data differ from those drawn so far: {event}")
            self.metrics.add(self.step, event=event)
        windows = self.data.validation_fingerprint(self.config.eval.windows)
        if announcement.validates_otherwise(self.record_before, windows):
            self._say_event(announcement.OTHER_WINDOWS)

    def _say_all(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.report.say(line)

    def _say_event(self, event: str) -> None:
        """Keep an event, which the picture marks, and show it."""
        self.metrics.add(self.step, event=event)
        self.report.say(event)

    def _compile(self) -> None:
        """Compile the step, if there is one to take. Refuse a model that does not fit in memory."""
        if self.step < self.until:
            import_later()
            if self.config.remat == "auto":
                self.train_step = self._await_compiled(self._select_step)
            given = (self.config, self.layout, self.train_step, self.stage.like)
            self.report.say(self._await_compiled(lambda: require_fit(*given)))

    def _await_compiled(self, work: Callable[[], T]) -> T:
        """The result of work that compiles. Raises AbandonedError on a signal meanwhile."""
        self.compiling = True
        result = self.interrupt.compile(work, self.report.say)
        self.compiling = False
        return result

    def _pause_at_first(self) -> None:
        """Validate and ask the tasks before the first step, where that is due and was not done.

        A signal may have kept the checkpoint that is resumed from them: then it is saved again.
        """
        rows = len(self.history.rows)
        self._validate_if_due()
        self._measure_if_due()
        if self.resumed and len(self.history.rows) > rows:
            self.checkpoints.replace(self.step, self.snapshot())

    def _train(self) -> None:
        """Take steps. While one is computed, draw the next batch and read the last metrics."""
        pending = None
        self.stopwatch = Stopwatch(self.position.tokens(self.step))
        while self.step < self.until and self.interrupt.stop is None:
            self.setup.trace.update(self.step, self.state)
            batch = self.position.next_batch(self.step, self.layout)
            self.state, metrics = self._step(batch)
            self.step += 1
            if not self.compiled:
                self._first_done(metrics)
            if pending is not None:
                self._note(*pending)
            pending = (self.step, metrics)
            save = self._save_due()
            if save or self._validation_due() or self._tasks_due():
                self._note(*pending)
                pending = None
                self._pause(save)
        self.setup.trace.update(self.step, self.state)
        if pending is not None:
            self._note(*pending)

    def _step(self, batch: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        """Dispatch a step. The first one compiles its program, or reads it from the cache."""
        if self.compiled or self.step > self.first:
            return self.train_step(self.state, batch)
        return self._await_compiled(lambda: self.train_step(self.state, batch))

    def _first_done(self, metrics: dict[str, jax.Array]) -> None:
        """Wait for the first step of a program, so that compiling it does not count as training."""
        jax.block_until_ready(metrics)
        self.compiled = True
        self.stopwatch.restart(self.position.tokens(self.step))
        self.report.restart_clock(self.step)

    def _note(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Read a step's metrics. Stop where they are not finite; keep and show every few."""
        found = jax.device_get(metrics)
        load_LxX = found.pop("load", None)
        values = {name: float(value) for name, value in found.items()}
        if not all(math.isfinite(value) for value in values.values()):
            self._refuse_non_finite(step, values)
        if step % self.config.log.every and step != self.until:
            return
        speed = self.stopwatch.read(self.position.tokens(step))
        rounded = None if speed is None else round(speed, 1)
        words = self.utilization.describe(speed)
        if load_LxX is not None:
            values |= self.metrics.add_load(step, load_LxX)
            words += f"  experts {values['idlest']:.1%} to {values['busiest']:.1%}"
        self.metrics.add(step, tokens_per_second=rounded, **values)
        self.report.show_row(step, values["loss"], values["learning_rate"], words)

    def _refuse_non_finite(self, step: int, values: dict[str, float]) -> None:
        first = self.position.drawn(step - 1)
        last = self.position.drawn(step) - 1
        raise DivergenceError(
            f"step {step} is not finite (loss {values['loss']}, gradient norm "
            f"{values['gradient_norm']}), in sequences {first} to {last} of data stream "
            f"{self.position.number}; {self.checkpoints.describe_last_good()}"
        )

    def _save_due(self) -> bool:
        """Whether to save: every so many steps, or after so many minutes by any process's clock."""
        settings = self.config.checkpoint
        elapsed = time.monotonic() - self.saved_at
        passed = settings.minutes > 0 and elapsed >= 60 * settings.minutes
        any_passed = self.interrupt.ask(passed)
        return any_passed or self.step % settings.every == 0

    def _validation_due(self) -> bool:
        """Validation comes at its own steps, with every planned checkpoint, and at the end."""
        if self.step == self.until:
            return True
        every = (self.config.eval.every, self.config.checkpoint.every)
        return any(self.step % each == 0 for each in every)

    def _tasks_due(self) -> bool:
        """Tasks come at their own steps and at the end."""
        return self.step == self.until or self.step % self.config.eval.tasks_every == 0

    def _pause(self, save: bool) -> None:
        """Validate, ask the tasks and save where it is due; none of it counts as time to train."""
        self._validate_if_due()
        self._measure_if_due()
        if save:
            self._save()
        self.stopwatch.restart(self.position.tokens(self.step))

    def _validate_if_due(self) -> None:
        """Validate where it is due and was not done before a resume."""
        if not self._validation_due() or self.history.find_validation_loss(self.step) is not None:
            return
        found = self.validate()
        if found is None:
            return
        if not math.isfinite(found.loss):
            words = f"the validation loss at step {self.step} is {found.loss}"
            raise DivergenceError(f"{words}; {self.checkpoints.describe_last_good()}")
        by_set = found.by_set or None
        self.metrics.add(self.step, validation_loss=found.loss, validation_losses=by_set)
        self._say_all(found.describe(self.step))
        self._say_drawn()
        if self.step == self.first and not self.resumed:
            self._compare(found.loss)
        self._heed_plateau()
        self.metrics.draw()

    def _say_drawn(self) -> None:
        """Say what was drawn from each data set, at the end and where it is not what was asked."""
        drawn = self.position.drawn(self.step)
        stream = self.position.stream
        if drawn and (self.step == self.until or self.data.departs(stream, drawn)):
            self.report.say(self.data.describe_drawn(stream, drawn))

    def validate(self, windows: int | None = None) -> Validation | None:
        """The mean losses on the fixed windows, or so many; None when a signal cut it short."""
        given = (self.state.params, self.data, self.stage, self.interrupt.stopped)
        return compute_validation_loss(self._evaluate, *given, windows)

    def _evaluate(self, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Dispatch a part of a validation. The first one compiles its program."""
        if self.evaluated:
            return self.eval_step(params, tokens, mask)
        loss = self._await_compiled(lambda: self.eval_step(params, tokens, mask))
        self.evaluated = True
        return loss

    def _compare(self, loss: float) -> None:
        """Refuse to go on where growth was exact and the validation loss is not the source's."""
        before = self.lineage.before_last
        own = self.config.eval.windows
        count = growth.count_compared(before, self.data, self.source_record, own)
        found = self.validate(count) if count != own else Validation(loss)
        if found is None:
            return
        windows = self.data.validation_fingerprint(count)
        allowed = math.inf if self.setup.allow_gap else growth.compute_allowed_gap(self.config)
        words = growth.compare_with_source(before, found.loss, self.source_record, windows, allowed)
        if words:
            self.report.say(words if count == own else f"{words}, on its {count} windows")

    def _heed_plateau(self) -> None:
        """Where validation is flat, grow if that is to come then; else train on at a lower rate."""
        at_plateau = self.grows and self.config.grow.at == "plateau"
        if at_plateau and growth.is_growth_due(self.config, self.step, self.history):
            self.until = self.step
            return
        losses = self.history.list_validation_losses()
        reduction = compute_reduction(losses, self.config.schedule, self.lineage)
        if reduction != self.reduction:
            self.reduction = reduction
            self._say_event(f"plateau: learning rate x {reduction:g}")
            self.train_step = self._await_compiled(self._select_step)

    def _measure_if_due(self) -> None:
        """Ask the tasks where they are due and were not asked before a resume."""
        if not self.tasks or not self._tasks_due():
            return
        if self.history.find_scores(self.step) is not None:
            return
        scores = self.tasks.scores(self.state.params, self.interrupt.stopped)
        if scores is None:
            return
        self.metrics.add(self.step, scores=scores)
        words = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        self.report.say(f"step {self.step}: {words}")
        self.metrics.draw()

    def _finish(self) -> None:
        """Save the run where it stands, and let go of its directory."""
        saves = not self._is_untouched()
        if self.interrupt.stop is not None:
            ending = "saving; another signal exits without saving" if saves else "nothing to save"
            self.report.say(f"stopping at step {self.step}: {ending}")
        if saves:
            self._save()
        self.close()
        self.metrics.draw(final=True)

    def _is_untouched(self) -> bool:
        """Whether a signal came before the first step, and before the first validation was done.

        The same command then does both again, with all that is checked there.
        """
        if self.interrupt.stop is None or self.step != self.first:
            return False
        validated = self.history.find_validation_loss(self.step) is not None
        return self.resumed or self.compiling or (self._validation_due() and not validated)

    def _save(self) -> None:
        """Save this step, unless it is saved already."""
        self.history.secure(self.setup.trust.sync)
        self.metrics.loads.flush()
        snapshot = self.snapshot()
        saved = self.checkpoints.save(self.step, snapshot)
        self.saved_at = time.monotonic()
        # A validated step has had its line already.
        if saved and snapshot.record["validation_loss"] is None:
            self.report.say(f"saved at step {self.step}")

    def snapshot(self) -> Snapshot:
        """What a checkpoint of this step holds."""
        record = self.position.record(self.step) | {
            "validation_loss": self.history.find_validation_loss(self.step),
            "reduction": self.reduction,
            "validation_windows": self.data.validation_fingerprint(self.config.eval.windows),
        }
        files = dict(self.files) | {EARLIER: self.history.export()}
        return Snapshot(self.state, self.model_config, self.lineage, record, files)

    def close(self) -> None:
        """Wait for what is being saved, then let other processes into RUN."""
        self.directory.close()

    def _result(self) -> Result:
        """How the stage ended. A run is finished when its last step is validated, signal or not."""
        loss = self.history.find_validation_loss(self.step)
        signal = self.interrupt.stop
        finished = self.step == self.config.schedule.steps and loss is not None
        return Result(self.step, None if finished else signal, loss, signal, self.compiling)
