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
from growkit.models.computation import ACTIVATIONS, ROTARY
from growkit.models.computed import COMPUTED
from growkit.models.family import Family
from growkit.models.gates import check_choice
from growkit.models.given import find_given
from growkit.models.gpt_neox import GPT_NEOX
from growkit.models.llama import LLAMA
from growkit.models.mistral import MISTRAL
from growkit.models.qwen2 import QWEN2
from growkit.models.qwen3 import QWEN3
from growkit.models.tables import list_mixtures, list_shipped, read_shipped
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


def list_trained() -> tuple[str, ...]:
    """The model types that the trainer trains: those whose families say what they compute."""
    by_hand = [kind for kind, family in FAMILIES.items() if family.computation]
    return tuple([*by_hand, *(kind for kind in list_shipped() if kind in COMPUTED)])


def list_upcycled(dense: str | None = None) -> tuple[str, ...]:
    """The mixtures that models of a dense type become; without one, the dense types.

    The one with the fewest dense types comes first: it is the nearest relative.
    """
    stated = {kind: read_shipped(kind).upcycling.get("from", ()) for kind in list_mixtures()}
    if dense is None:
        return tuple(dict.fromkeys(each for types in stated.values() for each in types))
    found = [kind for kind, types in stated.items() if dense in types]
    return tuple(sorted(found, key=lambda kind: (len(stated[kind]), kind)))


def require_trained(model: Architecture, origin: object) -> Architecture:
    """The model of `origin`, for what computes it in JAX.

    Raises UsageError for a family that growkit grows and does not train, and for a value of an
    option or field that the trainer does not compute.
    """
    computation = model.family.computation
    if computation is None:
        known = ", ".join(repr(kind) for kind in list_trained())
        raise UsageError(
            f"{origin} is a {model.kind!r} model, which growkit grows but does not train: "
            f"training, import, export, generate and search take {known}"
        )
    _require_value(origin, model.family.options["activation"], model.activation, ACTIVATIONS)
    for rope in model.ropes.values():
        _require_value(origin, "rotary positions of the type", rope["rope_type"], ROTARY)
    for name, computed in computation.only.items():
        _require_value(origin, name, model.facts[name], computed)
    try:
        check_choice(model)
    except GrowkitError as problem:
        raise UsageError(f"{origin}: {problem}") from None
    return model


def _require_value(origin: object, name: str, value: object, computed: tuple[object, ...]) -> None:
    """Raise UsageError for a value that is none of those that the trainer computes."""
    if value not in computed:
        known = " or ".join(repr(each) for each in computed)
        raise UsageError(
            f"{origin} has {name} {value!r}, and the trainer computes {known} only; growth on disk "
            f"takes it as it is"
        )
