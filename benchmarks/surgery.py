"""Growth on disk compared with copying a file of the same size, and with other programs that grow.

    python benchmarks/surgery.py [--dir DIR] [--rounds N] [--parameters 0.6] [--mergekit PROGRAM]
                                 [--alone] [--only huggingface|checkpoint|hf_trainer|dcp|convert|
                                                   checks|scale]

Expect, compared with `cp -r` of the grown output: growth in 0.65 to 0.95 times the copy, on
directories and on checkpoints of both trainers alike; `import` and `export` the same; an average of
two in 1.3 times at most; 20 to 45 MB of memory; a naive transformers script and mergekit five to
eleven times as long, in memory as large as the model. `verify` and `diff` take 1.2 times at most
what `cmp` takes for two files as large as the output. Needs disk and memory for about five times
the model (2.7 GB at 0.6B parameters in float32). Three rounds of everything take 40 minutes on two
cores.

Everything is a command of its own, timed from start to end, in turns within a round. The script
prints the medians of each, of its ratio to cp in the same round, and its peak anonymous memory:
once without a sync (growkit is told `--no-sync`), and once with a sync of the file system at the
end. On a virtual machine the first touch of memory costs more than a copy does, and memory that is
given back to the host counts as untouched again seconds later. So before every command the page
cache is filled from a file without blocks, and the output takes its memory from there, as on a
machine in use.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from growkit.checkpoint.dcp_layout import Distributed
from growkit.checkpoint.dcp_names import Spelling
from growkit.checkpoint.huggingface import read_header
from growkit.checkpoint.location import write_output
from growkit.checkpoint.optimizer import Group, Optimizer, Scalar, list_undecayed
from growkit.checkpoint.tensor import BLOCK, Contents, Recipe
from growkit.models.architecture import Architecture
from growkit.models.definition import list_defined
from growkit.models.gpt_neox import GPT_NEOX

# Python programs run from compiled files, as installed ones do.
COMPILED = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
GROWKIT = [sys.executable, "-c", "from growkit.cli import main; main()"]
UNSYNCED = ("--no-sync",)
KINDS = ("huggingface", "checkpoint", "hf_trainer", "dcp", "convert", "checks", "scale")
# 18 layers of embed 1536, untied: 0.66B parameters. The other sizes keep the proportions.
MODEL = GPT_NEOX.model(
    layer=18, embed=1536, head=12, mlp=6144, vocab=50304, context=1024, rotary_pct=0.25, tied=False
)
SIZES = {0.1: (12, 768), 0.6: (18, 1536), 2.0: (32, 2176)}
NAIVE = """
import sys, torch, transformers
source, out, target = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
layers = model.gpt_neox.layers
chosen = [i * len(layers) // target for i in range(target)]
config = transformers.AutoConfig.from_pretrained(source, num_hidden_layers=target)
grown = transformers.AutoModelForCausalLM.from_config(config, dtype=model.dtype)
state = {k: v for k, v in model.state_dict().items() if ".layers." not in k}
for new, old in enumerate(chosen):
    state |= {f"gpt_neox.layers.{new}.{k}": v for k, v in layers[old].state_dict().items()}
grown.load_state_dict(state)
grown.save_pretrained(out)
"""


def scale_model(billions: float) -> Architecture:
    """The model of about that many parameters."""
    layer, embed = SIZES[billions]
    return MODEL.change(layer=layer, embed=embed, head=embed // 128, mlp=4 * embed)


def build(path: Path, model: Architecture, kind: str, dtype: np.dtype, seed: int = 0) -> Path:
    """A model of random numbers on disk, with moments if it is a checkpoint."""
    if path.exists():
        return path
    noise = np.random.default_rng(seed).normal(0, 0.02, BLOCK // dtype.itemsize).astype(dtype)

    signed, squares = {}, {}
    for name, row, _ in model.table.names(model.sizes):
        signed[name] = repeat_noise(row.shape(model.sizes), noise)
        squares[name] = repeat_noise(row.shape(model.sizes), np.abs(noise))
    slots = {"params": signed}
    if kind != "huggingface":
        # Negative second moments would be counted one by one, and told.
        slots |= {"mu": signed, "nu": squares}
    optimizer = make_optimizer(model) if kind in ("hf_trainer", "dcp") else None
    layout = make_layout(model) if kind == "dcp" else None
    contents = Contents(model.config(), slots, [], torch_optimizer=optimizer, distributed=layout)
    write_output(path, kind, contents)
    return path


def make_optimizer(model: Architecture) -> Optimizer:
    """The two groups of transformers' Trainer, after 1000 steps of AdamW."""
    defined = list_defined(model)
    undecayed = list_undecayed(defined)[0]
    names = [name for name, _ in defined]
    sides = (
        [name for name in names if name not in undecayed],
        [name for name in names if name in undecayed],
    )
    return Optimizer(
        groups=tuple(Group(tuple(side), {"lr": 1e-4, "eps": 1e-8}) for side in sides),
        entries={"mu": "exp_avg", "nu": "exp_avg_sq"},
        locations={"mu": "cpu", "nu": "cpu"},
        steps=dict.fromkeys(names, Scalar("float32", "cpu", 1000.0)),
    )


def make_layout(model: Architecture) -> Distributed:
    """Keys model.NAME and optimizer.state.NAME.exp_avg, the table's names as they are."""
    templates = {row.name: re.sub(r"\{\w+\}", "{}", row.name) for row in model.table.rows}
    spelling = Spelling({}, templates, {})
    return Distributed(("", ""), ("model",), ("optimizer",), False, spelling, {})


def repeat_noise(shape: tuple[int, ...], noise: np.ndarray) -> Recipe:
    """A tensor that repeats the same noise."""
    size = math.prod(shape)

    def pieces() -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, size, len(noise)):
            yield start * noise.itemsize, noise[: size - start]

    return Recipe(shape, noise.dtype, pieces=pieces)


