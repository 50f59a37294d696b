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
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath

from growkit import __version__
from growkit.checkpoint.tensor import Source
from growkit.errors import GrowkitError
from growkit.neox import NeoX, write_config
from growkit.surgery import provenance
from trainer import curves
from trainer.checkpoint import Checkpoints, from_source
from trainer.config import Config, neox
from trainer.corpus import Corpus, open_corpus
from trainer.data import Stream, validation_batches
from trainer.directory import begin
from trainer.history import History
from trainer.interrupt import Interrupt
from trainer.model import initial_params
from trainer.report import Report
from trainer.step import initial_state, make_eval_step, make_train_step

DRAWN_EVERY = 60.0


@dataclass(frozen=True)
class Result:
    """How a run ended: at which step, by which signal (None: it is finished), with which validation loss."""

    step: int
    signal: int | None
    validation_loss: float | None


class Run:
    """A run in progress. `source` is the model it starts from, None for a new one or when the run exists."""

    def __init__(self, config: Config, out: str | os.PathLike, source: Source | None = None, start: str | None = None):
        self.config, self.source, self.start = config, source, start
        self.directory = epath.Path(out)
        self.model: NeoX = neox(config.model)
        self.data: Corpus = open_corpus(config, source)
        begin(self.directory, config, start, source)
        self.checkpoints = Checkpoints(self.directory, config.checkpoint)
        self.train_step = make_train_step(config, self.model)
        self.eval_step = make_eval_step(config, self.model)
        self._begin_state()
        self.validation_loss: float | None = None
        self.saved_at = time.monotonic()
        self.drawn_at = 0.0

    def _begin_state(self) -> None:
        """The state to go on from: the last checkpoint's, the source's, or a new one."""
        last = self.checkpoints.last
        fresh = initial_state(
            self.config, self.model, initial_params(self.model, self.config.precision, self.config.seed)
        )
        if last is not None:
            self.state, meta = self.checkpoints.restore(last, fresh)
            self.hf_config, self.lineage, record = meta["config"], meta["lineage"], meta["record"]
            self.files = {name: text for name, text in self.checkpoints.files(last).items() if name != "history.csv"}
            self.history = History(self.directory)
            self.history.keep_until(last)
            self.first = last
        else:
            self.state = from_source(self.source, fresh) if self.source else fresh
            self.first = 0
            self._begin_from_source()
            record = self.source.record if self.source else {}
        self.step = self.first
        self._begin_counts(record)

    def _begin_from_source(self) -> None:
        source = self.source
        base = (
            source.config if source else {"bos_token_id": self.data.end_of_text, "eos_token_id": self.data.end_of_text}
        )
        self.hf_config = write_config(self.model, base)
        entry = provenance(source) if source else {"growkit": __version__}
        self.lineage = [
            *(source.lineage if source else []),
            entry | {"operation": "train", "config": self.config.to_dict()},
        ]
        carried = dict(source.files) if source else {}
        earlier = carried.pop("history.csv", b"")
        self.files = carried | ({} if "tokenizer.json" in carried else self.data.tokenizer)
        self.history = History(self.directory, earlier if earlier else None)
        self.history.rows = []

    def _begin_counts(self, record: dict[str, Any]) -> None:
        """Tokens and FLOPs since the lineage began, and the place in the data stream."""
        per_step = self.config.batch.sequences * self.config.model.context
        self.tokens_before = record.get("tokens", 0) - self.first * per_step
        self.flops_per_token = self.model.flops_per_token(self.config.model.context)
        self.flops_before = record.get("flops", 0.0) - self.first * per_step * self.flops_per_token
        stream = record.get("stream")
        number, seed, drawn = (
            (stream["number"], stream["seed"], stream["drawn"]) if stream else (0, self.config.seed, 0)
        )
        self.stream = Stream(self.data.mixture, seed)
        self.new_stream = bool(stream) and stream["fingerprint"] != self.stream.fingerprint
        if self.new_stream:
            # Other data: a stream of its own, so that a text that is in both is not drawn in the same order again.
            number, drawn = number + 1, 0
            self.stream = Stream(self.data.mixture, self.config.seed + number)
        self.stream_number = number
        self.drawn_before = drawn - self.first * self.config.batch.sequences

    @property
    def drawn(self) -> int:
        """Sequences drawn from the stream before the next step."""
        return self.drawn_before + self.step * self.config.batch.sequences

    def tokens(self, step: int) -> int:
        """Tokens seen since the lineage began, at a step of this run."""
        return self.tokens_before + step * self.config.batch.sequences * self.config.model.context

    def record(self) -> dict[str, Any]:
        """The run's position, for a checkpoint."""
        seen = self.tokens(self.step) - self.tokens_before
        return {
            "tokens": self.tokens(self.step),
            "flops": self.flops_before + seen * self.flops_per_token,
            "validation_loss": self.validation_loss,
            "stream": {
                "number": self.stream_number,
                "seed": self.stream.seed,
                "drawn": self.drawn,
                "fingerprint": self.stream.fingerprint,
            },
        }

    def go(self) -> Result:
        """Train to the end, or until a signal; the run is saved either way."""
        steps = self.config.schedule.steps
        name = self.directory.name
        with Interrupt() as interrupt, Report(name, steps, self.first) as self.report:
            self.interrupt = interrupt
            self._announce()
            if self.step < steps or not self.history.validated(self.step):
                self._validate_if_due()
                self._train(steps)
                self._save(planned=interrupt.received is None)
            self.checkpoints.wait()
            self._draw(final=True)
            self.checkpoints.close()
            stopped = interrupt.received if self.step < steps else None
        return Result(self.step, stopped, self.validation_loss)

    def _announce(self) -> None:
        for line in self.data.facts():
            self.report.say(line)
        if self.first:
            self.report.say(f"resumed at step {self.first}")
            return
        event = "start"
        grown = [entry for entry in self.lineage if "sizes" in entry]
        if self.source and grown and self.lineage[-2] is grown[-1]:
            before, after = grown[-1]["sizes"]["before"], grown[-1]["sizes"]["after"]
            changed = (f"{axis} {before[axis]} to {after[axis]}" for axis in after if before[axis] != after[axis])
            event = f"start, grown: {', '.join(changed)}"
        self.history.add(step=0, tokens=self.tokens(0), flops=self.record()["flops"], event=event)
        if self.new_stream:
            self.report.say(f"the data differ from the source's: data stream {self.stream_number} begins")
            self.history.add(step=0, tokens=self.tokens(0), event=f"data stream {self.stream_number} begins")

    def _train(self, steps: int) -> None:
        """The loop: while a step is computed, the next batch is drawn and the last step's metrics are read."""
        settings = self.config
        pending = None
        self.timed = (time.monotonic(), self.step)
        while self.step < steps and self.interrupt.received is None:
            tokens = self.stream.batch(self.drawn, settings.batch.sequences)
            shape = (settings.batch.accumulation, -1, tokens.shape[1])
            self.state, metrics = self.train_step(self.state, tokens.reshape(shape))
            self.step += 1
            if pending is not None:
                self._note(*pending)
            pending = (self.step, metrics)
            if self._anything_due():
                self._note(*pending)
                pending = None
                self._validate_if_due()
                if self.interrupt.received is None:
                    self._save_if_due()
                self.timed = (time.monotonic(), self.step)
        if pending is not None:
            self._note(*pending)

    def _anything_due(self) -> bool:
        return self._validation_due() or self.step % self.config.checkpoint.every == 0 or self._minutes_passed()

    def _minutes_passed(self) -> bool:
        minutes = self.config.checkpoint.minutes
        return bool(minutes) and time.monotonic() - self.saved_at >= 60 * minutes

    def _validation_due(self) -> bool:
        """Validation comes at its own steps, with every planned checkpoint, and at both ends."""
        every = (self.config.eval.every, self.config.checkpoint.every)
        return self.step == self.config.schedule.steps or any(self.step % each == 0 for each in every)

    def _note(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Read a finished step's metrics; stop at numbers that are not finite; show and keep every few."""
        values = {name: float(value) for name, value in metrics.items()}
        if not all(math.isfinite(value) for value in values.values()):
            self._refuse_non_finite(step, values)
        if step % self.config.log.every and step != self.config.schedule.steps:
            return
        now = time.monotonic()
        begun, first = self.timed
        speed = self.tokens(step) - self.tokens(first)
        speed = speed / max(now - begun, 1e-9)
        self.timed = (now, step)
        seen = self.tokens(step) - self.tokens_before
        flops = self.flops_before + seen * self.flops_per_token
        self.history.add(step=step, tokens=self.tokens(step), flops=flops, tokens_per_second=round(speed, 1), **values)
        self.report.row(step, values["loss"], values["learning_rate"], speed)

    def _refuse_non_finite(self, step: int, values: dict[str, float]) -> None:
        last = self.checkpoints.last
        before = self.drawn_before + (step - 1) * self.config.batch.sequences
        good = (
            f"the last good checkpoint is {self.directory}@{last}"
            if last is not None
            else "no checkpoint was saved yet"
        )
        raise GrowkitError(
            f"step {step} is not finite (loss {values['loss']}, gradient norm {values['gradient_norm']}), in sequences "
            f"{before} to {before + self.config.batch.sequences - 1} of data stream {self.stream_number}; {good}"
        )

    def _validate_if_due(self) -> None:
        """Validate where it is due and has not been done before a resume."""
        if not self._validation_due():
            self.validation_loss = None
            return
        if self.history.validated(self.step):
            rows = [row for row in self.history.rows if row["step"] == str(self.step) and row["validation_loss"]]
            self.validation_loss = float(rows[-1]["validation_loss"])
            return
        loss = self.validate()
        if loss is None:
            return
        self.validation_loss = loss
        self.history.add(
            step=self.step, tokens=self.tokens(self.step), flops=self.record()["flops"], validation_loss=loss
        )
        self.report.say(f"step {self.step}: validation loss {loss:.4f}, perplexity {math.exp(min(loss, 30)):.2f}")
        self._draw()

    def validate(self) -> float | None:
        """The mean loss, nats a token, on the fixed windows; None when a signal cut it short."""
        settings = self.config
        batch = min(settings.batch.sequences // settings.batch.accumulation, settings.eval.windows)
        total, count = [], 0
        for tokens, mask in validation_batches(self.data.validation, batch, settings.eval.windows):
            if self.interrupt.received is not None:
                return None
            total.append(self.eval_step(self.state.params, tokens, mask))
            count += int(mask.sum()) * settings.model.context
        return math.fsum(float(part) for part in total) / count

    def _save_if_due(self) -> None:
        if self.step % self.config.checkpoint.every == 0 or self._minutes_passed():
            self._save(planned=self.step % self.config.checkpoint.every == 0)

    def _save(self, planned: bool) -> None:
        """Save this step. A planned checkpoint has a validation loss; one forced by a signal or the clock may not."""
        if not planned and not self.history.validated(self.step):
            self.validation_loss = None
        files = self.files | {"history.csv": self.history.carried()}
        self.checkpoints.save(self.step, self.state, self.hf_config, self.lineage, self.record(), files)
        self.saved_at = time.monotonic()
        if self.history.remote:
            self.history.flush()
        if not planned:
            self.report.say(f"saved at step {self.step}")

    def _draw(self, final: bool = False) -> None:
        """The picture, at most once a minute and at the end."""
        if not final and time.monotonic() - self.drawn_at < DRAWN_EVERY:
            return
        rows = self.history.earlier + self.history.rows
        if any(row["loss"] or row["validation_loss"] for row in rows):
            curves.draw(self.directory / "curves.png", rows, self.directory.name)
        self.drawn_at = time.monotonic()
