"""Two records, and in what they differ, in sentences that name the case and the part of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# By how much a number of a training may differ from one machine to another.
RTOL = 1e-3
# What only a comparison to the bit needs: of growth the digests of single tensors, of training all
# that depends on the processor, and what depends on the version of the tokenizers' library.
EXACT_OF_GROWTH = ("tensors",)
EXACT_OF_TRAINING = ("tensors", "slots", "position", "trained_tokens")
# Digests of what a record holds whole in `configs`.
CONFIGS = ("config", "settings")
SHOWN = 5

Record = Mapping[str, Any]
Equal = Callable[[str, str], bool]


def without(record: Record, parts: Sequence[str]) -> dict[str, Any]:
    """A record without some parts of its cases."""
    cases = {
        name: {part: value for part, value in case.items() if part not in parts}
        for name, case in record["cases"].items()
    }
    return dict(record) | {"cases": cases}


def same(one: str, other: str) -> bool:
    """Whether two texts are the same."""
    return one == other


def close(one: str, other: str) -> bool:
    """Whether two texts are the same, or are nearly the same number and not both whole."""
    if one == other:
        return True
    if one.isdecimal() and other.isdecimal():
        return False
    try:
        return math.isclose(float(one), float(other), rel_tol=RTOL)
    except ValueError:
        return False


def differences(expected: Record, found: Record, equal: Equal = same) -> list[str]:
    """A sentence for every part of every case in which two records differ, by case.

    equal: what entries of rows must be. Tensors are named one by one where both records have them.
    """
    sentences: list[str] = []
    configs = (expected["configs"], found["configs"])
    for name in sorted(expected["cases"].keys() | found["cases"].keys()):
        before, after = (record["cases"].get(name) for record in (expected, found))
        if before is None or after is None:
            sentences.append(f"{name}: only in the {'new' if before is None else 'old'} record")
        else:
            sentences += [f"{name}, {words}" for words in _parts(before, after, configs, equal)]
    return sentences


def _parts(
    before: Record, after: Record, configs: tuple[Record, Record], equal: Equal
) -> Iterator[str]:
    """What differs between two records of one case."""
    for part in sorted(before.keys() | after.keys()):
        old, new = before.get(part), after.get(part)
        if _text(old) == _text(new):
            continue
        if old is None or new is None:
            yield f"{part}: only in the {'new' if old is None else 'old'} record"
        elif part == "rows":
            yield from _rows(old, new, equal)
        elif part == "slots":
            yield from _slots(before, after)
        elif part in CONFIGS:
            yield from (f"{part}: {words}" for words in _fields(configs[0][old], configs[1][new]))
        elif part != "tensors":
            yield f"{part}: was {old}, is {new}"


def _text(value: Any) -> str:
    """A value as JSON, in which 1, 1.0 and true are not the same."""
    return json.dumps(value, sort_keys=True)


def _rows(old: Sequence[Record], new: Sequence[Record], equal: Equal) -> Iterator[str]:
    if len(old) != len(new):
        yield f"rows: were {len(old)}, are {len(new)}"
    for before, after in zip(old, new, strict=False):
        for column in sorted(before.keys() | after.keys()):
            was, now = before.get(column, ""), after.get(column, "")
            if not equal(was, now):
                yield f"rows: {column} at step {before['step']} was {was!r}, is {now!r}"


def _slots(before: Record, after: Record) -> Iterator[str]:
    """The slots that differ, and which of their tensors where both records have them."""
    old, new = before["slots"], after["slots"]
    for slot in sorted(old.keys() | new.keys()):
        if slot not in old or slot not in new:
            yield f"{slot}: only in the {'new' if slot in new else 'old'} record"
        elif old[slot] != new[slot]:
            tensors = [case.get("tensors", {}).get(slot, {}) for case in (before, after)]
            yield f"{slot}: the tensors differ{_which(*tensors)}"


def _which(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if not old or not new:
        return ""
    more = ", ..." if len(names) > SHOWN else ""
    return f": {len(names)} of {len(old)}, {', '.join(names[:SHOWN])}{more}"


def _fields(old: Record, new: Record, where: str = "") -> Iterator[str]:
    """The fields in which two configurations differ; those of a section by dotted names."""
    for field in sorted(old.keys() | new.keys()):
        was, now = old.get(field), new.get(field)
        if field not in old or field not in new:
            there = f"is new, {now!r}" if field in new else f"is gone, it was {was!r}"
            yield f"{where}{field} {there}"
        elif isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from _fields(was, now, f"{where}{field}.")
        elif _text(was) != _text(now):
            yield f"{where}{field} was {was!r}, is {now!r}"
