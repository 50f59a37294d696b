"""The model card of an exported directory: what the model is, how it came to be, how to load it.

Knows Markdown and the lineage's entries; leaves figures of quality to whoever measures them.
"""

from __future__ import annotations

from typing import Any

from growkit.models.architecture import Architecture

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


def format_count(number: float) -> str:
    """757,070,848 as 757.1M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return (
                f"{number / size:.2f}{unit}" if number < 10 * size else f"{number / size:.1f}{unit}"
            )
    return str(int(number))


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
    steps = "".join(f"{number}. {describe_entry(entry)}\n" for number, entry in enumerate(lineage, 1))
    return head + steps + (f"\n## Evaluation\n\n{evaluation}" if evaluation else "")


def describe_entry(entry: dict[str, Any]) -> str:
    """One lineage entry as a sentence."""
    operation = entry.get("operation", "unknown")
    source = entry.get("source", {})
    trained = (
        f", after {source['step']} steps and {format_count(source['tokens'])} tokens"
        if source.get("tokens")
        else ""
    )
    if operation == "train":
        return f"train: {entry.get('start', 'continued')}"
    if "sizes" in entry:
        return f"{operation}: {_growth(entry)}, function {entry['function']}{trained}"
    return (
        f"{operation} to {entry['dtype']}{trained}" if "dtype" in entry else f"{operation}{trained}"
    )


def _growth(entry: dict[str, Any]) -> str:
    """What grew and how, and the options that were not the default ones."""
    before, after = entry["sizes"]["before"], entry["sizes"]["after"]
    changed = ", ".join(
        f"{axis} {before[axis]} to {after[axis]}" for axis in after if before[axis] != after[axis]
    )
    options = [f"moments {entry['moments']}"] if entry.get("moments", "map") != "map" else []
    options += [f"noise {entry['noise']:g}"] if entry.get("noise") else []
    return ", ".join([f"{changed} by {entry['method']}", *options])
