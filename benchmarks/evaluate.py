"""How fast growkit's model in JAX is evaluated, beside lm-evaluation-harness' own model in
transformers.

python benchmarks/evaluate.py [--data DIR] [--limit N] [--batch N] [--layers N] [--embed N] [--vocab
N]

Expect a ratio (JAX over transformers) of at most 1 for each task on the CPU: the same items, the
same parameters in float32, the same number of texts at once. Both are asked every task once before
they are timed, so that programs are compiled and memory is there, and then in turns; printed are
medians, and the first times beside them. Without --data the items are made up, of the lengths that
the real ones have.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

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

ROUNDS = 3
# Words in what is asked and in what is scored, about as in the real items.
LENGTHS = {"piqa": (8, 20), "hellaswag": (40, 25), "arc_easy": (20, 4)}


def make_prose(words: int, generator: random.Random) -> str:
    """Made-up words, frequent ones short."""
    return " ".join(f"w{int(generator.paretovariate(0.7)) % 5000}" for _ in range(words))


def write_items(directory: Path, count: int) -> None:
    generator = random.Random(0)
    (directory / "bpb").mkdir(parents=True)

    def write(name: str, rows: list[dict]) -> None:
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def text(words: int) -> str:
        return make_prose(generator.randint(words // 2, words * 3 // 2), generator)

    write("lambada.jsonl", [{"text": text(75)} for _ in range(count)])
    asked, scored = LENGTHS["piqa"]
    write(
        "piqa.jsonl",
        [
            {"goal": text(asked), "sol1": text(scored), "sol2": text(scored), "label": 0}
            for _ in range(count)
        ],
    )
    asked, scored = LENGTHS["arc_easy"]
    write(
        "arc_easy.jsonl",
        [
            {"question": text(asked), "choices": [text(scored) for _ in range(4)], "gold": 0}
            for _ in range(count)
        ],
    )
    asked, scored = LENGTHS["hellaswag"]
    rows = [
        {
            "activity_label": "A",
            "ctx_a": text(asked),
            "ctx_b": "",
            "endings": [text(scored) for _ in range(4)],
            "label": 0,
        }
        for _ in range(count)
    ]
    write("hellaswag.jsonl", rows)
    write("bpb/text.jsonl", [{"text": text(1500)} for _ in range(max(1, count // 10))])


def write_model(
    directory: Path, model: Architecture, tokenizer: TextTokenizer
) -> tuple[Path, Path]:
    """The same random parameters as a checkpoint and as a Hugging Face directory."""
    generator = np.random.default_rng(0)
    recipes = {}
    for name, row, _ in model.table.names(model.sizes):
        shape = row.shape(model.sizes)
        array = (
            0.02 * generator.standard_normal(shape, np.float32) + (row.begins == "ones")
        ).astype(np.float32)
        recipes[name] = copy_tensor(wrap_array(array))
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


def time_question(model, question: harness.Question) -> float:
    begun = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # the harness' bars
        harness.ask(model, question)
    return time.perf_counter() - begun


def compare(ours, theirs, asked: list[harness.Question]) -> None:
    total = [0.0, 0.0]
    for question in asked:
        first = [time_question(model, question) for model in (ours, theirs)]
        pairs = [
            (time_question(ours, question), time_question(theirs, question)) for _ in range(ROUNDS)
        ]
        medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
        total = [before + median for before, median in zip(total, medians, strict=True)]
        click.echo(
            f"{question.name}: {question.documents} documents, JAX {medians[0]:.2f} s (at first {first[0]:.2f} s), "
            f"transformers {medians[1]:.2f} s (at first {first[1]:.2f} s), ratio {medians[0] / medians[1]:.2f}"
        )
    click.echo(
        f"all: JAX {total[0]:.1f} s, transformers {total[1]:.1f} s, ratio {total[0] / total[1]:.2f}"
    )


@click.command()
@click.option("--data", type=Path)
@click.option("--limit", default=6)
@click.option("--batch", default=8)
@click.option("--layers", default=4)
@click.option("--embed", default=256)
@click.option("--vocab", default=50304)
@click.option("--context", default=1024)
def main(
    data: Path | None, limit: int, batch: int, layers: int, embed: int, vocab: int, context: int
) -> None:
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
        asked = collect_questions(None, data, limit, lambda words: None)
        ours = load_jax_model(open_source(str(checkpoint)), tokenizer, context, batch)
        theirs = load_hugging_face_model(directory, tokenizer.end_of_text_id, context, batch)
        compare(ours, theirs, asked)


if __name__ == "__main__":
    main()
