"""How time and memory of surgery grow with the number of tensors, and with their bytes.

    python benchmarks/scale.py [--dir DIR] [--tensors 1000 10000 100000] [--gigabytes 2 20 200]

Expect both to grow in proportion: about 30 microseconds and 3 KB a tensor for `inspect` and a plan,
a few times that for growth and `verify`; and the same seconds and megabytes whatever the bytes,
for what reads headers alone. The sources are sharded Hugging Face directories. Those of many
tensors are tiny in bytes and grow for real. Those of many bytes are sparse files, which take no
disk: `inspect` and `depth --dry-run` read their headers and three pages of each tensor. They are
not grown: growth writes every byte, holes too, because an output's blocks are reserved before any
work is done.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from growkit.models import read_config
from growkit.models.architecture import Architecture
from growkit.models.gpt_neox import GPT_NEOX

GROWKIT = [sys.executable, "-c", "from growkit.cli import main; main()"]
# 24 layers of as many experts as it takes, of three tensors each.
MANY: dict[str, Any] = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 8,
    "num_hidden_layers": 24,
    "vocab_size": 16,
    "tie_word_embeddings": False,
}
LAYERS = MANY["num_hidden_layers"]
# A layer of embed 8192 in float32 takes 3.2 GB.
WIDE = GPT_NEOX.model(
    layer=1, embed=8192, head=64, mlp=32768, vocab=50304, context=16, rotary_pct=0.5, tied=False
)
SHARD_TENSORS = 500
WIDTH = 4  # bytes of float32


def write_sparse(path: Path, model: Architecture) -> Path:
    """A sharded directory of zeros, which are holes in its files."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(model.config()))
    shapes = {name: row.shape(model.sizes) for name, row, _ in model.table.names(model.sizes)}
    names = list(shapes)
    shards = [names[n : n + SHARD_TENSORS] for n in range(0, len(names), SHARD_TENSORS)]
    weight_map: dict[str, str] = {}
    for number, some in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(path / file, {name: shapes[name] for name in some})
        weight_map |= dict.fromkeys(some, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """One safetensors file: a header, then a hole as long as the tensors."""
    header = {}
    end = 0
    for name, shape in shapes.items():
        size = WIDTH
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def measure(words: list[str]) -> tuple[float, float]:
    """(seconds, megabytes of memory at the peak) of a command."""
    begun = time.perf_counter()
    process = subprocess.Popen([*GROWKIT, *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"growkit {' '.join(words)} failed")
    return time.perf_counter() - begun, usage.ru_maxrss / 1000


def show(what: str, verb: str, found: tuple[float, float]) -> None:
    print(f"{what:>16}  {verb:20} {found[0]:8.2f} s  {found[1]:8.0f} MB", flush=True)


def measure_tensors(directory: Path, tensors: int) -> None:
    """Everything on a source of so many tiny tensors."""
    model = read_config(MANY | {"num_local_experts": max(1, tensors // (3 * LAYERS))})
    source = str(write_sparse(directory / f"many{tensors}", model))
    grown = str(directory / f"grown{tensors}")
    depth = ["depth", "--map", f"{LAYERS}:{LAYERS * 4 // 3}", source, grown, "--no-sync"]
    what = f"{tensors:,} tensors"
    show(what, "inspect", measure(["inspect", source]))
    show(what, "depth --dry-run", measure([*depth, "--dry-run", "--json"]))
    show(what, "depth", measure([*depth, "--max-shard-size", "2MB"]))
    show(what, "verify", measure(["verify", source, grown]))


def measure_bytes(directory: Path, gigabytes: int) -> None:
    """What reads headers alone, on a source of so many bytes."""
    layers = max(1, round(gigabytes / 3.22))
    source = str(write_sparse(directory / f"wide{gigabytes}", WIDE.change(layer=layers)))
    depth = ["depth", "--dry-run", "--map", f"{layers}:{layers + 1}", source, f"{source}-grown"]
    what = f"{gigabytes:,} GB"
    show(what, "inspect", measure(["inspect", source]))
    show(what, "depth --dry-run", measure(depth))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dir", type=Path, help="where to work; a temporary directory by default")
    parser.add_argument("--tensors", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--gigabytes", type=int, nargs="*", default=[2, 20, 200])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="scale-") as name:
        for tensors in options.tensors:
            measure_tensors(Path(name), tensors)
        for gigabytes in options.gigabytes:
            measure_bytes(Path(name), gigabytes)


if __name__ == "__main__":
    main()
