"""Ask a model the tasks of lm-evaluation-harness: figures, standard errors, versions.

The harness makes the requests and computes the metrics. A task comes from a task file shipped with
growkit and local documents, or from the Hub. Standard errors are computed here in closed form: the
harness resamples in forked processes, and a process that runs JAX must not fork.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from growkit import __version__
from growkit.checkpoint.files import replace_nonfinite
from growkit.errors import GrowkitError, first_line
from growkit.evaluation.catalogue import TASKS, Task
from growkit.evaluation.items import Items, draw_sample

# A scoring request of the harness: (texts, tokens of the context, tokens of the continuation).
Request = tuple[Any, list[int], list[int]]
# The libraries that a figure depends on.
LIBRARIES = ("lm_eval", "datasets", "tokenizers", "jax", "torch", "transformers")


@dataclass(frozen=True)
class Question:
    """A task ready to be asked.

    name: the task's name, or bpb/PART. documents: how many are asked, of `total`. chosen: which of
    the harness's documents, or None for all. files: sha256 of local files by path.
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
    """A model's result on a question.

    cut: how many contexts lost their beginning because the window is shorter. documents_sha256:
    hash of the documents that were asked.
    """

    name: str
    figures: dict[str, Figure]
    documents: int
    total: int
    version: Any
    cut: int
    documents_sha256: str
    files: dict[str, str]


def require_harness(*others: str) -> None:
    """Raise GrowkitError, before any work is done, if the harness or another library is missing."""
    for name in ("lm_eval", *others):
        if importlib.util.find_spec(name) is None:
            raise GrowkitError(f"{name} is not installed; pip install 'growkit[eval]' brings it")


def collect_versions() -> dict[str, str]:
    """The version of growkit and of every installed library that a figure depends on."""
    installed = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    return {"growkit": __version__} | {name: version(name) for name in installed}


def build_local_question(items: Items) -> Question:
    """A question of local documents, by the task file that ships with growkit."""
    name = items.name.split("/")[0]
    file = files("growkit.evaluation") / "tasks" / f"{name}.yaml"
    config = yaml.safe_load(file.read_text())
    with silence_libraries():
        import datasets
        from lm_eval.api.task import ConfigurableTask

        data = {config["test_split"]: datasets.Dataset.from_list(items.documents)}
        config |= {"num_fewshot": 0, "custom_dataset": lambda **_: data}
        task = ConfigurableTask(config=config)
    return Question(items.name, task, len(items.documents), items.total, files=items.files)


def load_hub_question(name: str, limit: int | None) -> Question:
    """A question of the harness's own task, with items from the Hugging Face Hub or its cache.

    limit: how many items to draw, or None for all. Raises GrowkitError if the Hub does not answer.
    """
    with silence_libraries():
        try:
            task = _load_harness_task(TASKS[name])
        except Exception as problem:  # the network, the Hub and its libraries raise many types
            raise GrowkitError(
                f"the items of {name} could not be had from the Hugging Face Hub "
                f"({type(problem).__name__}: {first_line(problem)}); --data DIR takes them from "
                "local files"
            ) from None
        task.set_config(key="num_fewshot", value=0)
        total = len(task.eval_docs)
    if limit is None or limit >= total:
        return Question(name, task, total, total)
    chosen = draw_sample(range(total), limit)
    return Question(name, task, len(chosen), total, chosen)


def _load_harness_task(task: Task) -> Any:
    """The harness's own task. One folder is read: reading all 10,000 task files takes seconds."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / task.folder
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    return manager.load([task.harness])["tasks"][task.harness]


def ask(model: Any, question: Question) -> Answer:
    """Ask a model one question.

    model: an lm_eval.api.model.LM that is a WindowedModel as well.
    """
    key = question.task.config.task
    chosen = {key: question.chosen} if question.chosen else None
    tasks = {"tasks": {key: question.task}, "groups": {}}
    cut_before = model.cut
    with silence_libraries():
        from lm_eval.evaluator import evaluate

        found: Any = evaluate(model, tasks, samples=chosen, bootstrap_iters=0, log_samples=True)
    samples = sorted(found["samples"][key], key=lambda sample: sample["doc_id"])
    shown = TASKS[question.name].metrics if question.name in TASKS else ("bits_per_byte",)
    figures = {}
    for metric in shown:
        error = ERRORS[metric]([sample[metric] for sample in samples])
        figures[metric] = Figure(found["results"][key][f"{metric},none"], error)
    hashes = "".join(sample["doc_hash"] for sample in samples)
    return Answer(
        name=question.name,
        figures=figures,
        documents=question.documents,
        total=question.total,
        version=found["versions"][key],
        cut=model.cut - cut_before,
        documents_sha256=hashlib.sha256(hashes.encode()).hexdigest(),
        files=question.files,
    )


def error_of_mean(values: Sequence[float]) -> float:
    """The standard error of a mean: s / sqrt(n), where s divides by n - 1."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def error_of_perplexity(log_likelihoods: Sequence[float]) -> float:
    """The standard error of exp(-mean), to first order in that of the mean (the delta method)."""
    return math.exp(-float(np.mean(log_likelihoods))) * error_of_mean(log_likelihoods)


