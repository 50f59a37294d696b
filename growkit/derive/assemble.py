"""From a variant's rows to a family that growkit grows: the table's text, the fields, their
defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from growkit.derive.kinds import NO_LEADS, Kinds, find_kinds
from growkit.derive.lists import find_by_layer, find_numbers, find_others
from growkit.derive.network import CONFIG_MAPPING, class_of, load
from growkit.derive.rows import Draft, link, read_word
from growkit.derive.sizes import HIDDEN, POSITIONS, shapes_of
from growkit.derive.variant import Choice, Variant, axis_size
from growkit.models.family import Family
from growkit.models.fields import Same

OPTIONS = {
    "context": POSITIONS,
    "norm_eps": (
        "rms_norm_eps",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "norm_eps",
        "norm_epsilon",
    ),
    "initializer_range": ("initializer_range", "init_std", "initializer_std"),
    "activation": ("hidden_act", "hidden_activation", "activation_function", "activation"),
}


def row_lines(variant: Variant, choice: Choice, pooled: bool) -> list[tuple[str, str]]:
    """(name, rest) of each row. pooled: whether the last norm takes the reader's share, as under a
    tied head.
    """
    lines = []
    for draft in variant.drafts:
        words = [
            read_word(cuts[choice.get((link(draft), place), 0) % len(cuts)], draft.reads[place])
            for place, cuts in enumerate(draft.cuts)
        ]
        if draft.final and pooled:
            words = ["/embed"]
        begins = f"1+{draft.begins}" if draft.offset else draft.begins
        words = words or ["()"]
        lines.append(
            (table_name(draft), " ".join([*words, begins, role_word(draft, words, variant)]))
        )
    return lines


def table_name(draft: Draft) -> str:
    """A row's name with its marks: a slash where it writes the stream, a kind where not all layers
    have it.
    """
    slash = "/" if draft.stream else ""
    kind = f":{draft.kind}" if draft.kind else ""
    return draft.name.replace("{layer}", f"{{{slash}layer{kind}}}")


def role_word(draft: Draft, words: list[str], variant: Variant) -> str:
    """The role, and what a norm averages over."""
    if draft.role == "qkv" and not any(word.count("|") == 2 or "qkv" in word for word in words):
        return "bias" if len(words) == 1 else "matrix"
    if draft.role != "norm" or draft.averages is None:
        return draft.role
    axes = re.findall(r"\w+", words[-1])
    if "|" in words[-1] or len(axes) + len(words) == 2:
        return "norm"
    inner: list[str] = []
    size = 1
    for axis in reversed(re.findall(r"\w+", " ".join(words))):
        if size >= draft.averages:
            break
        inner.insert(0, axis)
        size *= axis_size(variant, axis) if axis in variant.sizes else 1
    every = re.findall(r"\w+", " ".join(words))
    return "norm" if inner == every or not inner else f"norm({' '.join(inner)})"


def fields_of(variant: Variant) -> dict[str, str]:
    """The configuration field of each axis."""
    fields = {"vocab": "", "layer": variant.layer_field, "embed": variant.hidden or ""}
    fields |= {axis: size.path for axis, size in variant.sizes.items()}
    return {axis: path for axis, path in fields.items() if path}


def make_family(
    variant: Variant, text: str, frozen: Mapping[str, str], flags: Mapping[str, str], **facts: Any
) -> Family:
    """A family of a table's text, everything else taken from a variant. flags: options that rows
    depend on.
    """
    kinds = kinds_of(variant)
    fields = fields_of(variant)
    options = find_option_fields(variant) | dict(flags)
    equal = variant.probe.equal
    paths = [*fields.values(), *options.values(), *equal, *variant.leading]
    defaults = variant.once(f"defaults {sorted(flags)}", lambda: find_defaults(variant, paths))
    # An option that the class has no value for is not an option (Youtu's initializer_range).
    options = {name: path for name, path in options.items() if path in defaults}
    constants = {"qkv": 3} if re.search(r"\bqkv\b", re.sub(r"\S+\s*$", "", text)) else {}
    return Family(
        kind=variant.kind,
        class_name=class_of(variant.config).__name__,
        title=title_of(variant),
        text=text,
        prefix=_prefix(text),
        fields=fields,
        defaults={**kinds.defaults, **defaults},
        nulls=variant.once(f"nulls {sorted(flags)}", lambda: find_nulls(variant, defaults)),
        options=options,
        norm=facts.pop("norm", "rms"),
        heads=next((axis for axis in ("kv", "head") if axis in fields), ""),
        rotary=None,
        constants=constants,
        frozen=dict(frozen),
        equal=equal,
        by_layer=find_by_layer(variant),
        leading=tuple(name for name in variant.leading if name not in NO_LEADS),
        numbers=find_numbers(variant),
        other_lists=find_others(variant),
        **kinds.facts,
        unread=tuple(class_of(variant.config)._keys_to_ignore_on_load_unexpected or ()),
        aliases=variant.once("aliases", lambda: find_aliases(variant)),
        **facts,
    )


def kinds_of(variant: Variant) -> Kinds:
    """What the type's configuration says of kinds of layers beside its lists."""
    kinds: Kinds = variant.once(
        "kinds",
        lambda: find_kinds(
            variant.kind,
            variant.layer_field,
            find_by_layer(variant),
            find_numbers(variant),
            variant.drafts,
            variant.probe.stated,
            variant.leading,
        ),
    )
    return kinds


