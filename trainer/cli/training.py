"""The verbs that turn text into a model: tokenize, train, anneal, generate.

Only options and printing are here. A run is `trainer.run.stages.train`'s, and a text to continue
`trainer.evaluate.generate`'s; both are imported when a verb is called.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

import click

from growkit.cli import INTERRUPTED, TERMINATED
from growkit.cli.options import COUNT, PATH
from growkit.cli.output import is_quiet, remark, show_result, tell
from growkit.cli.signals import leave_on_signal

if TYPE_CHECKING:
    from trainer.log.report import Result, Show


@click.command()
@click.argument("text", nargs=-1, required=True)
@click.option(
    "--tokenizer",
    metavar="TOKENIZER",
    help="A tokenizer.json such as GPT-NeoX-20B's, a vocab.json with merges.txt beside it, a "
    "SentencePiece .model, a directory with one of them, or a Hub id.",
)
@click.option(
    "--train-bpe",
    type=COUNT,
    metavar="VOCAB",
    help="Train a byte-level BPE of VOCAB tokens on the text itself.",
)
@click.option("--out", required=True, metavar="OUT", help="The directory of token files to write.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option(
    "--end-of-text",
    metavar="TOKEN",
    help="The token that ends a document.  [default: the one that the tokenizer's files state]",
)
@click.option(
    "--text-key",
    default="text",
    metavar="KEY",
    help="Under which key JSON objects have their text.",
)
@click.option(
    "--column",
    default="text",
    metavar="NAME",
    help="In which column Parquet and Arrow tables have their text.",
)
@click.option(
    "--errors",
    default="strict",
    show_default=True,
    metavar="POLICY",
    help="What to do with documents that are not text: strict stops, replace puts U+FFFD in the "
    "place of the bytes, skip leaves the document out. Both are counted.",
)
@click.option(
    "--documents",
    default="file",
    show_default=True,
    metavar="HOW",
    help="What is one document of plain text: file, blank-line (what is between blank lines) or "
    "line. Source code, .md and .rst are one document a file.",
)
@click.option(
    "--processes",
    type=COUNT,
    metavar="N",
    help="Number of worker processes.  [default: one per core]",
)
@click.option(
    "--shard",
    metavar="I/N",
    help="Tokenize only part I of N of TEXT, and the other parts on other machines.",
)
def tokenize(
    text: tuple[str, ...],
    tokenizer: str | None,
    train_bpe: int | None,
    out: str,
    force: bool,
    text_key: str,
    column: str,
    processes: int | None,
    shard: str | None,
    **settings: Any,
) -> None:
    """Turn TEXT into token files OUT.

    TEXT is files or directories of text, source code, JSON lines, Parquet or Arrow, and directories
    that Hugging Face's `datasets` saved, compressed or not (.gz, .zst, .bz2, .xz). What is read and
    passed over is printed by ending. OUT is the same for any number of processes. --shard I/N takes
    every N-th file, or every N-th block of text where there are fewer files than parts.

    OUT has Megatron's indexed format (tokens.bin, tokens.idx) and a manifest; an end-of-text
    token ends each document.
    """
    from growkit.cli.terminal import show_counts
    from trainer.data.fields import Fields
    from trainer.data.processes import count_cores
    from trainer.data.text import Shard
    from trainer.data.tokenize import tokenize as tokenize_files

    part = Shard.parse(shard) if shard else None
    number = count_cores() if processes is None else processes
    settings |= {"fields": Fields(text_key, column), "say": remark}
    with show_counts("tokenizing") as progress:
        manifest = tokenize_files(
            text, out, tokenizer, train_bpe, force, progress, number, part, **settings
        )
    if train_bpe and manifest["vocab_size"] < train_bpe:
        _say_fewer_tokens(train_bpe, manifest["vocab_size"])
    show_result(f"wrote {out}: {_describe_tokens(manifest)}", {"output": out} | manifest)


def _say_fewer_tokens(asked: int, supported: int) -> None:
    tell(f"note: {asked} tokens were asked for, and the text supports {supported}")


def _describe_tokens(manifest: dict[str, Any]) -> str:
    """What a manifest counts, in words."""
    kinds = {
        "empty_documents": "empty ones left out",
        "skipped_documents": "that are not text left out",
        "replaced_characters": "characters replaced",
    }
    others = "".join(
        f", {manifest[key]:,} {words}" for key, words in kinds.items() if manifest.get(key)
    )
    each = manifest["bytes"] / manifest["tokens"]
    documents = (
        "1 document" if manifest["documents"] == 1 else f"{manifest['documents']:,} documents"
    )
    return (
        f"{documents}{others}, {manifest['tokens']:,} tokens of "
        f"{each:.2f} bytes, vocabulary {manifest['vocab_size']:,}"
    )


def offer_trust(command: Callable[..., int]) -> Callable[..., int]:
    """The options that say how careful a run is with what lies on disk."""
    unsynced = click.option(
        "--no-sync",
        is_flag=True,
        help="Do not wait until a checkpoint is on the disk: a power cut may damage it.",
    )
    unverified = click.option(
        "--no-verify",
        is_flag=True,
        help="Resume without comparing the checkpoint with the hashes on record.",
    )
    whole = click.option(
        "--from-last-whole",
        is_flag=True,
        help="Where the last checkpoints are damaged, set them aside and go on from the last one "
        "that is whole.",
    )
    return unverified(whole(unsynced(command)))


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--from",
    "start",
    type=PATH,
    metavar="SRC",
    help="Begin with this model, and with its optimizer state where it has one.",
)
@click.option("--out", type=PATH, required=True, metavar="RUN", help="The run directory.")
@click.option(
    "--allow-gap", is_flag=True, help="Train on even if exact growth moved the validation loss."
)
@offer_trust
def train(
    config: str,
    overrides: tuple[str, ...],
    start: str | None,
    out: str,
    allow_gap: bool,
    no_verify: bool,
    from_last_whole: bool,
    no_sync: bool,
) -> int:
    """Train by CONFIG, a YAML file or a preset, into the run directory RUN.

    CONFIG may be another run's config.yaml: then --from is what that run began with. The same
    command given again resumes RUN where it stopped. On Ctrl-C, SIGTERM or a closed terminal
    (SIGHUP) the run saves a checkpoint and exits, with code 130 or 75.
    """
    from trainer.config.values import read_values
    from trainer.devices.hosts import join_cluster
    from trainer.run import stages
    from trainer.run.damage import Trust

    join_cluster()
    values = read_values(config, list(overrides))
    start = start or _find_start(config, out)
    trust = Trust(not no_verify, from_last_whole, sync=not no_sync)
    result = stages.train(values, out, start, allow_gap, show=_choose_display(), trust=trust)
    return _report_end(out, result)


def _choose_display() -> Show:
    """What the user sees of a run while it trains."""
    from trainer.log.report import Report, Silent

    return Silent if is_quiet() else Report


def _find_start(config: str, out: str) -> str | None:
    """What a run began with, where CONFIG is its config.yaml; else None.

    Raises UsageError where that is not there as it was, and RUN must begin with it.
    """
    from growkit.checkpoint.location import open_source
    from growkit.errors import UsageError
    from trainer.config.values import read_origin
    from trainer.run.checkpoint import find_last_step

    origin = read_origin(config)
    if origin is None:
        return None
    path = origin["path"]
    if find_last_step(out) is None and open_source(path).fingerprint != origin["fingerprint"]:
        raise UsageError(
            f"the run of {config} began with {path}, which has changed since; --from {path} begins "
            f"with it as it is now"
        )
    return path


def _report_end(out: str, result: Result) -> int:
    """Say how a run ended; returns the exit code."""
    from trainer.devices.hosts import is_writer

    loss = ""
    if result.validation_loss is not None:
        loss = f", validation loss {result.validation_loss:.4f}"
    state = "finished" if result.signal is None else "stopped; the same command resumes it"
    document = {
        "run": out,
        "step": result.step,
        "validation_loss": result.validation_loss,
        "finished": result.signal is None,
        "signal": result.signal,
    }
    if is_writer():
        # The terminal may be gone, as after a hangup.
        with suppress(OSError):
            show_result(f"{out}: step {result.step}{loss}, {state}", document)
    if result.compiling:
        _leave_at_once(exit_code(result))
    return exit_code(result)


def _leave_at_once(code: int) -> NoReturn:
    """End the process without Python's own end, which a thread that compiles would not survive."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def exit_code(result: Result) -> int:
    """0 for a run that is finished, otherwise what its signal means."""
    codes: dict[int | None, int] = {
        None: 0,
        signal.SIGTERM: TERMINATED,
        signal.SIGHUP: TERMINATED,
        signal.SIGINT: INTERRUPTED,
    }
    return codes[result.signal]