@dataclass
class Contender:
    """One way to do a job: a command, in which the word OUT stands for the output."""

    name: str
    command: list[str]
    unsynced: tuple[str, ...] = ()  # what the command is told where `cp` does not sync either


def time_contender(
    contender: Contender, out: Path, synced: bool, read: list[Path]
) -> tuple[float, float]:
    """(seconds, megabytes of anonymous memory at the peak) of a command.

    synced: whether a sync of the file system is part of it. read: the directories that it reads.
    """
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    warm_cache(out.parent, read)
    told = () if synced else contender.unsynced
    command = place_words([*contender.command, *told], OUT=out)
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=COMPILED
    )
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, read_anonymous_memory(process.pid))
        time.sleep(0.002)
    if synced:
        os.sync()
    seconds = time.perf_counter() - started
    if process.returncode:
        errors = process.stderr.read().decode() if process.stderr else ""
        raise SystemExit(f"{contender.name} failed: {errors[-2000:]}")
    return seconds, peak


def place_words(command: list[str], **paths: Path) -> list[str]:
    """A command with paths in the place of the words that stand for them."""
    return [str(paths.get(word, word)) for word in command]


def read_anonymous_memory(process: int) -> float:
    """Megabytes of a process's memory that are not backed by a file."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(lines[0].split()[1]) / 1000 if lines else 0.0


def warm_cache(directory: Path, read: list[Path]) -> None:
    """Fill the page cache with a file without blocks, then with what the command will read."""
    hole = directory / "hole"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with open(hole, "wb") as file:
        file.truncate(memory * 9 // 10)
    inside = [path for each in read for path in each.rglob("*") if path != hole]
    files = [path for path in inside if path.is_file()]
    buffer = bytearray(4 * BLOCK)
    for path in [hole, *files]:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def count_bytes(directory: Path) -> int:
    """Bytes of all files in a directory."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def compare(
    what: str,
    contenders: list[Contender],
    out: Path,
    rounds: int,
    read: list[Path],
    writes: bool = True,
) -> None:
    """Time all contenders in turns and print them; ratios are to the first one.

    read: the directories that they read. writes: whether they write; then they are timed with a
    sync too.
    """
    for synced in (False, True) if writes else (False,):
        seconds: dict[str, list[float]] = {each.name: [] for each in contenders}
        memory = dict.fromkeys(seconds, 0.0)
        for _ in range(rounds):
            for each in contenders:
                time_taken, peak = time_contender(each, out, synced, read)
                seconds[each.name].append(time_taken)
                memory[each.name] = max(memory[each.name], peak)
        mode = "with sync" if synced else ""
        rival = contenders[0].name
        for name, taken in seconds.items():
            pairs = zip(taken, seconds[rival], strict=True)
            ratios = sorted(mine / theirs for mine, theirs in pairs)
            line = (
                f"{statistics.median(ratios):5.2f} x {rival.split()[0]:3} "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f})  {statistics.median(taken):6.2f} s  "
                f"{memory[name]:6.0f} MB"
            )
            print(f"{what:27} {mode:10} {name:20} {line}", flush=True)
    shutil.rmtree(out, ignore_errors=True)


