"""Kinds of layers by the layer's number: which rule of which fields makes a configuration's list.

Lists are made by transformers' class for several numbers of layers and values of each field; a rule
is taken that gives all of them. Where none does, config.json must state the list.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from growkit.derive.network import CONFIG_MAPPING
from growkit.derive.rows import Draft
from growkit.models.layer_rules import parse_rule

# Fields that configurations read and do not keep.
UNKEPT = (
    "sliding_window_pattern",
    "full_attention_interval",
    "global_attn_every_n_layers",
    "first_k_dense_replace",
    "no_rope_layer_interval",
    "moe_layer_freq",
)
COUNTS = (5, 8, 13)
VALUES = (1, 2, 3, 5)
ONE = (
    "{a} if (layer + 1) % {f} == 0 else {b}",
    "{a} if layer % {f} == 0 else {b}",
    "{a} if layer < {f} else {b}",
)
TWO = (
    "{a} if layer >= {f} and layer % {g} == 0 else {b}",
    "{a} if (layer + 1) % 2 != 0 and layer < {f} and {g} else {b}",
    "{a} if (layer + 1) % {f} == 0 or not {g} else {b}",
)
# Rules that no list can stand for: a rule of some fields, where a type has them all.
CHECKED = {
    "attention": "layer % attn_layer_period == attn_layer_offset",
    "experts": "layer % expert_layer_period == expert_layer_offset",
    "sparse": "(layer + 1) % moe_layer_interval == 0 and layer >= moe_layer_start_index and "
    "(moe_layer_end_index < 0 or layer <= moe_layer_end_index)",
}
# Lists that are repeated for all layers, whatever their length.
CYCLES = ("block_types",)
LAST = ("moe_layer_end_index",)
NO_LEADS = ("moe_layer_interval", "expert_layer_offset", "attn_layer_offset")


@dataclass
class Kinds:
    """What a configuration says of kinds of layers beside its lists, as a family has it."""

    rules: dict[str, str] = field(default_factory=dict)
    settled: dict[str, Any] = field(default_factory=dict)
    checked: dict[str, str] = field(default_factory=dict)
    last: tuple[str, ...] = ()
    cycles: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """All but the defaults, which a family has with others."""
        return {name: value for name, value in vars(self).items() if name != "defaults"}


@dataclass(frozen=True)
class Lists:
    """One list of a class: its entries for some fields."""

    kind: str
    name: str
    layer_field: str
    numbers: bool

    def make(self, layers: int, given: Mapping[str, Any] = {}) -> list[Any] | None:  # noqa: B006
        """The list by the class, or whether each layer is listed; None where it has none."""
        try:
            fields = {self.layer_field: layers, **given}
            entries = getattr(CONFIG_MAPPING[self.kind](**fields), self.name)
        except Exception:
            return None
        if not isinstance(entries, list):
            return None
        return [layer in entries for layer in range(layers)] if self.numbers else entries


def find_kinds(
    kind: str,
    layer_field: str,
    lists: tuple[str, ...],
    numbers: tuple[str, ...],
    drafts: list[Draft],
    fields: Mapping[str, Any],
    leading: tuple[str, ...],
) -> Kinds:
    """The rules of a type.

    lists, numbers: its fields with one entry a layer, or with numbers of layers. fields: all of the
    tiny model, whose rows are `drafts`. leading: fields that count its first layers.
    """
    stated = CONFIG_MAPPING[kind]().to_dict()
    found = Kinds()
    for name in (*lists, *numbers):
        made = Lists(kind, name, layer_field, name in numbers)
        rule = find_rule(made, stated)
        if rule is not None:
            found.rules[name], defaults = rule
            found.defaults |= defaults
    add_known(found, stated)
    found.cycles = tuple(name for name in CYCLES if name in stated)
    found.defaults |= {name: stated[name] for name in found.cycles}
    found.last = tuple(name for name in LAST if found.checked and name in stated)
    if not found.checked:
        layers = int(fields[layer_field])
        known = list_known(fields, layers) | ({0} if leading else set())
        found.checked |= find_ends(drafts, layers, known)
    return found


def add_known(found: Kinds, stated: Mapping[str, Any]) -> None:
    """Add the rules of fields that several types share: lists of what is not every n-th layer, and
    rules that no list stands for.
    """
    if {"mlp_only_layers", "decoder_sparse_step"} <= stated.keys():
        found.rules["mlp_only_layers"] = (
            "layer in mlp_only_layers or (layer + 1) % decoder_sparse_step != 0"
        )
        found.settled["decoder_sparse_step"] = 1
        found.defaults["mlp_only_layers"] = stated["mlp_only_layers"] or []
        found.defaults["decoder_sparse_step"] = stated["decoder_sparse_step"]
    for what, rule_text in CHECKED.items():
        # As the rule states them: a set has no order that another process would repeat.
        names = sorted(parse_rule(rule_text)[1], key=rule_text.index)
        if all(stated.get(name) is not None for name in names):
            found.checked[what] = rule_text
            found.defaults |= {name: stated[name] for name in names}


def find_ends(drafts: list[Draft], layers: int, known: Collection[int]) -> dict[str, str]:
    """Whether the first or the last layer alone has other parameters, which no field says.

    known: of these two the ones of which a field says it.
    """
    every = frozenset(range(layers))
    alone = {draft.layers for draft in drafts if draft.kind}
    alone |= {every - each for each in alone}
    found = {}
    if frozenset({0}) in alone and 0 not in known:
        found["the first layer"] = "layer == 0"
    if frozenset({layers - 1}) in alone and layers - 1 not in known:
        found["the last layer"] = "layer == layers - 1"
    return found


def list_known(fields: Mapping[str, Any], layers: int) -> set[int]:
    """The layers that a list of a configuration tells from all others."""
    known = set()
    for name, entries in fields.items():
        if not isinstance(entries, list) or not entries:
            continue
        listed = entries
        if name not in CYCLES and len(entries) != layers:
            listed = [layer in entries for layer in range(layers)]
        texts = [json.dumps(listed[layer % len(listed)]) for layer in range(layers)]
        known |= {layer for layer, text in enumerate(texts) if texts.count(text) == 1}
    return known


def find_rule(made: Lists, stated: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The rule that makes a list, and the values of its fields that are left out."""
    names = find_fields(made, stated)
    plain = {layers: made.make(layers) for layers in COUNTS}
    if names is None or any(entries is None for entries in plain.values()):
        return None
    for rule in write_rules(made, names, stated):
        if not gives_all(rule, made, names, stated):
            continue
        defaults = find_values(rule, names, plain, stated)
        if defaults is not None:
            return rule, defaults
    return None


