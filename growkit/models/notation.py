"""The notation of a model's table: one line for each parameter says its axes, start and role.

A line is `name  axes  begins  role  [conditions]`, and these are lines of several models:

    layers.{/layer}.mlp.down_proj.weight           embed /mlp           normal   matrix
    layers.{layer}.self_attn.q_proj.bias           (kv group head_dim)  zeros    query     biased
    layers.{layer}.self_attn.qkv_proj.weight       (q | k | v) /embed   normal   qkv
    layers.{layer}.mlp.experts.{expert}.w2.weight  embed /mlp           normal   matrix
    layers.{layer}.self_attn.q_norm.weight         head head_dim        1+zeros  norm(head_dim)

The axes, one word for each stored dimension:

  * A slash marks an axis that the parameter *reads*, that is, sums over. It *writes* all others.
  * Parentheses hold several axes fused in one dimension: `(head qkv head_dim)`.
  * A bar makes a dimension the concatenation of blocks: `(mlp | mlp)`. Each block grows by itself.

Braces in the name hold stacked axes: one tensor for each unit. `{/layer}` says that the parameter
writes into the residual stream, which is a sum over layers. `{layer:sparse}` stacks over those
layers alone that are of the kind `sparse`: those whose files have that kind's parameters.

`begins` is normal, ones or zeros; `1+zeros` says that the model computes with 1 + the parameter.
The role is one of ROLES; a norm names the axes that it averages over where they are not all of its
own. Conditions are options of the configuration (`tied`, `bias`, ...) or their negation (`untied`,
`!bias`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product

INITIALISATIONS = ("normal", "ones", "zeros")
ATTENTION = ("query", "key", "value")
ROLES = ("embedding", "head", "matrix", "bias", "norm", "qkv", *ATTENTION)
FORM = f"name axes {'|'.join(INITIALISATIONS)} {'|'.join(ROLES)} [conditions]"

_WORD = re.compile(r"\w*\([^)]*\)|\S+")
_BEGINS = re.compile(rf"(?:(\d+(?:\.\d+)?)\+)?({'|'.join(INITIALISATIONS)})")
_ROLE = re.compile(rf"({'|'.join(ROLES)})(?:\(([^)]*)\))?")
_AXIS = re.compile(r"/?\w+")
_DIMENSION = re.compile(r"/?\w+|\([^()]*\)")
_BRACES = re.compile(r"\{(/?)(\w+)(?::(\w+))?\}")
# A stacked axis in a row's name, and the number of a unit in its place: no leading zeros, as files
# and trees write it.
STACKED = re.compile(r"\{\w+\}")
UNIT = "(0|[1-9][0-9]{0,8})"

Position = tuple[int, ...]


@dataclass(frozen=True)
class Axis:
    """One logical axis of a parameter, and whether the parameter sums over it."""

    name: str
    read: bool = False


Product = tuple[Axis, ...]


@dataclass(frozen=True)
class Part:
    """One block of a parameter: all of it, or one term of a summed dimension.

    label: what the part is called in a sum ("query", "0"), None for a whole parameter.
    dimensions: the fused axes of each stored dimension.
    """

    role: str
    label: str | None
    dimensions: tuple[Product, ...]

    @cached_property
    def axes(self) -> Product:
        """All axes in order, unfused."""
        return tuple(axis for dimension in self.dimensions for axis in dimension)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the axes in order."""
        return tuple(axis.name for axis in self.axes)

    @property
    def routes(self) -> bool:
        """Whether the part is a router: one row for each expert, which reads the stream."""
        return set(self.axes) == {Axis("expert"), Axis("embed", read=True)}

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The stored shape, fused dimensions multiplied out."""
        return tuple(math.prod(sizes[a.name] for a in dimension) for dimension in self.dimensions)

    def unfused(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with one dimension for each axis."""
        return tuple(sizes[name] for name in self.names)


