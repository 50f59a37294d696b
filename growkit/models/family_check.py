"""Whether a family that was read from a stranger's text is whole: what code relies on elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable

from growkit.errors import GrowkitError, did_you_mean
from growkit.models.family import NORMS, Family
from growkit.models.fields import RATIO
from growkit.models.gates import FIELDS, SCORES
from growkit.models.scalars import POWER
from growkit.models.table_file import LISTS

_FIELD = re.compile(r"\w+")


def check_family(family: Family) -> None:
    """Raise GrowkitError, naming what is wrong, for a family that contradicts itself."""
    if not family.kind:
        raise GrowkitError("the table does not say which model type it is for: `kind = ...`")
    if family.norm not in NORMS:
        near = did_you_mean(family.norm, NORMS)
        raise GrowkitError(f"norm is 'layer' or 'rms', got {family.norm!r}{near}")
    if not family.rows:
        raise GrowkitError("the table has no rows")
    checks: tuple[Callable[[Family], None], ...] = (
        _check_texts,
        _check_fields,
        _check_options,
        _check_rows,
        _check_scalars,
        _check_experts,
        _check_upcycling,
    )
    for check in checks:
        check(family)


def _check_texts(family: Family) -> None:
    """Lists and maps of texts hold texts."""
    for name in LISTS:
        if not all(isinstance(each, str) for each in getattr(family, name)):
            raise GrowkitError(f"{name} is a list of texts")
    for name in ("fields", "options", "frozen", "scalars", "equal"):
        for key, value in getattr(family, name).items():
            if not isinstance(value, str):
                raise GrowkitError(f"[{name}] states a text for {key}, got {value!r}")


def _check_fields(family: Family) -> None:
    """Each axis has a field or the ratio of two; constants are counts; `heads` is an axis."""
    for axis, path in family.fields.items():
        if not (_FIELD.fullmatch(path) or RATIO.fullmatch(path)):
            raise GrowkitError(f"the field of {axis} is a name or `a / b`, got {path!r}")
    for axis, size in family.constants.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise GrowkitError(f"the constant {axis} is a whole number of at least 1, got {size!r}")
    stated = {RATIO.sub(r"\1", path) for path in family.fields.values()}
    for name, path in family.equal.items():
        if path not in stated:
            near = did_you_mean(path, stated)
            raise GrowkitError(f"{name} is equal to {path!r}, which states no size{near}")
    if family.heads and family.heads not in family.fields:
        near = did_you_mean(family.heads, family.fields)
        raise GrowkitError(f"heads names the axis {family.heads!r}, which has no field{near}")


def _check_options(family: Family) -> None:
    """Each option has a default, which says what kind of value it is."""
    for name, path in family.options.items():
        if not isinstance(family.defaults.get(path), (bool, int, float, str)):
            raise GrowkitError(f"[defaults] states no value of {path}, the field of {name}")
    if "norm_eps" not in family.options and not family.unpadded:
        raise GrowkitError("[options] lacks norm_eps, which padding changes; or say why `unpadded`")


def _check_rows(family: Family) -> None:
    """Conditions are options, and axes whose units are counted have sizes."""
    sizes = {*family.fields, *family.constants}
    for row in family.rows:
        for condition in row.conditions:
            plain = re.sub("^(!|un)", "", condition)
            if condition not in family.options and plain not in family.options:
                raise GrowkitError(f"the row {row.name} depends on {condition!r}, no option")
        for axis in row.stacked:
            if axis.name not in sizes:
                near = did_you_mean(axis.name, sizes)
                raise GrowkitError(f"the row {row.name} is one of {axis.name!r}, no axis{near}")


def _check_scalars(family: Family) -> None:
    """Factors are of rows, and follow the size of an axis."""
    names = {row.name for row in family.rows}
    for key, text in family.scalars.items():
        if key.split()[0] not in names:
            near = did_you_mean(key.split()[0], names)
            raise GrowkitError(f"[scalars] names {key!r}, which is no row of the table{near}")
        found = POWER.fullmatch(text)
        if found is None or (found[2] or found[3]) not in family.fields:
            raise GrowkitError(
                f"a scalar is axis, sqrt(axis), 1/axis or 1/sqrt(axis) of an axis, got {text!r}"
            )


def _check_experts(family: Family) -> None:
    """A gate is of a kind that is known, and its fields have defaults."""
    stated = dict(family.experts)
    if not stated:
        return
    if "expert" not in family.fields:
        raise GrowkitError("[experts] states a gate, and the table has no axis expert")
    if stated.get("gate") not in SCORES:
        known = ", ".join(SCORES)
        raise GrowkitError(f"[experts] gate is one of {known}, got {stated.get('gate')!r}")
    for name in ("normalised", "top"):
        if name not in stated:
            raise GrowkitError(f"[experts] lacks {name}")
    for name, field in stated.items():
        if name not in ("gate", "normalised", "also", *FIELDS):
            raise GrowkitError(f"[experts] has no {name!r}")
        plain = isinstance(field, bool) and name == "normalised"
        named = name in ("normalised", *FIELDS) and not plain
        if named and (not isinstance(field, str) or field not in family.expert_defaults):
            raise GrowkitError(
                f"[expert_defaults] states no value of {field!r}, the field of {name}"
            )


def _check_upcycling(family: Family) -> None:
    """Where it is stated how a dense model becomes one of these, it is stated whole."""
    stated = dict(family.upcycling)
    if not stated:
        return
    if not family.experts:
        raise GrowkitError("[upcycling] needs [experts], which states the gate")
    known = ("from", "windows", "window", "switch", "every", "fields", "why")
    for name in (*stated, "from"):
        if name not in known or name not in stated:
            raise GrowkitError(
                f"[upcycling] states {', '.join(known)}; {name!r} is missing, or none of these"
            )
    if ("windows" in stated) != ("window" in stated):
        raise GrowkitError("[upcycling] states which layers have a window, and its field, or none")
    names = {row.name for row in family.rows}
    for name in family.upcycled:
        if name not in names:
            near = did_you_mean(name, names)
            raise GrowkitError(f"[upcycled] names {name!r}, which is no row of the table{near}")
