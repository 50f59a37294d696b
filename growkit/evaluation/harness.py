"""Tasks asked of a model through lm-evaluation-harness, and what it answers: figures, standard errors, versions.

The harness makes the requests and takes the metrics; here a task is built from a shipped file and local documents,
or had from the Hub, and one standard error is computed for every metric in closed form (the harness resamples in
processes of their own, which a program that runs JAX must not fork). Knows lm_eval; leaves models and files to others.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from growkit import __version__
from growkit.errors import GrowkitError
from growkit.evaluation.catalogue import TASKS
from growkit.evaluation.items import Items, draw_sample

# What is scored, as the harness has it: (texts, tokens of the context, tokens of the continuation).
Request = tuple[Any, list[int], list[int]]


@dataclass(frozen=True)
class Question:
    """A task ready to be asked. name: the task's, or bpb/PART. chosen: which of the harness's documents, None for all.

    files: sha256 of local files by path.
    """

    name: str
    task: Any
    documents: int
    total: int
    chosen: list[int] | None = None
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """A metric's value and its standard error (nan for fewer than two documents)."""

    value: float
    error: float


@dataclass(frozen=True)
class Answer:
    """What a model made of a question. cut: contexts cut on the left. documents_sha256: of the documents asked."""

    name: str
    figures: dict[str, Figure]
    documents: int
    total: int
    version: Any
    cut: int
    documents_sha256: str
    files: dict[str, str]


def require_harness(*others: str) -> None:
    """Raise GrowkitError, before any work is done, where the harness or another library is not installed."""
    for name in ("lm_eval", *others):
        if importlib.util.find_spec(name) is None:
            raise GrowkitError(f"{name} is not installed; pip install 'growkit[eval]' brings it")


def collect_versions() -> dict[str, str]:
    """The versions of the libraries that a figure rests on."""
    names = ("lm_eval", "datasets", "tokenizers", "jax", "torch", "transformers")
    return {"growkit": __version__} | {
        name: version(name) for name in names if importlib.util.find_spec(name)
    }


def build_local_question(items: Items) -> Question:
    """A question of local documents, by the task file that ships with growkit."""
    with silence_libraries():
        import datasets
        from lm_eval.api.task import ConfigurableTask

        name = items.name.split("/")[0]
        config = yaml.safe_load(
            (files("growkit.evaluation") / "tasks" / f"{name}.yaml").read_text()
        )
        data = {config["test_split"]: datasets.Dataset.from_list(items.documents)}
        task = ConfigurableTask(
            config=config | {"num_fewshot": 0, "custom_dataset": lambda **_: data}
        )
    return Question(items.name, task, len(items.documents), items.total, files=items.files)


def load_hub_question(name: str, limit: int | None) -> Question:
    """A question of the harness's own task, its items from the Hugging Face Hub or its cache. Raises GrowkitError."""
    with silence_libraries():
        import lm_eval.tasks

        folder, own = Path(lm_eval.tasks.__file__).parent / TASKS[name].folder, TASKS[name].harness
        try:
            # One folder and not all of them: to read ten thousand task files takes many seconds.
            task = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False).load(
                [own]
            )["tasks"][own]
        except Exception as problem:  # whatever the network, the Hub or its libraries say, the user needs one sentence
            words = next(iter(str(problem).strip().splitlines()), "no answer")
            raise GrowkitError(
                f"the items of {name} could not be had from the Hugging Face Hub ({type(problem).__name__}: "
                f"{words[:200]}); --data DIR takes them from local files"
            ) from None
        task.set_config(key="num_fewshot", value=0)
        total = len(task.eval_docs)
    chosen = draw_sample(range(total), limit) if limit is not None and limit < total else None
    return Question(name, task, len(chosen or range(total)), total, chosen)


