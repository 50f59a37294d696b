"""Tables beside those that growkit ships: of a file that the user names, or of a model's lineage.

A table that a user gives goes before all others while a command runs. What is grown by it states
the table's text in its lineage, so that the output opens without the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from growkit.errors import GrowkitError, UsageError
from growkit.models.family import Family
from growkit.models.family_check import check_family
from growkit.models.table_file import read_family

# The key of a lineage's entry that holds the text of a table.
KEY = "table"
# Bytes of a table's text at most; the longest that is shipped has 15,000.
LONGEST = 1_000_000

_GIVEN: ContextVar[Mapping[str, Family]] = ContextVar("given", default=MappingProxyType({}))


def read_table(path: Path) -> Family:
    """The family of a table file. Raises UsageError where it is none."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise UsageError(
            f"there is no table file {path}; `growkit derive MODEL_TYPE --out {path}` makes one"
        ) from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise UsageError(f"{path} is no table file, which is text") from None
    try:
        return parse_given(text)
    except GrowkitError as problem:
        raise UsageError(f"{path}: {problem}") from None


@lru_cache
def parse_given(text: str) -> Family:
    """The family of a table's text, which it keeps. Raises GrowkitError for a table that is wrong
    in itself.
    """
    if len(text) > LONGEST:
        raise GrowkitError(f"a table has at most {LONGEST:,} characters, got {len(text):,}")
    family = read_family(text)
    check_family(family)
    return replace(family, given=text)


@contextmanager
def use_family(family: Family) -> Iterator[None]:
    """Have growkit read models of the family's type by it, for a while."""
    token = _GIVEN.set({**_GIVEN.get(), family.kind: family})
    try:
        yield
    finally:
        _GIVEN.reset(token)


def find_given(kind: str, lineage: Sequence[Any] = ()) -> Family | None:
    """The family of a table that the user gave for this type, else the last that a lineage states.

    Raises UsageError where the user gave tables of other types only, GrowkitError for a table in a
    lineage that cannot be read.
    """
    given = _GIVEN.get()
    if kind in given:
        return given[kind]
    if given:
        kinds = ", ".join(repr(each) for each in given)
        raise UsageError(f"the table given is for {kinds} models, and this is a {kind!r} model")
    for entry in reversed(lineage):
        text = entry.get(KEY) if isinstance(entry, Mapping) else None
        family = _parse_stated(text) if text and isinstance(text, str) else None
        if family is not None and family.kind == kind:
            return family
    return None


def _parse_stated(text: str) -> Family:
    try:
        return parse_given(text)
    except GrowkitError as problem:
        raise GrowkitError(f"the table in the lineage cannot be read: {problem}") from None


def describe_origin(family: Family) -> str:
    """Where a family's table comes from, in words."""
    if not family.given:
        return "growkit's own"
    digest = hashlib.sha256(family.given.encode()).hexdigest()
    return f"not one that growkit ships (sha256 {digest[:16]})"
