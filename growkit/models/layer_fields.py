"""Fields of config.json about single layers: they follow the map when a model grows in depth.

Some hold one entry for each layer (`layer_types`), some hold numbers of layers (`mlp_only_layers`),
some count the first layers (`first_k_dense_replace`), and some configurations state the kinds of
layers by a rule of the layer's number. Which field is which is the family's data; a list that the
family does not name is never guessed about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from growkit.errors import UsageError
from growkit.models.layer_rules import check_kinds, write_kinds

if TYPE_CHECKING:
    from growkit.models.family import Family

# What transformers' PreTrainedConfig gives every model that states it (its validate_layer_type).
BY_LAYER = ("layer_types", "mlp_layer_types")
# Lists that PreTrainedConfig or generation take in any config.json, of no layer in particular.
OTHER_LISTS = (
    "architectures",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_decoder_ids",
    "keys_to_ignore_at_inference",
)


def follow_layers(
    config: Mapping[str, Any], before: Mapping[str, Any], family: Family, index: Sequence[int]
) -> dict[str, Any]:
    """A grown config.json whose fields about single layers follow a map of the layers.

    before: the source's config.json. index: for each new layer the old layer that it copies. Kinds
    of layers that the configuration states by a rule of the layer's number are written as a list
    where the rule would give a layer another kind than its source's. Raises UsageError for kinds
    that config.json does not state, for a list with as many entries as layers that the family does
    not name, and where layers that a field counts would not stay in front.
    """
    _check_stated(before, family)
    grown = dict(config)
    layers = family.fields_of(before).size(family.fields["layer"])
    for name, entries in before.items():
        if isinstance(entries, list) and entries:
            followed = follow_list(name, entries, layers, index, family)
            if followed is not None:
                grown[name] = followed
    for name, pattern in family.patterns.items():
        # A list that is left out is transformers' pattern, which counts layers anew: a copy of a
        # sliding layer would land on a full one's place.
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
        # Written only where the rule gives other kinds: a configuration stays as short as it was.
        if family.layer_kinds(grown) != wanted:
            grown["layer_types"] = wanted
    return grown


def follow_list(
    name: str,
    entries: list[Any],
    layers: int,
    index: Sequence[int],
    family: Family,
) -> list[Any] | None:
    """What a field's list becomes under a map of the layers, None for one that says nothing of
    layers.

    Raises UsageError for a list with as many entries as layers that the family does not name: it
    may hold one entry for each layer, or the numbers of all of them, and nothing tells which.

    >>> from growkit.models.qwen3 import QWEN3
    >>> follow_list("layer_types", ["full", "sliding"], 2, [0, 0, 1], QWEN3)
    ['full', 'full', 'sliding']
    """
    if name in family.numbers:
        return [new for new, old in enumerate(index) if old in entries]
    if len(entries) != layers or name in OTHER_LISTS or name in family.other_lists:
        return None
    if name in BY_LAYER or name in family.by_layer:
        return [entries[layer] for layer in index]
    raise UsageError(
        f"{name} in config.json has {layers} entries, as many as the model has layers, and nothing "
        f"says whether they are one for each layer: remove it if {family.title} models do not read "
        f"it, or name it in by_layer, numbers or other_lists of growkit's {family.kind!r} family"
    )


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
    # Left out it has transformers' default, which counts layers all the same.
    counted = before.get(name, family.defaults.get(name))
    if counted is not None and (type(counted) is not int or counted < 0):
        raise UsageError(
            f"{name} in config.json must be a whole number of layers, got {str(counted)[:80]!r}"
        )
    leads = [layer < (counted or 0) for layer in index]
    count = sum(leads)
    if not all(leads[:count]):
        raise UsageError(
            f"{name} counts the first {counted} layers, which are of another kind than the rest: "
            f"their copies must stay in front, and this map has others from {leads.index(False)} "
            f"on; the nearest that works is --map {','.join(map(str, sorted(index)))}"
        )
    return count
