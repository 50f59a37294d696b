"""The model card of an exported directory: what the model is, how it came to be, how to load it.

Knows Markdown and the lineage's entries; leaves figures of quality to whoever measures them.
"""

from __future__ import annotations

from typing import Any

from growkit.entries import Conversion, Entry, Growth, Origin
from growkit.lineage import Lineage
from growkit.models.architecture import Architecture
from growkit.quantity import format_count

HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt_neox, growkit]
---

# GPT-NeoX, {size}

| | |
| --- | --- |
| layers | {model.layer} |
| hidden size | {model.embed} |
| heads | {model.head_count} of {model.head_dim} |
| mlp | {model.mlp} |
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


def format_card(model: Architecture, lineage: list[dict[str, Any]], evaluation: str = "") -> str:
    """README.md of an exported model, its lineage in words; the entries themselves are in lineage.json.

    evaluation: tables and notes in Markdown, where it was measured.
    """
    head = HEAD.format(
        model=model,
        size=format_count(model.parameters),
        residual="parallel" if model.options["parallel_residual"] else "sequential",
        head="tied to the embedding" if model.tied else "untied",
    )
    read = Lineage.read(lineage)
    steps = "".join(f"{number}. {describe_entry(entry)}\n" for number, entry in enumerate(read, 1))
    return head + steps + (f"\n## Evaluation\n\n{evaluation}" if evaluation else "")


def describe_entry(entry: Entry) -> str:
    """One lineage entry as a sentence."""
    if entry.operation == "train":
        return "train: continued"
    trained = _trained(entry.source)
    if isinstance(entry, Growth):
        return f"{entry.operation}: {_growth(entry)}, function {entry.function}{trained}"
    if isinstance(entry, Conversion):
        return f"{entry.operation} to {entry.dtype}{trained}"
    return f"{entry.operation}{trained}"


def _trained(source: Origin | None) -> str:
    """How far an entry's source was trained, empty where that is not on record."""
    record = source.record if source else {}
    if not record.get("tokens"):
        return ""
    return f", after {record['step']} steps and {format_count(record['tokens'])} tokens"


def _growth(entry: Growth) -> str:
    """What grew and how, and the options that were not the default ones."""
    changed = ", ".join(f"{axis} {old} to {new}" for axis, (old, new) in entry.changes.items())
    options = [f"moments {entry.moments}"] if entry.moments != "map" else []
    options += [f"noise {entry.noise:g}"] if entry.noise else []
    return ", ".join([f"{changed} by {entry.method}", *options])
