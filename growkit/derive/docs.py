"""docs/derived.md: a row for each model type with a shipped table, from what the tables' files say
was measured.

python -m growkit.derive.docs > docs/derived.md
"""

from __future__ import annotations

from growkit.models.family import Family
from growkit.models.table_file import split_sections
from growkit.models.tables import list_shipped, read_shipped, read_text

BOUND = 1e-10
HEAD = """# Models that grow

GPT-NeoX, Llama, Mistral, Qwen2 and Qwen3 have tables written by hand (`growkit/models/`). The types
below have tables that `growkit derive` made from transformers' own classes
(`growkit/models/tables/`). Each was proved on tiny random models: grown by growkit, computed by
transformers in float64, compared with the source. Norms, softmaxes and rotary positions are
computed in float64 too; transformers itself computes them in float32.

* **copies**: layers copied compute what transformers' own layers compute in that order.
* **identity**: layers that add nothing can be inserted; the function stays.
* **width**: the axes that copies widen, alone and all together, with unequal multiplicities. The
  gradient of the grown model is the grown gradient, so moments follow the rule.
* **padding**: embed grows to any size.
* **difference**: the largest difference of logits over the largest logit, or of a row's gradients
  over its largest, of all growths that the row offers, through files too.
* **holds for**: options whose other value is another function, or was not proved. growkit refuses
  models that have it.

An axis that is not named is frozen; the table's file says why.
"""
COLUMNS = ("model_type", "copies", "identity", "width", "padding", "difference", "holds for")


def write_docs() -> str:
    """The text of docs/models.md."""
    rows = [write_row(kind) for kind in list_shipped()]
    wide = sum("embed" in row[3].split(", ") for row in rows)
    deep = sum(row[1] == "yes" for row in rows)
    count = (
        f"{len(rows)} types: {deep} grow in depth by copies, {wide} in the width of the stream.\n"
    )
    lines = [
        " | ".join(COLUMNS),
        " | ".join("---" for _ in COLUMNS),
        *(" | ".join(row) for row in rows),
    ]
    return "\n".join([HEAD, count, *(f"| {line} |" for line in lines)]) + "\n"


def write_row(kind: str) -> list[str]:
    """A type's row."""
    family = read_shipped(kind)
    gaps = {name: float(gap) for name, gap in split_sections(read_text(kind))["proof"].items()}
    exact = [gap for name, gap in gaps.items() if gap < BOUND]
    return [
        f"`{kind}`",
        say("layer" not in family.frozen),
        say(not family.no_identity and "layer" not in family.frozen),
        ", ".join(wide_axes(family, gaps)) or "no",
        say(not family.unpadded),
        f"{max(exact, default=0.0):.0e}",
        ", ".join(f"{name} = {str(value).lower()}" for name, value in family.proved.items()),
    ]


def say(true: bool) -> str:
    return "yes" if true else "no"


def wide_axes(family: Family, gaps: dict[str, float]) -> list[str]:
    """The axes that copies widen."""
    axes = [axis for axis in family.fields if axis != "layer" and axis not in family.frozen]
    grown = [axis for axis in axes if gaps.get(axis, 1.0) < BOUND]
    if family.coupled and family.heads in grown:
        grown.insert(0, "embed")
    return list(dict.fromkeys(grown))


if __name__ == "__main__":
    print(write_docs(), end="")
