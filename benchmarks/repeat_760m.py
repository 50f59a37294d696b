"""The way of the 760M run, whole, at tiny scale: every command of docs/runs/repeat-760m.md.

    python benchmarks/repeat_760m.py [--work DIR]

The commands are read from the page and run in DIR, in order, with tiny sizes in the place of large
ones; each is printed as it is run. Texts, items of tasks and two tiny GPT-2s are made here, from a
fixed seed; nothing is downloaded. Two devices share the work, so that the optimizer's state is
sharded. It takes a few minutes on two cores. What comes out is checked in `check_results`; how good
these models are means nothing.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

PAGE = Path(__file__).resolve().parents[1] / "docs" / "runs" / "repeat-760m.md"
VOCAB = 512
CONTEXT = 64
# Megabytes of each set in the log are kilobytes here, times ten: a quarter of Books3 is drawn from.
SIZES = {"openwebtext": 400, "philpapers": 20, "books2": 60, "books3": 1000, "pg19": 100}
MODEL = f"model.embed=32 model.head=4 model.mlp=64 model.vocab={VOCAB}"
RUN = (
    # No whole number of sequences: 8 of 64 tokens are the nearest.
    f"{MODEL} model.context={CONTEXT} batch.tokens=500 schedule.steps=24 "
    "schedule.warmup=4 eval.every=8 eval.windows=16 checkpoint.every=12 log.every=4"
)
PLAN = f"{MODEL} model.context={CONTEXT} batch.sequences=8"
# What is given in addition, or instead, by the first words of a command.
MORE = {
    "plan": PLAN,
    "train 580m": RUN,
    "train 760m": RUN,
    "train 1b": f"{RUN} model.context={CONTEXT // 2} schedule.tokens=6k",
}
INSTEAD = {"v3-32": "cpu", "5B": "4k"}
# Documents of the first part of the Pile: more than are asked.
DOCUMENTS = 3005


def read_commands(page: Path = PAGE) -> list[list[str]]:
    """The growkit commands in the shell blocks of a page, in order, as words."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("growkit ")]


def shrink(words: list[str]) -> list[str]:
    """A command with tiny sizes."""
    more = next((MORE[key] for key in MORE if " ".join(words).startswith(key)), "")
    return [*(INSTEAD.get(word, word) for word in words), *more.split()]


def make_prose(size: int, generator: random.Random) -> Iterator[str]:
    """Sentences of about `size` characters in all, of words that follow each other by a rule."""
    while size > 0:
        number = generator.randrange(97)
        words = []
        for _ in range(generator.randint(5, 15)):
            words.append(f"{'bcdfgklmnprst'[number % 13]}{'aeiou'[number % 5]}{number % 7}")
            # Mostly a fixed successor, so that there is something to learn.
            follows = (number * 5 + 3) % 97
            number = follows if generator.random() < 0.9 else generator.randrange(97)
        sentence = f"{' '.join(words).capitalize()}."
        size -= len(sentence) + 1
        yield sentence


def make_document(size: int, generator: random.Random) -> str:
    """Made-up prose of about so many characters."""
    return " ".join(make_prose(size, generator))


def write_lines(path: Path, rows: list[Any]) -> None:
    """Write JSON lines, compressed where the name says so."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_texts(root: Path, generator: random.Random) -> None:
    """The five sets: JSON lines, plain and compressed, and files of one document each."""
    for name, kilobytes in SIZES.items():
        count = max(2, kilobytes // 10)
        texts = [make_document(1000 * kilobytes // count, generator) for _ in range(count)]
        if name in ("openwebtext", "philpapers"):
            ending = ".jsonl.gz" if name == "openwebtext" else ".jsonl"
            write_lines(root / name / f"part{ending}", [{"text": text} for text in texts])
            continue
        (root / name).mkdir(parents=True)
        for number, text in enumerate(texts):
            (root / name / f"{number:03}.txt").write_text(text)


def write_items(root: Path, generator: random.Random) -> None:
    """Items of the three tasks, and documents of the five parts of the Pile."""

    def text(size: int) -> str:
        return make_document(size, generator).rstrip(".")

    write_lines(root / "lambada.jsonl", [{"text": text(80)} for _ in range(12)])
    choices = [{"goal": text(40), "sol1": text(40), "sol2": text(40), "label": 0} for _ in range(9)]
    write_lines(root / "piqa.jsonl", choices)
    endings = [
        {
            "activity_label": "A",
            "ctx_a": text(60),
            "ctx_b": "",
            "endings": [text(30) for _ in range(4)],
            "label": 1,
        }
        for _ in range(6)
    ]
    write_lines(root / "hellaswag.jsonl", endings)
    short = [{"text": text(1)} for _ in range(DOCUMENTS)]
    write_lines(root / "bpb" / "pile_cc.jsonl", short)
    for part in ("openwebtext2", "wikipedia", "arxiv", "bookcorpus2"):
        documents = [{"text": text(300)} for _ in range(8)]
        write_lines(root / "bpb" / f"pile_{part}.jsonl.gz", documents)


def write_gpt2(path: Path, layers: int, tokenizer: Path) -> None:
    """A tiny GPT-2 of random weights, with the tokenizer of a directory of tokens."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(layers)
    sizes = {"n_layer": layers, "n_embd": 32, "n_head": 4, "n_positions": CONTEXT}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **sizes, **special)).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((tokenizer / name).read_bytes())


