"""Tables that `growkit derive` made: a text file for each model type, read when asked for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from growkit.models.computed import COMPUTED
from growkit.models.family import Family
from growkit.models.table_file import read_family

# The package's own directory: importlib.resources would do, and imports what takes longer than all
# tables that a command reads.
DIRECTORY = Path(__file__).parent


@cache
def list_shipped() -> tuple[str, ...]:
    """The model types that have a table here."""
    names = (file.name for file in DIRECTORY.iterdir())
    return tuple(sorted(name.removesuffix(".txt") for name in names if name.endswith(".txt")))


def read_text(kind: str) -> str:
    """The text of a type's table."""
    return (DIRECTORY / f"{kind}.txt").read_text()


@cache
def list_mixtures() -> tuple[str, ...]:
    """The model types whose tables say how a dense model becomes one of them."""
    return tuple(kind for kind in list_shipped() if "\n[upcycling]\n" in read_text(kind))


@cache
def read_shipped(kind: str) -> Family:
    """The family of a type that has a table here, with how it is computed where that is stated."""
    return replace(read_family(read_text(kind)), computation=COMPUTED.get(kind))
