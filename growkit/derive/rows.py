"""From names, shapes and modules to the rows of a table.

Parameters of the same name but for a layer's or an expert's number are one row. Each dimension gets
the ways to cut it into axes, the likeliest first; what a proof refuses gives way to the next.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from growkit.derive.network import UnprovableError, memory_names
from growkit.derive.sizes import Probe, Size, Terms, find_terms, size_of

ATTENTION = re.compile(
    r"attn|attention|mixer|mamba|linear_attn|self_attn|recurrent|temporal|conv\b"
)
QUERY = re.compile(r"(.*[._])?(q|query|wq|q_proj|q_lin|q_b_proj|project_q)")
KEY = re.compile(r"(.*[._])?(k|key|wk|k_proj|k_lin|project_k)")
VALUE = re.compile(r"(.*[._])?(v|value|wv|v_proj|v_lin|project_v)")
FUSED = re.compile(r"(.*[._])?(qkv|qkv_proj|c_attn|query_key_value|Wqkv|wqkv|in_proj)")
# What the width of the stream can be as a product of sizes.
STREAMS = {("embed",), ("head", "head_dim"), ("kv", "group", "head_dim")}


@dataclass
class Draft:
    """A row in the making.

    name: with {layer} and {expert} in it, as in tables but for slashes and kinds. example: a
    parameter's name in files. cuts: for each dimension the words that it may be, the likeliest
    first. reads: which dimensions are read. stream: whether the row writes the stream.
    """

    name: str
    example: str
    shape: tuple[int, ...]
    terms: list[Terms | None]
    memory: str = ""
    cuts: list[list[str]] = field(default_factory=list)
    reads: list[bool] = field(default_factory=list)
    begins: str = "normal"
    role: str = "matrix"
    offset: bool = False
    averages: int | None = None
    stream: bool = False
    kind: str = ""
    layers: frozenset[int] = frozenset()
    conditions: tuple[str, ...] = ()
    final: bool = False
    streams: tuple[bool, ...] = ()

    def memory_of(self, name: str) -> str:
        """The name in memory of another of the row's parameters, where only a layer's number
        differs.
        """
        prefix = self.name.partition("{layer}")[0]
        ours = re.match(rf"{re.escape(prefix)}(\d+)\.", self.example)
        theirs = re.match(rf"{re.escape(prefix)}(\d+)\.", name)
        if ours is None or theirs is None:
            return self.memory
        return re.sub(rf"\b{ours[1]}\b", theirs[1], self.memory, count=1)

    @property
    def square(self) -> bool:
        """Whether both dimensions are as long as the stream is wide."""
        return len(self.streams) == 2 and all(self.streams)

    @property
    def may_write(self) -> bool:
        """Whether a dimension that the row writes can be the stream's."""
        return any(s and not read for s, read in zip(self.streams, self.reads, strict=True))

    def words(self, choice: Mapping[tuple[str, int], int] = {}) -> list[str]:  # noqa: B006
        """The words of its dimensions, some cut another way than the likeliest."""
        return [
            read_word(cuts[choice.get((self.name, place), 0)], self.reads[place])
            for place, cuts in enumerate(self.cuts)
        ]


def link(draft: Draft) -> str:
    """What a weight and its bias share: they are cut alike."""
    return re.sub(r"[._](weight|bias)$", "", draft.name)


def read_word(word: str, read: bool) -> str:
    """A dimension's word, with slashes where it is read."""
    return re.sub(r"(\w+)", r"/\1", word) if read else word


@dataclass
class Names:
    """How the names of parameters count layers and experts."""

    prefix: str
    layers: int
    stacked: dict[str, str]

    def template(self, name: str) -> tuple[str, tuple[int, ...]]:
        """A name with its numbers as axes, and the numbers."""
        numbers = []
        if self.prefix and (found := re.match(rf"{re.escape(self.prefix)}\.(\d+)\.", name)):
            numbers.append(int(found[1]))
            name = f"{self.prefix}.{{layer}}.{name[found.end() :]}"
        for before, axis in self.stacked.items():
            if found := re.match(rf"{re.escape(before)}\.(\d+)\b", name):
                numbers.append(int(found[1]))
                name = f"{before}.{{{axis}}}{name[found.end() :]}"
        return name, tuple(numbers)


