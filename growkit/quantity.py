"""Large counts as people write them: 41B tokens, 760M parameters, 1e21 FLOPs; both ways."""

from __future__ import annotations

from decimal import Decimal

from growkit.errors import UsageError

UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(text: str, what: str, below: float = 1e18) -> int:
    """The whole number that a text as 5B, 500M, 1e9, 2.5B or 1_000_000 stands for.

    Raises UsageError, with `what` as its subject, unless that is a whole number from 1 to `below`.
    """
    unit = UNITS.get(text[-1:].upper())
    digits = text[:-1] if unit else text
    try:
        count = Decimal(digits) * (unit or 1)
        valid = 1 <= count < below and count == int(count)
    except ArithmeticError:
        valid = False
    if not valid:
        raise UsageError(
            f"{what} is a whole number above 0, as 5B, 500M, 1e9 or 1000000, got {text!r}"
        )
    return int(count)


def format_count(count: float) -> str:
    """A count in three digits: 13.5B, 760M."""
    for unit, size in reversed(UNITS.items()):
        # 999,500 and more is written as 1M, which is what three digits of 999.5K round to.
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"
