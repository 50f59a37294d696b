"""Random numbers that are the same everywhere: a function of (seed, tensor, element) and nothing
else.

A counter-based generator (Threefry-2x32, 20 rounds; Salmon et al., SC'11) in integer arithmetic,
and a uniform distribution, which needs no function that machines round differently. So numpy and
jax, one device or many, whole tensors or pieces give the same bits.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np

# The rotations of Threefry-2x32 and the constant of its key schedule, from Random123's threefry.h;
# another constant is another generator, with no known tests.
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
# What makes the variance of `centred` one.
UNIT = math.sqrt(3) / 2**23


def threefry(key: tuple[Any, Any], high: Any, low: Any, xp: Any = np, rounds: int = 20) -> Any:
    """The first word, uint32, of Threefry-2x32 of each counter (high, low), uint32 arrays that
    broadcast.

    key: two words, numbers or uint32 arrays without dimensions. rounds: with 13 or more its
    authors knew of no flaw in September 2011, 20 have a margin (Random123, threefry.h).
    """
    keys = [xp.uint32(word) for word in (*key, key[0] ^ key[1] ^ PARITY)]
    first, second = high + keys[0], low + keys[1]
    for number in range(rounds):
        group, place = divmod(number, 4)
        rotation = ROTATIONS[group % 2][place]
        first = first + second
        second = (second << xp.uint32(rotation)) | (second >> xp.uint32(32 - rotation))
        second = second ^ first
        if place == 3:
            first = first + keys[(group + 1) % 3]
            second = second + keys[(group + 2) % 3] + xp.uint32(group + 1)
    return first


def centred(seed: int, name: str, shape: tuple[int, ...], xp: Any = np, first: int = 0) -> Any:
    """float32 of `shape`: independent odd multiples of 1/2, uniform between -2**23 and 2**23.

    Element i in C order depends on seed, name and first + i alone. xp: numpy, or jax.numpy for use
    under jit. They and the difference of any two are exact in float32.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
    size = math.prod(shape)
    if first + size >= 1 << 32:
        raise ValueError(f"a tensor of at most 2**32 - 1 elements, got {first + size}")
    # The counter is the element's place in the whole tensor, so a part draws what the whole would.
    low = xp.arange(first, first + size, dtype=xp.uint32)
    # numpy warns where uint32 wraps around, which is what Threefry wants.
    with np.errstate(over="ignore"):
        bits = threefry(key, xp.zeros_like(low), low, xp)
    # 24 bits, because float32 holds every whole number below 2**24. Less 2**23 - 1/2 they are
    # centred: the mean is exactly 0.
    return ((bits >> xp.uint32(8)).astype(xp.float32) - xp.float32(2**23 - 0.5)).reshape(shape)


def uniform(
    seed: int, name: str, shape: tuple[int, ...], xp: Any = np, spread: float = 1.0, first: int = 0
) -> Any:
    """float32 of `shape`: independent, mean 0, standard deviation `spread`, uniform.

    See `centred`.
    """
    # One product, rounded once: a compiler may fold two constants and round differently.
    return centred(seed, name, shape, xp, first) * xp.float32(spread * UNIT)
