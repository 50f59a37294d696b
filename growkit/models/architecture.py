"""One model: a size for every axis of its table, a value for every option.

What models of one kind have in common is in `growkit.models.family`. Writing config.json, resizing
and counting are the same code for every family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from growkit.errors import GrowkitError, UsageError
from growkit.models import counts
from growkit.models.computation import LAYER_TYPES
from growkit.models.fields import RATIO, Frozen
from growkit.models.gates import Gate, read_gate
from growkit.models.notation import Row
from growkit.models.rotary import keep_rotated, read_ropes, read_rotary, write_rotary
from growkit.models.scalars import compare_factors
from growkit.models.table import Table

if TYPE_CHECKING:
    from growkit.models.family import Family


@dataclass(frozen=True)
class Architecture:
    """One model: its family, the size of every axis of the table, and the value of every option.

    layers: the layers of each kind, where layers differ. facts: the values of the fields that only
    the family's computation reads. headless: whether the output head is left out, as in the files
    of a base model.
    """

    family: Family
    sizes: Mapping[str, int]
    options: Mapping[str, Any]
    layers: Mapping[str, tuple[int, ...]] = Frozen()
    facts: Mapping[str, Any] = Frozen()
    headless: bool = False

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
        """Endings of names of buffers in old files, which are left out: no model reads them now."""
        return self.family.buffers

    @property
    def coupled(self) -> bool:
        """Whether embed is heads x head_dim, so that one of them cannot change alone."""
        return self.family.coupled

    @cached_property
    def table(self) -> Table:
        """The table's rows that hold for this model's options."""
        selected = self.family.select_rows(self.options, self.headless)
        rows = self.family.settle_rows(selected.rows, self.layers, self.layer)
        return replace(selected, rows=rows, layers=self.layers)

    @property
    def gate(self) -> Gate | None:
        """How a mixture that is computed chooses its experts; None for any other model."""
        computation = self.family.computation
        if computation is None or not computation.experts:
            return None
        return read_gate(self.family, self.facts)

    @property
    def layer(self) -> int:
        """The number of layers; 0 for a model without the axis, as are all sizes below."""
        return self.sizes.get("layer", 0)

    @property
    def embed(self) -> int:
        """The width of the residual stream."""
        return self.sizes.get("embed", 0)

    @property
    def mlp(self) -> int:
        """The units of each mlp."""
        return self.sizes.get("mlp", 0)

    @property
    def vocab(self) -> int:
        """The rows of the embedding."""
        return self.sizes.get("vocab", 0)

    @property
    def head_dim(self) -> int:
        """The dimensions of each head."""
        return self.sizes.get("head_dim", 0)

    @property
    def head_count(self) -> int:
        """The number of query heads."""
        return self.sizes.get(self.heads, 0) * self.sizes.get("group", 1)

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return bool(self.options.get("tied", False))

    @property
    def context(self) -> int:
        """The longest sequence, in tokens; 0 for a model that does not state it."""
        return int(self.options.get("context", 0))

    @property
    def norm_eps(self) -> float:
        """What norms add to the variance; no unit."""
        return float(self.options["norm_eps"])

    @property
    def activation(self) -> str:
        """The mlp's activation function, by transformers' name."""
        return str(self.options["activation"])

    @property
    def initializer_range(self) -> float:
        """The standard deviation of new weights; no unit. transformers' usual one where the
        configuration states none.
        """
        return float(self.options.get("initializer_range", 0.02))

    @property
    def values(self) -> dict[str, Any]:
        """All sizes and options by name, as `Family.model` takes them."""
        sizes = {axis: self.sizes[axis] for axis in self.fields}
        options = {name: self.options[name] for name in self.family.options}
        kinds = {LAYER_TYPES: list(self.kinds)} if self.kinds else {}
        return {**sizes, **self.facts, **kinds, **options, "rope": dict(self.rope)}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of attention of each layer; empty where all layers are of one kind."""
        if self.family.computation is None or self.family.computation.windows != "list":
            return ()
        found = {n: kind for kind, layers in self.layers.items() for n in layers}
        return tuple(found[n] for n in range(self.layer))

    def number(self, name: str) -> float | None:
        """One of `computation.NUMBERS`; None where the model has none."""
        assert self.family.computation is not None
        value = self.facts.get(self.family.computation.numbers.get(name, ""))
        return None if value is None else float(value)

    @property
    def ropes(self) -> dict[str, Mapping[str, Any]]:
        """The rotary parameters by kind of layer, by "" where all have the same; none at all where
        positions are learned.
        """
        if self.family.computation is None or self.family.computation.positions:
            return {}
        if self.family.rotary:
            return {"": self.rope}
        return read_ropes(self.facts, self.family.computation.rotary_by_kind)

    @property
    def rope(self) -> Mapping[str, Any]:
        """The rotary parameters as transformers 5 states them."""
        rope: Mapping[str, Any] = self.options["rope"]
        return rope

    @property
    def rotary_base(self) -> float:
        """The base of the rotary frequencies; 0 for a model without rotary positions."""
        return float(self.rope.get("rope_theta", 0.0))

    @property
    def rotary_pct(self) -> float:
        """The part of each head that is rotated; 1 where a family rotates all of it."""
        if self.family.rotary is None:
            return 0.0
        if not self.family.rotary.part:
            return 1.0
        return float(self.rope["partial_rotary_factor"])

    @property
    def rotary(self) -> int:
        """How many dimensions of each head are rotated. transformers takes int(head_dim x part)."""
        return int(self.head_dim * self.rotary_pct)

    @property
    def parameters(self) -> int:
        """How many numbers the model holds, a tied embedding counted once."""
        return counts.count_numbers(self, self.table.rows)

    @property
    def active_parameters(self) -> int:
        """How many numbers a token passes; all, unless the trainer computes its experts."""
        return counts.count_active(self, self.table.rows)

    def flops_per_token(self, context: int | None = None) -> float:
        """Training FLOPs a token; see `growkit.models.counts`."""
        return counts.count_flops(self, context or self.context)

    def scalar_growth(self, row: Row, grown: Architecture) -> float:
        """f(old) / f(new) of the factor f that the model applies to a parameter; 1 where there is
        none.

        Source: Gemma multiplies its embedding by sqrt(hidden_size). The ratio is exact for float64
        and float32. A model in bfloat16 rounds each factor to 8 bits when it runs, so there it is
        off by up to 2^-8 = 3.9e-3, and by nothing where the size grows by a power of 4.
        """
        scalars = self.family.scalars
        text = scalars.get(" ".join((row.name, *row.conditions))) or scalars.get(row.name)
        if text is None:
            return 1.0
        return compare_factors(text, row.name, self.sizes, grown.sizes)

    @property
    def measured(self) -> bool:
        """Whether something about the model is to be found in its files: see `measure`."""
        rows = self.family.rows
        axes = {name for row in rows for name in row.axes}
        axes |= {axis.name for row in rows for axis in row.stacked}
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
        return replace(self, sizes=Frozen(sizes), layers=Frozen({**self.layers, **kinds}))

    def map_layers(self, index: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        """`layers` of a model each of whose layers copies an old one: it is of its kind."""
        kinds = {kind: frozenset(of_kind) for kind, of_kind in self.layers.items()}
        found = {
            kind: tuple(new for new, old in enumerate(index) if old in of_kind)
            for kind, of_kind in kinds.items()
        }
        return Frozen(found)

    def resize(self, sizes: Mapping[str, int], norm_eps: float | None = None) -> Architecture:
        """This model at other sizes; rotated dimensions stay as many, kinds of layers are spread.

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
            # As many dimensions stay rotated, so the part of a longer head is smaller.
            part = keep_rotated(self.rotary, resized["head_dim"])
            options["rope"] = {**self.rope, "partial_rotary_factor": part}
        layers = self.layers
        if layers and resized["layer"] != self.layer:
            count = resized["layer"]
            layers = self.map_layers([new * self.layer // count for new in range(count)])
        grown = replace(self, sizes=Frozen(resized), options=Frozen(options), layers=layers)
        self._check_whole_heads(grown)
        return grown

    def change(self, **values: Any) -> Architecture:
        """This model with other sizes or options, by the names that `Family.model` takes.

        What only the files say stays: sizes without a field, the kinds of layers, a missing head.
        Raises GrowkitError for another number of layers where layers are of kinds: which kind a new
        layer has, only a map says (see `follow_map`).
        """
        alike = self.family.computation is not None and bool(self.family.computation.kinds)
        if self.layers and not alike and values.get("layer", self.layer) != self.layer:
            raise GrowkitError(
                f"{self.family.title} layers are of several kinds ({', '.join(self.layers)}): "
                f"their number changes by a map of the layers, as plan_depth makes, and not alone"
            )
        mine = self.values
        if self.coupled:
            del mine["head_dim"]
        if values.get("layer", self.layer) != self.layer:
            mine.pop(LAYER_TYPES, None)
        if "rotary_base" in values:
            mine["rope"]["rope_theta"] = values.pop("rotary_base")
        if "rotary_pct" in values:
            mine["rope"]["partial_rotary_factor"] = values.pop("rotary_pct")
        changed = self.family.model(**{**mine, **values})
        sizes = Frozen({**self.sizes, **changed.sizes})
        layers = changed.layers if alike else self.layers
        return replace(changed, sizes=sizes, layers=layers, headless=self.headless)

    def _check_frozen(self, sizes: Mapping[str, int]) -> None:
        for axis, reason in self.family.fixed.items():
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
        written: dict[str, Any] = dict(base or {})
        if "model_type" not in written:
            written = {"architectures": [family.class_name], **family.new_fields, **written}
        written["model_type"] = family.kind
        for axis, path in family.fields.items():
            if "/" not in path:
                written[path] = self.sizes[axis]
        also = family.experts.get("also")
        if also in written:
            written[also] = self.sizes["expert"]
        for axis, path in family.fields.items():
            ratio = RATIO.fullmatch(path)
            if ratio:
                written[ratio[1]] = self.sizes[axis] * written[ratio[2]]
        written |= {name: written[path] for name, path in family.equal.items()}
        for name, path in family.options.items():
            written[path] = self.options[name]
        if family.rotary:
            written |= write_rotary(self.rope, family.rotary, base or {})
        written |= self.facts
        if self.kinds and (LAYER_TYPES in written or family.layer_kinds(written) != [*self.kinds]):
            written[LAYER_TYPES] = list(self.kinds)
        return written

    def update(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json of a model of this family, with the fields changed that say something else.

        Fields that say what this model is already, and fields left out whose defaults do, stay as
        they are.
        """
        written = dict(base)
        # What every field would be; below, only those are written that do not say so already.
        complete = self.config(base)
        stated = [*self._size_fields(), *self.family.equal, *self.family.options.values()]
        # A size written changes the default of another that follows it: head_dim from the heads.
        for _ in range(2):
            fields = self.family.fields_of(written)
            for path in stated:
                if not fields.states(path, complete[path]):
                    written[path] = complete[path]
                    fields = self.family.fields_of(written)
        rotary = self.family.rotary
        if rotary:
            fields = self.family.fields_of(written)
            if read_rotary(fields.given, rotary, fields) != self.rope:
                written |= write_rotary(self.rope, rotary, base)
        return written

    def _size_fields(self) -> list[str]:
        """The configuration fields of all sizes."""
        return list(dict.fromkeys(RATIO.sub(r"\1", path) for path in self.fields.values()))
