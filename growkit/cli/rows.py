"""What `inspect --rows` shows: a model's axes and its table's rows, and how each would grow."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from growkit.models.given import describe_origin

if TYPE_CHECKING:
    from growkit.models.architecture import Architecture
    from growkit.models.notation import Product, Row

COLUMNS = 98
INDENT = 6
# Names of axes up to so long make a column; longer ones push it aside.
LONGEST_AXIS = 12
# The option of `growkit width` for an axis; heads are grown by the axis that the family names.
OPTIONS = {"embed": "--embed", "mlp": "--mlp", "head_dim": "--head-dim"}
# Axes of which growth never makes copies, and what it does instead.
NEVER_COPIED = ("head_dim", "vocab")


def collect_rows(model: Architecture) -> dict[str, Any]:
    """The axes and rows of a model's table as JSON."""
    return {
        "table": describe_origin(model.family),
        "axes": [_collect_axis(model, axis) for axis in model.sizes],
        "rows": [_collect_row(model, row) for row in model.table.rows],
    }


def _collect_axis(model: Architecture, axis: str) -> dict[str, Any]:
    """An axis: its size, the field that states it, whether it grows and how, or why it does not."""
    why_not = find_obstacle(model, axis)
    return {
        "axis": axis,
        "size": model.sizes[axis],
        "field": model.fields.get(axis),
        "grows": not why_not,
        "how": why_not or _describe_growth(model, axis),
    }


def find_obstacle(model: Architecture, axis: str) -> str:
    """Why an axis cannot grow, empty where it can."""
    family = model.family
    if axis == "vocab":
        return _find_vocabulary_obstacle(model)
    if axis == "embed" and model.coupled:
        return find_obstacle(model, model.heads)
    if axis in family.fixed:
        return f"frozen: {family.fixed[axis]}"
    if axis not in family.fields:
        return "frozen: every model of the type has it so, or only its files state it"
    return ""


def _find_vocabulary_obstacle(model: Architecture) -> str:
    from growkit.errors import UsageError
    from growkit.growth.vocabulary import check_vocabulary

    try:
        check_vocabulary(model)
    except UsageError as problem:
        return f"frozen: {problem}"
    return ""


def _describe_growth(model: Architecture, axis: str) -> str:
    """By which option an axis grows, and how exactly."""
    family = model.family
    if axis == "layer":
        identity = "--method identity is exact"
        if family.no_identity:
            identity = f"no identity: {family.no_identity}"
        return f"depth --map: copies of layers, another function; {identity}"
    if axis == "vocab":
        return f"--vocab: old tokens keep their logits; {_describe_tokens(model)}"
    if axis == "expert":
        return "experts FROM:TO: whole copies, exact with as many times more of them a token"
    if axis == "head_dim":
        return f"width --head-dim: exact; {model.rotary} dimensions stay rotated"
    option = OPTIONS.get(axis, f"--axis {axis}=SIZE")
    if axis == model.heads:
        option = "--heads"
    if axis == "embed":
        obstacle = _find_padding_obstacle(model)
        padding = f"no padding: {obstacle}" if obstacle else "padding, exact"
        with_heads = " with the heads," if model.coupled else ""
        return f"width {option}:{with_heads} whole copies, exact; other sizes: {padding}"
    even = "as many copies of each unit" if axis in model.table.uniform_axes else "copies"
    return f"width {option}: {even}, exact"


def _find_padding_obstacle(model: Architecture) -> str:
    from growkit.errors import UsageError
    from growkit.growth.plan import check_paddable

    try:
        check_paddable(model)
    except UsageError as problem:
        return str(problem).removeprefix("embed cannot be padded: ")
    return ""


def _describe_tokens(model: Architecture) -> str:
    """How far k new tokens are from exact."""
    from growkit.growth.vocabulary import MARGIN, has_bias

    if has_bias(model):
        return f"their loss rises by less than {MARGIN:g}"
    return f"k new ones raise their loss by at most log(1 + k/{model.vocab})"


