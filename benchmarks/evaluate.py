"""How fast growkit's model in JAX is evaluated, compared with lm-evaluation-harness's own model.

    python benchmarks/evaluate.py [--data DIR] [--limit N] [--batch N] [--layers N] [--embed N]
                                  [--vocab N] [--context N] [--rounds N]

Expect a ratio (time of JAX over time of transformers) of at most 0.7 for each task on a CPU: with
the same items, the same float32 parameters and the same batch size. Both models are asked every
task once before they are timed, so that programs are compiled and memory is allocated; then they
take turns. The script prints medians, with the first times beside them, and the median of the
rounds' ratios with the least and the largest. Without --data the items are made up, about as long
as the real ones; there is one document for bits per byte for every ten items.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from convert.directory import convert_to_directory
from convert.harness import load_hugging_face_model
from growkit.checkpoint.location import open_source, write_output
from growkit.checkpoint.tensor import Contents, copy_tensor, wrap_array
from growkit.evaluation import harness
from growkit.evaluation.questions import collect_questions
from growkit.models.architecture import Architecture
from growkit.models.gpt_neox import GPT_NEOX
from trainer.data.tokenizer import TextTokenizer, train_tokenizer, write_tokenizer
from trainer.evaluate.harness import load_jax_model

# Words in a question and in each of its answers, about as in the real items.
LENGTHS = {"piqa": (8, 20), "hellaswag": (40, 25), "arc_easy": (20, 4)}
PASSAGE = 75  # words of a LAMBADA passage
DOCUMENT = 1500  # words of a document for bits per byte
SPREAD = 0.02  # standard deviation of the parameters

Item = dict[str, Any]


def make_prose(words: int, generator: random.Random) -> str:
    """Made-up words, of which the frequent ones are short."""
    return " ".join(f"w{int(generator.paretovariate(0.7)) % 5000}" for _ in range(words))


def write_items(directory: Path, count: int) -> None:
    """Write `count` made-up items of each task, as the files that `growkit evaluate` reads."""
    generator = random.Random(0)
    (directory / "bpb").mkdir(parents=True)

    def text(words: int) -> str:
        return make_prose(generator.randint(words // 2, words * 3 // 2), generator)

    def write(name: str, make: Callable[[], Item], number: int) -> None:
        rows = [make() for _ in range(number)]
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("lambada.jsonl", lambda: {"text": text(PASSAGE)}, count)
    write("piqa.jsonl", lambda: make_piqa(text), count)
    write("arc_easy.jsonl", lambda: make_arc(text), count)
    write("hellaswag.jsonl", lambda: make_hellaswag(text), count)
    write("bpb/text.jsonl", lambda: {"text": text(DOCUMENT)}, max(1, count // 10))


def make_piqa(text: Callable[[int], str]) -> Item:
    asked, answer = LENGTHS["piqa"]
    return {"goal": text(asked), "sol1": text(answer), "sol2": text(answer), "label": 0}


def make_arc(text: Callable[[int], str]) -> Item:
    asked, answer = LENGTHS["arc_easy"]
    return {"question": text(asked), "choices": [text(answer) for _ in range(4)], "gold": 0}


def make_hellaswag(text: Callable[[int], str]) -> Item:
    asked, answer = LENGTHS["hellaswag"]
    return {
        "activity_label": "A",
        "ctx_a": text(asked),
        "ctx_b": "",
        "endings": [text(answer) for _ in range(4)],
        "label": 0,
    }


def write_model(
    directory: Path, model: Architecture, tokenizer: TextTokenizer
) -> tuple[Path, Path]:
    """Write the same random parameters as a checkpoint and as a Hugging Face directory."""
    generator = np.random.default_rng(0)
    recipes = {}
    for name, row, _ in model.table.names(model.sizes):
        shape = row.shape(model.sizes)
        mean = 1.0 if row.begins == "ones" else 0.0
        array = mean + SPREAD * generator.standard_normal(shape, np.float32)
        recipes[name] = copy_tensor(wrap_array(array.astype(np.float32)))
    (directory / "tokenizer").mkdir()
    write_tokenizer(directory / "tokenizer", tokenizer)
    files = {path.name: path.read_bytes() for path in (directory / "tokenizer").iterdir()}
    record = {"count": 0, "step": 0, "schedule_step": 0, "tokens": 0}
    write_output(
        directory / "checkpoint",
        "checkpoint",
        Contents(model.config(), {"params": recipes}, [], record, files),
    )
    source = open_source(str(directory / "checkpoint"))
    write_output(directory / "huggingface", "huggingface", convert_to_directory(source), [source])
    return directory / "checkpoint", directory / "huggingface"


def time_question(model: Any, question: harness.Question) -> float:
    """Seconds to ask a model all documents of a task."""
    begun = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # the harness's progress bars
        harness.ask(model, question)
    return time.perf_counter() - begun


def compare(ours: Any, theirs: Any, questions: list[harness.Question], rounds: int) -> None:
    """Time both models on each task, in turns, and print the ratios."""
    our_total = 0.0
    their_total = 0.0
    for question in questions:
        our_first = time_question(ours, question)
        their_first = time_question(theirs, question)
        our_times = []
        their_times = []
        for _ in range(rounds):
            our_times.append(time_question(ours, question))
            their_times.append(time_question(theirs, question))
        our_median = statistics.median(our_times)
        their_median = statistics.median(their_times)
        ratios = [one / other for one, other in zip(our_times, their_times, strict=True)]
        our_total += our_median
        their_total += their_median
        click.echo(
            f"{question.name}: {question.documents} documents, "
            f"JAX {our_median:.2f} s (at first {our_first:.2f} s), "
            f"transformers {their_median:.2f} s (at first {their_first:.2f} s), "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    click.echo(
        f"all: JAX {our_total:.1f} s, transformers {their_total:.1f} s, "
        f"ratio {our_total / their_total:.2f}"
    )


@click.command()
@click.option("--data", type=Path)
@click.option("--limit", default=6)
@click.option("--batch", default=8)
@click.option("--layers", default=4)
@click.option("--embed", default=256)
@click.option("--vocab", default=50304)
@click.option("--context", default=1024)
@click.option("--rounds", default=5)
def main(
    data: Path | None,
    limit: int,
    batch: int,
    layers: int,
    embed: int,
    vocab: int,
    context: int,
    rounds: int,
) -> None:
    """Compare both models, on the items in DATA or on made-up ones."""
    model = GPT_NEOX.model(
        layer=layers,
        embed=embed,
        head=embed // 64,
        mlp=4 * embed,
        vocab=vocab,
        context=context,
        tied=True,
    )
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        if data is None:
            data = root / "items"
            write_items(data, limit)
        tokenizer = train_tokenizer([make_prose(20_000, random.Random(1))], 4096)
        checkpoint, directory = write_model(root, model, tokenizer)
        questions = collect_questions(None, data, limit, lambda words: None)
        ours = load_jax_model(open_source(str(checkpoint)), tokenizer, context, batch)
        theirs = load_hugging_face_model(directory, tokenizer.end_of_text_id, context, batch)
        compare(ours, theirs, questions, rounds)


if __name__ == "__main__":
    main()
