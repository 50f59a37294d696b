"""What a family of models has in common, as data; one member of it, from its config.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from growkit.errors import GrowkitError
from growkit.models.architecture import Architecture
from growkit.models.computation import LAYER_TYPES, Computation, select_kinds
from growkit.models.fields import RATIO, Fields, Frozen
from growkit.models.layer_rules import apply_rule
from growkit.models.notation import Row, parse_table
from growkit.models.rotary import FIELDS as ROTARY_FIELDS
from growkit.models.rotary import RotaryFields, read_ropes, read_rotary
from growkit.models.table import Table, settle_kinds

# A number in a config.json must not say how long a loop runs.
MOST_LAYERS = 1_000_000
# Whether norms subtract the mean (LayerNorm) or not (RMSNorm).
NORMS = ("layer", "rms")
# Endings of the names of tensors that are buffers of transformers' decoders, in old files; no
# parameter's name ends like this.
BUFFERS = (
    ".inv_freq",
    ".original_inv_freq",
    ".cos_cached",
    ".sin_cached",
    ".masked_bias",
    ".causal_mask",
    ".position_ids",
)


@dataclass(frozen=True)
class Family:
    """What all models of one model_type have in common."""

    # The model_type in config.json, transformers' class, and the name for people.
    kind: str
    class_name: str
    title: str
    # The table.
    text: str
    # The configuration field of each axis; `a / b` for a size that is the ratio of two fields.
    fields: Mapping[str, str]
    # What transformers takes for a field that config.json leaves out.
    defaults: Mapping[str, Any]
    # The configuration field of each option.
    options: Mapping[str, str]
    # 'layer' or 'rms'.
    norm: str
    # The axis that more heads grow.
    heads: str
    # The first words of names that a parameter tree leaves out.
    prefix: str = ""
    # The fields of rotary positions; None where none of them follows a size: they are kept.
    rotary: RotaryFields | None = ROTARY_FIELDS
    # Axes of one size, in every model.
    constants: Mapping[str, int] = field(default_factory=dict)
    # Fields of a config.json that is written without one to begin with.
    new: Mapping[str, Any] = field(default_factory=dict)
    # Sizes and options of a new model that are not transformers' defaults.
    fresh: Mapping[str, Any] = field(default_factory=dict)
    # What transformers takes for a field that is null, where that is not the default.
    nulls: Mapping[str, Any] = field(default_factory=dict)
    # axis -> why it cannot grow.
    frozen: Mapping[str, str] = field(default_factory=dict)
    # Endings of names of buffers in old files: such tensors are left out, no model reads them now.
    buffers: tuple[str, ...] = BUFFERS
    # What names match of tensors that transformers does not load, as of heads for further tokens.
    unread: tuple[str, ...] = ()
    # row -> its name in transformers' memory, which some files have; `name 0/2` for the first of
    # two blocks of what holds all experts.
    aliases: Mapping[str, str] = field(default_factory=dict)
    # row -> 'sqrt(axis)', 'axis', '1/sqrt(axis)' or '1/axis': what the model multiplies the
    # parameter by. A row's condition may follow its name.
    scalars: Mapping[str, str] = field(default_factory=dict)
    # Fields with one entry for each layer.
    by_layer: tuple[str, ...] = ("layer_types",)
    # Fields that list numbers of layers.
    numbers: tuple[str, ...] = ()
    # Fields that hold lists about something else than layers.
    other_lists: tuple[str, ...] = ()
    # Fields that count the layers of one kind, which lie in front.
    leading: tuple[str, ...] = ()
    # list by layer -> the kinds that repeat where config.json leaves the list out.
    patterns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Lists by layer that config.json must hold for growth in depth.
    stated: tuple[str, ...] = ()
    # list by layer, or of numbers -> the rule that stands for it; see growkit.models.layer_rules.
    rules: Mapping[str, str] = field(default_factory=dict)
    # Fields that a rule reads beside its own list, and what they are once the list says it all.
    settled: Mapping[str, Any] = field(default_factory=dict)
    # what -> a rule that no list can stand for: layers must keep to it.
    checked: Mapping[str, str] = field(default_factory=dict)
    # Lists of kinds that are repeated for all layers, whatever their length.
    cycles: tuple[str, ...] = ()
    # Fields that hold the number of the last layer of a kind.
    last: tuple[str, ...] = ()
    # The kinds of all layers, where the configuration states them by a rule and not in a list.
    layer_kinds: Callable[[Mapping[str, Any]], list[str] | None] = lambda config: None
    # How a mixture's gate chooses experts, and the defaults of the fields that say so; see
    # growkit.models.gates. Empty: not known, so the number of experts stays.
    experts: Mapping[str, Any] = field(default_factory=dict)
    expert_defaults: Mapping[str, Any] = field(default_factory=dict)
    # How a dense model becomes a mixture of this type, and row -> the dense row that it comes from;
    # see growkit.models.upcycling. Empty: not known.
    upcycling: Mapping[str, Any] = field(default_factory=dict)
    upcycled: Mapping[str, str] = field(default_factory=dict)
    # Whether transformers wants embed to be a multiple of the number of heads.
    whole_heads: bool = True
    # field -> the one value that the table holds for.
    proved: Mapping[str, Any] = field(default_factory=dict)
    # field -> the field whose value it has in the models that the table holds for: transformers
    # puts a projection between the two where they differ.
    equal: Mapping[str, str] = field(default_factory=dict)
    # Axes that are copied evenly, though no norm averages over them.
    uniform: tuple[str, ...] = ()
    # Why embed cannot be padded; why layers that add nothing cannot be inserted. Empty: they can.
    unpadded: str = ""
    no_identity: str = ""
    # What the trainer must know to compute it; None for a family that only grows.
    computation: Computation | None = None
    # The text of the table file, where it is not one that growkit ships.
    given: str = ""

    # Families hold dicts, which have no hash; kind and table tell them apart.
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
    def fixed(self) -> dict[str, str]:
        """axis -> why it cannot grow, but for axes with rules of their own.

        New tokens are no copies; `growkit.growth.vocabulary` rules on them. More experts are the
        matter of `growkit.growth.experts`, where the table states the gate.
        """
        elsewhere = ("vocab", "expert") if self.experts else ("vocab",)
        return {axis: why for axis, why in self.frozen.items() if axis not in elsewhere}

    @property
    def coupled(self) -> bool:
        """Whether embed is heads x head_dim, so that one of them cannot change alone."""
        return "/" in self.fields.get("head_dim", "")

    def select_rows(self, options: Mapping[str, Any], headless: bool = False) -> Table:
        """The table for a model with these options. headless: without the output head's row."""
        rows = [row for row in self.rows if holds_for(row, options)]
        if headless:
            rows = [row for row in rows if row.role != "head"]
        return Table(tuple(rows), uniform=self.uniform)

    def model(self, **values: Any) -> Architecture:
        """A new model from sizes by axis and options by name; what is left out has its default.

        rotary_base and rotary_pct stand for themselves, `rope` for all rotary parameters, and so do
        the fields of the computation. Raises GrowkitError for sizes that contradict each other,
        TypeError for unknown names.
        """
        given = {**self.fresh, **values}
        config: dict[str, Any] = {"rope_parameters": given.pop("rope", None)}
        paths = {**{name: name for name in self.computed_fields}, **self.fields, **self.options}
        if self.rotary:
            paths["rotary_base"] = self.rotary.base
        if self.rotary and self.rotary.part:
            paths["rotary_pct"] = self.rotary.part
        # Plain fields first: a ratio multiplies the field that it divides by.
        for name in sorted(given, key=lambda name: "/" in paths.get(name, "")):
            if name not in paths:
                raise TypeError(f"{self.kind} has no {name!r}; it has {', '.join(paths)}, rope")
            ratio = RATIO.fullmatch(paths[name])
            if ratio:
                # group = heads / kv: without kv in `given`, its default is what group multiplies.
                divisor = config.setdefault(ratio[2], self.fields_of(config).whole(ratio[2]))
                config[ratio[1]] = given[name] * divisor
            else:
                config[paths[name]] = given[name]
        return self.read(config)

    def read(self, config: Mapping[str, Any]) -> Architecture:
        """The model that the content of a config.json describes, by transformers 4 or 5.

        Raises GrowkitError for values of the wrong kind and for values that contradict each other.
        """
        values = self.fields_of(config)
        self._check_proved(values)
        try:
            sizes = {axis: values.size(path) for axis, path in self.fields.items()}
            options = {name: values.option(path) for name, path in self.options.items()}
            rope = read_rotary(values.given, self.rotary, values) if self.rotary else {}
            facts = self._read_facts(config)
            self._check_computed(facts)
            layers = self._read_kinds(config, facts, sizes.get("layer", 0))
        except (AttributeError, TypeError, ValueError) as problem:
            raise GrowkitError(f"config.json holds a value of the wrong kind: {problem}") from None
        return Architecture(
            self,
            Frozen({**sizes, **self.constants}),
            Frozen(options | {"rope": rope}),
            Frozen(layers),
            Frozen(facts),
        )

    @property
    def _facts(self) -> Mapping[str, Any]:
        """The fields that the computation reads beside sizes and options, with their defaults."""
        if self.computation is None:
            return {}
        gate = self.expert_defaults if self.computation.experts else {}
        return {**gate, **self.computation.fields}

    def _read_facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The values of those fields; null counts as a value."""
        facts = {name: config.get(name, default) for name, default in self._facts.items()}
        needs = self.computation.needs if self.computation else {}
        return facts | {name: None for name, needed in needs.items() if not facts[needed]}

    def _check_computed(self, facts: Mapping[str, Any]) -> None:
        """Raise ValueError, TypeError or GrowkitError for what cannot be computed with."""
        computation = self.computation
        if computation is None:
            return
        if not computation.positions and not self.rotary:
            read_ropes(facts, computation.rotary_by_kind)
        for name in computation.numbers.values():
            if facts.get(name) is not None:
                float(facts[name])

    @property
    def computed_fields(self) -> tuple[str, ...]:
        """The fields that only the computation reads."""
        listed = self.computation is not None and self.computation.windows == "list"
        return (*self._facts, LAYER_TYPES) if listed else tuple(self._facts)

    def _read_kinds(
        self, config: Mapping[str, Any], facts: Mapping[str, Any], layers: int
    ) -> dict[str, tuple[int, ...]]:
        """The layers of each kind, where the table or the attention has several kinds."""
        if self.computation is None:
            return {}
        if self.computation.windows == "list":
            _bound_layers(layers)
            return self._read_attention(config, layers)
        # Of a model that is not computed the files alone tell the kinds.
        computed = all(facts[name] in values for name, values in self.computation.only.items())
        kinds = self.computation.kinds if computed else {}
        if kinds:
            _bound_layers(layers)
        return {kind: tuple(range(layers if of_all else 0)) for kind, of_all in kinds.items()}

    def _read_attention(self, config: Mapping[str, Any], layers: int) -> dict[str, tuple[int, ...]]:
        """The layers of each kind of attention, as a list or a rule has them."""
        assert self.computation is not None
        pattern = self.patterns.get(LAYER_TYPES, ())
        rule = self.layer_kinds({**self.computation.fields, **config, "num_hidden_layers": layers})
        listed = config.get(LAYER_TYPES) is not None
        if LAYER_TYPES in self.rules and not listed:
            rule = apply_rule(self.rules[LAYER_TYPES], config, self)
        kinds = select_kinds(self.computation, config, layers, rule, pattern) or []
        return {
            kind: tuple(n for n, each in enumerate(kinds) if each == kind)
            for kind in sorted(set(kinds))
        }

    def fields_of(self, config: Mapping[str, Any]) -> Fields:
        """The fields of a config.json, with the defaults of those that it leaves out."""
        # transformers takes null as left out, but for the fields of `nulls`.
        given = {key: value for key, value in config.items() if value is not None}
        also = self.experts.get("also")
        if also in given:
            # transformers takes both names of the number of experts.
            given.setdefault(self.fields["expert"], given[also])
        null = {key: self.nulls[key] for key in config.keys() & self.nulls if key not in given}
        return Fields(given, {**self.defaults, **null})

    def settle_rows(
        self, rows: tuple[Row, ...], layers: Mapping[str, tuple[int, ...]], count: int
    ) -> tuple[Row, ...]:
        """The rows of a model, without kinds of layers where all that are computed are alike."""
        if self.computation is None or not self.computation.kinds or not layers:
            return rows
        return settle_kinds(rows, layers, count)

    @property
    def new_fields(self) -> dict[str, Any]:
        """Fields of a config.json that is written without one to begin with.

        transformers 4 and 5 have different names for the number of experts: both are written.
        """
        also = self.experts.get("also")
        return {**self.new, also: None} if also else dict(self.new)

    def name_experts(self, stated: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that a user states, with the number of experts by the name that goes first."""
        also = self.experts.get("also", "")
        first = {self.fields["expert"]: stated[also]} if also in stated else {}
        return {**first, **stated}

    def _check_proved(self, values: Fields) -> None:
        """Raise GrowkitError for fields whose values the table was not proved for."""
        for name, proved in self.proved.items():
            value = values.get(name)
            if value != proved:
                raise GrowkitError(
                    f"growth of {self.title} models is proved for {name} {proved!r} only, and this "
                    f"model has {value!r}"
                )
        for name, other in self.equal.items():
            if values.get(name) != values.get(other):
                raise GrowkitError(
                    f"growth of {self.title} models is proved where {name} is {other}, and this "
                    f"model has {values.get(name)} and {values.get(other)}"
                )


def _bound_layers(count: int) -> None:
    """Raise ValueError for a number of layers that no loop should run over."""
    if count > MOST_LAYERS:
        raise ValueError(f"{count:,} layers, and growkit takes at most {MOST_LAYERS:,}")


def holds_for(row: Row, options: Mapping[str, Any]) -> bool:
    """Whether all conditions of a row hold. `untied` and `!tied` negate the option `tied`."""
    for condition in row.conditions:
        negated = condition not in options
        # An option's own name may begin with un.
        name = bare_condition(condition) if negated else condition
        if name not in options:
            raise GrowkitError(
                f"the row {row.name} depends on {condition!r}, which is not an option"
            )
        if bool(options[name]) == negated:
            return False
    return True


def bare_condition(condition: str) -> str:
    """The option that a negation, `untied` or `!tied`, is of."""
    return re.sub("^(!|un)", "", condition)
