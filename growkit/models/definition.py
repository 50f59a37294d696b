"""The order in which transformers defines a model's parameters, which numbers those of an
optimizer.

torch numbers the parameters of an optimizer in the order of `model.named_parameters()`: as the
model's classes create them, layer by layer. Derived tables list their rows in that order, and a
test compares each with transformers. The tables written by hand are in a reader's order; what
differs is stated here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from growkit.errors import GrowkitError
from growkit.models import find_family
from growkit.models.architecture import Architecture
from growkit.models.fused import find_fused
from growkit.models.notation import Row
from growkit.models.table import Table

# The modules of a layer in transformers' order, where the table has another.
LLAMA_LAYER = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
QWEN3_LAYER = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    *LLAMA_LAYER[1:],
)
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
QUERY_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
# Experts are one parameter of a layer in memory; see `growkit.models.fused`.
MIXTURES = {
    "flex_olmo": (*ATTENTION, *QUERY_NORMS, "mlp.gate", *EXPERTS, *NORMS[1:])
    + ("post_feedforward_layernorm",),
    "mixtral": (*ATTENTION, "block_sparse_moe.gate", *EXPERTS, *NORMS),
    "olmoe": (*ATTENTION, *QUERY_NORMS, "mlp.gate", *EXPERTS, *NORMS),
    "qwen2_moe": (
        *ATTENTION,
        "mlp.gate",
        *EXPERTS,
        *(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")),
        "mlp.shared_expert_gate",
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        *NORMS,
    ),
    "qwen3_moe": (
        *ATTENTION,
        *QUERY_NORMS,
        *EXPERTS,
        "mlp.gate",
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        *NORMS,
    ),
}
MODULES = {
    **MIXTURES,
    "llama": LLAMA_LAYER,
    "mistral": LLAMA_LAYER,
    "qwen2": LLAMA_LAYER,
    "qwen3": QWEN3_LAYER,
}
# Model types whose tables list rows in another order than transformers defines them, or whose
# files name other parameters than the model has.
UNKNOWN = frozenset(
    (
        "afmoe",
        "aria_text",
        "ernie4_5_moe",
        "gpt_neox_japanese",
        "granitemoe",
        "granitemoehybrid",
        "granitemoeshared",
        "hy_v4",
        "kimi_linear",
        "lfm2",
        "lfm3",
        "llama4_text",
        "minimax_m3_vl_text",
        "modernbert-decoder",
        "olmo_hybrid",
        "qwen3_5_text",
        "recurrent_gemma",
        "zaya",
        "apertus",
    )
)


def list_defined(model: Architecture) -> list[tuple[str, Row]]:
    """(name in files, row) of every parameter, in the order in which transformers defines them.

    Experts that memory holds as one parameter have its name and row there. A tied head is the
    embedding and is not listed. Raises GrowkitError for a model type whose order is not known, and
    for a table that growkit does not ship.
    """
    rows = _order_rows(model)
    if model.kind in MIXTURES:
        rows = _order_mixture(rows)
    several = next((row for row in rows if len(row.stacked) > 1), None)
    shipped = find_family(model.kind)
    why = ""
    if several is not None:
        why = f": {several.name} is one parameter of many in transformers 5"
    elif shipped is None or shipped.text != model.family.text:
        why = ": its table is not one that growkit ships"
    if model.kind in UNKNOWN or why:
        raise GrowkitError(
            f"the order in which transformers numbers the parameters of a {model.family.title} "
            f"model is not known{why}"
        )
    stacked = [row for row in rows if row.stacked]
    found: list[tuple[str, Row]] = []
    for row in rows:
        if not row.stacked:
            found.append((row.name, row))
        elif row is stacked[0]:
            found += _list_layers(stacked, model)
    return found


def _order_rows(model: Architecture) -> Sequence[Row]:
    """The rows as the classes of the model define them."""
    modules = MODULES.get(model.kind)
    table: Table = model.table
    if modules is None:
        return table.rows
    rows = _fuse_experts(model) if model.kind in MIXTURES else table.rows
    stacked = [row for row in rows if row.stacked]
    ordered = iter(sorted(stacked, key=lambda row: _find_place(row, modules)))
    return [next(ordered) if row.stacked else row for row in rows]


def _fuse_experts(model: Architecture) -> list[Row]:
    """The rows with those of experts as memory holds them; a weight before its bias."""
    fused = find_fused(model).values()
    parts = {part for each in fused for part in each.parts}
    rows = [row for row in model.table.rows if row not in parts]
    rows += [each.row for each in fused]
    # The tables are sorted by name. Sorting keeps the order of what is equal.
    return sorted(rows, key=lambda row: row.name.endswith(".bias"))


def _order_mixture(rows: Sequence[Row]) -> list[Row]:
    """Rows of a table that is sorted by name: the head last."""
    ends = ("embedding", "norm", "head")
    outer = [row for row in rows if not row.stacked]
    outer.sort(key=lambda row: ends.index(row.role))
    inner = [row for row in rows if row.stacked]
    return [outer[0], *inner, *outer[1:]]


def _find_place(row: Row, modules: Sequence[str]) -> int:
    inner = row.name.partition("}.")[2]
    return next(n for n, module in enumerate(modules) if f"{inner}.".startswith(f"{module}."))


def _list_layers(rows: Sequence[Row], model: Architecture) -> Iterator[tuple[str, Row]]:
    """The parameters of all layers, one layer after another."""
    count = max(model.sizes[row.stacked[0].name] for row in rows)
    for unit, row in product(range(count), rows):
        if unit < model.sizes[row.stacked[0].name] and model.table.has(row, unit):
            yield row.name_at((unit,)), row