def find_aliases(variant: Variant) -> dict[str, str]:
    """Row -> its name in memory, where that is another, with its block of all experts'."""
    held = load(variant.config, variant.state).state_dict()
    found = {}
    for draft in variant.drafts:
        _, numbers = variant.names.template(draft.example)
        alias = find_alias(draft, numbers, held, variant.state)
        if alias:
            found[draft.name] = alias
    return found


def find_alias(
    draft: Draft, numbers: tuple[int, ...], held: Mapping[str, Any], state: Mapping[str, Any]
) -> str:
    """A row's name in memory and its block there; empty where that is its name in files.

    numbers: of the layer and the expert in its example's name. held: a network's own tensors.
    """
    if draft.memory in (draft.example, ""):
        return ""
    memory = draft.memory
    if "{layer}" in draft.name:
        memory = re.sub(rf"\b{numbers[0]}\b", "{layer}", memory, count=1)
    block = find_block(held[draft.memory], state[draft.example], numbers)
    return "" if block is None else f"{memory}{block}"


def find_block(whole: Any, part: Any, numbers: tuple[int, ...]) -> str | None:
    """Where a tensor lies in one of memory: "" for all of it, ' 1/2' for the second block of its
    expert; None where it is made otherwise.
    """
    if whole.shape == part.shape:
        return "" if bool((whole == part).all()) else None
    if whole.dim() != part.dim() + 1 or not numbers or not part.dim():
        return None
    unit = whole[numbers[-1]]
    count, rest = divmod(unit.shape[0], part.shape[0])
    if rest or unit.shape[1:] != part.shape[1:]:
        return None
    same = [bool((each == part).all()) for each in unit.split(part.shape[0])]
    return f" {same.index(True)}/{count}" if True in same else None


def find_option_fields(variant: Variant) -> dict[str, str]:
    """The configuration field of each of OPTIONS that the configuration states a value of."""
    stated = variant.probe.stated
    found = {}
    for option, names in OPTIONS.items():
        name = next((name for name in names if name in stated), None)
        if name is not None and stated[name] is not None:
            found[option] = name
    return found


def _prefix(text: str) -> str:
    firsts = [line.split(".")[0] for line in text.splitlines() if line and "{" in line]
    return max(dict.fromkeys(firsts), key=firsts.count) if firsts else ""


def title_of(variant: Variant) -> str:
    name = class_of(variant.config).__name__
    return re.sub(r"(ForCausalLM|LMHeadModel|WithLMHead.*|ForConditionalGeneration)$", "", name)


