"""growkit's tokenizing compared with the bare library's batches on all cores, on the same text.

    python benchmarks/tokenizing.py [TEXT... --tokenizer FILE] [--rounds N]
    taskset -c 0 python benchmarks/tokenizing.py     (one core, and no process beside this one)

Expect at least 1.0 of both from 30 MB of text on. growkit's time is all of `growkit tokenize`: it
starts processes, reads and parses the text, encodes, hashes and writes it. The library is given the
same documents, already in memory, in batches, by both of its functions: the better known
`encode_batch`, and `encode_batch_fast`, which computes no offsets; the ids are not even read out.
They take turns; the script prints the medians and the ratios of throughput, with the smallest and
largest of all rounds. Without TEXT it takes the Python standard library's source as JSON lines,
with a BPE of 8192 tokens trained on a part of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from growkit.cli.quickstart import read_standard_library
from trainer.data.processes import count_cores
from trainer.data.text import open_inputs
from trainer.data.tokenize import tokenize
from trainer.data.tokenizer import load_tokenizer, train_tokenizer

TEXT_BYTES = 30_000_000
VOCAB = 8192
BATCH = 1 << 21  # characters a batch: the library then takes some hundred megabytes of memory
OURS = "growkit tokenize"


def prepare(directory: Path) -> tuple[list[Path], Path]:
    """Text and a tokenizer for it, made from what every machine has."""
    texts = [text for _, text in read_standard_library(TEXT_BYTES)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    text_file = directory / "text.jsonl"
    text_file.write_text("".join(lines))
    tokenizer_file = directory / "tokenizer.json"
    tokenizer_file.write_bytes(train_tokenizer(texts[::10], VOCAB).json)
    return [text_file], tokenizer_file


def split_batches(documents: list[str]) -> list[list[str]]:
    """The documents in batches of about BATCH characters."""
    batches: list[list[str]] = [[]]
    size = 0
    for document in documents:
        batches[-1].append(document)
        size += len(document)
        if size >= BATCH:
            batches.append([])
            size = 0
    return [batch for batch in batches if batch]


def time_call(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def encode_all(encode: Callable[..., Any], batches: list[list[str]]) -> None:
    for batch in batches:
        encode(batch, add_special_tokens=False)


def measure(
    texts: list[Path], tokenizer: Path, rounds: int, directory: Path
) -> dict[str, list[float]]:
    """Seconds that each way takes in each round."""
    batches = split_batches(list(open_inputs(texts).read_documents()))
    library = load_tokenizer(tokenizer).tokenizer
    out = directory / "out"
    ways = {
        OURS: lambda: tokenize(texts, out, tokenizer, force=True, processes=count_cores()),
        "encode_batch": lambda: encode_all(library.encode_batch, batches),
        "encode_batch_fast": lambda: encode_all(library.encode_batch_fast, batches),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            times[name].append(time_call(work))
    return times


def show(manifest: dict[str, Any], times: dict[str, list[float]]) -> None:
    """Print throughputs and ratios. manifest: of the tokenized text."""
    size = manifest["bytes"] / 1e6
    print(
        f"{size:.1f} MB of text, {manifest['documents']:,} documents, "
        f"{manifest['tokens']:,} tokens, {count_cores()} cores"
    )
    ours = times.pop(OURS)
    print(f"{OURS}: {size / statistics.median(ours):.2f} MB/s")
    for way, theirs in times.items():
        ratios = sorted(their / our for our, their in zip(ours, theirs, strict=True))
        print(
            f"{way}: {size / statistics.median(theirs):.2f} MB/s; growkit's throughput over it "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", nargs="*", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if bool(options.text) != bool(options.tokenizer):
        parser.error("give both TEXT and --tokenizer, or neither")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if options.text:
            texts, tokenizer = options.text, options.tokenizer
        else:
            texts, tokenizer = prepare(directory)
        times = measure(texts, tokenizer, options.rounds, directory)
        manifest = json.loads((directory / "out" / "manifest.json").read_text())
    show(manifest, times)


if __name__ == "__main__":
    main()
