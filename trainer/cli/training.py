"""The verbs that make text into a model: tokenize, train, anneal, generate."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from growkit.cli import INTERRUPTED, TERMINATED

if TYPE_CHECKING:
    from growkit.entries import Branch


@click.command()
@click.argument("text", nargs=-1, required=True)
@click.option("--tokenizer", metavar="FILE", help="A tokenizer.json, as the one of GPT-NeoX-20B.")
@click.option(
    "--train-bpe",
    type=int,
    metavar="VOCAB",
    help="Train a byte-level BPE of VOCAB tokens on the text itself.",
)
@click.option("--out", required=True, metavar="OUT", help="The directory of token files to write.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option(
    "--processes",
    type=int,
    metavar="N",
    help="How many processes share the work.  [default: one a core]",
)
@click.option(
    "--shard",
    metavar="I/N",
    help="Take only the I-th of N parts of TEXT, the others on other machines.",
)
def tokenize(
    text: tuple[str, ...],
    tokenizer: str | None,
    train_bpe: int | None,
    out: str,
    force: bool,
    processes: int | None,
    shard: str | None,
) -> None:
    """Turn TEXT into token files OUT: files or directories of .txt, .jsonl and .parquet ("text"), source code.

    Each may be compressed (.gz, .zst). OUT is the same for any number of processes. --shard I/N takes every N-th
    file, or every N-th block of text where there are fewer files.

    Written in Megatron's indexed format (tokens.bin, tokens.idx) with a manifest; end-of-text ends each document.
    """
    from growkit.cli.terminal import show_counts
    from trainer.data.processes import count_cores
    from trainer.data.text import Shard
    from trainer.data.tokenize import tokenize as tokenize_files

    part = Shard.parse(shard) if shard else None
    number = count_cores() if processes is None else processes
    with show_counts("tokenizing") as progress:
        manifest = tokenize_files(
            list(text), out, tokenizer, train_bpe, force, progress, number, part
        )
    empty = (
        f", {manifest['empty_documents']} empty ones left out"
        if manifest.get("empty_documents")
        else ""
    )
    if train_bpe and manifest["vocab_size"] < train_bpe:
        click.echo(
            f"note: {train_bpe} tokens were asked for, and the text supports {manifest['vocab_size']}"
        )
    click.echo(
        f"wrote {out}: {manifest['documents']:,} documents{empty}, {manifest['tokens']:,} tokens of "
        f"{manifest['bytes'] / manifest['tokens']:.2f} bytes, vocabulary {manifest['vocab_size']:,}"
    )


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--from",
    "start",
    metavar="SRC",
    help="Begin with this model, and its optimizer where it has one.",
)
@click.option("--out", required=True, metavar="RUN", help="The run directory.")
@click.option(
    "--allow-gap", is_flag=True, help="Train on even if exact growth moved the validation loss."
)
def train(
    config: str, overrides: tuple[str, ...], start: str | None, out: str, allow_gap: bool
) -> int:
    """Train by CONFIG, a YAML file or a preset, into the run directory RUN.

    The same command given again resumes RUN where it stopped. Exit code 75 after SIGTERM, 130 after Ctrl-C,
    the run saved.
    """
    from trainer.config.values import read_values
    from trainer.devices.hosts import join_cluster

    join_cluster()
    return _told(out, train_run(read_values(config, list(overrides)), out, start, allow_gap))


def _told(out: str, result) -> int:
    """Say how a run ended; returns the exit code."""
    from trainer.devices.hosts import is_writer

    loss = (
        f", validation loss {result.validation_loss:.4f}"
        if result.validation_loss is not None
        else ""
    )
    state = "finished" if result.signal is None else "stopped; the same command resumes it"
    if is_writer():
        click.echo(f"{out}: step {result.step}{loss}, {state}")
    return exit_code(result)


@click.command()
@click.argument("src", metavar="RUN[@STEP]")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--to", type=float, required=True, metavar="LR", help="The learning rate to end at.")
@click.option(
    "--tokens", required=True, metavar="N", help="How many tokens to train on: 5B, 500M, 1e9, ..."
)
@click.option(
    "--out", required=True, metavar="RUN2", help="The directory of the run that this begins."
)
def anneal(src: str, overrides: tuple[str, ...], to: float, tokens: str, out: str) -> int:
    """Bring the learning rate of RUN down to LR over N more tokens, as a run RUN2 of its own.

    From RUN's checkpoint, optimizer and data stream included, and with its configuration; the rate falls linearly from
    the last one that RUN trained with, without a warm-up. The lineage records the branch. The same command given
    again resumes RUN2.
    """
    from growkit.quantity import parse_count
    from trainer.devices.hosts import is_writer, join_cluster
    from trainer.run.anneal import plan_annealing, read_annealing

    count = parse_count(tokens, "--tokens")
    join_cluster()
    values, branch = read_annealing(out, to, count, list(overrides)) or plan_annealing(
        src, to, count, list(overrides)
    )
    steps = values["schedule"]["steps"]
    if is_writer():
        click.echo(
            f"{out}: learning rate {branch.rate:g} to {to:g}, linearly over {steps:,} steps",
            err=True,
        )
    return _told(out, train_run(values, out, src, branch=branch))


def exit_code(result) -> int:
    """0 for a run that is finished, else what its signal means."""
    return {None: 0, signal.SIGTERM: TERMINATED, signal.SIGINT: INTERRUPTED}[result.signal]


def train_run(
    values: dict,
    out: str | Path,
    start: str | None = None,
    allow_gap: bool = False,
    branch: Branch | None = None,
    show: type | None = None,
):
    """Train by nested configuration values, from a source or anew, or resume; returns the loop's result.

    branch: what the lineage says of a run that another verb than train begins. show: the `Report` that the user sees.
    """
    from growkit.checkpoint.location import open_source
    from growkit.errors import UsageError
    from growkit.models import require_trained
    from trainer.config.sections import Model, build_architecture, resolve
    from trainer.devices.programs import enable_program_cache
    from trainer.log.report import Report
    from trainer.run.checkpoint import find_last_step
    from trainer.run.directory import fill_model, read_run
    from trainer.run.growth import plan_growth
    from trainer.run.stages import train as train_on

    # Orbax logs its errors with tracebacks and raises them too: they are shown once, as a sentence.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    stored = read_run(out)
    source = None
    grow = resolve({"grow": values.get("grow"), "schedule": values.get("schedule")}).grow
    if start and stored is not None and find_last_step(out) is not None:
        # The source may be gone by now; what was taken from it is in the run.
        values = fill_model(values, build_architecture(Model(**stored["config"]["model"])), start)
    elif start:
        source = open_source(start)
        require_trained(source.model, start)
        plan = plan_growth(grow, source.model) if not grow.at else None
        values = fill_model(values, plan.grown if plan else source.model, start)
    elif values.get("grow") and not grow.at:
        raise UsageError(
            "the grow section grows the model of --from; give one, or say when in this run (grow.at)"
        )
    elif not values.get("model"):
        raise UsageError(
            "there is no model to train: the configuration has no model section, and --from is not given"
        )
    enable_program_cache()
    return train_on(resolve(values), out, source, start, allow_gap, branch, show or Report)


@click.command()
@click.argument("src")
@click.option("--prompt", required=True, metavar="TEXT", help="The text to continue.")
@click.option(
    "--tokens", default=100, show_default=True, metavar="N", help="How many tokens to add at most."
)
@click.option(
    "--temperature",
    default=0.8,
    show_default=True,
    metavar="T",
    help="0 takes the likeliest token.",
)
@click.option("--seed", default=0, show_default=True, metavar="N", help="The random seed.")
def generate(src: str, prompt: str, tokens: int, temperature: float, seed: int) -> None:
    """Continue --prompt with SRC."""
    from growkit.checkpoint.location import open_source

    source = open_source(src)
    click.echo(continue_prompt(source, prompt, tokens, temperature, seed))


def continue_prompt(source, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """The prompt and its continuation, as text."""
    from tokenizers import Tokenizer

    from growkit.errors import GrowkitError, UsageError
    from growkit.models import require_trained
    from trainer.evaluate.generate import generate_tokens

    require_trained(source.model, str(source.path))
    if tokens < 1:
        raise UsageError(f"--tokens must be at least 1, got {tokens}")
    if "tokenizer.json" not in source.files:
        raise GrowkitError(
            f"{source.path} carries no tokenizer.json, so text cannot be made into tokens; put one beside it"
        )
    try:
        tokenizer = Tokenizer.from_str(source.files["tokenizer.json"].decode())
    except Exception as problem:  # tokenizers raises nothing more specific
        raise GrowkitError(
            f"the tokenizer.json of {source.path} cannot be read: {problem}"
        ) from None
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    if ids and max(ids) >= source.model.vocab:
        raise UsageError(
            f"the tokenizer gives the id {max(ids)}, and the model's vocabulary is {source.model.vocab}"
        )
    end = source.config.get("eos_token_id")
    added = generate_tokens(
        source, ids, tokens, temperature, seed, end if isinstance(end, int) else None
    )
    return prompt + tokenizer.decode(list(added), skip_special_tokens=False)


COMMANDS = {"tokenize": tokenize, "train": train, "anneal": anneal, "generate": generate}
