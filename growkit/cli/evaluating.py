"""The verb that measures models on benchmarks: evaluate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from growkit.cli.answering import Model, open_model, split_label
from growkit.cli.options import COUNT, PATH
from growkit.cli.output import remark, show_result, tell
from growkit.cli.remaining import show_remaining
from growkit.cli.signals import leave_on_signal
from growkit.evaluation.catalogue import BPB, BPB_LIMIT, TASKS, parse_task_names

if TYPE_CHECKING:
    from growkit.evaluation.harness import Answer, Question


@click.command()
@click.argument("src", nargs=-1, required=True, metavar="[NAME=]SRC...")
@click.option(
    "--tasks",
    metavar="LIST",
    help=f"Comma-separated, of {', '.join(TASKS)} and {BPB}. Default: all.",
)
@click.option(
    "--limit",
    type=COUNT,
    metavar="N",
    help=f"Maximum items per task. Default: all, and {BPB_LIMIT} documents for {BPB}.",
)
@click.option(
    "--data",
    type=PATH,
    metavar="DIR",
    help="Read items from DIR/TASK*.jsonl and DIR/bpb/*, not the Hub.",
)
@click.option(
    "--output",
    type=PATH,
    metavar="FILE.json",
    help="Keep the figures, and write FILE.md with the tables for a model card.",
)
@click.option(
    "--reference",
    metavar="FILE",
    help="Published rows to show beside those measured: a YAML file, or 760m, which has GPT2-Large "
    "and GPT2-XL and prints the 760M run's two tables. Default: its rows, beside full sets.",
)
@click.option("--batch", type=COUNT, default=8, show_default=True, metavar="N", help="Batch size.")
@click.option("--force", is_flag=True, help="Replace FILE.json and FILE.md if they exist.")
@click.option(
    "--no-verify", is_flag=True, help="Do not compare SRC with the hashes that were saved with it."
)
@leave_on_signal()
def evaluate(
    src: tuple[str, ...],
    tasks: str | None,
    limit: int | None,
    data: str | None,
    output: str | None,
    reference: str | None,
    batch: int,
    force: bool,
    no_verify: bool,
) -> None:
    """Measure each SRC on benchmarks: accuracies, perplexities, bits per byte of any text.

    SRC is a model, or FILE.json of an earlier --output, whose rows are shown beside new ones; NAME
    is what tables call it. What transformers loads is run by lm-evaluation-harness' own model, any
    other SRC in JAX; both in float32. Bits per byte: one figure for each file or folder in DIR/bpb
    (.jsonl with "text", .txt, source code; compressed too).
    """
    from growkit.evaluation import report
    from growkit.evaluation.reference import read_reference

    _check_at_least_1("limit", limit)
    _check_at_least_1("batch", batch)
    names = None if tasks is None else parse_task_names(tasks)
    published = None if reference is None else read_reference(reference)
    files = None if output is None else check_outputs(output, force)
    words = [split_label(word) for word in src]
    settings = {"limit": limit, "data": data, "batch": batch}
    record = _make_record(words, names, settings, not no_verify)
    if files is not None:
        report.write_record(record, *files, published)
    show_result(lambda: report.print_record(record, published), record)
    if files is not None:
        tell(f"wrote {files[0]} and {files[1]}")


def _make_record(
    words: Sequence[tuple[str | None, str]],
    names: list[str] | None,
    settings: dict[str, Any],
    verify: bool,
) -> dict[str, Any]:
    """The record of all models, those of earlier files where they were named.

    words: (label or None, what was named) of each. names: of the tasks. settings: limit, data and
    batch. verify: whether models are compared with their hashes.
    """
    from growkit.evaluation import report
    from growkit.evaluation.questions import collect_questions

    kept = {
        n: report.take_rows(Path(t), label) for n, (label, t) in enumerate(words) if _is_kept(t)
    }
    models = {n: open_model(t, label) for n, (label, t) in enumerate(words) if n not in kept}
    if not models:
        (first, *_), *_ = kept.values()
        record = report.start_record(first["settings"])
        return record | {"models": [row for rows in kept.values() for row in rows]}
    if verify:
        for model in models.values():
            model.require_whole()
    directory = None if settings["data"] is None else Path(settings["data"])
    questions = collect_questions(names, directory, settings["limit"], _say)
    window = _choose_window(list(models.values()))
    record = report.start_record(settings | {"max_length": window, "dtype": "float32"})
    for number in range(len(words)):
        rows = kept.get(number) or [_measure(models[number], questions, record["settings"])]
        record["models"] += rows
    return record


def _is_kept(text: str) -> bool:
    """Whether this is a file that `--output` wrote, by its name."""
    return text.endswith(".json") and not Path(text).is_dir()


def _measure(model: Model, questions: list[Question], settings: dict[str, Any]) -> dict[str, Any]:
    """Ask a model all questions; returns what a record keeps of it."""
    from growkit.evaluation import report

    loaded = model.load(settings["max_length"], settings["batch"])
    answers = ask_questions(model.label or model.text, questions, loaded)
    return report.record_model(model.text, model.label, model.describe(), answers)


def _say(words: str) -> None:
    """Print a line that is not a result."""
    remark(words)


def _check_at_least_1(option: str, value: int | None) -> None:
    from growkit.errors import UsageError

    if value is not None and value < 1:
        raise UsageError(f"--{option} must be at least 1, got {value}")


def check_outputs(text: str, force: bool) -> tuple[Path, Path]:
    """FILE.json and FILE.md. Raises UsageError if they must not be written."""
    from growkit.errors import UsageError

    path = Path(text)
    if path.suffix != ".json":
        raise UsageError(
            f"--output is the name of a .json file (a .md is written beside it), got {text!r}"
        )
    card = path.with_suffix(".md")
    for each in (path, card):
        if each.is_dir():
            raise UsageError(f"{each} is not a file")
        if each.exists() and not force:
            raise UsageError(f"the output exists: {each}; --force replaces it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path, card


def _choose_window(models: Sequence[Model]) -> int:
    """The shortest context: all models read the same number of tokens, so figures compare."""
    contexts = {model.window for model in models}
    window = min(contexts)
    if len(contexts) > 1:
        _say(f"note: contexts differ, so every model reads at most {window} tokens")
    return window


def ask_questions(name: str, questions: list[Question], model: Any) -> list[Answer]:
    """A model's answers; shows the time left of each question, and a line after it."""
    from growkit.evaluation.harness import ask

    answers = []
    for number, question in enumerate(questions, 1):
        began = time.monotonic()
        with show_remaining(f"{name}: {question.name} ({number} of {len(questions)})", model):
            answers.append(ask(model, question))
        seconds = time.monotonic() - began
        _say(f"{name}: {question.name}, {question.documents:,} documents in {seconds:.1f} s")
    return answers


COMMANDS = {"evaluate": evaluate}
