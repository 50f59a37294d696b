"""The Hugging Face Hub: whether a name may be one of its, and the directory of what it holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from growkit.errors import GrowkitError, first_line

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def split_revision(text: str) -> tuple[str, str | None]:
    """OWNER/NAME@REVISION as the name and the revision; None where there is none.

    >>> split_revision("EleutherAI/pythia-14m@step1000")
    ('EleutherAI/pythia-14m', 'step1000')
    """
    # From the right, because a directory's name may hold an @.
    name, _, revision = text.rpartition("@")
    return (name, revision) if name else (text, None)


def is_hub_id(text: str) -> bool:
    """Whether this is OWNER/NAME, with an optional @revision."""
    name, _ = split_revision(text)
    return HUB_ID.fullmatch(name) is not None and "/" in name


def download_from_hub(text: str, patterns: Sequence[str], hint: str = "") -> Path:
    """The directory of what OWNER/NAME@REVISION holds.

    patterns: of the names of files that are fetched. hint: the clause to end a refusal with. Raises
    GrowkitError.
    """
    from huggingface_hub import snapshot_download

    name, revision = split_revision(text)
    try:
        found = snapshot_download(name, revision=revision, allow_patterns=list(patterns))
    except Exception as problem:  # the network, the Hub and its library raise many types
        raise GrowkitError(
            f"there is no directory {name!r}, and it could not be had from the Hugging Face Hub "
            f"({type(problem).__name__}: {first_line(problem)}){hint}"
        ) from None
    return Path(found)
