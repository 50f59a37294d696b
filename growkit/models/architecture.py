"""A model as data: what a family of models has in common, and one model's sizes and options.

`Family` holds all that growkit knows of a model_type: its table, the fields of its config.json,
their defaults, and the rules for growing it. `Architecture` is one member: a size for every axis, a
value for every option. Reading and writing config.json is the same code for every family; so a new
family is one file of data.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from growkit.errors import GrowkitError, UsageError
from growkit.models.notation import Row, Table, parse_table
from growkit.models.rotary import FIELDS as ROTARY_FIELDS
from growkit.models.rotary import RotaryFields, read_rotary, write_rotary

_RATIO = re.compile(r"(\w+) / (\w+)")
_MULTIPLE = re.compile(r"(\d+) \* (\w+)")
_POWER = re.compile(r"(1/)?(?:sqrt\((\w+)\)|(\w+))")


@dataclass(frozen=True)
class Family:
    """What all models of one model_type have in common.

    kind: the model_type in config.json. class_name: transformers' class. title: the name for
    people. text, prefix: the table, see `growkit.models.notation`. fields: the configuration field
    of each axis; `a / b` for a size that two fields state together. defaults: what transformers
    takes for a field that config.json leaves out; `Same("a")` or `Same("a / b")` for the value of
    others; nulls: the same for a field that is null. options: the configuration field of each
    option. constants: fields whose value the table stands for. norm: 'layer' or 'rms'. heads: the
    axis that more heads grow. rotary: the fields of rotary positions. new: fields of a
    configuration written anew. fresh: sizes and options that a new model has unless told, where
    they are not the defaults. frozen: axis -> why it cannot grow. buffers: how names end that old
    checkpoints carry and no model reads. scalars: row -> 'sqrt(axis)', 'axis', '1/sqrt(axis)' or
    '1/axis', a factor that the model applies to the parameter and that follows a size; a row's
    condition may follow its name. by_layer: fields with one entry for each layer. layer_kinds: the
    kinds of all layers, where the configuration states them by rule and not in a list. whole_heads:
    whether transformers wants embed to be a multiple of the number of heads. proved: field ->
    the one value that the table holds for. unpadded, no_identity: why embed cannot be padded, why
    layers that add nothing cannot be inserted; empty where they can. rotary is None where no field
    of rotary positions follows a size: then they are kept as they are. leading: fields that count
    the layers of one kind, which lie in front. numbers: fields that list numbers of layers.
    patterns: list by layer -> the kinds that repeat where config.json leaves the list out. stated:
    lists by layer that config.json must hold for growth in depth. uniform: axes that are copied
    evenly, though no norm averages over them. An axis of the table that has neither a field nor a
    constant is measured in the files.
    """

    kind: str
    class_name: str
    title: str
    text: str
    prefix: str
    fields: Mapping[str, str]
    defaults: Mapping[str, Any]
    options: Mapping[str, str]
    norm: str
    heads: str
    rotary: RotaryFields | None = ROTARY_FIELDS
    constants: Mapping[str, int] = field(default_factory=dict)
    new: Mapping[str, Any] = field(default_factory=dict)
    fresh: Mapping[str, Any] = field(default_factory=dict)
    nulls: Mapping[str, Any] = field(default_factory=dict)
    frozen: Mapping[str, str] = field(default_factory=dict)
    buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)
    scalars: Mapping[str, str] = field(default_factory=dict)
    by_layer: tuple[str, ...] = ("layer_types",)
    layer_kinds: Callable[[Mapping[str, Any]], list[str] | None] = lambda config: None
    whole_heads: bool = True
    proved: Mapping[str, Any] = field(default_factory=dict)
    leading: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    patterns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stated: tuple[str, ...] = ()
    uniform: tuple[str, ...] = ()
    unpadded: str = ""
    no_identity: str = ""

    def __hash__(self) -> int:
        return hash((self.kind, self.text))

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows of the table, whatever their conditions."""
        return parse_table(self.text, self.prefix)

    @property
    def head_name(self) -> str:
        """The parameter of the output head, which files may hold although it is tied."""
        return next((row.name for row in self.rows if row.role == "head"), "")

    @property
    def coupled(self) -> bool:
        """Whether embed is heads x head_dim, so that one of them cannot change alone."""
        return "/" in self.fields.get("head_dim", "")

    def select_rows(self, options: Mapping[str, Any]) -> Table:
        """The table for a model with these options."""
        return Table(tuple(row for row in self.rows if holds_for(row, options)))

    def model(self, **values: Any) -> Architecture:
        """A new model from sizes by axis and options by name; what is left out has its default.

        rotary_base and rotary_pct stand for themselves, `rope` for all rotary parameters. Raises
        GrowkitError for sizes that contradict each other, TypeError for unknown names.
        """
        given = {**self.fresh, **values}
        config: dict[str, Any] = {"rope_parameters": given.pop("rope", None)}
        paths = {**self.fields, **self.options}
        if self.rotary:
            paths["rotary_base"] = self.rotary.base
        if self.rotary and self.rotary.part:
            paths["rotary_pct"] = self.rotary.part
        for name in sorted(given, key=lambda name: "/" in paths.get(name, "")):
            if name not in paths:
                raise TypeError(f"{self.kind} has no {name!r}; it has {', '.join(paths)}, rope")
            ratio = _RATIO.fullmatch(paths[name])
            if ratio:
                config[ratio[1]] = given[name] * config[ratio[2]]
            else:
                config[paths[name]] = given[name]
        return self.read(config)

    def read(self, config: Mapping[str, Any]) -> Architecture:
        """The model that the content of a config.json describes, by transformers 4 or 5.

        Raises GrowkitError for values of the wrong kind and for values that contradict each other.
        """
        given = {key: value for key, value in config.items() if value is not None}
        stated_null = {
            key: self.nulls[key] for key in config.keys() & self.nulls if key not in given
        }
        values = _Fields(given, {**self.defaults, **stated_null})
        self._check_proved(values)
        try:
            sizes = {axis: values.size(path) for axis, path in self.fields.items()}
            options = {name: values.option(path) for name, path in self.options.items()}
            rope = read_rotary(given, self.rotary, values) if self.rotary else {}
        except (AttributeError, TypeError, ValueError) as problem:
            raise GrowkitError(f"config.json holds a value of the wrong kind: {problem}") from None
        return Architecture(
            self, Frozen({**sizes, **self.constants}), Frozen(options | {"rope": rope})
        )

    def _check_proved(self, values: _Fields) -> None:
        """Raise GrowkitError for a field whose value the table was not proved for."""
        for name, proved in self.proved.items():
            value = values.get(name)
            if value != proved:
                raise GrowkitError(
                    f"growth of {self.title} models is proved for {name} {proved!r} only, and this "
                    f"model has {value!r}"
                )


