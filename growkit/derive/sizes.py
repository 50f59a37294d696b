"""Which sizes a model's parameters follow: found by doubling one size of the configuration at a
time.

Models are built on the meta device, so that only names and shapes are made. A dimension becomes a
polynomial of sizes: `{("kv", "head_dim"): 2, ("kv", "group", "head_dim"): 1}` is a fused query, key
and value. What no size explains is left to be measured in the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any

from growkit.derive.network import CONFIG_MAPPING, build, file_state, make_config, runs

Shapes = dict[str, tuple[int, ...]]
Terms = dict[tuple[str, ...], int]

# The canonical axes and what configurations call their sizes, first come first taken.
HIDDEN = ("hidden_size", "d_model", "n_embd")
HEADS = (
    "decoder_attention_heads",
    "num_decoder_attention_heads",
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
)
LAYERS = (
    "decoder_layers",
    "num_decoder_layers",
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_blocks",
)
INTERMEDIATE = (
    "intermediate_size",
    "decoder_ffn_dim",
    "n_inner",
    "ffn_dim",
    "dim_ff",
    "dff",
    "ffn_hidden_size",
)  # fmt: skip
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length")
# Fields of whole numbers that are not sizes.
NO_SIZES = re.compile(
    r".*(token_id|token_index|_idx|window|chunk_size|topk|top_k|per_tok(en)?|seed|period|offset|interval"
    r"|first_k_dense_replace|.*multiple_of.*|.*layer.*)"
)


@dataclass(frozen=True)
class Size:
    """One size: the axis it measures, the fields that double with it, the path that states it."""

    axis: str
    grows: tuple[str, ...]
    path: str


@dataclass
class Probe:
    """Shapes of a type's parameters, as files hold them, at the sizes asked for.

    unsaved: second names of tied parameters, which no file holds.
    """

    kind: str
    fields: dict[str, Any]
    unsaved: frozenset[str] = frozenset()
    known: dict[tuple[tuple[str, int], ...], Shapes | None] = field(default_factory=dict)

    @property
    def head_dim(self) -> str:
        """The field of the size of heads."""
        aliases: dict[str, str] = getattr(CONFIG_MAPPING[self.kind], "attribute_map", {})
        return aliases.get("head_dim", "head_dim")

    @cached_property
    def stated(self) -> dict[str, Any]:
        """All fields of the tiny configuration."""
        stated: dict[str, Any] = make_config(self.kind, self.fields).to_dict()
        return stated

    def name(self, names: Iterable[str]) -> str | None:
        """The first of these fields that the configuration has."""
        return next((name for name in names if isinstance(self.stated.get(name), int)), None)

    def shapes(self, factors: Mapping[str, int] = {}) -> Shapes | None:  # noqa: B006
        """Shapes by name with some fields multiplied; None where no such model can be built."""
        key = tuple(sorted(factors.items()))
        if key not in self.known:
            self.known[key] = self._shapes(factors)
        return self.known[key]

    def _shapes(self, factors: Mapping[str, int]) -> Shapes | None:
        try:
            changed = {name: self.value(name) * factor for name, factor in factors.items()}
        except KeyError:
            return None
        shapes = shapes_of(self.kind, self.fields | changed)
        if shapes is None:
            return None
        return {name: shape for name, shape in shapes.items() if name not in self.unsaved}

    def value(self, name: str) -> int:
        """A field's value; head_dim is hidden size over heads where no field says it."""
        if name in self.fields:
            return int(self.fields[name])
        if name in self.stated and self.stated[name] is not None:
            return int(self.stated[name])
        return int(self.stated[str(self.name(HIDDEN))]) // int(self.stated[str(self.name(HEADS))])

    def grown(self, sizes: Iterable[Size]) -> Shapes | None:
        """Shapes with some sizes doubled together."""
        factors: dict[str, int] = {}
        for size in sizes:
            for name in size.grows:
                factors[name] = factors.get(name, 1) * 2
        return self.shapes(factors)

    @cached_property
    def equal(self) -> dict[str, str]:
        """Fields that have the hidden size unless stated, and with another one change which
        parameters there are: a projection comes between the two.
        """
        hidden, heads = self.name(HIDDEN), self.name(HEADS)
        if hidden is None:
            return {}
        factors = {name: 2 for name in (hidden, heads) if name is not None}
        plain = CONFIG_MAPPING[self.kind]()
        found = {}
        for name, value in self.stated.items():
            by_itself = getattr(plain, name, None) in (None, getattr(plain, hidden))
            if name in factors or value != self.value(hidden) or not by_itself:
                continue
            alone, both = self.shapes(factors), self.shapes({**factors, name: 2})
            if alone and both and alone.keys() != self.base.keys() == both.keys():
                found[name] = hidden
        return found

    @cached_property
    def base(self) -> Shapes:
        shapes = self.shapes()
        assert shapes is not None
        return shapes


