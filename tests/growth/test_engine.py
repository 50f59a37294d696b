"""One engine grows every row that the notation can say: whole, in blocks of any size, in numpy, in
jax, under jit.

Random tables (axes in any order, fused, summed, stacked, read or written, with offsets and norms of
any axes) and random plans must give, bit for bit, the same numbers every way, and those that the
rules give when they are written out a second time, in `expected`. Every check has siblings that
break the engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from growkit.checkpoint.tensor import Tensor
from growkit.errors import UsageError
from growkit.growth import multipliers, padding, rule, separation, shares
from growkit.growth.axes import AxisMap, insert, make_map, tile
from growkit.growth.plan import MOMENT_OPTIONS, Plan, build_plan
from growkit.growth.rule import PartGrowth, UnitGrowth, find_source, grow_array, moment_fate
from growkit.growth.separation import Separation
from growkit.models.architecture import Architecture
from growkit.models.family import Family
from growkit.models.notation import ATTENTION, Row, parse_table
from growkit.models.rotary import RotaryFields, keep_rotated
from growkit.surgery import blocks

ROTATED = 2
SPREAD = 0.02
SIZES = {"embed": 4, "head": 2, "head_dim": 4, "mlp": 3, "kv": 2, "group": 2}
STACKED = {"layer": 2, "expert": 2}
DTYPES = {
    "float32": np.float32,
    "float64": np.float64,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
BLOCKS = (1, 40, 150, 1000)


@dataclass(frozen=True)
class Case:
    """A row of a table, and a growth of it.

    maps: axis -> (index, shares). query_norm: whether the model has a norm of queries, which shares
    eps. scalar: what the model multiplies the row by. position: the new unit of the stacked axes.
    stride: how many rows of the source are stored as one.
    """

    line: str
    maps: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = field(default_factory=dict)
    pads: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    moment: int = 0
    moments: str = "map"
    noise: float = 0.0
    noise_unit: str = separation.RANGE
    norm: str = "layer"
    query_norm: bool = False
    scalar: str | None = None
    position: tuple[int, ...] = ()
    dtype: str = "float32"
    stride: int = 1

    @property
    def row(self) -> Row:
        return parse_table(self.line)[0]

    def model(self) -> Architecture:
        """A model of a family of its own, whose table is the row."""
        sizes = SIZES | STACKED | self.sizes
        norm = "q_norm head_dim ones norm" if self.query_norm else ""
        family = Family(
            kind="test",
            class_name="Test",
            title="Test",
            text=f"{self.line}\n{norm}",
            prefix="",
            fields={axis: axis for axis in sizes},
            defaults={"tied": False, "context": 8, "norm_eps": 1e-5, "range": SPREAD, "base": 1e4},
            options={
                "tied": "tied",
                "context": "context",
                "norm_eps": "norm_eps",
                "initializer_range": "range",
            },
            norm=self.norm,
            heads="head",
            rotary=RotaryFields(base="base", part="part"),
            constants={"qkv": 3},
            scalars={self.row.name: self.scalar} if self.scalar else {},
            whole_heads=False,
        )
        return family.model(**sizes, rotary_pct=keep_rotated(ROTATED, sizes["head_dim"]))

    def plan(self) -> Plan:
        model = self.model()
        maps = {
            axis: make_map(index, model.sizes[axis], share)
            for axis, (index, share) in self.maps.items()
        }
        return build_plan(
            "test",
            "test",
            model,
            maps,
            self.pads,
            moments=self.moments,
            noise=self.noise,
            noise_unit=self.noise_unit,
            seed=7,
        )

    def array(self) -> np.ndarray:
        """The source, of numbers that tell places apart; positive for a second moment."""
        row, sizes = self.row, self.model().sizes
        numbers = np.random.default_rng(0).normal(size=row.shape(sizes))
        if self.moment == 2:
            numbers = np.square(numbers)
        return numbers.astype(DTYPES[self.dtype])


# The rules a second time, by docs/derivation.md and not by the engine: an array an axis, float64.


def expected(case: Case) -> np.ndarray:
    """What growth makes of a case without noise, NaN where the fill is random."""
    plan, row = case.plan(), case.row
    shape = row.shape(plan.grown.sizes)
    if case.moments == "first":
        # Written out a second time: the engine's own fate is not asked.
        stacked = zip(row.stacked, case.position, strict=True)
        firsts = [
            first_copies(case, axis.name)[unit] for axis, unit in stacked if axis.name in case.maps
        ]
        if case.moment and not all(firsts):
            return np.zeros(shape)
    elif moment_fate(plan, row, case.moment, case.position) == "zero":
        return np.zeros(shape)
    array = case.array().astype(np.float64)
    if row.summed is None:
        return expected_part(case, plan, row.parts[0], array).reshape(shape)
    lengths = [part.shape(plan.model.sizes)[row.summed] for part in row.parts]
    pieces = np.split(array, np.cumsum(lengths)[:-1], axis=row.summed)
    grown = [
        expected_part(case, plan, part, piece).reshape(part.shape(plan.grown.sizes))
        for part, piece in zip(row.parts, pieces, strict=True)
    ]
    return np.concatenate(grown, axis=row.summed)


def expected_part(case, plan, part, array):
    """One block of a parameter, unfused."""
    array = array.reshape(part.unfused(plan.model.sizes))
    by_rule = case.moment == 0 or case.moments != "copy"
    factor = np.ones([1] * array.ndim)
    for place, axis in enumerate(part.axes):
        if axis.name in plan.maps:
            axis_map = plan.maps[axis.name]
            array = array[(slice(None),) * place + (axis_map.index,)]
            factor = factor * beside(share_of(case, axis, axis_map.share), place, array.ndim)
    for axis, unit in zip(case.row.stacked, case.position, strict=True):
        if axis.name in plan.maps and (axis.name != "layer" or case.moment == 0):
            factor = factor * share_of(case, axis, plan.maps[axis.name].share)[unit]
    power = {0: 1, 1: -1, 2: -2}[case.moment]
    before, after = plan.model.sizes, plan.grown.sizes
    if case.scalar:
        ratio = math.sqrt(before["embed"] / after["embed"])
        factor = factor * (1 / ratio if case.scalar.startswith("1/") else ratio) ** power
    shrunk = math.sqrt(before["embed"] / after["embed"]) if "embed" in case.pads else 1.0
    offset = case.row.offset if case.moment == 0 else 0.0
    grown = []
    for role, at in kinds(part):
        # Queries and keys before norms that share eps, which padding of embed multiplies.
        normed = case.query_norm or case.row.role == "norm" and "embed" not in case.row.averages
        own = shrunk**power if normed and role in ("query", "key") else 1.0
        piece = array if at is None else array.take([at], part.names.index("qkv"))
        scale = factor * own if by_rule else 1.0
        piece = scale * (offset + piece) - offset
        for axis in ("embed", "head_dim"):
            for place, name in enumerate(part.names):
                if axis in case.pads and name == axis:
                    piece = expected_padding(case, part, role, place, piece, by_rule)
        grown.append(piece)
    return grown[0] if len(grown) == 1 else np.concatenate(grown, part.names.index("qkv"))


def first_copies(case, axis):
    """Whether each new unit is the first of its source's copies that carries anything."""
    index, share = case.maps[axis]
    carrying = [n for n, part in enumerate(share) if part != 0.0]
    return [
        n == min((m for m in carrying if index[m] == index[n]), default=-1)
        for n in range(len(index))
    ]


