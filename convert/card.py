"""The model card of an exported directory: what the model is, how it was made, how to load it."""

from __future__ import annotations

from typing import Any

from convert.training import format_curve, format_trainings
from growkit.entries import Conversion, Entry, Growth, Origin, Training
from growkit.growth.plan import KEEP
from growkit.lineage import Lineage
from growkit.models.architecture import Architecture
from growkit.models.counts import describe_mlp
from growkit.quantity import format_count

HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{model.kind}, growkit]
---

# {model.family.title}, {size}

| | |
| --- | --- |
| layers | {model.layer} |
| hidden size | {model.embed} |
| heads | {model.head_count} of {model.head_dim}{groups} |
| mlp | {mlp} |
| vocabulary | {model.vocab} |
| context | {model.context} tokens |
| parameters | {model.parameters:,} |
| residual | {residual} |
| head | {head} |

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```

## Lineage

"""


def format_card(
    model: Architecture,
    lineage: list[dict[str, Any]],
    evaluation: str = "",
    history: bytes = b"",
) -> str:
    """README.md of an exported model, with its lineage in words; lineage.json has the entries.

    evaluation: tables and notes in Markdown, if it was measured. history: the metrics of its
    training, as a run's checkpoint carries them.
    """
    parallel = model.options.get("parallel_residual", False)
    grouped = model.sizes.get("group", 1) > 1
    head = HEAD.format(
        model=model,
        mlp=describe_mlp(model),
        groups=f" in {model.sizes['kv']} groups" if grouped else "",
        size=format_count(model.parameters),
        residual="parallel" if parallel else "sequential",
        head="tied to the embedding" if model.tied else "untied",
    )
    entries = Lineage.read(lineage)
    steps = [f"{number}. {describe_entry(entry)}\n" for number, entry in enumerate(entries, 1)]
    card = head + "".join(steps)
    sections = {
        "Training": format_trainings(entries),
        "Validation loss": format_curve(history),
        "Evaluation": evaluation,
    }
    for title, text in sections.items():
        if text:
            card += f"\n## {title}\n\n{text}"
    return card


def describe_entry(entry: Entry) -> str:
    """One lineage entry as a sentence."""
    if isinstance(entry, Training):
        return _describe_beginning(entry)
    trained = _describe_training(entry.source)
    if isinstance(entry, Growth):
        grown = _describe_growth(entry)
        return f"{entry.operation}: {grown}, function {entry.function}{trained}"
    if isinstance(entry, Conversion):
        return f"{entry.operation} to {entry.dtype}{trained}"
    return f"{entry.operation}{trained}"


def _describe_beginning(entry: Training) -> str:
    """What a training began with, and the learning rates of an annealing."""
    if entry.source is None:
        return "train: from scratch"
    start = f"from {entry.source.path}{_describe_training(entry.source)}"
    if entry.branch is None:
        return f"train: {start}"
    branch = entry.branch
    rates = f"learning rate {branch.rate:g} to {branch.to:g}"
    return f"{branch.verb}: {start}, {rates} over {format_count(branch.tokens)} tokens"


def _describe_training(source: Origin | None) -> str:
    """How far an entry's source was trained; empty if that is not on record."""
    record = source.record if source else {}
    if not record.get("tokens"):
        return ""
    steps = f"{record['step']} steps and " if "step" in record else ""
    return f", after {steps}{format_count(record['tokens'])} tokens"


def _describe_growth(entry: Growth) -> str:
    """What grew and how, and the options that were not the defaults."""
    changes = ", ".join(f"{axis} {old} to {new}" for axis, (old, new) in entry.changes.items())
    words = [f"{changes} by {entry.method}"]
    if entry.moments != "map":
        words.append(f"moments {entry.moments}")
    if entry.noise:
        size = entry.noise if isinstance(entry.noise, str) else f"{entry.noise:g}"
        words.append(f"noise {size}")
    if entry.rates != KEEP:
        words.append(f"rates {entry.rates}")
    return ", ".join(words)
