"""The product's main job once, small: tokenize, train, grow, train on, export, load in transformers, compare.

Every part does what a verb does, by the same functions, on text that every machine has: the Python standard
library's own source. A part that is finished is not done again, so the command can be interrupted and repeated. Knows
the order of the parts and the sizes that a CPU trains in minutes; leaves the work to what the verbs call.
"""

from __future__ import annotations

import json
import math
import random
import sysconfig
import time
from pathlib import Path

import click

LAYERS, GROWN_LAYERS = 2, 4
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
SOURCE_STEPS, FURTHER_STEPS = 1400, 1000
PROMPT = "def read_"
MARK = "quickstart.json"


@click.command()
@click.option(
    "--out", default="quickstart", show_default=True, metavar="DIR", help="Where everything goes."
)
def quickstart(out: str) -> int:
    """Train a small model, grow it in depth with its optimizer, train on, export, and load it in transformers.

    On text that every machine has, in some minutes on two cores. Safe to interrupt and to run again.
    """
    began = time.monotonic()
    directory = Path(out)
    _begin(directory)
    code = _prepare_text(directory)
    for part in (_train_source, _grow, _train_grown, _train_control, _export):
        code = code or part(directory)
    if code:
        return code
    _show(directory)
    click.echo(f"all of it is in {directory}, in {time.monotonic() - began:.0f} seconds")
    return 0


def _begin(directory: Path) -> None:
    """Make the directory, or check that it is a quickstart's of the same sizes. Raises UsageError."""
    from growkit.errors import UsageError

    sizes = json.dumps(
        {"model": MODEL, "grown": GROWN_LAYERS, "steps": [SOURCE_STEPS, FURTHER_STEPS]}
    )
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
    if not (directory / "tokens").exists():
        texts = [text for _, text in read_standard_library(TEXT_BYTES)]
        # One text in four is enough to learn a small vocabulary from.
        tokenizer = train_tokenizer(texts[::4], VOCAB)
        with show_counts("tokenizing") as progress:
            names = ["Python standard library"]
            tokenize_documents(
                texts, directory / "tokens", tokenizer, names, False, progress, count_cores()
            )
    manifest = json.loads((directory / "tokens" / "manifest.json").read_text())
    click.echo(
        f"{manifest['documents']:,} files, {manifest['tokens']:,} tokens, vocabulary {manifest['vocab_size']:,}"
    )
    return 0


def read_standard_library(limit: int) -> list[tuple[str, str]]:
    """(name, text) of the interpreter's own source files, about `limit` bytes of them, spread over all."""
    root = Path(sysconfig.get_paths()["stdlib"])
    aside = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    files = [
        path for path in sorted(root.rglob("*.py")) if not aside & set(path.relative_to(root).parts)
    ]
    total = sum(path.stat().st_size for path in files)
    keep = min(1.0, limit / max(total, 1))
    chosen = [
        path
        for number, path in enumerate(files)
        if math.floor((number + 1) * keep) > math.floor(number * keep)
    ]
    # Shuffled, so that the held-out end is text like the rest.
    random.Random(0).shuffle(chosen)
    texts = (
        (path.relative_to(root).as_posix(), path.read_text("utf-8", errors="ignore"))
        for path in chosen
    )
    return [(name, text) for name, text in texts if text.strip()]


def _run(directory: Path, name: str, values: dict, start: str | None) -> int:
    from trainer.cli.training import exit_code
    from trainer.run.stages import train

    data = {"data": {"train": {str(directory / "tokens"): 1.0}}}
    result = train(RECIPE | data | values, directory / name, start)
    return exit_code(result)


def make_schedule(steps: int, warmup: int, peak: float) -> dict:
    """The values of a training: its length, its warm-up and its peak learning rate."""
    return {"schedule": {"steps": steps, "warmup": warmup}, "optimizer": {"learning_rate": peak}}