def find_names(
    probe: Probe, sizes: Mapping[str, Size], layers: tuple[str, dict[str, Any]]
) -> Names:
    """Where layers and experts are counted: by what a longer and a larger model adds.

    layers: the field of the number of layers, and the fields of a model with one layer more. Raises
    UnprovableError where the layers are not one list.
    """
    from growkit.derive.sizes import shapes_of

    longer = shapes_of(probe.kind, probe.fields | layers[1])
    count = int(layers[1][layers[0]]) - 1
    added = [] if longer is None else [name for name in longer if name not in probe.base]
    found = {match[1] for name in added if (match := re.match(rf"(.*?)\.{count}\.", name))}
    if len(found) != 1 or not added:
        raise UnprovableError(f"the layers are not one list: {sorted(found) or 'none grows'}")
    names = Names(found.pop(), count, {})
    for axis, size in sizes.items():
        grown = probe.grown([size]) or {}
        if grown.keys() == probe.base.keys():
            continue
        units = size_of(axis, probe, sizes)
        for name in grown:
            if name in probe.base:
                continue
            match = re.match(r"(.*?)\.(\d+)\b", names.template(name)[0])
            if match and int(match[2]) >= units:
                names.stacked[match[1]] = axis
    return names


def draft_rows(probe: Probe, sizes: Mapping[str, Size], names: Names, network: Any) -> list[Draft]:
    """All rows, in the order of the files, without what only a computation tells."""
    drafts: dict[str, Draft] = {}
    seen: dict[str, set[int]] = {}
    for name, shape in probe.base.items():
        template, numbers = names.template(name)
        if template not in drafts:
            terms = [find_terms(name, place, probe, sizes) for place in range(len(shape))]
            drafts[template] = Draft(template, name, shape, terms)
        if drafts[template].shape != shape:
            raise UnprovableError(f"layers differ in the shape of {template}")
        if "{layer}" in template:
            seen.setdefault(template, set()).add(numbers[0])
    label_kinds(drafts, seen, names.layers, probe.stated)
    memory = memory_names(network)
    for draft in drafts.values():
        draft.memory = memory[draft.example]
        describe(draft, network)
    return list(drafts.values())


def label_kinds(
    drafts: Mapping[str, Draft],
    seen: Mapping[str, set[int]],
    layers: int,
    config: Mapping[str, Any],
) -> None:
    """Name the kinds of layers: after a list of the configuration where one says the same."""
    listed: dict[frozenset[int], str] = {}
    for entries in config.values():
        if isinstance(entries, list) and len(entries) == layers:
            for kind in dict.fromkeys(map(str, entries)):
                of_kind = frozenset(n for n, each in enumerate(entries) if str(each) == kind)
                listed.setdefault(of_kind, re.sub(r"\W", "_", kind))
    for template, numbers in seen.items():
        of_kind = frozenset(numbers)
        drafts[template].layers = of_kind
        if len(of_kind) < layers:
            count = sum(label.startswith("some") for label in listed.values())
            drafts[template].kind = listed.setdefault(of_kind, f"some{count + 1}")


def describe(draft: Draft, network: Any) -> None:
    """What a row's module tells: what it reads, its role, how it begins."""
    draft.reads = [False] * len(draft.shape)
    _describe_module(draft, network)
    _describe_beginning(draft, network)
    path = draft.example.rpartition(".")[0]
    inner = path.rpartition("{layer}.")[2] or path
    if draft.role not in ("matrix", "bias") or "{layer}" not in draft.name:
        return
    for pattern, role in ((FUSED, "qkv"), (QUERY, "query"), (KEY, "key"), (VALUE, "value")):
        if pattern.fullmatch(inner):
            draft.role = role
            break


def _describe_module(draft: Draft, network: Any) -> None:
    """The role, and the dimension that is read, by the class of the module."""
    path, _, leaf = draft.memory.rpartition(".")
    module = _module(network, path)
    kind = type(module).__name__
    embedding = network.get_input_embeddings()
    tied = embedding is not None and _parameter(network, draft.memory) is embedding.weight
    if isinstance(module, nn.Embedding) or tied:
        draft.role = "embedding"
    elif leaf.endswith("bias") or len(draft.shape) < 2:
        draft.role = "norm" if "norm" in f"{kind} {path}".lower() and leaf != "bias" else "bias"
    elif "norm" in kind.lower():
        draft.role = "norm"
    elif isinstance(module, nn.Conv1d):
        draft.reads[1] = module.groups == 1
    elif len(draft.shape) <= 3:
        draft.reads[_read_place(draft, module)] = True
    head = network.get_output_embeddings()
    if head is module and module is not None and leaf == "weight" and not tied:
        draft.role = "head"