def add_buffers(source: Path, layer: int) -> Path:
    """The source with three buffers a layer, as old checkpoints have and mergekit requires."""
    old = source.parent / "with-buffers"
    old.mkdir(exist_ok=True)
    buffers = {
        f"gpt_neox.layers.{each}.attention.{name}": np.zeros(1, np.float32)
        for each in range(layer)
        for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
    }
    save_file(buffers, old / "buffers.safetensors")
    os.link(source / "model.safetensors", old / "parameters.safetensors")
    shutil.copy(source / "config.json", old)
    names = dict.fromkeys(buffers, "buffers.safetensors")
    names |= dict.fromkeys(read_header(source / "model.safetensors"), "parameters.safetensors")
    (old / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": names})
    )
    return old


def make_mergekit(program: str, source: Path, layer: int, target: int) -> Contender:
    """mergekit's passthrough merge of the same layers."""
    source = add_buffers(source, layer)
    slices = ""
    for new in range(target):
        old = new * layer // target
        slices += f"  - sources:\n    - model: {source}\n      layer_range: [{old}, {old + 1}]\n"
    path = source.parent / "mergekit.yaml"
    path.write_text(f"merge_method: passthrough\ndtype: float32\nslices:\n{slices}")
    return Contender("mergekit", [program, str(path), "OUT", "--no-copy-tokenizer"])


def list_rivals(source: Path, layer: int, target: int, program: str | None) -> list[Contender]:
    """Other programs that grow a Hugging Face directory in depth, those that are installed."""
    found = []
    if importlib.util.find_spec("transformers"):
        script = [sys.executable, "-c", NAIVE, str(source), "OUT", str(target)]
        found.append(Contender("transformers script", script))
    if program:
        found.append(make_mergekit(program, source, layer, target))
    return found


@dataclass
class Job:
    """A growth to time.

    words: growkit's arguments, in which SOURCE, OTHER and OUT stand for paths.
    """

    name: str
    model: Architecture
    words: list[str]


