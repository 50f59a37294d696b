"""The whole pipeline once, small: tokenize, train, grow, train on, export, load in transformers.

Each part calls what the verb of that name calls. The text is the Python standard library's own
source, which every machine has. A part that is finished is not repeated, so the command may be
interrupted and run again. The sizes are such that a CPU trains them in minutes.
"""

from __future__ import annotations

import json
import math
import random
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from growkit.cli.options import PATH

if TYPE_CHECKING:
    from growkit.checkpoint.tensor import Source

LAYERS = 2
GROWN_LAYERS = 4
TEXT_BYTES = 8_000_000
VOCAB = 1024
MODEL = {
    "layer": LAYERS,
    "embed": 64,
    "head": 4,
    "mlp": 256,
    "vocab": VOCAB,
    "context": 128,
    "tied": True,
}
RECIPE = {
    "dropout": {"hidden": 0.0, "attention": 0.0, "embedding": 0.0},
    "precision": {"params": "float32", "compute": "float32"},
    "batch": {"sequences": 16},
    "eval": {"every": 100, "windows": 128},
    "log": {"every": 20},
    "checkpoint": {"every": 200, "keep_last": 2},
}
SOURCE_STEPS = 1400
FURTHER_STEPS = 1000
PROMPT = "def read_"
MARK = "quickstart.json"


@click.command()
@click.option(
    "--out",
    type=PATH,
    default="quickstart",
    show_default=True,
    metavar="DIR",
    help="Where everything goes.",
)
def quickstart(out: str) -> int:
    """Run the whole pipeline on a tiny model; no data needed.

    Train a small model, grow it in depth with its optimizer, train on, export it, and load it in
    transformers. Takes some minutes on two cores. Safe to interrupt and to run again.
    """
    began = time.monotonic()
    directory = Path(out)
    _begin(directory)
    for part in (_prepare_text, _train_source, _grow, _train_grown, _train_control, _export):
        code = part(directory)
        if code:
            return code
    _show_results(directory)
    click.echo(f"everything is in {directory}; it took {time.monotonic() - began:.0f} seconds")
    click.echo(_describe_next(directory))
    return 0


def _describe_next(directory: Path) -> str:
    """The next three commands: look at the result, use it, do the same with texts of one's own."""
    lines = (
        f"growkit inspect {directory / 'trained'}",
        f"growkit generate {directory / 'trained'}@best --prompt {PROMPT!r}",
        "growkit tokenize MYTEXTS --train-bpe 4096 --out tokens",
    )
    return "\n".join(["next:", *(f"  {line}" for line in lines)])


def _begin(directory: Path) -> None:
    """Make the directory, or check that it is a quickstart of these sizes. Raises UsageError."""
    from growkit.errors import UsageError

    steps = [SOURCE_STEPS, FURTHER_STEPS]
    sizes = json.dumps({"model": MODEL, "grown": GROWN_LAYERS, "steps": steps})
    mark = directory / MARK
    foreign = directory.is_dir() and any(directory.iterdir()) and not mark.exists()
    if foreign or (directory.exists() and not directory.is_dir()):
        raise UsageError(f"{directory} exists and is not a quickstart's; name another --out")
    if mark.exists() and mark.read_text() != sizes:
        raise UsageError(
            f"{directory} is a quickstart's of other sizes, by another version; name another --out"
        )
    directory.mkdir(parents=True, exist_ok=True)
    mark.write_text(sizes)


def _say(number: int, words: str) -> None:
    click.echo(f"\n[{number}/6] {words}")


def _prepare_text(directory: Path) -> int:
    from growkit.cli.terminal import show_counts
    from trainer.data.processes import count_cores
    from trainer.data.tokenize import tokenize_documents
    from trainer.data.tokenizer import train_tokenizer

    _say(1, "tokenize the Python standard library's source")
    out = directory / "tokens"
    if not out.exists():
        texts = [text for _, text in read_standard_library(TEXT_BYTES)]
        # A quarter of the texts is enough to learn a small vocabulary from.
        tokenizer = train_tokenizer(texts[::4], VOCAB)
        names = ["Python standard library"]
        with show_counts("tokenizing") as progress:
            tokenize_documents(texts, out, tokenizer, names, False, progress, count_cores())
    manifest = json.loads((out / "manifest.json").read_text())
    click.echo(
        f"{manifest['documents']:,} files, {manifest['tokens']:,} tokens, vocabulary "
        f"{manifest['vocab_size']:,}"
    )
    return 0


def read_standard_library(limit: int) -> list[tuple[str, str]]:
    """(name, text) of the interpreter's own source files, about `limit` bytes spread over all."""
    root = Path(sysconfig.get_paths()["stdlib"])
    aside = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    files = [
        path for path in sorted(root.rglob("*.py")) if not aside & set(path.relative_to(root).parts)
    ]
    total = sum(path.stat().st_size for path in files)
    keep = min(1.0, limit / max(total, 1))
    # Evenly spread: take a file whenever the number of files to take passes a whole number.
    chosen = [
        path
        for number, path in enumerate(files)
        if math.floor((number + 1) * keep) > math.floor(number * keep)
    ]
    # Shuffled, so that the held-out end is text like the rest.
    random.Random(0).shuffle(chosen)
    texts = []
    for path in chosen:
        text = path.read_text("utf-8", errors="ignore")
        if text.strip():
            texts.append((path.relative_to(root).as_posix(), text))
    return texts


