"""Where records have their text: the key of a JSON object, the column of a table."""

from __future__ import annotations

from dataclasses import dataclass

from growkit.errors import UsageError
from growkit.textfiles import TEXT


@dataclass(frozen=True)
class Fields:
    """key: of JSON lines and JSON documents. column: of Parquet and Arrow tables."""

    key: str = TEXT
    column: str = TEXT

    def __post_init__(self) -> None:
        for option, name in (("--text-key", self.key), ("--column", self.column)):
            if not name:
                raise UsageError(f"{option} names where a record has its text, and is empty")

    def describe(self) -> dict[str, str]:
        """What differs from the usual, for a manifest."""
        named = {"text_key": self.key, "column": self.column}
        return {option: name for option, name in named.items() if name != TEXT}


USUAL_FIELDS = Fields()
