"""A family as a text file: what a table needs beside it, then the table.

    growkit table 1
    kind = llama
    ...
    [fields]
    embed = hidden_size
    [defaults]
    hidden_size = 4096
    head_dim = same hidden_size / num_attention_heads
    [table]
    model.embed_tokens.weight  vocab embed  normal  embedding

Lines that start with # are comments, as in tables. Values are JSON, or `same` and a path for what
another field says. `[proof]` keeps what was measured when the file was derived; nothing reads it
but people and docs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from growkit.errors import GrowkitError
from growkit.models.family import BUFFERS, Family
from growkit.models.fields import Same
from growkit.models.notation import find_begins, parse_table, split_words
from growkit.models.rotary import RotaryFields

HEADER = "growkit table 1"
TEXTS = ("kind", "class_name", "title", "prefix", "norm", "heads", "unpadded", "no_identity")
MAPS = (
    "fields",
    "options",
    "defaults",
    "nulls",
    "new",
    "fresh",
    "proved",
    "equal",
    "constants",
    "frozen",
    "scalars",
    "patterns",
    "aliases",
    "rules",
    "settled",
    "checked",
    "experts",
    "expert_defaults",
    "upcycling",
    "upcycled",
)
LISTS = (
    "by_layer",
    "leading",
    "numbers",
    "other_lists",
    "stated",
    "uniform",
    "unread",
    "last",
    "cycles",
    "buffers",
)


def read_family(text: str) -> Family:
    """The family that a file's text states. Raises GrowkitError that names the line at fault."""
    sections = split_sections(text)
    known = {*TEXTS, *LISTS, "whole_heads", "rotary"}
    for name in sections[""]:
        if name not in known:
            raise GrowkitError(f"a table file has no {name!r}; it has {', '.join(sorted(known))}")
    try:
        return _make_family(sections)
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise GrowkitError(f"a table file that cannot be read: {problem}") from None


def _make_family(sections: Mapping[str, Any]) -> Family:
    """The family of a file's sections. Raises ValueError and others for values that are wrong."""
    facts: dict[str, Any] = dict(sections[""])
    rotary = facts.pop("rotary", None)
    facts |= {name: str(facts.get(name, "")) for name in TEXTS}
    facts |= {name: tuple(facts.get(name, ())) for name in LISTS}
    facts |= {name: sections.get(name, {}) for name in MAPS}
    facts["buffers"] = (*facts["buffers"], *BUFFERS)
    facts["patterns"] = {name: tuple(kinds) for name, kinds in facts["patterns"].items()}
    parse_table(sections["table"], facts["prefix"])
    return Family(
        text=sections["table"], rotary=RotaryFields(**rotary) if rotary else None, **facts
    )


def split_sections(text: str) -> dict[str, Any]:
    """Section -> values by name; `table` is its text, "" what stands before the first section."""
    first, *lines = text.splitlines() or [""]
    if first.strip() != HEADER:
        raise GrowkitError(f"a table file begins with {HEADER!r}, got {first[:40]!r}")
    sections: dict[str, Any] = {"": {}}
    section = ""
    for number, line in enumerate(lines, 2):
        if section == "table":
            sections["table"] += f"{line}\n"
        elif line.startswith("[") and line.rstrip().endswith("]"):
            section = line.strip()[1:-1]
            sections[section] = "" if section == "table" else {}
        elif line.strip() and not line.startswith("#"):
            name, equals, value = line.partition(" = ")
            if not equals:
                raise GrowkitError(f"line {number} of a table file is not `name = value`: {line!r}")
            sections[section][name.strip()] = _read_value(value.strip(), number)
    return sections


def _read_value(text: str, number: int) -> Any:
    if text.startswith("same "):
        return Same(text.removeprefix("same "))
    try:
        return json.loads(text)
    except ValueError:
        if text.startswith(("{", "[", '"')):
            raise GrowkitError(f"line {number} of a table file holds no JSON: {text!r}") from None
        return text


def write_family(family: Family, proof: Mapping[str, str], origin: str) -> str:
    """The text of a family. origin: one line on where the table comes from."""
    lines = [HEADER, f"# {origin}"]
    for name in TEXTS:
        if getattr(family, name):
            lines.append(f"{name} = {getattr(family, name)}")
    for name in LISTS:
        # Buffers of any decoder need not be said.
        listed = [each for each in getattr(family, name) if each not in BUFFERS]
        if listed:
            lines.append(f"{name} = {json.dumps(listed)}")
    lines.append(f"whole_heads = {json.dumps(family.whole_heads)}")
    if family.rotary:
        lines.append(f"rotary = {json.dumps(vars(family.rotary))}")
    for name in MAPS:
        values = getattr(family, name)
        if values:
            lines += ["", f"[{name}]", *(f"{key} = {_write_value(values[key])}" for key in values)]
    lines += ["", "[proof]", *(f"{name} = {value}" for name, value in proof.items())]
    return "\n".join([*lines, "", "[table]", align(family.text)]) + "\n"


def _write_value(value: Any) -> str:
    if isinstance(value, Same):
        return f"same {value.path}"
    plain = isinstance(value, str) and value[:1].isalpha() and not value.startswith("same ")
    if plain and value not in ("true", "false", "null"):
        return str(value)
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def align(text: str) -> str:
    """A table's rows with their columns under one another."""
    rows = [_columns(line) for line in text.splitlines() if line.strip() and line[0] != "#"]
    titles = ["# name", "axes", "begins", "role", "when"]
    widths = [max(len(row[n]) for row in [titles, *rows]) for n in range(4)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, [*widths, 0], strict=True)).rstrip()
        for row in [titles, *rows]
    )


def _columns(line: str) -> list[str]:
    """name, axes, begins, role, conditions of a row."""
    name, *words = split_words(line)
    place = find_begins(words)
    axes, (begins, role, *conditions) = words[:place], words[place:]
    return [name, " ".join(axes), begins, role, " ".join(conditions)]