def _describe_beginning(draft: Draft, network: Any) -> None:
    """Whether the parameter begins as zeros or ones."""
    parameter = _parameter(network, draft.memory)
    if parameter is None:
        return
    if (parameter == 0).all():
        draft.begins = "zeros"
    elif (parameter == 1).all():
        draft.begins = "ones"


def _read_place(draft: Draft, module: Any) -> int:
    """Which dimension of a matrix is read.

    Of stacked experts, which are raw parameters, the stream's, but not on the way down.
    """
    if isinstance(module, Conv1D):
        return 0
    if len(draft.shape) == 2:
        return 1
    streams = [bool(terms and set(terms) & STREAMS) for terms in draft.terms[1:]]
    down = re.search(r"down|w2|fc2|output|out_proj|c_proj", draft.name) is not None
    if streams.count(True) != 1:
        return 2
    stream = 1 + streams.index(True)
    return 3 - stream if down else stream


def _module(network: Any, path: str) -> Any:
    try:
        return network.get_submodule(path)
    except AttributeError:
        return None


def _parameter(network: Any, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(_module(network, path), leaf, None)


def cut(draft: Draft, coupled: set[tuple[str, ...]], embed: bool, mixer: bool) -> None:
    """The ways to cut each dimension. coupled: the products of axes that are embed's size.

    mixer: whether the row lies in the part of a layer that has heads; there a matrix has the stream
    on one side. embed: whether such a dimension is the stream's in any other row.
    """
    draft.cuts = []
    widths = coupled | {("embed",)}
    draft.streams = tuple(
        t is not None and len(t) == 1 and bool(set(t) & widths) for t in draft.terms
    )
    for place, terms in enumerate(draft.terms):
        if terms and len(terms) == 1 and (axes := next(iter(terms))) in coupled:
            matrix = mixer and len(draft.terms) > 1 and draft.role != "embedding"
            stream = draft.reads[place] != draft.stream if matrix else embed
            word = "embed" if stream else " ".join(axes)
            draft.cuts.append(_times(word, terms[axes]))
        else:
            draft.cuts.append(cut_terms(terms, draft, place))


def cut_terms(terms: Terms | None, draft: Draft, place: int) -> list[str]:
    """The words that a polynomial can be, the likeliest first."""
    if terms is None or not terms:
        return [_own_axis(draft, place)]
    if () in terms:
        return [_own_axis(draft, place)] if len(terms) == 1 else _sum_words(terms, draft, place)
    if len(terms) == 1:
        axes, factor = next(iter(terms.items()))
        return _times(" ".join(axes), factor)
    return _sum_words(terms, draft, place)


def _own_axis(draft: Draft, place: int) -> str:
    """An axis of the row's own, measured in files."""
    words = re.sub(r"\{\w+\}\.?", "", draft.name).split(".")
    return re.sub(r"\W", "_", "_".join(words[1:] or words)) + f"_{place}"


def _times(word: str, factor: int) -> list[str]:
    """A product with a constant: as blocks one after the other, interleaved, or units within."""
    axes = word.split()
    if factor == 1:
        found = [" ".join(axes), " ".join(reversed(axes))] if len(axes) == 2 else [word]
        return [f"({each})" if " " in each else each for each in found]
    name = {2: "pair", 3: "qkv"}.get(factor, f"times{factor}")
    within = [" ".join((*axes[:place], name, *axes[place:])) for place in range(len(axes) + 1)]
    if factor == 3:
        # Queries, keys and values in front, then within a head.
        return [f"({each})" for each in [within[0], *within[1:-1][::-1], within[-1]]]
    blocks = [f"({' | '.join([word] * factor)})"] if factor == 2 else []
    return [*blocks, *(f"({each})" for each in [*within[1:-1][::-1], within[-1], within[0]])]


def _sum_words(terms: Terms, draft: Draft, place: int) -> list[str]:
    """A sum of blocks: in the order of size, or by key and value heads with their queries."""
    blocks: list[str] = []
    for axes, factor in sorted(terms.items(), key=lambda item: -len(item[0])):
        word = " ".join(axes) if axes else _own_axis(draft, place)
        blocks += [word] * (factor if axes else 1)
    found = [f"({' | '.join(blocks)})", f"({' | '.join(reversed(blocks))})"]
    shared = [axis for axis in next(iter(terms)) if all(axis in axes for axes in terms)]
    if shared:
        # Per key and value head: its queries, its key and its value.
        place = -1 if shared[-1] == "head_dim" else len(shared)
        shared.insert(place, _own_axis(draft, draft.terms.index(terms)))
        found.append(f"({' '.join(shared)})")
    return found