def _train_source(directory: Path) -> int:
    _say(2, f"train a model of {LAYERS} layers")
    return _run(directory, "source", {"model": MODEL} | make_schedule(SOURCE_STEPS, 50, 5e-3), None)


def _grow(directory: Path) -> int:
    from growkit.checkpoint.location import open_source
    from growkit.cli.growing import grow
    from growkit.growth.depth import plan_depth

    _say(3, f"grow it to {GROWN_LAYERS} layers: growkit depth --map {LAYERS}:{GROWN_LAYERS}")
    if not (directory / "grown").exists():
        source = open_source(str(directory / "source"))
        grow(
            source,
            plan_depth(source.model, f"{LAYERS}:{GROWN_LAYERS}"),
            directory / "grown",
            False,
            False,
            False,
        )
    return 0


def _train_grown(directory: Path) -> int:
    _say(4, "train the grown model on")
    return _run(directory, "trained", make_schedule(FURTHER_STEPS, 40, 3.3e-3), str(directory / "grown"))


def _train_control(directory: Path) -> int:
    from growkit.checkpoint.location import open_source

    small, grown = (open_source(str(directory / name)).model for name in ("source", "grown"))
    steps = round(FURTHER_STEPS * grown.flops_per_token() / small.flops_per_token())
    _say(5, f"for comparison, train the small model on for the same compute ({steps} steps)")
    return _run(directory, "control", make_schedule(steps, 40, 3.3e-3), str(directory / "source"))


def _export(directory: Path) -> int:
    from convert.directory import convert_to_directory
    from growkit.checkpoint.location import open_source
    from growkit.cli.terminal import write_with_progress

    _say(6, "export, load in transformers, generate")
    source = open_source(str(directory / "trained"))
    hf = directory / "huggingface"
    if not hf.exists():
        write_with_progress([source], convert_to_directory(source), hf, "huggingface", False)
    _load_in_transformers(source, hf)
    return 0


def _load_in_transformers(source, hf: Path) -> None:
    from convert.cli import compare_logits

    try:
        from convert.reference import generate_text

        text = generate_text(hf, PROMPT, 60)
    except ImportError as problem:
        click.echo(
            f"{problem.name} is not installed, so nothing was loaded in it; pip install 'growkit[hf]' brings it"
        )
        return
    click.echo(compare_logits(source, hf, "float32"))
    click.echo(f"transformers continues {PROMPT!r} from {hf}:\n{text}")


def _show(directory: Path) -> None:
    """The table and the picture of what growth did."""
    from etils import epath

    from trainer.log import curves
    from trainer.log.history import History

    histories = {
        name: History(epath.Path(directory / name)) for name in ("source", "trained", "control")
    }
    losses = {
        name: [row for row in history.rows if row["validation_loss"]]
        for name, history in histories.items()
    }
    further = float(losses["trained"][-1]["flops"]) - float(losses["trained"][0]["flops"])
    rows = [
        ("small model, before growth", losses["source"][-1]),
        (f"grown {LAYERS} to {GROWN_LAYERS} layers, before training on", losses["trained"][0]),
        ("grown model, trained on", losses["trained"][-1]),
        ("small model, trained on for the same compute", losses["control"][-1]),
    ]
    lines = ["| model | training FLOPs | validation perplexity |", "| --- | --- | --- |"]
    for name, row in rows:
        perplexity = math.exp(float(row["validation_loss"]))
        lines.append(f"| {name:<44} | {float(row['flops']):14.3e} | {perplexity:21.2f} |")
    table = "\n".join(lines)
    (directory / "table.md").write_text(table + "\n")
    trained = histories["trained"]
    picture = epath.Path(directory / "curves.png")
    curves.draw_curves(
        picture,
        trained.earlier + trained.rows,
        "growkit quickstart",
        {"small model, same compute": histories["control"].rows},
    )
    click.echo(f"\n{table}\n\nfurther training of both: {further:.2e} FLOPs; the curves: {picture}")


COMMANDS = {"quickstart": quickstart}