def find_defaults(variant: Variant, paths: list[str]) -> dict[str, Any]:
    """What a configuration that leaves a field out means by it, as far as a value or another field
    says it.
    """
    config_class = CONFIG_MAPPING[variant.kind]
    plain = config_class()
    names = list(dict.fromkeys(name for path in paths for name in path.split(" / ")))
    defaults: dict[str, Any] = {}
    for name in names:
        value = getattr(plain, name, None)
        follows = [] if value is None else _followed(config_class, name, value, names)
        if follows:
            defaults[name] = _same_as(plain, name, value, follows)
        elif value is not None:
            defaults[name] = value
        else:
            default = _shape_default(variant, name)
            if default is not None:
                defaults[name] = default
    return {name: value for name, value in defaults.items() if value is not None}


def _followed(
    config_class: Any, name: str, value: Any, others: list[str], **given: None
) -> list[str]:
    """The fields that change a field that is left out, or is null where `given` says so."""
    found = []
    for other in others:
        before = getattr(config_class(), other, None)
        if other == name or isinstance(before, bool) or not isinstance(before, int):
            continue
        try:
            changed = getattr(config_class(**given, **{other: before * 2}), name, None)
        except Exception:
            continue
        if changed != value:
            found.append(other)
    return found


def _same_as(plain: Any, name: str, value: Any, follows: list[str]) -> Any:
    """The value as other fields give it; None where one or two of them do not say it."""
    values = {other: getattr(plain, other) for other in follows}
    for other, theirs in values.items():
        if theirs == value and len(follows) == 1:
            return Same(other)
        if len(follows) == 1 and isinstance(value, int) and value % theirs == 0:
            return Same(f"{value // theirs} * {other}")
    for whole, a in values.items():
        for part, b in values.items():
            if whole != part and a == value * b:
                return Same(f"{whole} / {part}")
    return None


def _shape_default(variant: Variant, name: str) -> Any:
    """What the model takes for a field that is None: the field of hidden size, a multiple, or a
    ratio of it.
    """
    probe = variant.probe
    hidden = probe.name(HIDDEN)
    if hidden is None:
        return None
    without = {key: value for key, value in probe.fields.items() if key != name}
    heads = next((size.path for size in variant.sizes.values() if size.axis in ("head", "kv")), "")
    whole = next(
        (s.path.split(" / ")[0] for s in variant.sizes.values() if s.axis == "group"), heads
    )
    candidates = {Same(whole): probe.value(whole)} if whole else {}
    candidates |= {Same(f"{n} * {hidden}"): n * probe.value(hidden) for n in (1, 2, 3, 4, 8)}
    if whole:
        candidates[Same(f"{hidden} / {whole}")] = probe.value(hidden) // probe.value(whole)
    wider = {hidden: probe.value(hidden) * 2, **({whole: probe.value(whole) * 2} if whole else {})}
    base, grown = (_without(variant.kind, without | more, name) for more in ({}, wider))
    for same, value in candidates.items():
        doubled = value * 2 if " / " not in same.path else value
        same_base = shapes_of(variant.kind, without | {name: value}) == base
        if same_base and shapes_of(variant.kind, without | wider | {name: doubled}) == grown:
            return same
    return None


def _without(kind: str, fields: Mapping[str, Any], name: str) -> Any:
    """Shapes where a field is null, or where that is refused, left out."""
    return shapes_of(kind, {**fields, name: None}) or shapes_of(kind, fields)


def find_nulls(variant: Variant, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What a field that is null means, where that is not what it means to leave it out."""
    config_class = CONFIG_MAPPING[variant.kind]
    names = [name for name in defaults if name in variant.probe.stated]
    found = {}
    for name in names:
        try:
            value = getattr(config_class(**{name: None}), name)
        except Exception:
            continue
        if value is None or isinstance(value, (bool, str)):
            continue
        same = _same_as(
            config_class(**{name: None}),
            name,
            value,
            _followed(config_class, name, value, names, **{name: None}),
        )
        if same is not None and same != defaults[name]:
            found[name] = same
    return found