def list_jobs(model: Architecture, directory: Path) -> list[Job]:
    """Every growth that is timed, with its source's model.

    Sources that grow in width have a quarter of the layers, so that all outputs have about the same
    size.
    """
    layers = f"{model.layer}:{model.layer * 4 // 3}"
    small = model.change(layer=max(1, model.layer // 4))
    like = write_grown_config(small, directory)
    return [
        Job("depth", model, ["depth", "--map", layers, "SOURCE", "OUT"]),
        Job("average of two", model, ["average", "SOURCE", "OTHER", "--out", "OUT"]),
        Job("width", small, ["width", "--embed", "2x", "SOURCE", "OUT"]),
        Job("depth and width", small, ["grow", "--like", str(like), "SOURCE", "OUT"]),
    ]


def write_grown_config(model: Architecture, directory: Path) -> Path:
    """The config.json of a third more layers and twice the width."""
    grown = model.change(
        layer=model.layer * 4 // 3,
        head=model.head_count * 2,
        embed=model.embed * 2,
        mlp=model.mlp * 2,
    )
    path = directory / "like.json"
    path.write_text(json.dumps(grown.config()))
    return path


@dataclass
class Bench:
    """Where and how often to time. program: mergekit's; others: whether to time other programs."""

    directory: Path
    rounds: int
    program: str | None
    others: bool


def compare_kind(kind: str, model: Architecture, bench: Bench) -> None:
    """Time all jobs on one kind of source."""
    for job in list_jobs(model, bench.directory):
        compare_job(kind, job, bench)
    for source in bench.directory.glob(f"{kind}-*"):
        shutil.rmtree(source)


def compare_job(kind: str, job: Job, bench: Bench) -> None:
    """Time a job against a copy of its own output, and depth against other programs too."""
    model = job.model
    sample = bench.directory / "sample"
    source = bench.directory / f"{kind}-{model.layer}"
    other = bench.directory / "other"
    build(source, model, kind, np.dtype(np.float32))
    read = [sample, source]
    if "OTHER" in job.words:
        build(other, model, kind, np.dtype(np.float32), seed=1)
        read.append(other)

    command = place_words([*GROWKIT, *job.words], SOURCE=source, OTHER=other)
    subprocess.run(place_words(command, OUT=sample), check=True, stdout=subprocess.DEVNULL)
    contenders = [
        Contender("cp -r", ["cp", "-r", str(sample), "OUT"]),
        Contender("growkit", command, UNSYNCED),
    ]
    if bench.others and kind == "huggingface" and job.name == "depth":
        contenders += list_rivals(source, model.layer, model.layer * 4 // 3, bench.program)
    compare(f"{kind} {job.name}", contenders, bench.directory / "out", bench.rounds, read)
    shutil.rmtree(sample)
    shutil.rmtree(other, ignore_errors=True)


def compare_conversions(model: Architecture, bench: Bench) -> None:
    """Time import and export, which change no number, against a copy of what they write."""
    kinds = {"import": "huggingface", "export": "checkpoint"}
    for verb, kind in kinds.items():
        # An export leaves the moments behind: only the parameters are read and written.
        compare_job(kind, Job(verb, model, [verb, "SOURCE", "OUT"]), bench)
        shutil.rmtree(bench.directory / f"{kind}-{model.layer}")


def compare_checks(model: Architecture, bench: Bench) -> None:
    """Time verify of a growth in depth and in width, and diff, against `cmp` of as many bytes."""
    out = bench.directory / "out"
    for job in list_jobs(model, bench.directory):
        if job.name not in ("depth", "width"):
            continue
        source = bench.directory / "source"
        build(source, job.model, "huggingface", np.dtype(np.float32))
        grown, twin = bench.directory / "grown", bench.directory / "twin"
        command = place_words([*GROWKIT, *job.words, *UNSYNCED], SOURCE=source, OUT=grown)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.copytree(grown, twin)
        files = [str(each / "model.safetensors") for each in (grown, twin)]
        contenders = [
            Contender("cmp", ["cmp", *files]),
            Contender("growkit verify", [*GROWKIT, "verify", str(source), str(grown)]),
            Contender("growkit diff", [*GROWKIT, "diff", str(grown), str(twin)]),
        ]
        read = [source, grown, twin]
        compare(f"checks of {job.name}", contenders, out, bench.rounds, read, writes=False)
        for each in read:
            shutil.rmtree(each)


def measure_scale(bench: Bench) -> None:
    """Time and memory of growth in depth by the size of the model, in bfloat16."""
    source = bench.directory / "source"
    out = bench.directory / "out"
    for billions in SIZES:
        model = scale_model(billions)
        build(source, model, "huggingface", np.dtype(ml_dtypes.bfloat16))
        layers = f"{model.layer}:{model.layer * 4 // 3}"
        command = [*GROWKIT, "depth", "--map", layers, str(source), "OUT"]
        growkit = Contender("growkit", command, UNSYNCED)
        runs = [time_contender(growkit, out, False, [source]) for _ in range(bench.rounds)]
        size = count_bytes(out) / 1e9
        seconds = statistics.median(taken for taken, _ in runs)
        peak = max(memory for _, memory in runs)
        print(
            f"{billions:4}B: {size:6.2f} GB out, {seconds:6.2f} s, {size / seconds:5.2f} GB/s, "
            f"{peak:4.0f} MB"
        )
        shutil.rmtree(source)
        shutil.rmtree(out)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, help="where to work; a temporary directory by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parameters", type=float, default=0.6, choices=SIZES, help="in billions")
    parser.add_argument(
        "--mergekit", default=shutil.which("mergekit-yaml"), help="its mergekit-yaml program"
    )
    parser.add_argument("--alone", action="store_true", help="leave transformers and mergekit out")
    parser.add_argument("--only", choices=KINDS)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    model = scale_model(options.parameters)
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="surgery-") as name:
        bench = Bench(Path(name), options.rounds, options.mergekit, not options.alone)
        if options.only in (None, "huggingface"):
            compare_kind("huggingface", model, bench)
        for kind in ("checkpoint", "hf_trainer", "dcp"):
            if options.only in (None, kind):
                # A checkpoint holds every parameter three times: a third of the layers, tied, makes
                # about as many bytes.
                third = model.change(layer=model.layer // 3, tied=True)
                compare_kind(kind, third, bench)
        if options.only in (None, "convert"):
            compare_conversions(model, bench)
        if options.only in (None, "checks"):
            compare_checks(model, bench)
        if options.only in (None, "scale"):
            measure_scale(bench)


if __name__ == "__main__":
    main()
