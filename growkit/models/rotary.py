"""Rotary positions in config.json: read from the fields of transformers 4 and 5, written for both.

transformers 5 keeps all of them in `rope_parameters`. transformers 4 has the base in a field of its
own, the rotated part of a head in another, and what a scaled kind adds in `rope_scaling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from growkit.errors import GrowkitError
from growkit.models.computation import FULL, SLIDING
from growkit.models.fields import read_number


@dataclass(frozen=True)
class RotaryFields:
    """The fields of transformers 4: of the base, of the rotated part (None: all of a head).

    scaling: whether kinds other than the default are written to `rope_scaling` too.
    """

    base: str = "rope_theta"
    part: str | None = None
    scaling: bool = True


FIELDS = RotaryFields()


class Values(Protocol):
    """Fields of a configuration, with defaults."""

    def get(self, name: str) -> Any: ...


def read_rotary(given: Mapping[str, Any], fields: RotaryFields, values: Values) -> dict[str, Any]:
    """The rotary parameters as transformers 5 takes them.

    rope_scaling of version 4 goes before rope_parameters. given: the fields that config.json
    states; values: the same with defaults. Raises TypeError for what states no parameters,
    ValueError for a number that is out of its range.
    """
    name = "rope_scaling" if given.get("rope_scaling") else "rope_parameters"
    stated = given.get(name) or {}
    if not isinstance(stated, Mapping):
        raise TypeError(f"{name} is {stated!r}")
    stated = dict(stated)
    # Early files of transformers 4 say `type`, later ones `rope_type`, which the line below lets
    # win.
    kind = stated.pop("type", "default")
    rope = {"rope_type": kind} | stated
    base = stated.get("rope_theta", values.get(fields.base))
    rope["rope_theta"] = read_number(fields.base, base)
    if fields.part:
        part = stated.get("partial_rotary_factor", values.get(fields.part))
        rope["partial_rotary_factor"] = read_number(fields.part, part)
        if not 0 <= rope["partial_rotary_factor"] <= 1:
            raise ValueError(f"{fields.part} must lie between 0 and 1, got {str(part)[:80]!r}")
    return rope


def read_ropes(facts: Mapping[str, Any], by_kind: bool) -> dict[str, Mapping[str, Any]]:
    """The rotary parameters by kind of layer, by "" where all have the same.

    facts: the configuration's fields, complete. by_kind: as Gemma 3 states them. Its version 4 has
    `rope_theta` and `rope_scaling` for full attention, `rope_local_base_freq` for sliding windows.
    Source: Gemma3TextConfig, transformers 5. Raises GrowkitError for values of another kind.
    """
    if not by_kind:
        given = {name: value for name, value in facts.items() if value is not None}
        return {"": read_rotary(given, FIELDS, facts)}
    stated = _take_mapping(facts, "rope_parameters")
    scaling = _take_mapping(facts, "rope_scaling")
    full = {"rope_type": "default", **_take_mapping(stated, FULL), **scaling}
    sliding = {"rope_type": "default", **_take_mapping(stated, SLIDING)}
    full.setdefault("rope_theta", facts["rope_theta"])
    sliding.setdefault("rope_theta", facts["rope_local_base_freq"])
    return {FULL: full, SLIDING: sliding}


def _take_mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Parameters by name; empty where there are none. Raises GrowkitError for anything else."""
    stated = values.get(name) or {}
    if not isinstance(stated, Mapping):
        raise GrowkitError(
            f"config.json holds a value of the wrong kind: {name} is {str(stated)[:80]!r}"
        )
    return stated


def write_rotary(
    rope: Mapping[str, Any], fields: RotaryFields, base: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields that state rotary parameters, for transformers 4 and 5."""
    written: dict[str, Any] = {fields.base: rope["rope_theta"], "rope_parameters": dict(rope)}
    if fields.part:
        written[fields.part] = rope["partial_rotary_factor"]
    if fields.scaling:
        # transformers 4 has the base in a field of its own.
        scaled = {key: value for key, value in rope.items() if key != "rope_theta"}
        written["rope_scaling"] = None if rope["rope_type"] == "default" else scaled
    return written


def keep_rotated(rotary: int, head_dim: int) -> float:
    """The part of a head for which transformers' int(head_dim x part) gives `rotary` dimensions."""
    part = rotary / head_dim
    if int(head_dim * part) == rotary:
        return part
    # Where rounding would miss the count (30 of 44: 29), half a dimension is added.
    return (rotary + 0.5) / head_dim
