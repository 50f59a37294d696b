"""Mistakes planted in tables: one line of each says something wrong."""

from __future__ import annotations

import re
from dataclasses import replace


def plant_mistakes(family):
    """(what, family with one row that says something wrong), for every row that growth touches."""
    lines = family.text.splitlines()
    for place, line in enumerate(lines):
        for what, wrong in wrong_lines(line, family):
            text = "\n".join([*lines[:place], wrong, *lines[place + 1 :]])
            yield f"{what}: {line.split()[0]}", replace(family, text=text)


def wrong_lines(line, family):
    """What a line could say wrongly."""
    if "{/layer" in line:
        yield "does not write the stream", line.replace("{/layer", "{layer")
    for axis in ("embed", "mlp"):
        if re.search(rf"\s/{axis}\s", line):
            yield f"does not read {axis}", re.sub(rf"\s/{axis}\b", f" {axis}", line)
    if re.search(r"\(kv group head_dim\)", line):
        yield "groups before heads", line.replace("(kv group", "(group kv")
    if re.search(r"\sembed\s+(1\+)?(ones|zeros)\s+norm", line):
        yield "a norm is a bias", re.sub(r"\bnorm\b(?=\s*$|\s+\w*tied)", "bias", line)


def one_of_each(family):
    """One mistake of each sort, and the family without what stands beside its table."""
    found = {}
    for what, wrong in plant_mistakes(family):
        # The rows of the model with an untied head and of the other may have one name.
        if not re.search(r"lm_head|^model\.norm", what.split(": ")[1]):
            found.setdefault(what.split(": ")[0], wrong)
    for line, whole in (("(mlp | mlp)", "(pair mlp)"), ("(mlp | mlp)", "(mlp pair)")):
        if line in family.text:
            text = family.text.replace(line, whole)
            found[f"blocks as {whole}"] = replace(family, text=text)
    if family.scalars:
        found["no factor of the embedding"] = replace(family, scalars={})
    if any(row.offset for row in family.rows):
        found["no offset"] = replace(family, text=re.sub(r"\b1\+", "", family.text))
    return found