def run_command(words: list[str]) -> None:
    """Print a command and run it. Exits where it fails."""
    from growkit.cli import run

    click.secho(f"\n$ growkit {shlex.join(words)}", bold=True)
    code = run(words)
    if code:
        raise SystemExit(f"the command ended with code {code}")


def prepare(root: Path) -> None:
    """Write texts, items, a tokenizer and the two GPT-2s into the working directory."""
    generator = random.Random(0)
    write_texts(root / "texts", generator)
    write_items(root / "items", generator)
    run_command(f"tokenize texts/openwebtext --train-bpe {VOCAB} --out made".split())
    (root / "tokenizer.json").write_bytes((root / "made" / "tokenizer.json").read_bytes())
    for name, layers in (("gpt2-large", 2), ("gpt2-xl", 3)):
        write_gpt2(root / "openai-community" / name, layers, root / "made")


def check_results(root: Path) -> None:
    """Compare what was written with what the log's run had. Raises AssertionError."""
    from growkit.checkpoint.location import open_source
    from growkit.lineage import Lineage

    layers = {"runs/580m": 18, "grown": 24, "runs/760m": 24, "runs/annealed": 24, "runs/1b": 36}
    sources = {name: open_source(str(root / name)) for name in layers}
    assert {name: source.model.layer for name, source in sources.items()} == layers
    context = {name: source.model.context for name, source in sources.items()}
    assert (context["runs/760m"], context["runs/1b"]) == (CONTEXT, CONTEXT // 2)
    training = Lineage.read(sources["runs/760m"].lineage).last_training
    assert training.config["data"]["mix"] == "proportional"
    assert training.config["mesh"]["zero1"]
    assert (training.config["batch"]["sequences"], training.config["batch"]["tokens"]) == (8, 500)
    for run in ("580m", "760m", "annealed", "1b"):
        assert (root / "runs" / run / "curves.png").stat().st_size > 10_000
        with (root / "runs" / run / "metrics.csv").open() as file:
            losses = [
                float(row["validation_loss"])
                for row in csv.DictReader(file)
                if row["validation_loss"]
            ]
        assert len(losses) >= 2, run
    check_tables(root)


def check_tables(root: Path) -> None:
    """The rows of both result files are of the same documents, at most 3000 of a part."""
    models = [
        model
        for name in ("760m", "gpt2")
        for model in json.loads((root / "results" / f"{name}.json").read_text())["models"]
    ]
    assert [model["label"] for model in models] == ["GPT-760M", "GPT2-Large", "GPT2-XL"]
    asked = [[(r["name"], r["documents_sha256"]) for r in model["results"]] for model in models]
    assert asked[0] == asked[1] == asked[2] and len(asked[0]) == 8
    counts = {r["name"]: (r["documents"], r["total"]) for r in models[0]["results"]}
    assert counts["bpb/pile_cc"] == (3000, DOCUMENTS)
    # The tiny model has learned something of texts like those that it was trained on.
    bits = [
        next(r for r in model["results"] if r["name"] == "bpb/pile_arxiv")["figures"]
        for model in models
    ]
    mine, *others = (figures["bits_per_byte"]["value"] for figures in bits)
    assert mine < min(others)


def repeat(root: Path) -> None:
    """Run every command of the page in a directory, which becomes the working directory."""
    root.mkdir(parents=True, exist_ok=True)
    os.chdir(root)
    prepare(root)
    for words in read_commands():
        run_command(shrink(words))
    check_results(root)
    click.echo("\nevery command of the page ran, and what they wrote is as it should be")


@click.command()
@click.option(
    "--work", type=click.Path(path_type=Path), help="Keep what is written in this directory."
)
def main(work: Path | None) -> None:
    """Repeat the 760M run at tiny scale."""
    # Before jax is imported.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    # The bars of other libraries; growkit has its own.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if work is not None:
        repeat(work.resolve())
        return
    with tempfile.TemporaryDirectory(prefix="repeat-760m-") as scratch:
        repeat(Path(scratch))


if __name__ == "__main__":
    main()