def ask(model: Any, question: Question) -> Answer:
    """Ask a model, an lm_eval.api.model.LM that counts contexts it cuts in `cut`, one question."""
    key, before = question.task.config.task, model.cut
    with silence_libraries():
        from lm_eval.evaluator import evaluate

        samples = {key: question.chosen} if question.chosen else None
        tasks = {"tasks": {key: question.task}, "groups": {}}
        found = evaluate(model, tasks, samples=samples, bootstrap_iters=0, log_samples=True)
    samples = sorted(found["samples"][key], key=lambda sample: sample["doc_id"])
    shown = TASKS[question.name].metrics if question.name in TASKS else ("bits_per_byte",)
    values = {metric: found["results"][key][f"{metric},none"] for metric in shown}
    figures = {
        metric: Figure(value, ERRORS[metric]([sample[metric] for sample in samples]))
        for metric, value in values.items()
    }
    hashes = "".join(sample["doc_hash"] for sample in samples)
    return Answer(
        question.name,
        figures,
        question.documents,
        question.total,
        found["versions"][key],
        model.cut - before,
        hashlib.sha256(hashes.encode()).hexdigest(),
        question.files,
    )


def error_of_mean(values: Sequence[float]) -> float:
    """The standard error of a mean: s / sqrt(n), s with n - 1."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def error_of_perplexity(log_likelihoods: Sequence[float]) -> float:
    """The standard error of exp(-mean), to first order in that of the mean (the delta method)."""
    return math.exp(-float(np.mean(log_likelihoods))) * error_of_mean(log_likelihoods)


def error_of_bits_per_byte(pairs: Sequence[tuple[float, int]]) -> float:
    """The standard error of -sum(nats) / sum(bytes) / ln 2 over documents (log likelihood, bytes).

    That of a ratio of sums to first order: of the sum of bits_i - ratio x bytes_i, over all bytes. Cochran, Sampling
    Techniques (1977), section 2.11.
    """
    nats, sizes = np.asarray(pairs, np.float64).T
    bits = -nats / math.log(2)
    residuals = bits - bits.sum() / sizes.sum() * sizes
    return error_of_mean(list(residuals)) * len(pairs) / float(sizes.sum())


ERRORS = {
    "acc": error_of_mean,
    "acc_norm": error_of_mean,
    "perplexity": error_of_perplexity,
    "bits_per_byte": error_of_bits_per_byte,
}


class Windowed:
    """What both kinds of model have beside the harness's own class: a count of cut contexts, and progress.

    cut: contexts so far that were longer than the window, max_length tokens, leaves room for, and lost their beginning.
    expect and advance: told how many texts are about to be scored, and how many of them just were.
    """

    cut = 0
    expect: Callable[[int], None] = staticmethod(lambda count: None)
    advance: Callable[[int], None] = staticmethod(lambda count: None)

    def split_requests(self, requests: Sequence[Request]) -> tuple[list[Request], list[int]]:
        """The requests with every continuation in pieces of at most the window, and which request each piece is of.

        A piece has all before it as its context, which the model cuts on the left: the rule of rolling windows.
        Raises GrowkitError for a continuation without a token.
        """
        pieces, owners = [], []
        for number, (texts, context, continuation) in enumerate(requests):
            if not continuation:
                raise GrowkitError(
                    f"a text to be scored has no token of its own: {texts[1]!r} after {texts[0][-60:]!r}"
                )
            for first in range(0, len(continuation), self.max_length):
                piece = continuation[first : first + self.max_length]
                pieces.append((texts, context + continuation[:first], piece))
                owners.append(number)
        return pieces, owners

    def count_cut(self, requests: Sequence[Request]) -> None:
        """Add the requests whose context loses its beginning."""
        self.cut += sum(
            len(context) + len(scored) > self.max_length + 1 for _, context, scored in requests
        )


def join_scores(owners: Sequence[int], scores: Sequence[tuple[float, bool]]) -> list[tuple[float, bool]]:
    """The scores of whole requests from those of their pieces: log likelihoods added, all of them likeliest."""
    results: list[tuple[float, bool]] = []
    for owner, (score, likeliest) in zip(owners, scores, strict=True):
        if owner == len(results):
            results.append((0.0, True))
        results[owner] = (results[owner][0] + score, results[owner][1] and likeliest)
    return results


@contextmanager
def silence_libraries():
    """Without the log lines and bars of the libraries, which speak of what growkit says in its own words."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def encode_answer(answer: Answer) -> dict[str, Any]:
    """An answer as JSON has it, numbers that are not finite as null."""
    figures = {
        metric: {"value": _finite(figure.value), "standard_error": _finite(figure.error)}
        for metric, figure in answer.figures.items()
    }
    return json.loads(json.dumps({**vars(answer), "figures": figures}))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