@click.command()
@click.argument("src", type=PATH, metavar="RUN[@STEP]")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--to", type=float, required=True, metavar="LR", help="The final learning rate.")
@click.option(
    "--tokens", required=True, metavar="N", help="Number of tokens to train on: 5B, 500M, 1e9, ..."
)
@click.option(
    "--out", type=PATH, required=True, metavar="RUN2", help="The directory of the new run."
)
@offer_trust
def anneal(
    src: str,
    overrides: tuple[str, ...],
    to: float,
    tokens: str,
    out: str,
    no_verify: bool,
    from_last_whole: bool,
    no_sync: bool,
) -> int:
    """Bring the learning rate of RUN down to LR over N more tokens, in a new run RUN2.

    RUN2 starts from RUN's checkpoint, with its optimizer state, its place in the data stream and
    its configuration. The learning rate falls linearly, without a warm-up, from the last one that
    RUN trained with. The lineage records the branch. The same command given again resumes RUN2.
    """
    from growkit.quantity import parse_count
    from trainer.devices.hosts import is_writer, join_cluster
    from trainer.run import stages
    from trainer.run.anneal import plan_annealing, read_annealing
    from trainer.run.damage import Trust

    count = parse_count(tokens, "--tokens")
    join_cluster()
    given = (to, count, list(overrides))
    values, branch = read_annealing(out, *given) or plan_annealing(src, *given)
    steps = values["schedule"]["steps"]
    if is_writer():
        rates = f"learning rate {branch.rate:g} to {to:g}, linearly over"
        if branch.rate == to:
            rates = f"the learning rate is {to:g} already and stays for"
        remark(f"{out}: {rates} {steps:,} steps")
    trust = Trust(not no_verify, from_last_whole, sync=not no_sync)
    show = _choose_display()
    result = stages.train(values, out, src, branch=branch, show=show, trust=trust)
    return _report_end(out, result)


