"""One run of training, from a configuration to a directory of checkpoints, metrics and a picture.

    RUN/config.yaml   the resolved configuration and the source     RUN/metrics.csv   a row every few steps
    RUN/checkpoints/STEP/                                           RUN/curves.png    perplexity over tokens

The only stateful file: it dispatches step n before it reads the metrics of step n-1, validates, saves, obeys
signals and stops at numbers that are not finite. What a step does, what a batch is, what is kept and how it
is shown is each somebody else's.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import closing
from typing import Any

import jax
import numpy as np
from etils import epath

from growkit.checkpoint.files import is_remote
from growkit.checkpoint.location import open_source
from growkit.checkpoint.tensor import Source
from growkit.entries import Branch, Origin, Training
from growkit.errors import GrowkitError
from growkit.lineage import Lineage
from growkit.models.architecture import Architecture
from growkit.surgery.grow import open_grown
from trainer.config.sections import Config, build_architecture
from trainer.data.corpus import Corpus, open_corpus
from trainer.data.stream import validation_batches
from trainer.devices.hosts import is_writer
from trainer.devices.sharding import make_layout, place
from trainer.log import curves
from trainer.log.history import EARLIER, History
from trainer.log.report import Report, Result
from trainer.log.speed import Stopwatch, Utilization
from trainer.log.trace import Trace
from trainer.log.writers import Writers
from trainer.model.decoder import init_params
from trainer.model.kernels import select_kernel
from trainer.plan.memory import require_fit, select_step
from trainer.run import growth
from trainer.run.checkpoint import Checkpoints, find_last_step, from_source
from trainer.run.directory import open_run
from trainer.run.interrupt import Interrupt
from trainer.run.position import Position
from trainer.run.tasks import TaskQuestions
from trainer.run.watch import Watch
from trainer.step.optimizer import Multipliers
from trainer.step.plateau import compute_reduction, reduce_learning_rate
from trainer.step.update import (
    State,
    abstract_state,
    check_precision,
    init_state,
    make_eval_step,
    make_train_step,
)

DRAWN_EVERY = 60.0


class DivergenceError(GrowkitError):
    """A loss or a gradient was not finite."""


class Run:
    """A run in progress. `source` is the model it starts from, None for a new one or when the run has a checkpoint."""

    def __init__(
        self,
        config: Config,
        out: str | os.PathLike,
        source: Source | None = None,
        start: str | None = None,
        allow_gap: bool = False,
        branch: Branch | None = None,
    ):
        self.source, self.allow_gap, self.branch = source, allow_gap, branch
        self.directory = epath.Path(out)
        check_precision(config)
        self.growth_to_come = growth.plan_later_growth(config)
        if self.growth_to_come:
            # Refused now where the grown model does not lie on the mesh, and not when its step has come.
            make_layout(growth.grow_config(config, self.growth_to_come), self.growth_to_come.grown)
        self._lay_out(config, build_architecture(config.model))
        self.data: Corpus = open_corpus(config, source)
        self.asked = TaskQuestions(config.eval)
        self.writers, self.trace = Writers(config), Trace(config.log.profile, self.directory)
        self.held = open_run(
            self.directory, config, start, source, find_last_step(self.directory) is not None
        )
        self.checkpoints = Checkpoints(self.directory, config.checkpoint)
        self.history = History(self.directory)
        last = self.checkpoints.last
        self.first = self.step = last or 0
        self.resumed = last is not None and not self._grows_now(last)
        record = self._resume(last) if self.resumed else self._begin()
        self.position = Position(self.config, self.model, self.data.mixture, record, self.first)
        self.utilization = self._utilization()
        self.multipliers = self._multipliers()
        self._make_train_step(self.history.list_validation_losses() if self.resumed else [])
        self.eval_step = make_eval_step(self.config, self.model, self.layout)
        self.tasks = self.asked.bind(
            self.config, self.model, self.layout, self.files, self.directory
        )
        self.saved_at = time.monotonic()
        self.drawn_at = time.monotonic()

    def _lay_out(self, config: Config, model: Architecture) -> None:
        """Take the configuration and the model that this loop trains, and where its state lies."""
        self.config, self.model, self.layout = config, model, make_layout(config, model)
        self.like = abstract_state(config, model, self.layout)

    def _grows_now(self, last: int) -> bool:
        """Whether the growth on the way comes at RUN's last checkpoint. From there on the grown model is the run's."""
        plan = self.growth_to_come
        if plan is None:
            return False
        self.history.keep_until(last)
        made = self.checkpoints.model(last).sizes == plan.grown.sizes
        if not made:
            self.history.forget_growth(last)
            if not self._growth_due():
                return False
            self.source = open_source(f"{self.directory}@{last}")
        self.growth_to_come = None
        self._lay_out(growth.grow_config(self.config, plan), plan.grown)
        return not made

    def _growth_due(self) -> bool:
        """Whether this step, once it is validated, is the one to grow at."""
        if self.growth_to_come is None or self.step == self.config.schedule.steps:
            return False
        validated = self.history.find_validation_loss(self.step) is not None
        return validated and growth.is_growth_due(
            self.config, self.step, self.history.list_validation_losses()
        )

    def _make_train_step(self, losses: list[float]) -> None:
        """The program of a step, at the learning rate that the plateaus of these validation losses leave."""
        self.reduction = compute_reduction(losses, self.config.schedule, self.lineage)
        config, grown_at = (
            reduce_learning_rate(self.config, self.reduction),
            self.lineage.grown_at,
        )
        others = (self.model, self.multipliers, self.layout, grown_at)
        self.train_step = select_step(
            config, self.layout, self.like, lambda each: make_train_step(each, *others)
        )
        self.compiled = False

    def _new_state(self) -> State:
        """A new model's state, made where it lies."""

        def make() -> State:
            params = init_params(self.model, self.config.precision, self.config.seed)
            return init_state(self.config, self.model, params)

        return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.like))()

    def _resume(self, last: int) -> dict[str, Any]:
        """Go on from a checkpoint of this run; returns its record."""
        self.state, meta = self.checkpoints.restore(last, self.like)
        self.hf_config, self.lineage = meta["config"], Lineage.read(meta["lineage"])
        self.files = {
            name: text for name, text in self.checkpoints.files(last).items() if name != EARLIER
        }
        self.history.keep_until(last)
        return meta["record"]

    def _begin(self) -> dict[str, Any]:
        """Begin with the source, grown first if the configuration says so, or with a new model; returns its record."""
        source, end = self.source, self.data.end_of_text
        origin = Origin.of(source) if source else None
        plan = (
            growth.plan_growth(self.config.grow, source.model)
            if source and not self.growth_to_come
            else None
        )
        source = open_grown(source, plan) if plan else source
        continued = self.config.schedule.continued
        state = from_source(source, self.like, continued) if source else self._new_state()
        self.state = state._replace(step=place(np.int32(self.step), self.like.step.sharding))
        base = source.config if source else {"bos_token_id": end, "eos_token_id": end}
        self.hf_config = self.model.config(base)
        before = Lineage.read(source.lineage if source else [])
        applied = (
            growth.select_multipliers(self.config.optimizer.multipliers, before, self.model)
            is not None
        )
        entry = Training(
            source=origin, multipliers=applied, config=self.config.to_dict(), branch=self.branch
        )
        self.lineage = before.followed_by(entry)
        carried = dict(source.files) if source else {}
        earlier = carried.pop(EARLIER, b"")
        if not self.step:
            self.history.begin(earlier)
        self.files = carried | ({} if "tokenizer.json" in carried else self.data.tokenizer)
        return source.record if source else {}

    def _multipliers(self) -> Multipliers | None:
        """What the growths before this training ask of the optimizer, where this run applies it."""
        applied = "on" if self.lineage.last_training.multipliers else "off"
        return growth.select_multipliers(applied, self.lineage.before_last, self.model)

    def _utilization(self) -> Utilization:
        devices = self.layout.mesh.devices
        return Utilization(
            devices.flat[0], devices.size, self.model.flops_per_token(self.config.model.context)
        )

    def record(self) -> dict[str, Any]:
        """The run's position, for a checkpoint."""
        return self.position.record(self.step) | {
            "validation_loss": self.history.find_validation_loss(self.step),
            "reduction": self.reduction,
            "validation_windows": self.data.validation_fingerprint(self.config.eval.windows),
        }

    def go(self, show: type[Report] = Report) -> Result:
        """Train to the end, or until a signal; the run is saved either way. show: what the user sees of it."""
        steps = self.until = self.config.schedule.steps
        if self.growth_to_come and self.config.grow.at != "plateau":
            self.until = int(self.config.grow.at)
        report = show(self.directory.name, steps, self.first)
        with (
            Interrupt() as self.interrupt,
            report as self.report,
            closing(self.writers),
            closing(self.trace),
            Watch(
                self.interrupt.agreement, self.config.log.stalled, self.report.say, self.directory
            ),
        ):
            self.writers.begin(self.directory, self.first)
            self._announce()
            if self.step < self.until:
                self.report.say(require_fit(self.config, self.layout, self.train_step, self.like))
            self._validate_if_due()
            self._measure_if_due()
            self._train()
            if self.interrupt.stop is not None:
                self.report.say(
                    f"stopping at step {self.step}: saving; another signal ends it at once, unsaved"
                )
            self._save()
            self.close()
            self._draw(final=True)
        loss = self.history.find_validation_loss(self.step)
        finished = self.step == steps and loss is not None
        stop = self.interrupt.stop
        return Result(self.step, None if finished else stop, loss, stop)

    def close(self) -> None:
        """Wait for what is being saved, then let others into RUN. After a failure the end of the process does it."""
        self.checkpoints.close()
        if self.held is not None:
            self.held.close()

    def _announce(self) -> None:
        model, before = self.config.model, self.lineage.last_training.source
        origin = f", from {before.path}" if before else ", new"
        self.report.say(
            f"model: {model.layer} layers, embed {model.embed}, {model.head} heads, mlp {model.mlp}, "
            f"{self.model.parameters:,} parameters{origin}"
        )
        drawn = self.position.drawn(self.config.schedule.steps)
        attention = select_kernel(self.config, self.model, self.layout).words
        for line in (
            *self.data.describe(drawn),
            *self.asked.notes,
            attention,
            self.utilization.formula,
        ):
            self.report.say(line)
        if self.resumed:
            self.report.say(f"resumed at step {self.first}")
        else:
            beginning = growth.describe_beginning(self.lineage, self.step)
            self._row(self.step, event=beginning)
            self.report.say(beginning)
        for line in growth.describe_growths(self.lineage, self.model, self.config.dropout):
            self.report.say(line)
        if self.position.new:
            self.report.say(
                f"other data than those drawn from so far: data stream {self.position.number} begins"
            )
            self._row(self.step, event=f"data stream {self.position.number} begins")

    def _row(self, step: int, **values: Any) -> None:
        position = self.position
        row = self.history.add(
            step=step, tokens=position.tokens(step), flops=position.flops(step), **values
        )
        self.writers.add(row)

    def _train(self) -> None:
        """The loop: while a step is computed, the next batch is drawn and the last step's metrics are read."""
        pending = None
        self.stopwatch = Stopwatch(self.position.tokens(self.step))
        while self.step < self.until and self.interrupt.stop is None:
            self.trace.update(self.step, self.state)
            self.state, metrics = self.train_step(
                self.state, self.position.next_batch(self.step, self.layout)
            )
            self.step += 1
            if not self.compiled:
                self._first_done(metrics)
            if pending is not None:
                self._note(*pending)
            pending = (self.step, metrics)
            save = self._save_due()
            if self._validation_due() or self._tasks_due() or save:
                self._note(*pending)
                pending = None
                self._validate_if_due()
                self._measure_if_due()
                if save:
                    self._save()
                self.stopwatch.restart(self.position.tokens(self.step))
        self.trace.update(self.step, self.state)
        if pending is not None:
            self._note(*pending)

    def _first_done(self, metrics: dict[str, jax.Array]) -> None:
        """Wait for the first step of a program, so that compiling it counts neither as speed nor in the time left."""
        jax.block_until_ready(metrics)
        self.compiled = True
        self.stopwatch.restart(self.position.tokens(self.step))
        self.report.restart_clock(self.step)

    def _save_due(self) -> bool:
        settings = self.config.checkpoint
        passed = (
            bool(settings.minutes) and time.monotonic() - self.saved_at >= 60 * settings.minutes
        )
        return self.interrupt.ask(passed) or self.step % settings.every == 0

    def _validation_due(self) -> bool:
        """Validation comes at its own steps, with every planned checkpoint, and at both ends."""
        every = (self.config.eval.every, self.config.checkpoint.every)
        return self.step == self.until or any(self.step % each == 0 for each in every)

    def _note(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Read a finished step's metrics; stop at numbers that are not finite; show and keep every few."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not all(math.isfinite(value) for value in values.values()):
            self._refuse_non_finite(step, values)
        if step % self.config.log.every and step != self.until:
            return
        speed = self.stopwatch.read(self.position.tokens(step))
        self._row(step, tokens_per_second=speed and round(speed, 1), **values)
        self.report.show_row(
            step, values["loss"], values["learning_rate"], self.utilization.describe(speed)
        )

    def _refuse_non_finite(self, step: int, values: dict[str, float]) -> None:
        position = self.position
        first, last = position.drawn(step - 1), position.drawn(step) - 1
        raise DivergenceError(
            f"step {step} is not finite (loss {values['loss']}, gradient norm {values['gradient_norm']}), in sequences "
            f"{first} to {last} of data stream {position.number}; {self._last_good()}"
        )

    def _last_good(self) -> str:
        self.checkpoints.wait()
        last = self.checkpoints.last
        return (
            "no checkpoint was saved yet"
            if last is None
            else f"the last good checkpoint is {self.directory}@{last}"
        )

    def _validate_if_due(self) -> None:
        """Validate where it is due and was not done before a resume."""
        if not self._validation_due() or self.history.find_validation_loss(self.step) is not None:
            return
        loss = self.validate()
        if loss is None:
            return
        if not math.isfinite(loss):
            raise DivergenceError(
                f"the validation loss at step {self.step} is {loss}; {self._last_good()}"
            )
        self._row(self.step, validation_loss=loss)
        self.report.say(
            f"step {self.step}: validation loss {loss:.4f}, perplexity {math.exp(min(loss, 30)):.2f}"
        )
        if self.position.drawn(self.step):
            self.report.say(
                self.data.describe_drawn(self.position.stream, self.position.drawn(self.step))
            )
        if self.step == self.first and not self.resumed:
            self._compare(loss)
        self._heed_plateau()
        self._draw()

    def _tasks_due(self) -> bool:
        """Tasks come at their own steps and at both ends."""
        return self.step == self.until or self.step % self.config.eval.tasks_every == 0

    def _measure_if_due(self) -> None:
        """Ask the tasks where they are due and were not asked before a resume."""
        if (
            not self.tasks
            or not self._tasks_due()
            or self.history.find_scores(self.step) is not None
        ):
            return
        scores = self.tasks.scores(self.state.params, self.interrupt.stopped)
        if scores is not None:
            self._row(self.step, scores=scores)
            self.report.say(
                f"step {self.step}: {', '.join(f'{name} {value:.4g}' for name, value in scores.items())}"
            )
            self._draw()

    def _compare(self, loss: float) -> None:
        """Exact growth leaves the validation loss as it was; refuse to go on where it did not."""
        source = self.source.record if self.source else {}
        windows = self.data.validation_fingerprint(self.config.eval.windows)
        allowed = math.inf if self.allow_gap else growth.compute_allowed_gap(self.config)
        if said := growth.compare_with_source(
            self.lineage.before_last, loss, source, windows, allowed
        ):
            self.report.say(said)

    def _heed_plateau(self) -> None:
        """Where validation is flat, grow if that is to come then, else train on at a lower rate."""
        if self.config.grow.at == "plateau" and self._growth_due():
            self.until = self.step
            return
        losses = self.history.list_validation_losses()
        if compute_reduction(losses, self.config.schedule, self.lineage) != self.reduction:
            self._make_train_step(losses)
            event = f"plateau: learning rate x {self.reduction:g}"
            self._row(self.step, event=event)
            self.report.say(event)

    def validate(self) -> float | None:
        """The mean loss, nats a token, on the fixed windows; None when a signal cut it short."""
        settings = self.config
        shards, windows = self.layout.batch_shards, settings.eval.windows
        batch = min(
            settings.batch.sequences // settings.batch.accumulation, -(-windows // shards) * shards
        )
        sums: list[jax.Array] = []
        count = 0
        for tokens, mask in validation_batches(self.data.validation, batch, windows):
            if self.interrupt.stopped():
                return None
            parts = (place(part, self.layout.batch_sharding()) for part in (tokens, mask))
            sums.append(self.eval_step(self.state.params, *parts))
            count += int(mask.sum()) * settings.model.context
            # One batch ahead of the device and no more, so that a signal need not wait for all of them.
            sums[-2:][0].block_until_ready()
        return math.fsum(float(part) for part in sums) / count

    def _save(self) -> None:
        """Save this step, unless it is saved already."""
        if is_remote(self.directory):
            self.history.flush()
        files = self.files | {EARLIER: self.history.export()}
        record = self.record()
        saved = self.checkpoints.save(
            self.step, self.state, self.hf_config, self.lineage.to_json(), record, files
        )
        self.saved_at = time.monotonic()
        if saved and record["validation_loss"] is None:
            self.report.say(f"saved at step {self.step}")

    def _draw(self, final: bool = False) -> None:
        """The picture, at most once a minute and at the end."""
        if not is_writer() or not final and time.monotonic() - self.drawn_at < DRAWN_EVERY:
            return
        rows = self.history.earlier + self.history.rows
        if any(row["loss"] or row["validation_loss"] or row.get("scores") for row in rows):
            curves.draw_curves(self.directory / "curves.png", rows, self.directory.name)
        self.drawn_at = time.monotonic()