def find_fields(made: Lists, stated: Mapping[str, Any]) -> list[str] | None:
    """The fields that a list depends on; None for more than two."""
    layers = COUNTS[-1]
    found = []
    for name in dict.fromkeys([*stated, *UNKEPT]):
        value = stated.get(name)
        if name == made.layer_field or not (isinstance(value, int) or name in UNKEPT):
            continue
        tried = (True, False) if isinstance(value, bool) else VALUES
        lists = [made.make(layers, {name: each}) for each in tried]
        if len({json.dumps(each) for each in lists if each is not None}) > 1:
            found.append(name)
    if all(isinstance(stated.get(name), bool) for name in found):
        found = find_switched(made, stated, found) or found
    return found if len(found) <= 2 else None


def find_switched(made: Lists, stated: Mapping[str, Any], switches: list[str]) -> list[str]:
    """A switch and the field that a list depends on with it alone."""
    for switch in switches:
        given = {switch: not stated[switch]}
        for name, value in stated.items():
            if isinstance(value, bool) or not isinstance(value, int) or name == made.layer_field:
                continue
            lists = [made.make(COUNTS[-1], {**given, name: each}) for each in VALUES]
            if len({json.dumps(each) for each in lists if each is not None}) > 1:
                return [name, switch]
    return []


def list_values(names: list[str], stated: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The values that are tried of each field."""
    return [(True, False) if isinstance(stated.get(name), bool) else VALUES for name in names]


def write_rules(made: Lists, names: list[str], stated: Mapping[str, Any]) -> Iterator[str]:
    """The rules of one or two fields, for the two kinds that the list has."""
    entries: list[Any] = [] if names else made.make(COUNTS[-1]) or []
    for values in product(*list_values(names, stated)):
        entries += made.make(COUNTS[-1], dict(zip(names, values, strict=True))) or []
    kinds = [json.loads(each) for each in dict.fromkeys(map(json.dumps, entries))]
    if len(kinds) != 2:
        return
    for a, b in (kinds, kinds[::-1]):
        if not names:
            yield from (f"{a!r} if layer < {count} else {b!r}" for count in range(1, 5))
            continue
        for form in ONE if len(names) == 1 else TWO:
            for f, g in ((names[0], names[-1]), (names[-1], names[0])):
                yield form.format(a=repr(a), b=repr(b), f=f, g=g)


def gives_all(rule: str, made: Lists, names: list[str], stated: Mapping[str, Any]) -> bool:
    """Whether a rule gives the class's list for all numbers of layers and values that it takes."""
    compared = 0
    for layers, values in product(COUNTS, product(*list_values(names, stated))):
        given = dict(zip(names, values, strict=True))
        entries = made.make(layers, given)
        if entries is None:
            continue
        compared += 1
        if evaluate(rule, layers, given) != entries:
            return False
    return compared >= len(COUNTS)


def evaluate(rule: str, layers: int, given: Mapping[str, Any]) -> list[Any]:
    """What a rule gives for each layer; nothing where it divides by zero."""
    code, _ = parse_rule(rule)
    try:
        return [
            eval(code, {"__builtins__": {}}, {**given, "layer": layer, "layers": layers})  # noqa: S307
            for layer in range(layers)
        ]
    except ZeroDivisionError:
        return []


def find_values(
    rule: str, names: list[str], plain: Mapping[int, Any], stated: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The values of a rule's fields that a configuration without them means."""
    tried = [[stated[name]] if stated.get(name) is not None else list(range(9)) for name in names]
    for values in product(*tried):
        given = dict(zip(names, values, strict=True))
        if all(evaluate(rule, layers, given) == plain[layers] for layers in COUNTS):
            return given
    return None
