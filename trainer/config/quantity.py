"""Large counts as one writes them: 41B tokens, 760M parameters, 1e21 FLOPs.

Knows the units K, M, B and T, both ways; leaves what is counted to others.
"""

from __future__ import annotations

from decimal import Decimal

from growkit.errors import UsageError

UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(text: str, what: str, below: float = 1e18) -> int:
    """The number that 5B, 500M, 1e9, 2.5B or 1_000_000 is; `what` begins the sentence of the UsageError for others."""
    unit = UNITS.get(text[-1:].upper())
    try:
        count = Decimal(text[:-1] if unit else text) * (unit or 1)
        right = 1 <= count < below and count == int(count)
    except ArithmeticError:
        right = False
    if not right:
        raise UsageError(
            f"{what} is a whole number above 0, as 5B, 500M, 1e9 or 1000000, got {text!r}"
        )
    return int(count)


def format_count(count: float) -> str:
    """A count to three digits: 13.5B, 760M."""
    for unit, size in reversed(UNITS.items()):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"
