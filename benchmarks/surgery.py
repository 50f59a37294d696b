"""Growth on disk against copying a file of the same size, and against what else grows models.

python benchmarks/surgery.py [--dir DIR] [--rounds N] [--parameters 0.6] [--mergekit PROGRAM]
[--alone] [--only huggingface|checkpoint|scale]

Expect, against `cp -r` of the grown output: growth in 0.65 to 0.95 times the copy on directories
and on checkpoints alike, an average of two in 1.0 to 1.8 times, in 20 to 45 MB; a naive
transformers script and mergekit five to eleven times as long, in memory as large as the model.
Needs disk and memory for about five times the model (2.7 GB at 0.6B parameters in float32); three
rounds of everything take 20 minutes on two cores.

Everything is a command of its own, timed from start to end, in turns within a round; printed are
the medians of each, of its ratio to cp in the same round, and its peak anonymous memory. Once as it
is and once with a sync of the file system at the end. The first touch of memory costs a virtual
machine more than a copy does, and one that gives free memory back to its host touches for the first
time again seconds later; so before every command the page cache is filled, from a file without
blocks, and what is written takes its memory from there, as on a machine in use.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from growkit.checkpoint.huggingface import read_header
from growkit.checkpoint.location import write_output
from growkit.checkpoint.tensor import BLOCK, Contents, Recipe
from growkit.models.architecture import Architecture
from growkit.models.gpt_neox import GPT_NEOX

# Python programs run compiled, as installed ones are.
COMPILED = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
GROWKIT = [sys.executable, "-c", "from growkit.cli import main; main()"]
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

    def recipe(shape: tuple[int, ...]) -> Recipe:
        size = int(np.prod(shape))
        pieces = [
            (start, noise[: min(len(noise), size - start)]) for start in range(0, size, len(noise))
        ]
        return Recipe(
            shape,
            dtype,
            pieces=lambda: ((start * dtype.itemsize, piece) for start, piece in pieces),
        )

    recipes = {
        name: recipe(row.shape(model.sizes)) for name, row, _ in model.table.names(model.sizes)
    }
    slots = ("params", "mu", "nu") if kind == "checkpoint" else ("params",)
    write_output(path, kind, Contents(model.config(), dict.fromkeys(slots, recipes), []))
    return path


@dataclass
class Contender:
    """One way to do a job: a command that makes OUT."""

    name: str
    command: Callable[[Path], list[str]]


def time_contender(
    contender: Contender, out: Path, synced: bool, read: list[Path]
) -> tuple[float, float]:
    """Seconds, and megabytes of anonymous memory at the peak, of a command; `read`: the directories
    it reads.
    """
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    warm_cache(out.parent, read)
    started = time.perf_counter()
    process = subprocess.Popen(
        contender.command(out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=COMPILED
    )
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, read_anonymous_memory(process.pid))
        time.sleep(0.002)
    if synced:
        os.sync()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{contender.name} failed: {process.stderr.read().decode()[-2000:]}")
    return seconds, peak


def read_anonymous_memory(process: int) -> float:
    """Megabytes of memory of a process that no file is behind."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(lines[0].split()[1]) / 1000 if lines else 0.0


