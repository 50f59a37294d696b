"""What a dense model gains as a mixture: 8 experts, 2 for each token, against the dense model.

    growkit tokenize TEXT... --train-bpe 1024 --out tokens
    python benchmarks/experts_study.py tokens [--work DIR] [--seeds 3] [--steps 2000]

A small Llama is trained at a constant rate. Then it becomes a mixture, with its optimizer state,
and is trained on; and it is trained on as it is, for the same FLOPs, those of active parameters
counted. Both go on in the source's data stream, at its rate, which falls by a cosine. For each seed
the validation losses are printed, and at the end the difference with its spread. Runs that are
finished are kept, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
from pathlib import Path

import click

MODEL = (
    "model.kind=llama model.layer=4 model.embed=64 model.head=4 model.mlp=192 model.vocab=1024 "
    "model.context=64"
)
COMMON = (
    "dropout.hidden=0 dropout.attention=0 precision.compute=float32 batch.sequences=16 "
    "optimizer.learning_rate=8e-3 eval.every=100000 eval.windows=512 log.every=100 "
    "checkpoint.every=100000 checkpoint.keep_last=1"
)
# How the dense model becomes a mixture, by the name of the arm.
WAYS = {"random router": ["--router", "random"], "zero router, noise": ["--noise", "1"]}


def run(*words: str) -> None:
    """Run a growkit command; its output is shown where it fails."""
    command = [sys.executable, "-m", "growkit", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(words)}\n{done.stdout}{done.stderr}")


def train(out: Path, *words: str) -> None:
    """Train a run, unless it is finished."""
    run("train", *words, "--out", str(out), *COMMON.split())


def read_end(out: Path) -> tuple[float, float]:
    """(FLOPs, validation loss) at the end of a run."""
    with (out / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["validation_loss"]]
    return float(rows[-1]["flops"]), float(rows[-1]["validation_loss"])


def compare(tokens: str, work: Path, seed: int, steps: int) -> dict[str, float]:
    """The losses of one seed by arm: of the source, of it trained on, and of each mixture."""
    options = [f"data.train={tokens}", f"seed={seed}"]
    constant = ["schedule.kind=constant", "schedule.warmup=100"]
    source = work / f"source-{seed}"
    train(source, "tiny", *MODEL.split(), *options, *constant, f"schedule.steps={steps}")
    fall = [*options, "schedule.kind=cosine", "schedule.warmup=0"]
    dense = work / f"dense-{seed}"
    train(dense, "recipe", "--from", str(source), *fall, f"schedule.steps={steps}")
    before, losses = read_end(source)[0], {"source": read_end(source)[1]}
    flops, losses["dense, trained on"] = read_end(dense)
    for name, way in WAYS.items():
        mixture = work / f"{name.split()[0]}-{seed}"
        grown = work / f"{name.split()[0]}-{seed}-grown"
        if not grown.exists():
            sizes = ["--from-dense", "8", "--top", "2", "--seed", str(seed)]
            run("experts", *sizes, *way, str(source), str(grown))
        length = round(steps * count_flops(dense) / count_flops(grown))
        train(mixture, "recipe", "--from", str(grown), *fall, f"schedule.steps={length}")
        spent, losses[name] = read_end(mixture)
        click.echo(f"seed {seed}, {name}: {length} steps, {spent:.4g} FLOPs of {flops:.4g}")
    click.echo(f"seed {seed}: " + ", ".join(f"{arm} {loss:.4f}" for arm, loss in losses.items()))
    assert before < flops
    return losses


def count_flops(path: Path) -> float:
    """FLOPs a token of the model in a run or a directory, of its active parameters."""
    from growkit.checkpoint.location import open_source

    model = open_source(str(path)).model
    return model.flops_per_token(model.context)


@click.command()
@click.argument("tokens")
@click.option("--work", type=click.Path(path_type=Path), default=Path("experts-study"))
@click.option("--seeds", default=3, show_default=True)
@click.option("--steps", default=2000, show_default=True, help="Of the source, and of it after.")
def main(tokens: str, work: Path, seeds: int, steps: int) -> None:
    """Compare a mixture made of a dense model with the dense model, at equal compute."""
    found = [compare(tokens, work, seed, steps) for seed in range(seeds)]
    for arm in found[0]:
        losses = [losses[arm] for losses in found]
        ahead = [losses["dense, trained on"] - losses[arm] for losses in found]
        spread = statistics.stdev if seeds > 1 else lambda numbers: 0.0
        click.echo(
            f"{arm}: loss {statistics.fmean(losses):.4f} ± {spread(losses):.4f}, better than the "
            f"dense model trained on by {statistics.fmean(ahead):+.4f} ± {spread(ahead):.4f}"
        )


if __name__ == "__main__":
    main()
