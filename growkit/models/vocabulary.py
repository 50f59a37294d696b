"""Whether a model has the tokens of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from growkit.errors import GrowkitError


def check_ids(
    ids: Sequence[int], vocab: int, model: object, name: Callable[[int], str | None]
) -> None:
    """Raise GrowkitError where a text has a token that a model's vocabulary does not have.

    name: the function from an id to its token.
    """
    highest = max(ids, default=0)
    if highest >= vocab:
        raise GrowkitError(
            f"the text has the token {name(highest)!r} with the id {highest}, and the vocabulary "
            f"of {model} ends at {vocab - 1}; leave that text out"
        )
