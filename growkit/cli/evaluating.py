"""The verb that measures models on benchmarks: evaluate."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from growkit.cli.options import COUNT, PATH
from growkit.cli.remaining import show_remaining
from growkit.evaluation.catalogue import BPB, BPB_LIMIT, TASKS, parse_task_names

if TYPE_CHECKING:
    from growkit.checkpoint.tensor import Source
    from growkit.evaluation.harness import Answer, Question


@click.command()
@click.argument("src", nargs=-1, required=True)
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
@click.option("--batch", type=COUNT, default=8, show_default=True, metavar="N", help="Batch size.")
@click.option("--force", is_flag=True, help="Replace FILE.json and FILE.md if they exist.")
@click.option(
    "--no-verify", is_flag=True, help="Do not compare SRC with the hashes that were saved with it."
)
def evaluate(
    src: tuple[str, ...],
    tasks: str | None,
    limit: int | None,
    data: str | None,
    output: str | None,
    batch: int,
    force: bool,
    no_verify: bool,
) -> None:
    """Measure each SRC on benchmarks: accuracies, perplexities, bits per byte of any text.

    What transformers loads is run by lm-evaluation-harness' own model, any other SRC in JAX; both
    in float32. Bits per byte: one figure for each file or folder in DIR/bpb (.jsonl with
    "text", .txt, source code; compressed too).
    """
    from growkit.evaluation import report
    from growkit.evaluation.questions import collect_questions

    _check_at_least_1("limit", limit)
    _check_at_least_1("batch", batch)
    names = None if tasks is None else parse_task_names(tasks)
    files = None if output is None else check_outputs(output, force)
    models = [open_model(text) for text in src]
    if not no_verify:
        for model in models:
            model.source.require_whole()
    directory = None if data is None else Path(data)
    questions = collect_questions(names, directory, limit, _say)
    window = _choose_window(models)
    settings = {"limit": limit, "data": data, "batch": batch, "max_length": window}
    record = _measure(models, questions, settings)
    report.print_record(record)
    if files is not None:
        report.write_record(record, *files)
        click.echo(f"wrote {files[0]} and {files[1]}")


def _measure(
    models: list[Model], questions: list[Question], settings: dict[str, Any]
) -> dict[str, Any]:
    """Ask every model all questions; returns the record, see `growkit.evaluation.report`."""
    from growkit.evaluation import report

    record = report.start_record(settings | {"dtype": "float32"})
    for model in models:
        loaded = load_model(model, settings["max_length"], settings["batch"])
        answers = ask_questions(model.text, questions, loaded)
        record["models"].append(report.record_model(model.text, model.source, answers))
    return record


def _say(words: str) -> None:
    """Print a line that is not a result."""
    click.echo(words, err=True)


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


@dataclass(frozen=True)
class Model:
    """A model to be measured. text: what the user calls it."""

    text: str
    source: Source
    tokenizer: Any


def open_model(text: str) -> Model:
    """Open SRC and its tokenizer; refuse here, before loading, what could not be measured.

    Raises UsageError or GrowkitError.
    """
    from growkit.checkpoint.location import open_source
    from growkit.cli.description import is_loaded_by_transformers
    from growkit.errors import GrowkitError
    from growkit.evaluation.harness import require_harness
    from growkit.models import require_trained
    from trainer.data.tokenizer import load_model_tokenizer

    source = open_source(text)
    if not is_loaded_by_transformers(source):
        require_harness()
        require_trained(source.model, source.path)
    else:
        require_harness("torch", "transformers", "accelerate")
    tokenizer = load_model_tokenizer(source.files, source.path, source.config)
    # A tokenizer may have more tokens than the model, as one for padding. A text that has one is
    # refused when it is encoded; every text follows the end of another.
    if tokenizer.end_of_text_id >= source.model.vocab:
        raise GrowkitError(
            f"{tokenizer.end_of_text!r} of {source.path} has the id {tokenizer.end_of_text_id}, "
            f"and the vocabulary of the model is {source.model.vocab}: the tokenizer is not the "
            "one that the model was trained with"
        )
    return Model(text, source, tokenizer)


def _choose_window(models: list[Model]) -> int:
    """The shortest context: all models read the same number of tokens, so figures compare."""
    from growkit.cli.checking import choose_length

    contexts = {choose_length(model.source.model) for model in models}
    window = min(contexts)
    if len(contexts) > 1:
        _say(f"note: contexts differ, so every model reads at most {window} tokens")
    return window


def load_model(model: Model, window: int, batch: int) -> Any:
    """The model as the harness asks it: in transformers where that loads it, else in JAX."""
    from growkit.cli.description import is_loaded_by_transformers
    from growkit.lineage import Lineage

    source = model.source
    # The trainer begins texts with end-of-text, as Pythia's; other models begin as they say.
    ours = source.model.kind == "gpt_neox" or Lineage.read(source.lineage).trained
    if not is_loaded_by_transformers(source):
        from trainer.evaluate.harness import load_jax_model

        begin = None if ours else source.config.get("bos_token_id")
        return load_jax_model(source, model.tokenizer, window, batch, begin)
    from convert.harness import load_hugging_face_model

    prefix = model.tokenizer.end_of_text_id if ours else None
    return load_hugging_face_model(source.here, prefix, window, batch)


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
