"""Kinds of layers that a configuration states by a rule of the layer's number, and not in a list.

A rule is an expression of `layer` (from 0), `layers` (how many) and fields of config.json:

    "full_attention" if (layer + 1) % sliding_window_pattern == 0 else "sliding_attention"

It gives the entry of a list, or for a list of numbers whether the layer is in it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from growkit.errors import GrowkitError, UsageError

if TYPE_CHECKING:
    from growkit.models.family import Family

# All that a rule may be made of: no calls, no attributes.
PARTS = (
    ast.Expression,
    ast.IfExp,
    ast.BoolOp,
    ast.UnaryOp,
    ast.BinOp,
    ast.Compare,
    ast.Name,
    ast.Constant,
    ast.boolop,
    ast.unaryop,
    ast.operator,
    ast.cmpop,
    ast.expr_context,
)
# Layers of a map that is suggested, at most.
LONGEST = 512


@lru_cache
def parse_rule(text: str) -> tuple[Any, frozenset[str]]:
    """The compiled rule, and the fields that it reads. Raises GrowkitError for what is none."""
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        raise GrowkitError(f"a rule of layers is an expression, got {text!r}") from None
    for node in ast.walk(tree):
        if not isinstance(node, PARTS) or isinstance(getattr(node, "op", None), ast.Pow):
            raise GrowkitError(
                f"a rule of layers compares numbers and fields, and nothing else, got {text!r}"
            )
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return compile(tree, "rule", "eval"), frozenset(names - {"layer", "layers"})


def apply_rule(text: str, config: Mapping[str, Any], family: Family) -> list[Any]:
    """What a rule gives for each layer of the model that a config.json describes.

    Raises GrowkitError for a field that is left out and has no default, or is of the wrong kind.
    """
    code, names = parse_rule(text)
    fields = family.fields_of(config)
    layers = fields.size(family.fields["layer"])
    values = {name: fields.get(name) for name in names}
    try:
        return [
            eval(code, {"__builtins__": {}}, {**values, "layer": layer, "layers": layers})  # noqa: S307
            for layer in range(layers)
        ]
    except (TypeError, ZeroDivisionError) as problem:
        raise GrowkitError(f"config.json holds a value of the wrong kind: {problem}") from None


def write_kinds(
    grown: dict[str, Any], before: Mapping[str, Any], family: Family, index: Sequence[int]
) -> None:
    """Write the lists that rules stand for into a grown config.json, where a rule would give a
    layer another kind than its source's.
    """
    for name in family.cycles:
        kinds = before.get(name) or family.defaults.get(name)
        if isinstance(kinds, list) and kinds:
            grown[name] = [kinds[layer % len(kinds)] for layer in index]
    for name, text in family.rules.items():
        own = name in parse_rule(text)[1]
        if not own and (is_stated(name, before, family) or follows_list(text, before, family)):
            continue
        entries = apply_rule(text, before, family)
        if not own:
            _check_given(name, text, before, entries)
        wanted = [entries[layer] for layer in index]
        if apply_rule(text, grown, family) == wanted:
            continue
        numbers = [new for new, listed in enumerate(wanted) if listed]
        grown[name] = numbers if name in family.numbers else wanted
        if own:
            grown.update(family.settled)


def is_stated(name: str, config: Mapping[str, Any], family: Family) -> bool:
    """Whether a config.json holds a list, for which then no rule stands; an empty one of entries
    is none.
    """
    entries = config.get(name)
    return isinstance(entries, list) and (bool(entries) or name in family.numbers)


def follows_list(text: str, config: Mapping[str, Any], family: Family) -> bool:
    """Whether another list of the same rule is stated: transformers makes this one from that."""
    return any(
        is_stated(name, config, family)
        for name, other in family.rules.items()
        if parse_rule(other)[1] == parse_rule(text)[1]
    )


def _check_given(name: str, text: str, before: Mapping[str, Any], entries: Sequence[Any]) -> None:
    """Raise UsageError where a field is null that a rule reads, or the window of layers of which
    the rule says that some have one: then another rule may hold.
    """
    window = ["sliding_window"] if any(each != entries[0] for each in entries) else []
    for each in (*sorted(parse_rule(text)[1]), *window):
        if each in before and before[each] is None:
            raise UsageError(
                f"config.json has {each} null and lacks {name}, so that the kinds of its layers "
                f"are not known: load the model in transformers and save it once, then grow it in "
                f"depth"
            )


def check_kinds(
    grown: Mapping[str, Any], before: Mapping[str, Any], family: Family, index: Sequence[int]
) -> None:
    """Raise UsageError where a layer would be of another kind than the one that it copies, and no
    list can say it.
    """
    for what, text in family.checked.items():
        old = apply_rule(text, before, family)
        new = apply_rule(text, grown, family)
        for place, layer in enumerate(index):
            if new[place] != old[layer]:
                near = suggest_map(text, before, family, len(index))
                raise UsageError(
                    f"layers must keep their kind, and new layer {place}, a copy of layer {layer}, "
                    f"would not ({what}: {text}); config.json holds no list of kinds{near}"
                )


def suggest_map(text: str, before: Mapping[str, Any], family: Family, target: int) -> str:
    """A clause with the nearest map of layers under which each keeps its kind; empty for none."""
    layers = family.fields_of(before).size(family.fields["layer"])
    best: tuple[int, str] | None = None
    for first in range(layers):
        for last in range(first, layers):
            block = range(first, last + 1)
            index = [*range(last + 1), *block, *range(last + 1, layers)]
            distance = abs(len(index) - target)
            if len(index) > LONGEST or (best is not None and distance >= best[0]):
                continue
            if keeps_kinds(text, before, family, index):
                rest = f",{last + 1}-{layers - 1}" if last + 1 < layers else ""
                best = distance, f"0-{last},{first}-{last}{rest}"
    return f"; the nearest that works is --map {best[1]}" if best else ""


def keeps_kinds(text: str, before: Mapping[str, Any], family: Family, index: Sequence[int]) -> bool:
    """Whether every layer keeps its kind under a map."""
    grown = {**before, family.fields["layer"]: len(index)}
    old, new = apply_rule(text, before, family), apply_rule(text, grown, family)
    return all(new[place] == old[layer] for place, layer in enumerate(index))