@dataclass(frozen=True)
class Same:
    """A default that is the value of another field: Same("a"), Same("4 * a") or Same("a / b")."""

    path: str


class Frozen(dict[str, Any]):
    """A dict that is not changed, so that what holds it can be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True, default=str))


class _Fields:
    """The fields of a config.json, with the defaults of those that it leaves out."""

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any]):
        self.given = given
        self.defaults = defaults

    def get(self, name: str) -> Any:
        if name in self.given:
            return self.given[name]
        if name not in self.defaults:
            raise GrowkitError(f"config.json lacks {name}, which has no default")
        default = self.defaults[name]
        return self.size(default.path) if isinstance(default, Same) else default

    def whole(self, name: str) -> int:
        """A field that holds a whole number of at least 1."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise GrowkitError(f"{name} must be a whole number, got {value!r}")
        if value < 1:
            raise GrowkitError(f"{name} must be a whole number of at least 1, got {value!r}")
        return value

    def size(self, path: str) -> int:
        """The size that a field states, a multiple of it, or two of them by their ratio."""
        multiple = _MULTIPLE.fullmatch(path)
        if multiple:
            return int(multiple[1]) * self.whole(multiple[2])
        ratio = _RATIO.fullmatch(path)
        if ratio is None:
            return self.whole(path)
        whole, part = self.whole(ratio[1]), self.whole(ratio[2])
        if whole % part:
            low = whole - whole % part
            raise GrowkitError(
                f"{ratio[1]} must be a multiple of {ratio[2]}, got {whole} and {part}; the nearest "
                f"for {ratio[1]} are {low or part} and {low + part}"
            )
        return whole // part

    def option(self, path: str) -> Any:
        """An option's value, of the kind that its default is."""
        default = self.defaults[path]
        if isinstance(default, bool):
            return bool(self.get(path))
        if isinstance(default, int):
            return self.whole(path)
        kind: Callable[[Any], Any] = type(default)
        return kind(self.get(path))


