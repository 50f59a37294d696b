"""Training: a run that grows in depth on the way, and one that begins with it, grown in width."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from golden.command import attempted, command
from golden.growths import kept
from golden.outputs import described, digest, entry_kept
from golden.words import text, tokenizer

# What the load of the machine decides.
SPEED = ("tokens_per_second",)

MODEL = {"layer": 2, "embed": 32, "head": 2, "mlp": 64, "vocab": 272, "context": 32}
RECIPE = {
    "dropout": {"hidden": 0.1, "attention": 0.1, "embedding": 0.0},
    "precision": {"params": "float32", "compute": "float32"},
    "data": {"held_out": 0.05},
    "batch": {"sequences": 8, "accumulation": 2},
    "optimizer": {"learning_rate": 0.005},
    "schedule": {"steps": 30, "warmup": 5},
    "checkpoint": {"every": 10, "minutes": 0},
    "eval": {"every": 5, "windows": 8},
    "log": {"every": 1},
    "seed": 7,
}
NEW, GROWN, AVERAGE = "depth-on-the-way", "width-at-start", "average-of-run"
ON_THE_WAY = ("grow.map=2:3", "grow.at=14", "schedule.rewarmup=3")
# Growth in width by copies is exact, so that both growths ask for multipliers: that of the mlp on
# disk, by shares that are not equal, and that at the start of the run.
ON_DISK = ("--mlp", "2x", "--spread", "0.5")
AT_START = (
    "grow.embed=2x",
    "dropout.hidden=0",
    "dropout.attention=0",
    "schedule.steps=15",
    "batch.accumulation=1",
)


def trainings(root: Path) -> dict[str, Any]:
    """{"cases": {name: what is kept of it}, "configs": {digest: content}}.

    The cases are the tokens, a run that grows, one that begins grown, and an average of the first.
    root: a directory for all of them. A case that fails has {"failed": words}.
    """
    (root / "text.txt").write_text(text())
    (root / "tokenizer.json").write_text(tokenizer())
    (root / "recipe.yaml").write_text(json.dumps(RECIPE))
    configs: dict[str, Any] = {}
    makes = {
        "tokens": partial(_tokens, root),
        NEW: partial(_new, root, configs),
        GROWN: partial(_grown, root, configs),
        AVERAGE: partial(_average, root, configs),
    }
    cases = {name: attempted(make, root) for name, make in makes.items()}
    return {"cases": cases, "configs": configs}


def _tokens(root: Path) -> dict[str, str]:
    """Tokenize the text, by a tokenizer that is there and by one trained on it."""
    options = {
        "tokens": ["--tokenizer", str(root / "tokenizer.json")],
        "trained_tokens": ["--train-bpe", "300"],
    }
    for name, words in options.items():
        out = str(root / name)
        command(["tokenize", str(root / "text.txt"), "--out", out, "--processes", "1", *words])
    return {name: _ids(root / name) for name in options}


def _ids(tokens: Path) -> str:
    """A digest of the ids of a directory of tokens, and of the tokenizer that made them."""
    files = ("tokens.bin", "tokenizer.json")
    return digest({file: digest((tokens / file).read_bytes()) for file in files})


def _new(root: Path, configs: dict[str, Any]) -> dict[str, Any]:
    """A run of a new model, which grows in depth on the way."""
    model = [f"model.{name}={size}" for name, size in MODEL.items()]
    return _trained(root, NEW, [*ON_THE_WAY, *model], configs)


def _grown(root: Path, configs: dict[str, Any]) -> dict[str, Any]:
    """A run that begins with the first one's end, grown twice."""
    wide = root / "wide"
    command(["width", str(root / NEW), str(wide), *ON_DISK])
    return _trained(root, GROWN, [*AT_START, "--from", str(wide)], configs)


def _average(root: Path, configs: dict[str, Any]) -> dict[str, Any]:
    """The mean of two checkpoints of a run."""
    run, out = root / NEW, root / AVERAGE
    command(["average", f"{run}@20", f"{run}@30", "--out", str(out)])
    return _saved(out, configs)


def _trained(root: Path, name: str, options: list[str], configs: dict[str, Any]) -> dict[str, Any]:
    """Train; returns what is kept: the last checkpoint, the configuration and the rows."""
    run = root / name
    tokens = f"data.train={root / 'tokens'}"
    command(["train", str(root / "recipe.yaml"), tokens, *options, "--out", str(run)])
    settings = _settings(run, root)
    configs[digest(settings)] = settings
    steps = [path for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    last = max(steps, key=lambda path: int(path.name))
    return _saved(last, configs) | {"settings": digest(settings), "rows": _rows(run)}


def _saved(checkpoint: Path, configs: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a checkpoint. Its record has a loss in it, which depends on the processor."""
    content = kept(described(checkpoint, ()), configs)
    lineage = json.loads((checkpoint / "meta" / "metadata").read_text())["lineage"]
    content["position"] = content.pop("record")
    return content | {"lineage": [entry_kept(entry) for entry in lineage]}


def _settings(run: Path, root: Path) -> dict[str, Any]:
    """The resolved configuration of a run, without the place where its data lie."""
    settings = yaml.safe_load((run / "config.yaml").read_text())["config"]
    return json.loads(json.dumps(settings).replace(str(root), "ROOT"))


def _rows(run: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics, without empty columns and without speed."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{key: text for key, text in row.items() if text and key not in SPEED} for row in rows]
