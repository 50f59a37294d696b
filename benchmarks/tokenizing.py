"""growkit's tokenizing against the bare library's batches on all cores, over the same text, on this
machine.

    python benchmarks/tokenizing.py [TEXT... --tokenizer FILE] [--rounds N]

Expect at least 0.9 of `encode_batch`. growkit's time is all of `growkit tokenize`'s work: it starts
the processes, reads and parses the text, encodes, hashes and writes it. The library is given the
same documents, in memory already, in batches, by both of its functions: `encode_batch`, the one
that is best known, and `encode_batch_fast`, which does without offsets; its ids are not even taken
out. They run in turns; printed are the medians and the ratios of throughput, with the least and
largest of the rounds. Without TEXT: the Python standard library's source as JSON lines, with a BPE
of 8192 trained on a part of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from growkit.cli.quickstart import read_standard_library
from trainer.data.processes import count_cores
from trainer.data.text import open_inputs
from trainer.data.tokenize import tokenize
from trainer.data.tokenizer import load_tokenizer, train_tokenizer

TEXT_BYTES, VOCAB = 30_000_000, 8192
BATCH = 1 << 21  # characters: as many as keep the library's memory at some hundred megabytes


def prepare(directory: Path) -> tuple[list[Path], Path]:
    """Text and a tokenizer that every machine has."""
    texts = [text for _, text in read_standard_library(TEXT_BYTES)]
    (directory / "text.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    (directory / "tokenizer.json").write_bytes(train_tokenizer(texts[::10], VOCAB).json)
    return [directory / "text.jsonl"], directory / "tokenizer.json"


def split_batches(documents: list[str]) -> list[list[str]]:
    result: list[list[str]] = [[]]
    size = 0
    for document in documents:
        result[-1].append(document)
        size += len(document)
        if size >= BATCH:
            result.append([])
            size = 0
    return [batch for batch in result if batch]


def time_call(work) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def encode_all(encode, groups: list[list[str]]) -> None:
    for group in groups:
        encode(group, add_special_tokens=False)


def measure(
    texts: list[Path], tokenizer: Path, rounds: int, directory: Path
) -> dict[str, list[float]]:
    """Seconds of each way in each round."""
    groups = split_batches(list(open_inputs(texts).read_documents()))
    library = load_tokenizer(tokenizer).tokenizer
    ways = {
        "growkit tokenize": lambda: tokenize(
            texts, directory / "out", tokenizer, force=True, processes=count_cores()
        ),
        "encode_batch": lambda: encode_all(library.encode_batch, groups),
        "encode_batch_fast": lambda: encode_all(library.encode_batch_fast, groups),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            times[name].append(time_call(work))
    return times


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
        texts, tokenizer = (options.text, options.tokenizer) if options.text else prepare(directory)
        times = measure(texts, tokenizer, options.rounds, directory)
        manifest = json.loads((directory / "out" / "manifest.json").read_text())
    size = manifest["bytes"] / 1e6
    print(
        f"{size:.1f} MB of text, {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, {count_cores()} cores"
    )
    ours = times.pop("growkit tokenize")
    print(f"growkit tokenize: {size / statistics.median(ours):.2f} MB/s")
    for way, theirs in times.items():
        ratios = sorted(their / our for our, their in zip(ours, theirs, strict=True))
        print(
            f"{way}: {size / statistics.median(theirs):.2f} MB/s; growkit's throughput over it "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
