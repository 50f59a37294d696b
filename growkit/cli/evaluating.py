"""The verb that measures models on benchmarks: evaluate."""

from __future__ import annotations

import time
from contextlib import contextmanager
from pathlib import Path

import click


@click.command()
@click.argument("src", nargs=-1, required=True)
@click.option(
    "--tasks",
    metavar="LIST",
    help="Of lambada, piqa, hellaswag, winogrande, arc_easy, arc_challenge and bpb, with commas; default: all.",
)
@click.option(
    "--limit",
    type=int,
    metavar="N",
    help="Items of a task at most. Default: all, and 3000 documents for bpb.",
)
@click.option(
    "--data", metavar="DIR", help="Items from DIR/TASK*.jsonl and DIR/bpb/* and not from the Hub."
)
@click.option(
    "--output",
    metavar="FILE.json",
    help="Keep the figures, and FILE.md with the tables for a model card.",
)
@click.option("--batch", default=8, show_default=True, metavar="N", help="Texts at once.")
@click.option("--force", is_flag=True, help="Replace FILE.json and FILE.md if they exist.")
def evaluate(
    src: tuple[str, ...],
    tasks: str | None,
    limit: int | None,
    data: str | None,
    output: str | None,
    batch: int,
    force: bool,
) -> None:
    """Measure each SRC on benchmarks: accuracies, perplexities, bits per byte of any text.

    A Hugging Face directory through lm-evaluation-harness' own model, a trainer checkpoint in JAX, in float32 both.
    Bits per byte: one figure for each file or folder in DIR/bpb (.jsonl with "text", .txt, source code; gzipped too).
    """
    from growkit.errors import UsageError
    from growkit.evaluation import report
    from growkit.evaluation.catalogue import parse_task_names
    from growkit.evaluation.questions import collect_questions

    for name, value in (("limit", limit), ("batch", batch)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
    names = None if tasks is None else parse_task_names(tasks)
    kept = None if output is None else check_outputs(output, force)
    models = open_models(src)
    asked = collect_questions(
        names,
        Path(data) if data is not None else None,
        limit,
        lambda words: click.echo(words, err=True),
    )
    window = min(source.model.context for _, source, _ in models)
    if len({source.model.context for _, source, _ in models}) > 1:
        click.echo(f"note: contexts differ, so every model reads at most {window} tokens", err=True)
    settings = {
        "limit": limit,
        "data": data,
        "batch": batch,
        "max_length": window,
        "dtype": "float32",
    }
    record = report.start_record(settings)
    for text, source, tokenizer in models:
        results = ask_questions(text, asked, load_model(source, tokenizer, window, batch))
        record["models"].append(report.record_model(text, source, results))
    report.print_record(record)
    if kept is not None:
        report.write_record(record, *kept)
        click.echo(f"wrote {kept[0]} and {kept[1]}")


def check_outputs(text: str, force: bool) -> tuple[Path, Path]:
    """FILE.json and FILE.md. Raises UsageError where they must not, and OSError where they cannot be written."""
    from growkit.errors import UsageError

    path = Path(text)
    if path.suffix != ".json":
        raise UsageError(
            f"--output is the name of a .json file (a .md is written beside it), got {text!r}"
        )
    both = path, path.with_suffix(".md")
    for each in both:
        if each.is_dir() or (each.exists() and not force):
            raise UsageError(
                f"the output exists: {each}; --force replaces it"
                if each.is_file()
                else f"{each} is no file"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    return both


def open_models(texts: tuple[str, ...]) -> list[tuple]:
    """(SRC, source, tokenizer) of each, all that can be refused before a model is loaded refused."""
    from growkit.checkpoint.location import open_source
    from growkit.errors import GrowkitError
    from growkit.evaluation.harness import require_harness
    from growkit.models import require_trained
    from trainer.data.tokenizer import load_model_tokenizer

    found = []
    for text in texts:
        source = open_source(text)
        require_harness(
            *(("torch", "transformers", "accelerate") if source.kind == "huggingface" else ())
        )
        if source.kind == "checkpoint":
            require_trained(source.model, source.path)
        tokenizer = load_model_tokenizer(source.files, source.path)
        if tokenizer.vocab_size > source.model.vocab:
            raise GrowkitError(
                f"the tokenizer of {source.path} gives ids up to {tokenizer.vocab_size - 1}, and the vocabulary of the "
                f"model is {source.model.vocab}: it is not the one the model was trained with"
            )
        found.append((text, source, tokenizer))
    return found


def load_model(source, tokenizer, window: int, batch: int):
    """The model of a source as the harness asks it: transformers' for a directory, ours for a checkpoint."""

    if source.kind == "checkpoint":
        from trainer.evaluate.harness import load_jax_model

        return load_jax_model(source, tokenizer, window, batch)
    from convert.harness import load_hugging_face_model

    prefix = tokenizer.end_of_text_id if source.model.kind == "gpt_neox" else None
    return load_hugging_face_model(source.here, prefix, window, batch)


def ask_questions(name: str, asked: list, model) -> list:
    """What a model makes of each question, a bar on a terminal while it does and a line when it has."""
    from growkit.evaluation.harness import ask

    results = []
    for number, question in enumerate(asked, 1):
        began = time.monotonic()
        with show_progress(f"{name}: {question.name} ({number} of {len(asked)})", model):
            results.append(ask(model, question))
        seconds = time.monotonic() - began
        click.echo(
            f"{name}: {question.name}, {question.documents:,} documents in {seconds:.1f} s",
            err=True,
        )
    return results


@contextmanager
def show_progress(words: str, model):
    """A bar of the texts that a model has scored, on a terminal."""
    import sys

    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(words, total=None)
        model.expect = lambda count: progress.update(task, total=count)
        model.advance = lambda count: progress.advance(task, count)
        yield
    del model.expect, model.advance


COMMANDS = {"evaluate": evaluate}