def error_of_bits_per_byte(pairs: Sequence[tuple[float, int]]) -> float:
    """The standard error of -sum(nats) / sum(bytes) / ln 2 over documents.

    pairs: (log likelihood in nats, bytes) of each document. To first order, a ratio of sums has the
    standard error of the sum of bits_i - ratio x bytes_i, divided by all bytes. Source: Cochran,
    Sampling Techniques (1977), section 2.11.
    """
    nats, sizes = np.asarray(pairs, np.float64).T
    bits = -nats / math.log(2)
    residuals = bits - bits.sum() / sizes.sum() * sizes
    return error_of_mean(list(residuals)) * len(pairs) / float(sizes.sum())


ERRORS: dict[str, Callable[[list[Any]], float]] = {
    "acc": error_of_mean,
    "acc_norm": error_of_mean,
    "perplexity": error_of_perplexity,
    "bits_per_byte": error_of_bits_per_byte,
}


class WindowedModel:
    """What both kinds of model add to the harness's own class.

    max_length: tokens of the window. cut: how many contexts so far were longer than the window has
    room for and lost their beginning. expect(texts, tokens): called before so many texts, which
    have so many tokens together, are scored. advance(texts, tokens): called when some of them were.
    """

    max_length: int
    cut = 0
    expect: Callable[[int, int], None] = staticmethod(lambda texts, tokens: None)
    advance: Callable[[int, int], None] = staticmethod(lambda texts, tokens: None)

    def split_requests(self, requests: Sequence[Request]) -> tuple[list[Request], list[int]]:
        """(requests whose continuations fit the window, which of the requests given each is of).

        The context of each piece is all that comes before it. The model cuts that on the left,
        which is the rule of rolling windows. Raises GrowkitError for a continuation without tokens.
        """
        pieces: list[Request] = []
        owners: list[int] = []
        for number, (texts, context, continuation) in enumerate(requests):
            if not continuation:
                before = texts[0][-60:]
                raise GrowkitError(
                    f"a text to be scored has no token of its own: {texts[1]!r} after {before!r}"
                )
            for first in range(0, len(continuation), self.max_length):
                piece = continuation[first : first + self.max_length]
                pieces.append((texts, context + continuation[:first], piece))
                owners.append(number)
        return pieces, owners

    def count_tokens(self, requests: Sequence[Request]) -> int:
        """How many tokens a model reads to score requests; all but the last of each."""
        sizes = [len(context) + len(scored) - 1 for _, context, scored in requests]
        return sum(min(size, self.max_length) for size in sizes)

    def count_cut(self, requests: Sequence[Request]) -> None:
        """Count the requests whose context loses its beginning."""
        for _, context, scored in requests:
            # The last token is scored and not read, so one more than the window has room.
            if len(context) + len(scored) > self.max_length + 1:
                self.cut += 1


def join_scores(
    owners: Sequence[int], scores: Sequence[tuple[float, bool]]
) -> list[tuple[float, bool]]:
    """The scores of whole requests from those of their pieces.

    owners: which request each piece is of, in order. A score is (log likelihood, whether every
    token was the likeliest); log likelihoods are added.
    """
    results: list[tuple[float, bool]] = []
    for owner, (score, likeliest) in zip(owners, scores, strict=True):
        if owner == len(results):
            results.append((0.0, True))
        total, all_likeliest = results[owner]
        results[owner] = (total + score, all_likeliest and likeliest)
    return results


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Without the log lines and progress bars of other libraries; growkit has its own."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def encode_answer(answer: Answer) -> dict[str, Any]:
    """An answer in JSON's types; numbers that are not finite are None."""
    figures = {
        metric: {"value": figure.value, "standard_error": figure.error}
        for metric, figure in answer.figures.items()
    }
    plain = {**vars(answer), "figures": replace_nonfinite(figures)}
    decoded: dict[str, Any] = json.loads(json.dumps(plain))
    return decoded
