"""The tasks that a run is measured on while it trains: those of `growkit evaluate`, in the run's own precision.

Knows which tasks a configuration asks for and how the parameters of the moment answer; leaves when to ask to the
loop. Imports lm_eval, through `trainer.evaluate.harness`, only where there are tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from growkit.evaluation import harness
from growkit.evaluation.catalogue import parse_task_names
from growkit.evaluation.questions import collect_questions
from growkit.models.architecture import Architecture
from trainer.config.sections import Config, Eval
from trainer.data.tokenizer import load_model_tokenizer
from trainer.devices.sharding import Layout
from trainer.model.decoder import GPTNeoX

# Texts at once, at most: their logits are held for all of them, which training spares itself.
BATCH = 64


class TaskQuestions:
    """The tasks of an eval section, their items read. Raises UsageError, GrowkitError as `growkit evaluate` does.

    notes: what is to be said about the items.
    """

    def __init__(self, settings: Eval):
        self.notes: list[str] = []
        self.questions: list[harness.Question] = []
        if settings.tasks:
            harness.require_harness()
            data = Path(settings.data) if settings.data else None
            self.questions = collect_questions(
                parse_task_names(settings.tasks), data, settings.limit or None, self.notes.append
            )

    def bind(
        self, config: Config, model: Architecture, layout: Layout, files: Mapping[str, bytes], run: Any
    ) -> Tasks | None:
        """The same, to be asked of a run's model by the tokenizer among its files; None without tasks."""
        if not self.questions:
            return None
        from trainer.evaluate.harness import JaxModel
        from trainer.evaluate.likelihood import Likelihood

        network = GPTNeoX(model, config.precision, layout=layout)
        batch = min(BATCH, config.batch.sequences // config.batch.accumulation)
        likelihood = Likelihood(network, None, config.model.context, batch)
        return Tasks(self.questions, JaxModel(likelihood, load_model_tokenizer(files, run)))


class Interrupted(Exception):
    """A signal arrived while a task was being asked."""


class Tasks:
    """Questions and the model that answers them, with whatever parameters it is given."""

    def __init__(self, asked: list[harness.Question], model: Any):
        self.asked, self.model = asked, model

    def scores(self, params: Any, stopped: Callable[[], bool]) -> dict[str, float] | None:
        """{"TASK METRIC": value} by these parameters; None when `stopped` became true meanwhile."""

        def advance(done: int) -> None:
            if stopped():
                raise Interrupted

        self.model.advance, self.model.likelihood.params = advance, params
        try:
            answers = [harness.ask(self.model, question) for question in self.asked]
        except Interrupted:
            return None
        finally:
            # The next step is given the parameters' memory.
            self.model.likelihood.params = None
        return {
            f"{a.name} {metric}": figure.value
            for a in answers
            for metric, figure in a.figures.items()
        }