@click.command()
@click.argument("src")
@click.option("--prompt", required=True, metavar="TEXT", help="The text to continue.")
@click.option(
    "--tokens",
    type=COUNT,
    default=100,
    show_default=True,
    metavar="N",
    help="Maximum number of new tokens.",
)
@click.option(
    "--temperature",
    default=0.8,
    show_default=True,
    metavar="T",
    help="Sampling temperature; 0 takes the likeliest token.",
)
@click.option("--seed", default=0, show_default=True, metavar="N", help="The random seed.")
@click.option(
    "--no-verify", is_flag=True, help="Do not compare SRC with the hashes that were saved with it."
)
@leave_on_signal()
def generate(
    src: str, prompt: str, tokens: int, temperature: float, seed: int, no_verify: bool
) -> None:
    """Continue --prompt with SRC."""
    from growkit.checkpoint.location import open_source
    from trainer.evaluate.generate import continue_prompt
    from trainer.run.damage import Trust

    source = open_source(src)
    Trust(verify=not no_verify).require_whole(source)
    text = continue_prompt(source, prompt, tokens, temperature, seed)
    document = {"source": str(source.path), "prompt": prompt, "seed": seed, "text": text}
    show_result(lambda: click.echo(text), document)


COMMANDS = {"tokenize": tokenize, "train": train, "anneal": anneal, "generate": generate}
