"""The text that --check runs models on, and what a reader should know of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np

from growkit.cli.checking import RANDOM, choose_length, require_checkable, select_tokens
from growkit.entries import Training
from growkit.errors import UsageError
from growkit.lineage import Lineage

if TYPE_CHECKING:
    from growkit.checkpoint.tensor import Source
    from growkit.models.architecture import Architecture

# Token data that are named in a note, at most.
MOST_NAMED = 3
OWN = "--check-text takes a text of your own"


@dataclass(frozen=True)
class CheckedText:
    """Tokens [B, T], what they are, and what that says of the loss (empty for a text given)."""

    tokens: np.ndarray
    words: str
    note: str = ""


def prepare_check(
    source: Source, tokens: int, given: str | None, grown: Architecture | None = None
) -> CheckedText:
    """The text of a check. Raises UsageError or GrowkitError, before anything is written, where the
    check could not run.

    grown: the model that is made.
    """
    require_checkable(source, tokens, grown)
    return choose_text(source, tokens, given)


def choose_text(
    source: Source, count: int, given: str | None = None, option: str = "--check-text"
) -> CheckedText:
    """About `count` tokens of the text `given`, as many as it has; of a text that comes with Python
    unless one is given.

    option: what a message calls it by. Raises UsageError or GrowkitError for a text that the model
    cannot be given.
    """
    if given is not None:
        return _read_given(source, count, given, option)
    tokens_BxT, words = select_tokens(source, count)
    if words == RANDOM:
        note = (
            f"no text, because no tokenizer of the model can be read: its loss says little; {OWN}"
        )
        return CheckedText(tokens_BxT, words, note)
    return CheckedText(
        tokens_BxT, words, f"{words}, which comes with Python; {_say_seen(source)}; {OWN}"
    )


def _read_given(source: Source, count: int, given: str, option: str) -> CheckedText:
    from trainer.data.sample import Reader

    ids = Reader(source.files, str(source.path), source.model.vocab).read(given, count).ids
    if len(ids) < 2:
        raise UsageError(
            f"{option} {given} has {len(ids)} tokens, and the loss of the next token takes at "
            f"least 2"
        )
    length = min(len(ids), choose_length(source.model))
    rows = len(ids) // length
    tokens_BxT = ids[: rows * length].reshape(rows, length).astype(np.int64)
    return CheckedText(tokens_BxT, f"tokens of {given}")


def _say_seen(source: Source) -> str:
    """What is known of whether the model was trained on such text."""
    entries = Lineage.read(source.lineage).entries
    trained = [entry for entry in entries if isinstance(entry, Training)]
    from_nothing = bool(entries) and isinstance(entries[0], Training) and not entries[0].source
    if not from_nothing:
        return "the model may never have seen such text"
    names = dict.fromkeys(name for entry in trained for name in _list_data(entry))
    if not names:
        return "the model may never have seen such text"
    listed = ", ".join([*names][:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
    return f"the model was trained on other data: {listed}"


def _list_data(entry: Training) -> list[str]:
    """The names of the token data of a training."""
    data = entry.config.get("data")
    listed = data.get("train") if isinstance(data, dict) else None
    if not isinstance(listed, list | dict):
        return []
    return [PurePath(str(name)).name for name in listed]