def kinds(part):
    """(role, place on the axis qkv) of the slices that padding treats by themselves."""
    if part.role != "qkv":
        return [(part.role, None)]
    return [("query", 0), ("key", 1), ("value", 2)]


def share_of(case, axis, share):
    """Values: where the axis is read; mu: where it is written; nu: the square of mu's.

    Zero for other copies than the first where moments are kept for that alone.
    """
    kept = np.ones_like(share)
    if case.moment and case.moments == "first":
        kept = np.array(first_copies(case, axis.name), float)
    if axis.read != (case.moment == 0):
        return kept
    return kept * share ** {0: 1, 1: 1, 2: 2}[case.moment]


def beside(vector, place, axes):
    return vector.reshape([-1 if at == place else 1 for at in range(axes)])


def expected_padding(case, part, role, place, array, by_rule):
    axis, reads = part.axes[place].name, part.axes[place].read
    growth = case.pads[axis] / (SIZES | case.sizes)[axis]
    row = case.row
    scale, fill = 1.0, "free"
    if axis == "embed" and row.role == "norm":
        scale = {0: growth**-0.5, 1: growth**0.5, 2: growth}[case.moment]
        fill = scale - row.offset
    elif axis == "embed" and row.role == "bias" and not row.writes_stream:
        fill = 0.0
    elif axis == "embed" and not reads:
        fill = "mean" if case.norm == "layer" else 0.0
    if axis == "head_dim":
        if role == "query":
            scale = {0: growth**0.5, 1: growth**-0.5, 2: 1 / growth}[case.moment]
        if reads or role == "key":
            fill = 0.0
    if case.moment:
        fill = {1: 0.0, 2: "mean"}[case.moment]
    scale = scale if by_rule else 1.0
    offset = row.offset if row.role == "norm" and axis == "embed" and case.moment == 0 else 0.0
    old = scale * (offset + array) - offset
    new = {"free": math.nan, "mean": old.mean(place, keepdims=True)}.get(fill, fill)
    shape = list(old.shape)
    shape[place] = case.pads[axis] - old.shape[place]
    return np.concatenate([old, np.broadcast_to(new, shape)], place)