def holds_for(row: Row, options: Mapping[str, Any]) -> bool:
    """Whether all conditions of a row hold. `untied` and `!tied` negate the option `tied`."""
    for condition in row.conditions:
        negated = condition.startswith("!") or condition.startswith("un")
        name = condition.removeprefix("!").removeprefix("un") if negated else condition
        if name not in options:
            raise GrowkitError(f"the row {row.name} depends on {condition!r}, which is no option")
        if bool(options[name]) == negated:
            return False
    return True


@dataclass(frozen=True)
class Architecture:
    """One model: its family, the size of every axis of the table, and the value of every option.

    layers: the layers of each kind, where layers differ in their parameters.
    """

    family: Family
    sizes: Mapping[str, int]
    options: Mapping[str, Any]
    layers: Mapping[str, tuple[int, ...]] = Frozen()

    def __post_init__(self) -> None:
        if self.family.rotary is None:
            return
        rotated = self.rotary
        if not self.family.rotary.part and rotated % 2:
            raise GrowkitError(
                f"head_dim must be even, because rotary positions rotate pairs; got {rotated}"
            )
        if rotated % 2 or not 0 < rotated <= self.head_dim:
            raise GrowkitError(
                f"the rotated part of a head must be even and between 2 and head_dim, got "
                f"int({self.head_dim} x {self.rotary_pct}) = {rotated}"
            )

    @property
    def kind(self) -> str:
        """The model_type in config.json."""
        return self.family.kind

    @property
    def norm(self) -> str:
        """'layer' (mean and variance) or 'rms'."""
        return self.family.norm

    @property
    def fields(self) -> Mapping[str, str]:
        """The configuration field of each axis."""
        return self.family.fields

    @property
    def heads(self) -> str:
        """The axis that more heads grow."""
        return self.family.heads

    @property
    def head_name(self) -> str:
        """The parameter of the output head, which files may hold although it is tied."""
        return self.family.head_name

    @property
    def buffers(self) -> tuple[str, ...]:
        """How names end that old checkpoints carry and no model of today reads."""
        return self.family.buffers

    @property
    def coupled(self) -> bool:
        """Whether embed is heads x head_dim, so that one of them cannot change alone."""
        return self.family.coupled

    @cached_property
    def table(self) -> Table:
        """The table's rows that hold for this model's options."""
        rows = self.family.select_rows(self.options)
        return replace(rows, layers=self.layers, uniform=self.family.uniform)

    @property
    def layer(self) -> int:
        """The number of layers."""
        return self.sizes["layer"]

    @property
    def embed(self) -> int:
        """The width of the residual stream."""
        return self.sizes["embed"]

    @property
    def mlp(self) -> int:
        """The units of each mlp."""
        return self.sizes["mlp"]

    @property
    def vocab(self) -> int:
        """The rows of the embedding."""
        return self.sizes["vocab"]

    @property
    def head_dim(self) -> int:
        """The dimensions of each head."""
        return self.sizes["head_dim"]

    @property
    def head_count(self) -> int:
        """The number of query heads."""
        return self.sizes[self.heads] * self.sizes.get("group", 1)

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return bool(self.options.get("tied", False))

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return int(self.options["context"])

    @property
    def norm_eps(self) -> float:
        """What norms add to the variance; no unit."""
        return float(self.options["norm_eps"])

    @property
    def initializer_range(self) -> float:
        """The standard deviation of new weights; no unit."""
        return float(self.options["initializer_range"])

    @property
    def values(self) -> dict[str, Any]:
        """All sizes and options by name, as `Family.model` takes them."""
        sizes = {axis: self.sizes[axis] for axis in self.fields}
        options = {name: self.options[name] for name in self.family.options}
        return {**sizes, **options, "rope": dict(self.rope)}

    @property
    def rope(self) -> Mapping[str, Any]:
        """The rotary parameters as transformers 5 states them."""
        rope: Mapping[str, Any] = self.options["rope"]
        return rope

    @property
    def rotary_base(self) -> float:
        """The base of the rotary frequencies."""
        return float(self.rope["rope_theta"])

    @property
    def rotary_pct(self) -> float:
        """The part of each head that is rotated; 1 where a family rotates all of it."""
        if not self.family.rotary or not self.family.rotary.part:
            return 1.0
        return float(self.rope["partial_rotary_factor"])

    @property
    def rotary(self) -> int:
        """How many dimensions of each head are rotated. transformers takes int(head_dim x part)."""
        return int(self.head_dim * self.rotary_pct)

    @property
    def parameters(self) -> int:
        """How many numbers the model holds, a tied embedding counted once."""
        return count_parameters(self.table.rows, self.sizes)

    def flops_per_token(self, context: int | None = None) -> float:
        """Training FLOPs a token: 6 for each weight that multiplies, and attention's products.

        Attention takes 12 x layer x heads x head_dim x context. PaLM (arXiv 2204.02311), appendix
        B. The embedding look-up multiplies nothing; the head does.
        """
        matrices = [row for row in self.table.rows if row.multiplies]
        weights = count_parameters(matrices, self.sizes)
        head = self.vocab * self.embed if self.tied else 0
        attention = self.layer * self.head_count * self.head_dim * (context or self.context)
        return 6.0 * (weights + head) + 12.0 * attention

    def scalar_growth(self, row: Row, grown: Architecture) -> float:
        """f(old) / f(new) of the factor f that the model applies to a parameter; 1 where there is
        none.

        Source: Gemma multiplies its embedding by sqrt(hidden_size).
        """
        scalars = self.family.scalars
        text = scalars.get(" ".join((row.name, *row.conditions))) or scalars.get(row.name)
        found = _POWER.fullmatch(text) if text else None
        if found is None:
            return 1.0
        axis = found[2] or found[3]
        ratio = self.sizes[axis] / grown.sizes[axis]
        if found[2]:
            ratio = math.sqrt(ratio)
        return 1.0 / ratio if found[1] else ratio

    @property
    def measured(self) -> bool:
        """Whether something about the model is to be found in its files: see `measure`."""
        rows = self.family.rows
        axes = {name for row in rows for name in row.axes} | {
            a.name for r in rows for a in r.stacked
        }
        return bool(axes - self.sizes.keys()) or any(row.kind for row in rows)

    def measure(self, shapes: Mapping[str, Sequence[int]]) -> Architecture:
        """This model with what its files alone say: some sizes, the kinds of layers.

        shapes: by name in files. A dimension that is a product with one axis of unknown size gives
        that size; a layer is of a kind if the files have that kind's parameters for it.
        """
        sizes = dict(self.sizes)
        layers: dict[str, set[int]] = {row.kind: set() for row in self.table.rows if row.kind}
        seen: set[Row] = set()
        for name, shape in shapes.items():
            found = ((row, row.match(name)) for row in self.table.rows)
            row, position = next((pair for pair in found if pair[1] is not None), (None, None))
            if row is None or position is None:
                continue
            if row.kind:
                layers[row.kind].add(position[0])
            if row not in seen:
                sizes |= row.measure(shape, sizes)
            seen.add(row)
        kinds = {kind: tuple(sorted(of_kind)) for kind, of_kind in layers.items()}
        return replace(self, sizes=Frozen(sizes), layers=Frozen(kinds))

    def follow_map(self, index: Sequence[int]) -> Architecture:
        """This model with each layer of the kind of the old layer that it copies."""
        kinds = {
            kind: tuple(new for new, old in enumerate(index) if old in of_kind)
            for kind, of_kind in self.layers.items()
        }
        return replace(self, layers=Frozen(kinds))

    def resize(self, sizes: Mapping[str, int], norm_eps: float | None = None) -> Architecture:
        """This model at other sizes; the number of rotated dimensions is kept.

        Raises UsageError for an axis of the family that cannot grow, and for sizes that
        transformers does not accept.
        """
        self._check_frozen(sizes)
        options = dict(self.options)
        if norm_eps is not None:
            options["norm_eps"] = norm_eps
        resized = {axis: sizes[axis] for axis in self.sizes}
        if self.coupled:
            heads = resized[self.heads] * resized.get("group", 1)
            resized["head_dim"] = resized["embed"] // heads
        rotary = self.family.rotary
        if rotary and rotary.part and resized["head_dim"] != self.head_dim:
            part = keep_rotated(self.rotary, resized["head_dim"])
            options["rope"] = {**self.rope, "partial_rotary_factor": part}
        grown = replace(self, sizes=Frozen(resized), options=Frozen(options))
        self._check_whole_heads(grown)
        return grown

    def change(self, **values: Any) -> Architecture:
        """This model with other sizes or options, by the names that `Family.model` takes."""
        mine = self.values
        if self.coupled:
            del mine["head_dim"]
        if "rotary_base" in values:
            mine["rope"]["rope_theta"] = values.pop("rotary_base")
        if "rotary_pct" in values:
            mine["rope"]["partial_rotary_factor"] = values.pop("rotary_pct")
        return self.family.model(**{**mine, **values})

    def _check_frozen(self, sizes: Mapping[str, int]) -> None:
        for axis, reason in self.family.frozen.items():
            if axis in self.sizes and sizes[axis] != self.sizes[axis]:
                raise UsageError(
                    f"{axis} of a {self.family.title} model stays {self.sizes[axis]}: {reason}"
                )

    def _check_whole_heads(self, grown: Architecture) -> None:
        """A source that breaks this rule of transformers 5 may grow in depth all the same."""
        if not (self.family.whole_heads and self.heads) or self.embed % self.head_count:
            return
        heads = grown.head_count
        if grown.embed % heads:
            low = grown.embed - grown.embed % heads
            near = [str(size) for size in (low, low + heads) if size > self.embed]
            raise UsageError(
                f"hidden_size must be a multiple of num_attention_heads, got {grown.embed} and "
                f"{heads}; with {heads} heads the nearest for embed: {' and '.join(near)}"
            )

    def config(self, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The config.json content of the model, in fields that transformers 4 and 5 both read.

        Fields of `base` that say nothing about sizes or options are kept as they are.
        """
        family = self.family
        written: dict[str, Any] = {"architectures": [family.class_name], **family.new}
        written |= base or {}
        written["model_type"] = family.kind
        for axis, path in family.fields.items():
            if "/" not in path:
                written[path] = self.sizes[axis]
        for axis, path in family.fields.items():
            ratio = _RATIO.fullmatch(path)
            if ratio:
                written[ratio[1]] = self.sizes[axis] * written[ratio[2]]
        for name, path in family.options.items():
            written[path] = self.options[name]
        if family.rotary is None:
            return written
        return written | write_rotary(self.rope, family.rotary, base or {})


def keep_rotated(rotary: int, head_dim: int) -> float:
    """The part of a head for which transformers' int(head_dim x part) gives `rotary` dimensions."""
    part = rotary / head_dim
    if int(head_dim * part) == rotary:
        return part
    # Where rounding would miss the count (30 of 44: 29), half a dimension is added.
    return (rotary + 0.5) / head_dim


def count_parameters(rows: Iterable[Row], sizes: Mapping[str, int]) -> int:
    """The number of elements of all parameters of `rows` at `sizes`."""
    return sum(math.prod(row.stacked_shape(sizes)) for row in rows)


def follow_layers(
    config: Mapping[str, Any], before: Mapping[str, Any], family: Family, index: Sequence[int]
) -> dict[str, Any]:
    """A grown config.json whose fields with one entry for each layer follow a map of the layers.

    before: the source's config.json. index: for each new layer the old layer that it copies. Kinds
    of layers that the configuration states by a rule of the layer's number are written as a list
    where the rule would give a layer another kind than its source's.
    """
    grown = dict(config)
    _check_stated(before, family)
    for name in family.by_layer:
        entries = _entries_by_layer(name, before, family)
        if entries:
            grown[name] = [entries[layer] for layer in index]
    for name in family.leading:
        grown[name] = _count_leading(name, before, family, index)
    for name in family.numbers:
        if isinstance(before.get(name), list):
            grown[name] = [new for new, old in enumerate(index) if old in before[name]]
    kinds = family.layer_kinds(before)
    if kinds is not None and not grown.get("layer_types"):
        wanted = [kinds[layer] for layer in index]
        if family.layer_kinds(grown) != wanted:
            grown["layer_types"] = wanted
    return grown


def _check_stated(before: Mapping[str, Any], family: Family) -> None:
    """Raise UsageError where a list of kinds is missing that transformers would make by a rule."""
    for name in family.stated:
        if not isinstance(before.get(name), list):
            raise UsageError(
                f"config.json lacks {name}, which says what kind each layer is of: load the model "
                f"in transformers and save it once, then grow it in depth"
            )


def _entries_by_layer(name: str, before: Mapping[str, Any], family: Family) -> list[Any]:
    """The source's entries of a list with one for each layer; empty where it has none."""
    entries = before.get(name)
    if isinstance(entries, list):
        return entries
    pattern = family.patterns.get(name, ())
    layers = before.get(family.fields["layer"], family.defaults.get(family.fields["layer"], 0))
    return [pattern[layer % len(pattern)] for layer in range(layers)] if pattern else []


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
            f"their copies must stay in front, and this map has others from {leads.index(False)} on"
        )
    return count
