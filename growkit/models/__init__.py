"""What a model is: its parameters, the axes along which they lie, and its config.json.

Read `notation` (the language of tables) first, then one model (`llama`, `gpt_neox`), then `table`
(all rows of a model), `family` and `architecture`, which turn a config.json into sizes and options
and back. This file lists the families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from growkit.errors import GrowkitError, UsageError
from growkit.models.architecture import Architecture
from growkit.models.family import Family
from growkit.models.given import find_given
from growkit.models.gpt_neox import GPT_NEOX
from growkit.models.llama import LLAMA
from growkit.models.mistral import MISTRAL
from growkit.models.qwen2 import QWEN2
from growkit.models.qwen3 import QWEN3
from growkit.models.tables import list_shipped, read_shipped
from growkit.models.unknown import describe_unknown

FAMILIES: dict[str, Family] = {
    family.kind: family for family in (GPT_NEOX, LLAMA, MISTRAL, QWEN2, QWEN3)
}
# Text decoders within larger models that are another family's but for their model_type. Positions
# in pictures have three parts; those of text are as before.
WITHIN = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2"}


def find_family(kind: str) -> Family | None:
    """The family of a model type, by hand or of a derived table; None where there is none."""
    if kind in FAMILIES:
        return FAMILIES[kind]
    if kind in WITHIN:
        family = FAMILIES[WITHIN[kind]]
        fixed = dict.fromkeys(
            ("kv", "group", "head_dim"), "transformers makes head_dim embed / heads"
        )
        return replace(family, kind=kind, frozen={**family.frozen, **fixed})
    return read_shipped(kind) if kind in list_shipped() else None


def read_config(config: Mapping[str, Any], lineage: Sequence[Any] = ()) -> Architecture:
    """The model that a config.json describes. Raises GrowkitError for an unknown architecture.

    lineage: the model's entries, as files hold them; one may state the table.
    """
    kind = config.get("model_type")
    family = find_given(str(kind), lineage) or find_family(str(kind))
    if family is None:
        shipped = list_shipped()
        by_hand = ", ".join(repr(name) for name in FAMILIES)
        known = f"{by_hand} and {len(shipped)} others"
        hint = describe_unknown(str(kind), [*FAMILIES, *shipped])
        raise GrowkitError(f"the architecture is {kind!r}, and growkit knows {known} only{hint}")
    return family.read(config)


# What the trainer computes; growth works for every family.
TRAINED = {GPT_NEOX.kind: {"activation": "gelu", "attention_bias": True}}


def require_trained(model: Architecture, origin: object) -> Architecture:
    """The model of `origin`, for what computes it in JAX.

    Raises UsageError for a family that growkit grows and does not train, and for an option that the
    trainer does not compute.
    """
    if model.kind not in TRAINED:
        known = ", ".join(repr(kind) for kind in TRAINED)
        raise UsageError(
            f"{origin} is a {model.kind!r} model, which growkit grows but does not train: "
            f"training, import, export and generate take {known} only"
        )
    for name, value in TRAINED[model.kind].items():
        if model.options[name] != value:
            field = model.family.options[name]
            raise UsageError(
                f"{origin} has {field} {model.options[name]!r}, and the trainer computes {value!r} "
                f"only; growth on disk takes it as it is"
            )
    rotary = model.rope["rope_type"]
    if rotary != "default":
        raise UsageError(
            f"{origin} has rotary positions of the type {rotary!r}, and the trainer computes "
            f"'default' only; growth on disk takes them as they are"
        )
    return model