@dataclass(frozen=True)
class Row:
    """One line of the table: a parameter, or one parameter for each unit of the stacked axes.

    blocks: for each stored dimension its terms, each a product of axes. averages: the axes that a
    norm averages over. offset: what the model adds to the parameter before it uses it. prefix: the
    first words of the name that a parameter tree leaves out. kind: the kind of layers that have the
    parameter, "" for all.
    """

    name: str
    blocks: tuple[tuple[Product, ...], ...]
    begins: str
    role: str
    offset: float = 0.0
    averages: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    stacked: Product = ()
    prefix: str = ""
    kind: str = ""

    @cached_property
    def summed(self) -> int | None:
        """The dimension that is a concatenation of blocks, None when there is none."""
        return next((place for place, terms in enumerate(self.blocks) if len(terms) > 1), None)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The blocks that grow each by itself: one, unless a dimension is a sum."""
        if self.summed is None:
            return (Part(self.role, None, tuple(terms[0] for terms in self.blocks)),)
        return tuple(self._part(number) for number in range(len(self.blocks[self.summed])))

    def _part(self, number: int) -> Part:
        """Term `number` of the summed dimension; those of a qkv row are query, key, value."""
        # By place: a sum of role qkv is query, key and value in this order, however it is written.
        role = ATTENTION[number] if self.role == "qkv" else self.role
        dimensions = tuple(
            terms[number if place == self.summed else 0] for place, terms in enumerate(self.blocks)
        )
        return Part(role, role if self.role == "qkv" else str(number), dimensions)

    @cached_property
    def axes(self) -> frozenset[str]:
        """The names of all axes of one unit's parameter; stacked axes are not among them."""
        return frozenset(name for part in self.parts for name in part.names)

    @cached_property
    def inner_name(self) -> str:
        """The name without the first words that a parameter tree leaves out."""
        return self.name.removeprefix(f"{self.prefix}.") if self.prefix else self.name

    @cached_property
    def path(self) -> tuple[str, ...]:
        """Where the parameter lies in a tree: ('layers', 'attention', 'dense', 'weight')."""
        return tuple(word for word in self.inner_name.split(".") if not STACKED.fullmatch(word))

    @property
    def writes_stream(self) -> bool:
        """Whether the parameter writes into the residual stream, a sum over layers."""
        return any(axis.read and axis.name == "layer" for axis in self.stacked)

    @property
    def decays(self) -> bool:
        """Whether weight decay acts on the parameter: on matrices and embeddings."""
        if self.role in ("norm", "bias"):
            return False
        reads = any(axis.read for part in self.parts for axis in part.axes)
        return reads or self.role == "embedding"

    @property
    def multiplies(self) -> bool:
        """Whether the parameter is a matrix that activations are multiplied by."""
        return self.decays and self.role != "embedding"

    @property
    def leading_axes(self) -> tuple[str, ...]:
        """The first axis of each stored dimension, by which the dimension is split over devices."""
        return tuple(terms[0][0].name for terms in self.blocks)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The stored shape of one unit's parameter, fused dimensions multiplied out."""
        shapes = [part.shape(sizes) for part in self.parts]
        if self.summed is None:
            return shapes[0]
        total = sum(shape[self.summed] for shape in shapes)
        return (*shapes[0][: self.summed], total, *shapes[0][self.summed + 1 :])

    def measure(self, shape: Sequence[int], sizes: Mapping[str, int]) -> dict[str, int]:
        """The sizes of axes that `sizes` lacks, one a dimension at most, from the stored shape."""
        found: dict[str, int] = {}
        for length, terms in zip(shape, self.blocks, strict=True):
            known = {**sizes, **found}
            unknown = [[axis.name for axis in term if axis.name not in known] for term in terms]
            names = {name for term in unknown for name in term}
            if len(names) != 1:
                continue
            # length = sum of the known terms + x * (sum of the factors beside the unknown axis).
            rest = [math.prod(known.get(axis.name, 1) for axis in term) for term in terms]
            fixed = sum(part for part, term in zip(rest, unknown, strict=True) if not term)
            share = sum(part for part, term in zip(rest, unknown, strict=True) if term)
            found[names.pop()] = (length - fixed) // share
        return found

    def stacked_sizes(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """How many units each stacked axis has."""
        return tuple(sizes[axis.name] for axis in self.stacked)

    def stacked_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in a parameter tree, stacked axes first."""
        return self.stacked_sizes(sizes) + self.shape(sizes)

    def positions(self, sizes: Mapping[str, int]) -> Iterator[Position]:
        """Every unit of the stacked axes, in order; one empty position where there are none."""
        return product(*(range(size) for size in self.stacked_sizes(sizes)))

    def name_at(self, position: Position = ()) -> str:
        """The name in files of one unit of the stacked axes."""
        name = self.name
        for unit in position:
            name = STACKED.sub(str(unit), name, count=1)
        return name

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        literals = STACKED.split(self.name)
        return re.compile(UNIT.join(re.escape(literal) for literal in literals))

    def match(self, name: str) -> Position | None:
        """The unit of the stacked axes that `name` belongs to, None when it is not this row's."""
        found = self._pattern.fullmatch(name)
        return None if found is None else tuple(int(number) for number in found.groups())


@lru_cache
def parse_table(text: str, prefix: str = "") -> tuple[Row, ...]:
    """Parse the lines of a table; blank lines and lines that start with # are skipped.

    prefix: the first words of names that a parameter tree leaves out. Raises ValueError that quotes
    the line.

    >>> row, = parse_table("layers.{/layer}.dense.weight  embed (/head /head_dim)  normal  matrix")
    >>> row.shape({"embed": 32, "head": 4, "head_dim": 8})
    (32, 32)
    >>> row.name_at((3,)), row.path, row.writes_stream
    ('layers.3.dense.weight', ('layers', 'dense', 'weight'), True)
    """
    # Parsed once for each text (see lru_cache): a table is asked for its rows at every tensor.
    lines = (line.strip() for line in text.splitlines())
    return tuple(_parse_row(line, prefix) for line in lines if line and not line.startswith("#"))


def split_words(line: str) -> list[str]:
    """The words of a line; what stands in parentheses is one."""
    return _WORD.findall(line)


def find_begins(words: Sequence[str]) -> int | None:
    """The place of the word that says how a parameter begins, after which the role stands."""
    return next((n for n, word in enumerate(words) if _BEGINS.fullmatch(word)), None)


def _parse_row(line: str, prefix: str) -> Row:
    """A line as a row. Raises ValueError that quotes it."""
    name, *words = split_words(line)
    place = find_begins(words)
    # No axes (place 0) is as wrong as no word that says how the parameter begins.
    if not place or len(words) <= place + 1:
        raise ValueError(f"a table line is `{FORM}`, got {line!r}")
    axes = words[:place]
    begins = _BEGINS.fullmatch(words[place])
    role = _ROLE.fullmatch(words[place + 1])
    conditions = words[place + 2 :]
    if begins is None or role is None:
        raise ValueError(f"a table line is `{FORM}`, got {line!r}")
    # A parameter without dimensions, one number, has the word `()`.
    blocks = tuple(_parse_dimension(word, line) for word in axes if word != "()")
    _check_sums(blocks, role[1], line)
    plain_name, stacked, kind = _parse_name(name, line)
    return Row(
        name=plain_name,
        blocks=blocks,
        begins=begins[2],
        role=role[1],
        offset=float(begins[1] or 0.0),
        averages=_parse_averages(role, blocks, line),
        conditions=tuple(conditions),
        stacked=stacked,
        prefix=prefix,
        kind=kind,
    )


def _parse_name(name: str, line: str) -> tuple[str, Product, str]:
    """'{/layer:sparse}.w' as its name without marks, the stacked axes, and the kind of layers."""
    if re.search("[{}]", _BRACES.sub("", name)):
        raise ValueError(f"braces of a name hold an axis, as {{layer}} or {{/layer}}, got {line!r}")
    marks = _BRACES.findall(name)
    stacked = tuple(Axis(axis, slash == "/") for slash, axis, _ in marks)
    kinds = [kind for _, _, kind in marks if kind]
    return _BRACES.sub(r"{\2}", name), stacked, kinds[0] if kinds else ""


def _parse_dimension(word: str, line: str) -> tuple[Product, ...]:
    """'embed', '(/head /head_dim)' or '(mlp | mlp)' as terms, each a product of axes."""
    terms = [term.split() for term in word.strip("()").split("|")]
    axes = [axis for term in terms for axis in term]
    if not _DIMENSION.fullmatch(word) or not all(_AXIS.fullmatch(axis) for axis in axes):
        raise ValueError(
            f"a dimension is an axis, (axis /axis) or (axis | axis); {word!r} is not one, "
            f"got {line!r}"
        )
    return tuple(_parse_axes(term) for term in terms)


def _parse_axes(words: Sequence[str]) -> Product:
    return tuple(Axis(word.removeprefix("/"), word.startswith("/")) for word in words)


def _parse_averages(
    role: re.Match[str], blocks: tuple[tuple[Product, ...], ...], line: str
) -> tuple[str, ...]:
    """The axes that a norm averages over: those it names, else all that it has."""
    own = tuple(axis.name for terms in blocks for term in terms for axis in term)
    if role[2] is None:
        return own if role[1] == "norm" else ()
    named = tuple(role[2].split())
    if role[1] != "norm" or not named or not set(named) <= set(own):
        raise ValueError(f"only a norm averages over axes, and over its own alone, got {line!r}")
    return named


def _check_sums(blocks: tuple[tuple[Product, ...], ...], role: str, line: str) -> None:
    """Raise ValueError for empty products, two sums in one row, and a qkv row without its kinds."""
    if not all(term for terms in blocks for term in terms):
        raise ValueError(f"every block of a dimension needs an axis, got {line!r}")
    lengths = [len(terms) for terms in blocks if len(terms) > 1]
    if len(lengths) > 1:
        raise ValueError(f"one dimension of a row can be a sum, got {line!r}")
    if role == "qkv" and lengths and lengths != [3]:
        raise ValueError(f"a sum of role qkv has three blocks, query | key | value, got {line!r}")
    names = [axis.name for terms in blocks for term in terms for axis in term]
    if role == "qkv" and not lengths and names.count("qkv") != 1:
        raise ValueError(f"a row of role qkv has an axis qkv or a sum of three, got {line!r}")