def _train(directory: Path, name: str, values: dict[str, Any], start: str | None) -> int:
    """Train the run `name` in the directory, from another model or anew; returns the exit code."""
    from trainer.cli.training import exit_code
    from trainer.run.stages import train

    data = {"data": {"train": {str(directory / "tokens"): 1.0}}}
    result = train(RECIPE | data | values, directory / name, start)
    return exit_code(result)


def make_schedule(steps: int, warmup: int, peak: float) -> dict[str, Any]:
    """Configuration values: number of steps, steps of warm-up, peak learning rate."""
    return {"schedule": {"steps": steps, "warmup": warmup}, "optimizer": {"learning_rate": peak}}


def _train_source(directory: Path) -> int:
    _say(2, f"train a model of {LAYERS} layers")
    values = {"model": MODEL} | make_schedule(SOURCE_STEPS, 50, 5e-3)
    return _train(directory, "source", values, None)


def _grow(directory: Path) -> int:
    from growkit.checkpoint.location import open_source
    from growkit.cli.growing import Output, grow
    from growkit.growth.depth import plan_depth

    _say(3, f"grow it to {GROWN_LAYERS} layers: growkit depth --map {LAYERS}:{GROWN_LAYERS}")
    out = directory / "grown"
    if not out.exists():
        source = open_source(str(directory / "source"))
        plan = plan_depth(source.model, f"{LAYERS}:{GROWN_LAYERS}")
        grow(source, plan, out, Output())
    return 0


def _train_grown(directory: Path) -> int:
    _say(4, "train the grown model on")
    values = make_schedule(FURTHER_STEPS, 40, 3.3e-3)
    return _train(directory, "trained", values, str(directory / "grown"))


def _train_control(directory: Path) -> int:
    from growkit.checkpoint.location import open_source

    small = open_source(str(directory / "source")).model
    grown = open_source(str(directory / "grown")).model
    steps = round(FURTHER_STEPS * grown.flops_per_token() / small.flops_per_token())
    _say(5, f"for comparison, train the small model on for the same compute ({steps} steps)")
    values = make_schedule(steps, 40, 3.3e-3)
    return _train(directory, "control", values, str(directory / "source"))


def _export(directory: Path) -> int:
    from convert.directory import convert_to_directory
    from growkit.checkpoint.location import open_source
    from growkit.cli.terminal import write_with_progress

    _say(6, "export, load in transformers, generate")
    source = open_source(str(directory / "trained"))
    out = directory / "huggingface"
    if not out.exists():
        contents = convert_to_directory(source)
        write_with_progress([source], contents, out, "huggingface", False)
    _load_in_transformers(source, out)
    return 0


def _load_in_transformers(source: Source, directory: Path) -> None:
    """Compare the exported model with its source and generate text, if transformers is here."""
    from growkit.cli.checking import check_export

    try:
        from convert.reference import generate_text

        text = generate_text(directory, PROMPT, 60)
    except ImportError as problem:
        click.echo(
            f"{problem.name} is not installed, so nothing was loaded in it; pip install "
            "'growkit[hf]' brings it"
        )
        return
    click.echo(check_export(source, directory, "float32"))
    click.echo(f"transformers continues {PROMPT!r} from {directory}:\n{text}")


def _show_results(directory: Path) -> None:
    """Print and keep the table and the picture of what growth did."""
    from etils import epath

    from trainer.log import curves
    from trainer.log.history import History

    names = ("source", "trained", "control")
    histories = {name: History(epath.Path(directory / name)) for name in names}
    measured = {
        name: [row for row in history.rows if row["validation_loss"]]
        for name, history in histories.items()
    }
    grown = measured["trained"]
    table = _format_table(
        {
            "small model, before growth": measured["source"][-1],
            f"grown {LAYERS} to {GROWN_LAYERS} layers, before training on": grown[0],
            "grown model, trained on": grown[-1],
            "small model, trained on for the same compute": measured["control"][-1],
        }
    )
    (directory / "table.md").write_text(table + "\n")
    picture = epath.Path(directory / "curves.png")
    rows = histories["trained"].earlier + histories["trained"].rows
    others = {"small model, same compute": histories["control"].rows}
    # Over compute, because a step of the small model takes less of it: both end at the same place.
    curves.draw_curves(picture, rows, "growkit quickstart", others, over="flops")
    further = float(grown[-1]["flops"]) - float(grown[0]["flops"])
    click.echo(f"\n{table}\n\nfurther training of both: {further:.2e} FLOPs; the curves: {picture}")


def _format_table(rows: dict[str, Any]) -> str:
    """The table in Markdown. rows: model -> the row of its history."""
    lines = ["| model | training FLOPs | validation perplexity |", "| --- | --- | --- |"]
    for name, row in rows.items():
        perplexity = math.exp(float(row["validation_loss"]))
        lines.append(f"| {name:<44} | {float(row['flops']):14.3e} | {perplexity:21.2f} |")
    return "\n".join(lines)


COMMANDS = {"quickstart": quickstart}
