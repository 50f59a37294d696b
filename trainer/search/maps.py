"""Maps of layers to try: the known ways to repeat layers, and maps one step away from a map.

A map is the list of source layers that the new layers copy. Every source layer stays in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from growkit.growth.axes import replicate, replicate_nearest, stack

# A run of at least so many layers is written as a range.
SHORTEST_RANGE = 3

Index = tuple[int, ...]


def list_known(source: int, target: int) -> dict[str, Index]:
    """The known ways to make `target` layers of `source`, by name; equal ones once.

    replicate, nearest: each layer replicated in place. stack: the whole model again. overlap: the
    first half of the new layers from the bottom, the other half from the top (SOLAR, arXiv
    2312.15166). top: the last layers again, as a block. middle: the middle layers once more than
    the others, in place.
    """
    known = {
        "replicate": tuple(replicate(source, target).index.tolist()),
        "nearest": tuple(replicate_nearest(source, target).index.tolist()),
        "stack": tuple(stack(source, target).index.tolist()),
        "middle": _repeat_middle(source, target),
    }
    added = target - source
    if added <= source:
        first = (target + 1) // 2
        known["overlap"] = (*range(first), *range(source - (target - first), source))
        known["top"] = (*range(source), *range(source - added, source))
    names: dict[Index, str] = {}
    for name, index in known.items():
        names.setdefault(index, name)
    return {name: index for index, name in names.items() if len(set(index)) == source}


def _repeat_middle(source: int, target: int) -> Index:
    """Each layer as often as all can be, and the middle ones once more."""
    copies, more = divmod(target, source)
    first = (source - more) // 2
    counts = [copies + (first <= layer < first + more) for layer in range(source)]
    return tuple(layer for layer, count in enumerate(counts) for _ in range(count))


def draw_step(index: Index, draw: np.random.Generator) -> Index:
    """A map one step away: one copy is taken out, and a layer is put in at another place.

    What is put in fits to one of its new neighbours: it is that layer again, the next one above the
    lower neighbour, or the one below the upper neighbour.
    """
    counts = Counter(index)
    spare = [place for place, layer in enumerate(index) if counts[layer] > 1]
    out = int(draw.choice(spare))
    left = [*index[:out], *index[out + 1 :]]
    place = int(draw.integers(0, len(left) + 1))
    fitting = set()
    if place > 0:
        fitting |= {left[place - 1], left[place - 1] + 1}
    if place < len(left):
        fitting |= {left[place], left[place] - 1}
    layers = sorted(layer for layer in fitting if layer in counts)
    layer = layers[int(draw.integers(len(layers)))]
    return (*left[:place], layer, *left[place:])


def write_map(index: Sequence[int]) -> str:
    """A map as --map takes it.

    >>> write_map([0, 0, 1, 2, 3, 1, 2])
    '0,0-3,1,2'
    """
    runs: list[list[int]] = []
    for layer in index:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(_write_run(run) for run in runs)


def _write_run(run: list[int]) -> str:
    if len(run) >= SHORTEST_RANGE:
        return f"{run[0]}-{run[-1]}"
    return ",".join(map(str, run))