def make_probe(kind: str, fields: Mapping[str, Any]) -> Probe:
    """A probe of a type; head_dim is stated where the model reads it, though the class has no such
    field.
    """
    probe = Probe(kind, dict(fields))
    hidden, heads = probe.name(HIDDEN), probe.name(HEADS)
    if probe.name((probe.head_dim,)) or hidden is None or heads is None:
        return probe
    stated = Probe(kind, {**fields, "head_dim": probe.value("head_dim")})
    wider = stated.shapes({"head_dim": 2})
    reads = stated.shapes() == probe.shapes() and wider not in (None, probe.shapes())
    wide = stated.fields | {"head_dim": 2 * probe.value("head_dim")}
    return stated if reads and runs(make_config(kind, wide)) is None else probe


def shapes_of(kind: str, fields: Mapping[str, Any]) -> Shapes | None:
    """Names and shapes of a model's parameters in files; None where it cannot be built."""
    try:
        state = file_state(build(make_config(kind, fields), meta=True))
    except Exception:
        return None
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def find_sizes(probe: Probe) -> list[Size]:
    """Every size that changes a shape when it is doubled."""
    hidden, heads = probe.name(HIDDEN), probe.name(HEADS)
    kv = probe.name(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"))
    found = [Size("vocab", ("vocab_size",), "vocab_size")] if probe.name(("vocab_size",)) else []
    found += _find_heads(probe, hidden, heads, kv)
    taken = {name for size in found for name in size.grows}
    mlp = [name for name in INTERMEDIATE if name not in taken and _changes(probe, name)]
    found += [Size("mlp", (name,), name) for name in mlp[:1]]
    taken |= set(mlp[:1])
    for name, value in probe.stated.items():
        counts = isinstance(value, int) and not isinstance(value, bool) and value > 1
        if counts and name not in taken and not NO_SIZES.fullmatch(name) and _changes(probe, name):
            found.append(Size(_axis_name(name), (name,), name))
    return [size for size in found if probe.grown([size]) is not None]


def _axis_name(name: str) -> str:
    if name in POSITIONS:
        return "position"
    # Shared experts are one wider mlp.
    if re.search(r"(num|n_routed).*experts?$", name) and "shared" not in name:
        return "expert"
    return name


def _changes(probe: Probe, *names: str) -> bool:
    shapes = probe.shapes(dict.fromkeys(names, 2))
    return shapes is not None and shapes != probe.base


def _reads_kv(probe: Probe, heads: str, kv: str, follows: tuple[str, ...]) -> bool:
    """Whether a shape follows the number of key and value heads, or the model needs it anyway."""
    both = probe.grown([Size("", (heads, kv, *follows), "")])
    alone = probe.grown([Size("", (heads, *follows), "")])
    return both != alone or not runs_with(probe, _double(probe, heads, *follows))


def _double(probe: Probe, *names: str) -> dict[str, int]:
    return {name: 2 * probe.value(name) for name in names}


def runs_with(probe: Probe, changed: Mapping[str, Any]) -> bool:
    """Whether the model computes with some fields changed."""
    try:
        return runs(make_config(probe.kind, probe.fields | dict(changed))) is None
    except Exception:
        return False


def _grows(probe: Probe, *names: str) -> bool:
    """Whether some dimension is longer when these fields are doubled."""
    shapes = probe.shapes(dict.fromkeys(names, 2))
    if shapes is None:
        return False
    return any(
        length > before
        for name, shape in shapes.items()
        for length, before in zip(shape, probe.base.get(name, shape), strict=True)
    )


def _find_heads(probe: Probe, hidden: str | None, heads: str | None, kv: str | None) -> list[Size]:
    """embed, heads and head_dim: independent sizes, or embed = heads x head_dim."""
    if hidden is None:
        return []
    whole = (hidden, *probe.equal)
    if heads is None:
        return [Size("embed", whole, hidden)]
    both = (heads,) if kv is None else (heads, kv)
    coupled = not _grows(probe, *both)
    explicit = not coupled
    if not coupled and not runs_with(probe, _double(probe, *whole)):
        # The model wants embed = heads x head_dim, although all three are stated (Helium).
        coupled = runs_with(probe, _double(probe, *whole, *both))
    follows = whole if coupled else ()
    if kv is not None and not _reads_kv(probe, heads, kv, follows):
        kv = None
    head_dim = (*follows, probe.head_dim) if explicit else follows
    path = f"{hidden} / {heads}" if coupled else probe.head_dim
    found = [] if coupled else [Size("embed", whole, hidden)]
    if kv is None:
        found.append(Size("head", (heads, *follows), heads))
    else:
        found.append(Size("kv", (heads, kv, *follows), kv))
        found.append(Size("group", (heads, *follows), f"{heads} / {kv}"))
    if coupled or _changes(probe, probe.head_dim):
        found.append(Size("head_dim", head_dim, path))
    return found


def find_terms(name: str, place: int, probe: Probe, sizes: Mapping[str, Size]) -> Terms | None:
    """A dimension as a polynomial of sizes: {axes: factor}, () for a constant. None where it is
    none.

    name: the parameter's in files.
    """
    length = probe.base[name][place]
    follows = [
        axis for axis, size in sizes.items() if _length(probe, [size], name, place) != length
    ]
    # Dimensions of a head come after the heads.
    follows.sort(key=lambda axis: (axis.endswith("dim"), list(sizes).index(axis)))
    if len(follows) > 4:
        return None
    subsets = [s for n in range(len(follows) + 1) for s in combinations(follows, n)]
    lengths = {s: _length(probe, [sizes[axis] for axis in s], name, place) for s in subsets}
    if None in lengths.values():
        return None
    parts: dict[tuple[str, ...], int] = {}
    for subset in reversed(subsets):
        difference = sum(
            (-1) ** (len(subset) - len(each)) * (lengths[each] or 0)
            for each in subsets
            if set(each) <= set(subset)
        )
        parts[subset] = difference - sum(v for s, v in parts.items() if set(subset) < set(s))
    return _divide(parts, probe, sizes)


def _divide(
    parts: Mapping[tuple[str, ...], int], probe: Probe, sizes: Mapping[str, Size]
) -> Terms | None:
    terms: Terms = {}
    for axes, part in parts.items():
        unit = 1
        for axis in axes:
            unit *= size_of(axis, probe, sizes)
        if part % unit or part < 0:
            return None
        if part:
            terms[axes] = part // unit
    return terms


def size_of(axis: str, probe: Probe, sizes: Mapping[str, Size]) -> int:
    """The size of an axis in the tiny configuration."""
    whole, _, part = sizes[axis].path.partition(" / ")
    return probe.value(whole) // probe.value(part) if part else probe.value(whole)


def _length(probe: Probe, sizes: Iterable[Size], name: str, place: int) -> int | None:
    """A dimension's length with some sizes doubled. A name that is gone has its old length."""
    shapes = probe.grown(sizes)
    if shapes is None:
        return None
    shape = shapes.get(name, probe.base[name])
    return shape[place] if place < len(shape) else None
