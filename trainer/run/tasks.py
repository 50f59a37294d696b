"""The tasks that a run is measured on while it trains, in the run's own precision.

They are those of `growkit evaluate`.
lm_eval is imported, through `trainer.evaluate.harness`, only where the configuration asks for
tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from growkit.evaluation import harness
from growkit.evaluation.catalogue import parse_task_names
from growkit.evaluation.questions import collect_questions
from growkit.models.architecture import Architecture
from trainer.config.sections import Config, Eval
from trainer.data.tokenizer import load_model_tokenizer
from trainer.devices.sharding import Layout
from trainer.model.decoder import Decoder

# The largest batch of texts: the logits of all of them are in memory at once, which training
# avoids.
BATCH = 64


class TaskQuestions:
    """The tasks of an eval section, with their items.

    Raises UsageError and GrowkitError as `growkit evaluate` does. notes: what to tell the user
    about the items.
    """

    def __init__(self, settings: Eval) -> None:
        self.notes: list[str] = []
        self.questions: list[harness.Question] = []
        if settings.tasks:
            harness.require_harness()
            names = parse_task_names(settings.tasks)
            data = Path(settings.data) if settings.data else None
            limit = settings.limit or None
            self.questions = collect_questions(names, data, limit, self.notes.append)

    def bind(
        self,
        config: Config,
        model: Architecture,
        layout: Layout,
        files: Mapping[str, bytes],
        run: epath.Path,
    ) -> Tasks | None:
        """The tasks for a run's model, with the tokenizer among its files; None without tasks."""
        if not self.questions:
            return None
        from trainer.evaluate.harness import JaxModel
        from trainer.evaluate.likelihood import Likelihood

        network = Decoder(model, config.precision, layout=layout)
        # No larger than a part of a training batch, which is known to fit.
        batch = min(BATCH, config.batch.sequences // config.batch.accumulation)
        likelihood = Likelihood(network, None, config.model.context, batch)
        tokenizer = load_model_tokenizer(files, run)
        return Tasks(self.questions, JaxModel(likelihood, tokenizer, model.vocab))


class Interrupted(Exception):
    """A signal arrived during a task."""


class Tasks:
    """Questions, and the model that answers them with whatever parameters it is given."""

    def __init__(self, questions: list[harness.Question], model: Any) -> None:
        self.questions = questions
        self.model = model

    def scores(self, params: Any, stopped: Callable[[], bool]) -> dict[str, float] | None:
        """{"TASK METRIC": value} with these parameters; None when `stopped` becomes true."""

        def advance(texts: int, tokens: int) -> None:
            if stopped():
                raise Interrupted

        self.model.advance = advance
        self.model.likelihood.params = params
        try:
            answers = [harness.ask(self.model, question) for question in self.questions]
        except Interrupted:
            return None
        finally:
            # The next step needs the parameters' memory.
            self.model.likelihood.params = None
        return {
            f"{answer.name} {metric}": figure.value
            for answer in answers
            for metric, figure in answer.figures.items()
        }