def warm_cache(directory: Path, read: list[Path]) -> None:
    """Fill the page cache with a file of one hole, then with what the command will read."""
    hole, buffer = directory / "hole", bytearray(4 * BLOCK)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with open(hole, "wb") as file:
        file.truncate(memory * 9 // 10)
    for path in [hole, *(file for each in read for file in each.rglob("*") if file.is_file())]:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def count_bytes(directory: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def compare(
    what: str, contenders: list[Contender], out: Path, rounds: int, read: list[Path]
) -> None:
    """Time all contenders, which read `read`, in turns; the first is the copy that the ratios are
    to.
    """
    for synced in (False, True):
        seconds: dict[str, list[float]] = {each.name: [] for each in contenders}
        memory = dict.fromkeys(seconds, 0.0)
        for _ in range(rounds):
            for each in contenders:
                taken, peak = time_contender(each, out, synced, read)
                seconds[each.name].append(taken)
                memory[each.name] = max(memory[each.name], peak)
        copy = seconds[contenders[0].name]
        for name, taken in seconds.items():
            ratio = statistics.median(
                mine / theirs for mine, theirs in zip(taken, copy, strict=True)
            )
            line = f"{ratio:5.2f} x cp  {statistics.median(taken):6.2f} s  {memory[name]:6.0f} MB"
            print(f"{what:27} {'with sync' if synced else '':10} {name:20} {line}", flush=True)
    shutil.rmtree(out, ignore_errors=True)


def add_buffers(source: Path, layer: int) -> Path:
    """The source as checkpoints once were, with the three buffers a layer that mergekit insists on."""
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
    """mergekit's passthrough of the same layers."""
    source = add_buffers(source, layer)
    slices = "".join(
        f"  - sources:\n    - model: {source}\n      layer_range: [{old}, {old + 1}]\n"
        for old in (i * layer // target for i in range(target))
    )
    path = source.parent / "mergekit.yaml"
    path.write_text(f"merge_method: passthrough\ndtype: float32\nslices:\n{slices}")
    return Contender("mergekit", lambda out: [program, str(path), str(out), "--no-copy-tokenizer"])


def list_rivals(source: Path, layer: int, target: int, program: str | None) -> list[Contender]:
    """What else grows a Hugging Face directory in depth, as far as it is installed."""
    found = []
    if importlib.util.find_spec("transformers"):
        script = [sys.executable, "-c", NAIVE, str(source)]
        found.append(Contender("transformers script", lambda out: [*script, str(out), str(target)]))
    if program:
        found.append(make_mergekit(program, source, layer, target))
    return found


def list_jobs(
    model: Architecture, directory: Path
) -> dict[str, tuple[Architecture, Callable[[Path, Path, Path], list[str]]]]:
    """Every growth that is timed: name -> (the source's model, the command by source, other source
    and output).

    Sources that grow in width have a quarter of the layers, so that all outputs have about the same
    size.
    """
    target, small = model.layer * 4 // 3, model.change(layer=max(1, model.layer // 4))
    grown = replace(
        small,
        layer=small.layer * 4 // 3,
        head=model.head_count * 2,
        embed=model.embed * 2,
        mlp=model.mlp * 2,
    )
    like = directory / "like.json"
    like.write_text(json.dumps(grown.config()))
    return {
        "depth": (
            model,
            lambda source, other, out: ["depth", "--map", f"{model.layer}:{target}", source, out],
        ),
        "average of two": (
            model,
            lambda source, other, out: ["average", source, other, "--out", out],
        ),
        "width": (small, lambda source, other, out: ["width", "--embed", "2x", source, out]),
        "depth and width": (
            small,
            lambda source, other, out: ["grow", "--like", like, source, out],
        ),
    }


def compare_kind(
    kind: str,
    model: Architecture,
    directory: Path,
    rounds: int,
    program: str | None = None,
    others: bool = False,
) -> None:
    """All jobs on one kind of source; each is compared with a copy of its own output."""
    sample, out, other = directory / "sample", directory / "out", directory / "other"
    for name, (begun, words) in list_jobs(model, directory).items():
        source = build(directory / f"{kind}-{begun.layer}", begun, kind, np.dtype(np.float32))
        if name.startswith("average"):
            build(other, begun, kind, np.dtype(np.float32), seed=1)

        def command(out: Path, source: Path = source, words: Any = words) -> list[str]:
            return [*GROWKIT, *map(str, words(source, other, out))]

        subprocess.run(command(sample), check=True, stdout=subprocess.DEVNULL)
        copy = Contender("cp -r", lambda out: ["cp", "-r", str(sample), str(out)])
        contenders = [copy, Contender("growkit", command)]
        if name == "depth" and others:
            contenders += list_rivals(source, model.layer, model.layer * 4 // 3, program)
        read = [sample, source, *([other] if other.exists() else [])]
        compare(f"{kind} {name}", contenders, out, rounds, read)
        shutil.rmtree(sample)
        shutil.rmtree(other, ignore_errors=True)
    for source in directory.glob(f"{kind}-*"):
        shutil.rmtree(source)


def measure_scale(directory: Path, rounds: int) -> None:
    """Time and memory of growth in depth over the size of the model, in bfloat16."""
    for billions in SIZES:
        model = scale_model(billions)
        source = build(directory / "source", model, "huggingface", np.dtype(ml_dtypes.bfloat16))
        words = [*GROWKIT, "depth", "--map", f"{model.layer}:{model.layer * 4 // 3}", str(source)]
        each = Contender("growkit", lambda out, words=words: [*words, str(out)])
        runs = [time_contender(each, directory / "out", False, [source]) for _ in range(rounds)]
        size = count_bytes(directory / "out") / 1e9
        seconds, peak = statistics.median(taken for taken, _ in runs), max(peak for _, peak in runs)
        print(
            f"{billions:4}B: {size:6.2f} GB out, {seconds:6.2f} s, {size / seconds:5.2f} GB/s, {peak:4.0f} MB"
        )
        shutil.rmtree(source)
        shutil.rmtree(directory / "out")


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--dir", type=Path, help="where to work; a temporary directory by default")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--parameters", type=float, default=0.6, choices=SIZES, help="in billions")
    options.add_argument(
        "--mergekit", default=shutil.which("mergekit-yaml"), help="its mergekit-yaml program"
    )
    options.add_argument("--alone", action="store_true", help="leave transformers and mergekit out")
    options.add_argument("--only", choices=("huggingface", "checkpoint", "scale"))
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.dir, prefix="surgery-") as name:
        directory, model = Path(name), scale_model(chosen.parameters)
        if chosen.only in (None, "huggingface"):
            compare_kind(
                "huggingface", model, directory, chosen.rounds, chosen.mergekit, not chosen.alone
            )
        if chosen.only in (None, "checkpoint"):
            # A checkpoint holds every parameter three times: a third of the layers, tied, make
            # about as many bytes.
            compare_kind(
                "checkpoint",
                model.change(layer=model.layer // 3, tied=True),
                directory,
                chosen.rounds,
            )
        if chosen.only in (None, "scale"):
            measure_scale(directory, chosen.rounds)


if __name__ == "__main__":
    main()