def _collect_row(model: Architecture, row: Row) -> dict[str, Any]:
    """A row: what it is, and what growth does to it along each axis."""
    units = row.positions(model.sizes)
    tensors = sum(not position or model.table.has(row, position[0]) for position in units)
    axes = [axis for part in row.parts for axis in part.axes]
    grown = [axis for axis in axes if not find_obstacle(model, axis.name)]
    copied = [axis for axis in grown if axis.name not in NEVER_COPIED]
    stacked = [axis.name for axis in row.stacked]
    layers = "layer" in stacked and not find_obstacle(model, "layer")
    silent = layers and row.writes_stream and not model.family.no_identity
    return {
        "name": write_name(row),
        "axes": " ".join(_write_dimension(terms) for terms in row.blocks) or "()",
        "begins": f"{row.offset:g}+{row.begins}" if row.offset else row.begins,
        "role": _write_role(row),
        "tensors": tensors,
        "shape": list(row.shape(model.sizes)),
        "grows": _list_names(grown) + (["layer"] if layers else []),
        "values_share": _list_names([axis for axis in copied if axis.read]),
        "moments_share": _list_names([axis for axis in copied if not axis.read]),
        "frozen": [name for name in _list_names(axes) if find_obstacle(model, name)],
        "silent_in_inserted_layers": silent,
    }


def _list_names(axes: list[Any]) -> list[str]:
    return list(dict.fromkeys(axis.name for axis in axes))


def write_name(row: Row) -> str:
    """A row's name as a table has it: `{/layer}` where it writes into the stream."""
    name = row.name
    for axis in row.stacked:
        kind = f":{row.kind}" if row.kind and axis.name == "layer" else ""
        slash = "/" if axis.read else ""
        name = name.replace(f"{{{axis.name}}}", f"{{{slash}{axis.name}{kind}}}")
    return name


def _write_dimension(terms: tuple[Product, ...]) -> str:
    """One stored dimension as a table has it."""
    written = " | ".join(
        " ".join(f"/{axis.name}" if axis.read else axis.name for axis in term) for term in terms
    )
    single = len(terms) == 1 and len(terms[0]) == 1
    return written if single else f"({written})"


def _write_role(row: Row) -> str:
    """The role; of a norm the axes that it averages over where they are not all of its own."""
    others = row.role == "norm" and set(row.averages) != row.axes
    return f"norm({' '.join(row.averages)})" if others else row.role


def format_rows(model: Architecture) -> str:
    """The same for a reader at a terminal, in lines of at most 98 columns where names allow it."""
    found = collect_rows(model)
    width = min(LONGEST_AXIS, max(len(axis["axis"]) for axis in found["axes"]))
    lines = ["axes"]
    for axis in found["axes"]:
        head = f"  {axis['axis']:<{width}}  {axis['size']:>7}  "
        lines += _wrap(axis["how"], head, " " * INDENT)
    lines.append("rows")
    for row in found["rows"]:
        lines.append(f"  {row['name']}  {row['axes']}")
        lines += _wrap(_describe_row(row), " " * INDENT, " " * INDENT)
    return "\n".join(lines)


def _describe_row(row: dict[str, Any]) -> str:
    """A row's second line: role, shape, and what growth does."""
    shape = " x ".join(map(str, row["shape"])) or "a number"
    count = "" if row["tensors"] == 1 else f"{row['tensors']} of "
    grows = "stays as it is"
    if row["grows"]:
        grows = f"grows along {', '.join(row['grows'])}"
    parts = [f"{row['role']}, {count}{shape}", grows]
    if row["values_share"]:
        parts.append(f"values x shares of {', '.join(row['values_share'])}")
    if row["moments_share"]:
        parts.append(f"moments x shares of {', '.join(row['moments_share'])}")
    if row["frozen"]:
        parts.append(f"frozen along {', '.join(row['frozen'])}")
    if row["silent_in_inserted_layers"]:
        parts.append("silent in inserted layers")
    return "; ".join(parts)


def _wrap(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text,
        COLUMNS,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )
