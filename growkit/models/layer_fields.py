"""Fields of config.json about single layers: they follow the map when a model grows in depth.

Some hold one entry for each layer (`layer_types`), some hold numbers of layers (`mlp_only_layers`),
some count the first layers (`first_k_dense_replace`), and some configurations state the kinds of
layers by a rule of the layer's number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from growkit.errors import UsageError
from growkit.models.layer_rules import check_kinds, write_kinds

if TYPE_CHECKING:
    from growkit.models.family import Family

# Fields of transformers' decoders that hold numbers of layers.
_NUMBERS = re.compile(r"\w*(?:layers|layer_ids|layer_idx|layer_indices|layers_idx)")
# Other names of which a list with as many entries as layers is one entry for each layer.
_BY_LAYER = re.compile(r"\w*(?:layer|pattern|block_types|_types)\w*")
# One entry for each layer, whatever the entries look like: no_rope_layers is a list of 0 and 1.
_ALWAYS_BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


def follow_layers(
    config: Mapping[str, Any], before: Mapping[str, Any], family: Family, index: Sequence[int]
) -> dict[str, Any]:
    """A grown config.json whose fields about single layers follow a map of the layers.

    before: the source's config.json. index: for each new layer the old layer that it copies. Kinds
    of layers that the configuration states by a rule of the layer's number are written as a list
    where the rule would give a layer another kind than its source's. Raises UsageError for kinds
    that config.json does not state, and where layers that a field counts would not stay in front.
    """
    _check_stated(before, family)
    grown = dict(config)
    layers = family.fields_of(before).size(family.fields["layer"])
    for name, entries in before.items():
        if isinstance(entries, list) and entries:
            followed = follow_list(name, entries, layers, index, family.by_layer, family.numbers)
            if followed is not None:
                grown[name] = followed
    for name, pattern in family.patterns.items():
        if not isinstance(before.get(name), list):
            grown[name] = [pattern[layer % len(pattern)] for layer in index]
    for name in family.leading:
        grown[name] = _count_leading(name, before, family, index)
    for name in family.last:
        grown[name] = _find_last(before.get(name, family.defaults.get(name)), index)
    write_kinds(grown, before, family, index)
    check_kinds(grown, before, family, index)
    kinds = family.layer_kinds(before)
    if kinds is not None and not grown.get("layer_types"):
        wanted = [kinds[layer] for layer in index]
        if family.layer_kinds(grown) != wanted:
            grown["layer_types"] = wanted
    return grown


def follow_list(
    name: str,
    entries: list[Any],
    layers: int,
    index: Sequence[int],
    by_layer: Sequence[str] = (),
    numbers: Sequence[str] = (),
) -> list[Any] | None:
    """What a field's list becomes under a map of the layers, None for one that says nothing of
    layers.

    by_layer, numbers: names of which it is known that they hold an entry for each layer, or
    numbers of layers.

    >>> follow_list("layer_types", ["full", "sliding"], 2, [0, 0, 1])
    ['full', 'full', 'sliding']
    >>> follow_list("mlp_only_layers", [1], 3, [0, 1, 1, 2])
    [1, 2]
    """
    whole = len(entries) == layers
    if whole and (name in _ALWAYS_BY_LAYER or name in by_layer):
        return [entries[layer] for layer in index]
    by_name = _NUMBERS.fullmatch(name) and _are_layer_numbers(entries, layers)
    if by_name or name in numbers:
        return [new for new, old in enumerate(index) if old in entries]
    if whole and _BY_LAYER.fullmatch(name):
        return [entries[layer] for layer in index]
    return None


def _are_layer_numbers(entries: list[Any], layers: int) -> bool:
    """Whether a list holds different numbers of layers, in ascending order."""
    if not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries):
        return False
    ascending = all(one < other for one, other in zip(entries, entries[1:], strict=False))
    return ascending and entries[0] >= 0 and entries[-1] < layers


def _check_stated(before: Mapping[str, Any], family: Family) -> None:
    """Raise UsageError where a list of kinds is missing that transformers would make by a rule."""
    for name in family.stated:
        if not isinstance(before.get(name), list):
            raise UsageError(
                f"config.json lacks {name}, which says what kind each layer is of: load the model "
                f"in transformers and save it once, then grow it in depth"
            )


def _find_last(number: Any, index: Sequence[int]) -> Any:
    """The number of the last new layer that copies one up to a number; -1 stands for the last."""
    if not isinstance(number, int) or number < 0:
        return number
    return max(new for new, old in enumerate(index) if old <= number)


def _count_leading(
    name: str, before: Mapping[str, Any], family: Family, index: Sequence[int]
) -> int:
    """How many layers copy one of those that a field counts; they must stay in front."""
    counted = before.get(name, family.defaults.get(name))
    leads = [layer < int(counted or 0) for layer in index]
    count = sum(leads)
    if not all(leads[:count]):
        raise UsageError(
            f"{name} counts the first {counted} layers, which are of another kind than the rest: "
            f"their copies must stay in front, and this map has others from {leads.index(False)} "
            f"on; the nearest that works is --map {','.join(map(str, sorted(index)))}"
        )
    return count