# The checks


def digits(dtype: str) -> float:
    return {"float64": 1e-12, "float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}[dtype]


def near(ours: np.ndarray, theirs: np.ndarray, bound: float) -> bool:
    """Whether numbers are the same but for the last digits of the largest."""
    limit = bound * max(1.0, float(np.abs(theirs).max(initial=0.0)))
    return bool((np.abs(ours - theirs) <= limit).all())


def assert_by_the_rules(case: Case, grown: np.ndarray) -> None:
    """That numbers are those of `expected`, and random fills what random fills are."""
    if case.noise and case.moment == 0:
        return
    wanted, found = expected(case), grown.astype(np.float64)
    free = np.isnan(wanted)
    assert near(found[~free], wanted[~free], digits(case.dtype)), (found, wanted)
    # A uniform distribution ends at sqrt(3) of its standard deviation; queries' may be scaled up.
    assert (np.abs(found[free]) < 3 * math.sqrt(3) * SPREAD).all()
    assert free.sum() < 4 or len(np.unique(found[free])) > 1


def tensor_of(array: np.ndarray, stride: int) -> Tensor:
    def rows(start: int, stop: int) -> np.ndarray:
        if not array.ndim:
            return array
        assert 0 <= start < stop <= len(array)
        return array[start:stop].copy()

    return Tensor(array.shape, array.dtype, rows, stride=stride)


def check_blocks(case: Case) -> None:
    """The whole by the rules, and blocks of several sizes the whole."""
    plan, row, array = case.plan(), case.row, case.array()
    assert array.shape == row.shape(plan.model.sizes)
    whole = grow_array(array, row, plan, case.moment, case.position)
    assert whole.dtype == array.dtype and whole.shape == row.shape(plan.grown.sizes)
    assert_by_the_rules(case, whole)
    if moment_fate(plan, row, case.moment, case.position) == "zero":
        return
    tensor = tensor_of(array, case.stride)
    for size in BLOCKS:
        with mock.patch.object(blocks, "BLOCK", size):
            recipe = blocks.grown_recipe(tensor, row, plan, case.moment, case.position)
            joined = recipe.make_array()
            written = sum(piece.nbytes for _, piece in recipe.pieces())
        assert joined.dtype == whole.dtype and joined.tobytes() == whole.tobytes(), size
        assert written == whole.nbytes, "every byte once"


def check_jax(case: Case, *ways) -> None:
    """numpy's bits in jax, each way; means, and what follows from them, to the last digits."""
    plan, row, array = case.plan(), case.row, case.array()
    whole = grow_array(array, row, plan, case.moment, case.position)
    with jax.enable_x64(True):
        for way in ways:
            grown = way(
                lambda array: grow_array(array, row, plan, case.moment, case.position, jnp)
            )(jnp.asarray(array))
            assert isinstance(grown, jax.Array)
            ours = np.asarray(grown)
            assert ours.dtype == whole.dtype and ours.shape == whole.shape
            means = case.pads and (case.moment == 2 or case.norm == "layer")
            # A measured size is rounded to 8 bits, and may then differ by one of them.
            measured = case.noise and case.noise_unit == separation.RMS
            if means or measured:
                ours, theirs = ours.astype(np.float64), whole.astype(np.float64)
                bound = digits(case.dtype) + (2**-7 if measured else 0.0)
                assert near(ours, theirs, bound), (ours, theirs)
            else:
                assert ours.tobytes() == whole.tobytes(), (ours, whole)


# Cases that are written out

UNEVEN_HEADS = {"head": ((0, 1, 1, 0), (0.25, 0.3, 0.7, 0.75))}
UNEVEN_MLP = {"mlp": ((0, 1, 2, 2, 0), (0.4, 1.0, 0.5, 0.5, 0.6))}
WIDE = {"embed": ((0, 1, 2, 3) * 2, (0.5,) * 8)}
DEEP = {"layer": ((0, 0, 1), (1.0, 0.0, 1.0))}
MORE_EXPERTS = {"expert": ((0, 1, 0), (0.3, 1.0, 0.7))}
EXPERT = "m.{layer}.experts.{/expert}.w2  embed /mlp  normal  matrix"
QKV = "m.qkv  (head qkv head_dim) /embed  normal  qkv"
# GPT-2 stores queries, keys and values so.
GPT2 = Case("h.attn.c_attn.weight  /embed (qkv head head_dim)  normal  qkv", pads={"head_dim": 6})
CASES = {
    "gpt2": GPT2,
    "gpt2, both padded": replace(GPT2, pads={"head_dim": 6, "embed": 7}),
    "gpt2, nu": replace(GPT2, moment=2, maps=UNEVEN_HEADS),
    "uneven heads": Case(QKV, maps={**UNEVEN_HEADS, **WIDE}),
    "uneven heads, noise": Case(QKV, maps={**UNEVEN_HEADS, **WIDE}, noise=0.4),
    "uneven heads, noise of its size": Case(
        QKV, maps={**UNEVEN_HEADS, **WIDE}, noise=0.4, noise_unit=separation.RMS
    ),
    "a sum, noise of its size": Case(
        "m.qkv  (mlp | kv head) /embed  normal  matrix",
        maps={**UNEVEN_HEADS, **WIDE},
        noise=0.4,
        noise_unit=separation.RMS,
        dtype="bfloat16",
    ),
    "heads, head_dim padded": Case(QKV, maps=UNEVEN_HEADS, pads={"head_dim": 6, "embed": 7}),
    "kinds first, head_dim in another dimension": Case(
        "m.qkv  (qkv head) head_dim /embed  normal  qkv", pads={"head_dim": 5}
    ),
    "head_dim before kinds": Case(
        "m.qkv  (head_dim qkv head) /embed  normal  qkv", pads={"head_dim": 5}
    ),
    "a sum": Case("m.gate_up  (mlp | mlp) /embed  normal  matrix", maps={**UNEVEN_MLP, **WIDE}),
    "a sum of another dimension": Case(
        "m.gate_up  /embed (mlp | mlp)  normal  matrix", maps=UNEVEN_MLP
    ),
    "a sum between dimensions": Case(
        "m.gate_up  embed (mlp | mlp) /head  normal  matrix", maps=UNEVEN_HEADS
    ),
    "queries, keys and values in a row": Case(
        "m.qkv  (head head_dim | kv head_dim | kv head_dim) /embed  normal  qkv",
        maps={**UNEVEN_HEADS, "kv": ((1, 0, 1), (0.3, 1.0, 0.7))},
        pads={"head_dim": 7, "embed": 6},
    ),
    "queries, keys and values beside embed": Case(
        "m.qkv  /embed (head head_dim | kv head_dim | kv head_dim)  normal  qkv",
        maps={**UNEVEN_HEADS, **WIDE},
        pads={"head_dim": 7},
        noise=0.4,
    ),
    "both padded, head_dim first": Case(
        "m.k  head_dim /embed  normal  key", pads={"embed": 6, "head_dim": 6}
    ),
    "the mean along one of two axes": Case(
        "m.w  (embed mlp) /head  normal  matrix", pads={"embed": 7}
    ),
    "the mean of a moment": Case(
        "m.w  (embed mlp) head  normal  matrix", pads={"embed": 7}, moment=2
    ),
    "new columns": Case("m.w  mlp /embed  normal  matrix", pads={"embed": 7}),
    "a square": Case("m.w  embed /embed  normal  matrix", pads={"embed": 7}),
    "an offset, twice scaled": Case(
        "m.norm  (mlp /head) embed  1+zeros  norm",
        maps=UNEVEN_HEADS,
        pads={"embed": 7},
        norm="rms",
    ),
    "a query before its norm, twice scaled": Case(
        "m.q  (mlp head_dim) head  normal  query",
        pads={"embed": 7, "head_dim": 7},
        query_norm=True,
        norm="rms",
    ),
    "fused before norms": Case(QKV, pads={"embed": 7}, query_norm=True, norm="rms"),
    "mu of what is written": Case("m.w  mlp /embed  normal  matrix", maps=UNEVEN_MLP, moment=1),
    "nu of what is written": Case("m.w  mlp /embed  normal  matrix", maps=UNEVEN_MLP, moment=2),
    "stacked twice": Case(EXPERT, maps={**DEEP, **MORE_EXPERTS, **WIDE}, position=(2, 2)),
    "stacked twice, mu": Case(
        "m.{/layer}.experts.{expert}.w2  embed /mlp  normal  matrix",
        maps={**DEEP, **MORE_EXPERTS},
        position=(2, 2),
        moment=1,
    ),
    "a copied layer that reads": Case(
        "m.{/layer}.w  embed /mlp  normal  matrix", maps=DEEP, position=(1,)
    ),
    "nu of copied layers": Case(
        "m.{layer}.w  embed /mlp  normal  matrix",
        maps={"layer": ((0, 0, 1), (0.5, 0.5, 1.0))},
        position=(1,),
        moment=2,
    ),
    "multiplied by a size": Case(
        "m.w  mlp embed  normal  embedding", maps=WIDE, scalar="sqrt(embed)"
    ),
    "moments as they are, padded": Case(
        QKV, pads={"head_dim": 6, "embed": 7}, moment=2, moments="copy"
    ),
    "first copies, mu": Case(
        QKV, maps={**UNEVEN_HEADS, **WIDE}, pads={"head_dim": 6}, moment=1, moments="first"
    ),
    "first copies, nu of a sum": Case(
        "m.gate_up  (mlp | mlp) /embed  normal  matrix",
        maps={**UNEVEN_MLP, **WIDE},
        moment=2,
        moments="first",
    ),
    "first copies of layers": Case(
        "m.{layer}.w  embed /mlp  normal  matrix",
        maps={"layer": ((0, 0, 1), (0.0, 1.0, 0.5)), **UNEVEN_MLP},
        position=(1,),
        moment=1,
        moments="first",
    ),
    "another copy of a layer": Case(
        "m.{layer}.w  embed /mlp  normal  matrix",
        maps={"layer": ((0, 0, 1), (1.0, 1.0, 1.0))},
        position=(1,),
        moment=2,
        moments="first",
    ),
    "a number": Case("m.{/layer}.scale  ()  ones  matrix", maps=DEEP, position=(1,)),
    "rows stored as one": Case("m.w  (mlp head) /embed  normal  matrix", maps=UNEVEN_MLP, stride=4),
    "bfloat16": Case(QKV, maps=UNEVEN_HEADS, pads={"embed": 7, "head_dim": 6}, dtype="bfloat16"),
}


def test_gpt2_grows_its_heads_kind_by_kind():
    plan, row, array = GPT2.plan(), GPT2.row, GPT2.array()
    grown = grow_array(array, row, plan)
    old = array.reshape(4, 3, 2, 4)
    queries, keys, values = np.moveaxis(grown.reshape(4, 3, 2, 6), 1, 0)
    assert np.array_equal(queries[..., :4], old[:, 0] * np.float32(math.sqrt(6 / 4)))
    assert np.allclose(queries[..., :4] / old[:, 0], 1.2247, atol=1e-4)
    assert np.array_equal(keys[..., :4], old[:, 1]) and (keys[..., 4:] == 0).all()
    assert np.array_equal(values[..., :4], old[:, 2])
    assert (queries[..., 4:] != 0).all() and (values[..., 4:] != 0).all()


@pytest.mark.parametrize("name", CASES)
def test_a_case_grows_by_the_rules_and_in_blocks(name):
    check_blocks(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_a_case_grows_under_jit_to_the_same_bits(name):
    check_jax(CASES[name], jax.jit)


@pytest.mark.parametrize("name", ["gpt2, both padded", "uneven heads, noise", "stacked twice"])
def test_jax_gives_the_same_bits_one_operation_at_a_time(name):
    check_jax(CASES[name], lambda grow: grow)


# The engine broken on purpose


def forgetting_what_was_seen(call):
    def measure(self, array, *xp):
        for growth in self.growths:
            if growth.separation:
                growth.separation.squares = separation.SquareSum()
        return call(self, array, *xp)

    return measure


def one_role_for_all_kinds(call):
    """GPT-2's queries, keys and values padded as one matrix."""
    return lambda self, array, place, units, xp: self._extend_as(
        array, place, "matrix", "head_dim", int(units[0]), xp
    )


def kinds_numbered_together(call):
    """The fills of queries, keys and values numbered by the unit and not by the head."""

    def extend(self, array, place, units, xp):
        kind = self.part.names.index("qkv")
        if kind >= self.lead:
            return call(self, array, place, units, xp)
        at = np.unravel_index(int(units[0]), self.copied[: self.lead])
        role = ATTENTION[int(at[kind])]
        return self._extend_as(array, place, role, f"head_dim {role}", int(units[0]), xp)

    return extend


def of_first_unit(call):
    return lambda self, units, *xp: call(self, units[:1], *xp)


def from_first_unit(call):
    return lambda self, units, *xp: call(self, units - units[0], *xp)


def begun_anew(call):
    return lambda self, first, *xp: call(self, 0, *xp)


def forgetting_earlier_blocks(call):
    def pad(self, array, xp):
        self.sum = None
        return call(self, array, xp)

    return pad


def without_empty_rest(call):
    """Units without the dimension that their empty rest of the first dimension is."""

    def store(self, array):
        stored = call(self, array)
        return stored if self.lead < len(self.part.dimensions[0]) else stored[:, 0]

    return store


def whole_at_once(call):
    """All source units as one block."""
    return lambda self: iter([(0, self.units)])


def without_offset(call):
    return lambda wide, scale, offset, xp=np: call(wide, scale, 0.0, xp)


def mu_for_nu(call):
    return lambda axes, maps, moment: call(axes, maps, min(moment, 1))


def read_for_written(call):
    def scale(axes, maps, moment):
        return call(tuple(replace(axis, read=not axis.read) for axis in axes), maps, moment)

    return scale


def layers_as_others(call):
    """Shares of layers for moments too."""

    def share(row, maps, moment, position):
        renamed = tuple(replace(axis, name=f"{axis.name}s") for axis in row.stacked)
        maps = {f"{axis}s": axis_map for axis, axis_map in maps.items()}
        return call(replace(row, stacked=renamed), maps, moment, position)

    return share


def last_copies(found):
    """The last copy of each unit for the first."""

    def added(self):
        turned = make_map(self.index[::-1], self.source, self.share[::-1])
        return found.func(turned)[::-1]

    return property(added)


def scaled_alone(call):
    """Other copies keep their moments too."""
    return lambda axes, maps, scale: scale


def all_kept(call):
    return lambda plan, row, position: False


def always_one(call):
    return lambda *arguments: 1.0


# What is broken, where, and the cases that show it.
BROKEN = {
    "kinds not split": (
        PartGrowth,
        "_extend_heads",
        one_role_for_all_kinds,
        ["gpt2", "gpt2, nu", "heads, head_dim padded"],
    ),
    "kinds numbered together": (
        PartGrowth,
        "_extend_heads",
        kinds_numbered_together,
        ["heads, head_dim padded"],
    ),
    "kinds mixed in a block": (
        blocks.Blocks,
        "_cut_source",
        whole_at_once,
        ["heads, head_dim padded"],
    ),
    "the first unit's factor for all": (
        PartGrowth,
        "factor_at",
        of_first_unit,
        ["mu of what is written", "nu of what is written"],
    ),
    "factors counted from each block": (
        PartGrowth,
        "factor_at",
        from_first_unit,
        ["mu of what is written"],
    ),
    "noise numbered anew in each block": (
        Separation,
        "_numbers",
        from_first_unit,
        ["uneven heads, noise"],
    ),
    "the size of the last block's numbers": (
        UnitGrowth,
        "measure",
        forgetting_what_was_seen,
        ["uneven heads, noise of its size", "a sum, noise of its size"],
    ),
    "fills numbered anew in each block": (
        PartGrowth,
        "_random_from",
        begun_anew,
        ["new columns"],
    ),
    "the mean of the last block alone": (
        PartGrowth,
        "_pad_outer",
        forgetting_earlier_blocks,
        ["the mean along one of two axes"],
    ),
    "blocks joined along another dimension": (
        PartGrowth,
        "_merge_dimensions",
        without_empty_rest,
        ["a sum between dimensions"],
    ),
    "no offset": (
        padding,
        "scale_with_offset",
        without_offset,
        ["an offset, twice scaled"],
    ),
    "mu's rule for nu": (
        shares,
        "share_scale",
        mu_for_nu,
        ["nu of what is written"],
    ),
    "read for written": (
        shares,
        "share_scale",
        read_for_written,
        ["uneven heads", "mu of what is written", "a sum"],
    ),
    "shares of layers for moments": (
        shares,
        "stacked_share",
        layers_as_others,
        ["nu of copied layers"],
    ),
    "no shares of stacked axes": (
        shares,
        "stacked_share",
        always_one,
        ["stacked twice", "stacked twice, mu", "a copied layer that reads"],
    ),
    "the last copy for the first": (
        AxisMap,
        "added",
        last_copies,
        ["first copies, mu", "first copies, nu of a sum", "another copy of a layer"],
    ),
    "moments of all copies": (
        rule,
        "keep_first",
        scaled_alone,
        ["first copies, mu", "first copies, nu of a sum", "first copies of layers"],
    ),
    "moments of all layers": (
        rule,
        "is_added",
        all_kept,
        ["another copy of a layer"],
    ),
    "queries not scaled for their norm": (
        shares,
        "_eps_scale",
        always_one,
        ["fused before norms", "a query before its norm, twice scaled"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_engine_is_found_out(name, monkeypatch):
    where, function, wrong, cases = BROKEN[name]
    right = vars(where)[function]
    monkeypatch.setattr(where, function, wrong(right))
    for case in cases:
        with pytest.raises(AssertionError):
            check_blocks(CASES[case])


def test_padding_in_the_other_order_is_found_out(monkeypatch):
    monkeypatch.setattr("growkit.growth.rule.PADDED", ("head_dim", "embed"))
    with pytest.raises(AssertionError):
        check_blocks(CASES["both padded, head_dim first"])


@pytest.mark.parametrize(
    "name,where",
    [
        ("an offset, twice scaled", padding),
        ("a query before its norm, twice scaled", padding),
        ("uneven heads, noise", separation),
    ],
)
def test_operations_that_a_compiler_takes_as_one_are_found_out(name, where, monkeypatch):
    monkeypatch.setattr(where, "round_here", lambda result, xp: result)
    with pytest.raises(AssertionError):
        check_jax(CASES[name], jax.jit)


def test_a_wrong_number_is_found_out():
    case, right = CASES["uneven heads"], expected(CASES["uneven heads"])
    assert_by_the_rules(case, right)
    right[1, 1] *= 1 + 1e-4
    with pytest.raises(AssertionError):
        assert_by_the_rules(case, right)


# Random cases


@st.composite
def products(draw, pool, most=3):
    """A product of axes out of `pool`, which loses them."""
    count = draw(st.integers(1, min(most, len(pool))))
    axes = [pool.pop(draw(st.integers(0, len(pool) - 1))) for _ in range(count)]
    return [("/" if name != "qkv" and draw(st.booleans()) else "") + name for name in axes]


@st.composite
def lines(draw):
    """A line of a table."""
    fused = draw(st.booleans())
    # A square matrix has an axis twice.
    pool = [*SIZES, *draw(st.lists(st.sampled_from([*SIZES]), max_size=1))]
    summed = not fused and draw(st.booleans())
    dimensions = [draw(products(pool)) for _ in range(draw(st.integers(1, 2)))]
    if fused:
        dimension = dimensions[draw(st.integers(0, len(dimensions) - 1))]
        dimension.insert(draw(st.integers(0, len(dimension))), "qkv")
    words = [f"({' '.join(dimension)})" for dimension in dimensions]
    terms = 0
    if summed and pool:
        terms = draw(st.integers(2, 3))
        blocks_of = [" ".join(draw(products([*pool]))) for _ in range(terms)]
        words.insert(draw(st.integers(0, len(words))), f"({' | '.join(blocks_of)})")
    roles = ["matrix", "bias", "embedding", "query", "key", "value", "norm"]
    if fused:
        roles = ["qkv"]
    elif terms == 3:
        roles = ["qkv", *roles]
    role = draw(st.sampled_from(roles))
    begins = draw(st.sampled_from(["ones", "1+zeros"])) if role == "norm" else "normal"
    stacked = draw(st.lists(st.sampled_from([*STACKED]), unique=True, max_size=2))
    name = "".join(f"{{{'/' if draw(st.booleans()) else ''}{axis}}}." for axis in stacked)
    return f"m.{name}weight  {' '.join(words)}  {begins}  {role}"


@st.composite
def axis_maps(draw, size, preserving, uniform):
    """(index, shares) of copies of an axis of `size` units."""
    if uniform or draw(st.booleans()):
        copies = tile(size, size * draw(st.integers(1, 3)))
        return tuple(copies.index.tolist()), tuple(copies.share.tolist())
    more = draw(st.lists(st.integers(0, size - 1), max_size=4))
    index = draw(st.permutations([*range(size), *more]))
    weights = draw(
        st.lists(st.sampled_from([0.25, 0.3, 1.0, 1.7]), min_size=len(index), max_size=len(index))
    )
    share = np.array(weights)
    if preserving:
        share = share / np.bincount(index, share)[index]
    return tuple(index), tuple(share.tolist())


@st.composite
def cases(draw):
    line = draw(lines())
    (row,) = parse_table(line)
    sizes = {axis: draw(st.integers(2, 4)) for axis in (*SIZES, *STACKED)}
    preserving = draw(st.sampled_from([True, True, False]))
    query_norm = draw(st.booleans())
    maps, pads = {}, {}
    for axis in sorted(row.axes - {"qkv"}) + [axis.name for axis in row.stacked]:
        way = draw(st.sampled_from(["copy", "pad", "keep"]))
        if way == "pad" and axis in ("embed", "head_dim"):
            pads[axis] = sizes[axis] + draw(st.integers(1, 3))
        elif way != "keep" and axis == "layer" and preserving:
            inserted = insert(sizes[axis], sizes[axis] + 1)
            maps[axis] = tuple(inserted.index.tolist()), tuple(inserted.share.tolist())
        elif way != "keep":
            uniform = axis in row.averages or query_norm and axis == "head_dim"
            maps[axis] = draw(axis_maps(sizes[axis], preserving, preserving and uniform))
    if "embed" not in row.axes and "embed" not in maps and draw(st.booleans()):
        pads["embed"] = sizes["embed"] + 2
    after = {axis: len(maps[axis][0]) if axis in maps else sizes[axis] for axis in STACKED}
    return Case(
        line=line,
        maps=maps,
        pads=pads,
        sizes=sizes,
        moment=draw(st.sampled_from([0, 0, 1, 2])),
        moments=draw(st.sampled_from(["map", "map", *MOMENT_OPTIONS])),
        noise=draw(st.sampled_from([0.0, 0.0, 0.4])),
        noise_unit=draw(st.sampled_from([separation.RANGE, separation.RMS])),
        norm=draw(st.sampled_from(["layer", "rms"])),
        query_norm=query_norm,
        scalar=draw(st.sampled_from([None, None, "sqrt(embed)", "1/sqrt(embed)"])),
        position=tuple(draw(st.integers(0, after[axis.name] - 1)) for axis in row.stacked),
        dtype=draw(st.sampled_from([*DTYPES])),
        stride=draw(st.integers(1, 5)),
    )


def is_possible(case: Case) -> bool:
    """Whether growth takes a case: padding of embed is refused beside some norms."""
    try:
        case.plan()
    except UsageError as problem:
        assert "embed cannot be padded" in str(problem)
        return False
    return True


@example(GPT2)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases().filter(is_possible))
def test_the_whole_is_by_the_rules_and_blocks_are_the_whole(case):
    check_blocks(case)


@example(GPT2)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases().filter(is_possible))
def test_growth_under_jit_gives_the_same_bits(case):
    check_jax(case, jax.jit)


# What an optimizer multiplies


def factors_of(case: Case, plan: Plan) -> dict[str, np.ndarray]:
    """The multipliers of the row, of the shape of its leaf in a parameter tree."""
    found = {}
    for name, node in multipliers.compute_multipliers(plan.grown, [plan]).items():
        for key in case.row.path:
            node = node[key]
        found[name] = np.broadcast_to(node, case.row.stacked_shape(plan.grown.sizes))
    return found


def check_multipliers(case: Case, plan: Plan) -> None:
    """Rates are what ones grow to, eps what they grow to as mu; and norms of gradients stay."""
    row, sizes = case.row, plan.model.sizes
    factors = factors_of(case, plan)
    ones = np.ones(row.shape(sizes))
    gradient = np.random.default_rng(1).normal(size=row.stacked_shape(sizes))
    squares = 0.0
    for position in row.positions(plan.grown.sizes):
        values = grow_array(ones - row.offset, row, plan, 0, position) + row.offset
        moments = [grow_array(ones, row, plan, moment, position) for moment in (1, 2)]
        assert np.allclose(factors["learning_rate"][position], values, rtol=1e-12)
        assert np.allclose(factors["eps"][position], moments[0], rtol=1e-12)
        assert np.allclose(factors["eps"][position] ** 2, moments[1], rtol=1e-12)
        source = gradient[find_source(plan, row, position)]
        grown = grow_array(source, row, plan, 1, position)
        squares += (factors["clip"][position] * np.square(grown)).sum()
    assert np.allclose(squares, np.square(gradient).sum(), rtol=1e-12)


def copies_alone(case: Case) -> Case:
    """The case without what training does not go on after."""
    maps = {axis: axis_map for axis, axis_map in case.maps.items() if axis != "layer"}
    return replace(case, maps=maps, pads={}, noise=0.0, moments="map", dtype="float64")


@example(Case("m.{expert}.w  (mlp | mlp) /embed  normal  matrix", maps=MORE_EXPERTS))
@example(Case("m.w  (mlp | kv head) /embed  normal  matrix", maps=UNEVEN_HEADS))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases().map(copies_alone))
def test_multipliers_are_what_growth_makes_of_ones(case):
    plan = case.plan()
    assume(plan.preserved)
    check_multipliers(case, plan)


@pytest.mark.parametrize(
    "function,wrong,name",
    [
        ("share_scale", read_for_written, "a sum of another dimension"),
        ("_count_copies", always_one, "a sum of another dimension"),
        ("share_scale", read_for_written, "uneven heads"),
    ],
)
def test_multipliers_by_another_rule_are_found_out(function, wrong, name, monkeypatch):
    case = copies_alone(CASES[name])
    plan = case.plan()
    check_multipliers(case, plan)
    monkeypatch.setattr(multipliers, function, wrong(getattr(multipliers, function)))
    with pytest.raises(AssertionError):
        check_multipliers(case, plan)
