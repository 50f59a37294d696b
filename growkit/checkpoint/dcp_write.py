"""Distributed checkpoints of PyTorch, written without torch, in blocks.

Every tensor is one chunk, whole, in a file of bounded size; torch cuts it when it loads it into
sharded tensors. What the program keeps besides is written byte for byte as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from growkit.checkpoint.dcp import KIND, TRAINING
from growkit.checkpoint.dcp_layout import PARAMS, Distributed, Keys, join_keys
from growkit.checkpoint.dcp_metadata import Chunk, Entry, write_metadata
from growkit.checkpoint.dcp_names import rotate_recipe
from growkit.checkpoint.fill import Filled, Job, Progress, collect_jobs, create_file, fill
from growkit.checkpoint.huggingface import SHARD, write_beside
from growkit.checkpoint.numbers import Findings
from growkit.checkpoint.optimizer import NAMES, STEP, Optimizer, Scalar
from growkit.checkpoint.raw import Span
from growkit.checkpoint.tensor import Contents, Recipe, copy_tensor, wrap_array
from growkit.checkpoint.torch_zip import ALIGNMENT, TorchWriter
from growkit.errors import GrowkitError
from growkit.models import read_config
from growkit.models.architecture import Architecture


@dataclass
class _Item:
    """A file of torch.save that is to be written, or copied from a span."""

    key: str
    entry: Entry
    size: int
    writer: TorchWriter | None = None
    span: Span | None = None
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    file: str = ""
    base: int = 0

    def make_chunk(self) -> Chunk:
        return Chunk(self.offsets, self.sizes, self.file, self.base, self.size)


@dataclass
class _Directory:
    """A directory of `.distcp` files in the making."""

    path: Path
    items: list[_Item] = field(default_factory=list)

    def add_tensor(self, keys: Keys, slot: str, name: str, recipe: Recipe) -> None:
        """A tensor that a recipe makes. slot, name: what its hash and its findings are told as."""
        writer = TorchWriter(self.path / "archive")
        stored = writer.add(slot, name, recipe, "cpu")
        entry = Entry(keys, str(recipe.dtype), recipe.shape, ())
        size = writer.lay_out(stored)
        first = (0,) * len(recipe.shape)
        item = _Item(join_keys(keys), entry, size, writer, offsets=first, sizes=recipe.shape)
        self.items.append(item)

    def add_value(self, keys: Keys, value: Any) -> None:
        """An object of plain values, or a number that was a tensor."""
        if isinstance(value, Scalar):
            array = np.asarray(value.value, value.dtype)
            self.add_tensor(keys, "", join_keys(keys), copy_tensor(wrap_array(array)))
            return
        writer = TorchWriter(self.path / "archive")
        size = writer.lay_out(value)
        self.items.append(_Item(join_keys(keys), Entry(keys, "", (), ()), size, writer))

    def add_carried(self, key: str, entry: Entry, spans: tuple[Span, ...]) -> None:
        """What is written as it was."""
        for chunk, span in zip(entry.chunks, spans, strict=True):
            item = _Item(key, entry, span.size, span=span)
            item.offsets, item.sizes = chunk.offsets, chunk.sizes
            self.items.append(item)

    def begin(self, limit: int, jobs: list[Job]) -> None:
        """Reserve all files and add the jobs that fill them. limit: bytes of a file, unless one
        tensor has more.
        """
        for number, items in enumerate(self._split(limit)):
            name = f"__0_{number}.distcp"
            last = items[-1]
            file = create_file(self.path / name, last.base + last.size)
            # A file of objects alone has no tensor to be made, and is closed with the others.
            jobs.append(Job("", f"{self.path.name}/{name}", (), file, 0))
            for item in items:
                item.file = name
                jobs += _begin_item(item, file)

    def _split(self, limit: int) -> Iterator[list[_Item]]:
        """The items of each file, in order, each given its place."""
        items: list[_Item] = []
        end = 0
        for item in self.items:
            base = end + -end % ALIGNMENT
            if items and base + item.size > limit:
                yield items
                items, base = [], 0
            item.base = base
            end = base + item.size
            items.append(item)
        if items:
            yield items

    def finish(self, filled: Filled) -> None:
        """Write the headers of all items, and the metadata last."""
        entries: dict[str, Entry] = {}
        chunks: dict[str, list[Chunk]] = {}
        for item in self.items:
            if item.writer is not None:
                item.writer.finish(filled)
            entries[item.key] = item.entry
            chunks.setdefault(item.key, []).append(item.make_chunk())
        made = {
            key: Entry(entry.path, entry.dtype, entry.shape, tuple(chunks[key]))
            for key, entry in entries.items()
        }
        write_metadata(self.path, made)


def _begin_item(item: _Item, file: int) -> list[Job]:
    """The jobs that make the bytes of an item, in an open file."""
    if item.writer is not None:
        return item.writer.put(file, item.base)
    recipe = Recipe((item.size,), np.dtype(np.uint8), copied=item.span)
    return [Job("", f"{item.key} {item.offsets}", (recipe,), file, item.base)]


def write_distributed(
    path: Path, contents: Contents, progress: Progress | None = None, shard: int = SHARD
) -> Findings:
    """Write `contents` as a distributed checkpoint at `path`, which must not exist.

    shard: the most bytes in one file. Returns what was found in the numbers.
    """
    layout = contents.distributed
    if layout is None:
        raise GrowkitError(f"{path} is to be laid out as a {KIND} checkpoint, and none was given")
    path.mkdir()
    folders = {folder: _Directory(path / folder) for folder in layout.folders}
    for directory in folders.values():
        directory.path.mkdir(exist_ok=True)
    first, second = (folders[folder] for folder in layout.folders)
    model = read_config(contents.config, contents.lineage)
    _add_parameters(first, layout, contents, model)
    if contents.torch_optimizer is not None:
        _add_optimizer(second, layout, contents.torch_optimizer, contents, model)
    for key, carried in layout.others.items():
        target = second if carried.with_optimizer else first
        target.add_carried(key, carried.entry, carried.spans)
    with collect_jobs() as jobs:
        for directory in folders.values():
            directory.begin(shard, jobs)
        filled = fill(jobs, progress)
        for directory in folders.values():
            directory.finish(filled)
    training = tuple(name for name in contents.files if TRAINING.fullmatch(name))
    write_beside(path, contents, {}, filled, training)
    return filled.findings


def _add_parameters(
    directory: _Directory, layout: Distributed, contents: Contents, model: Architecture
) -> None:
    """The parameters, and a tied head under its own name where the source had it."""
    spelling = layout.spelling
    params = contents.recipes["params"]
    for name, own, recipe in _list_recipes(params, layout, model):
        directory.add_tensor(layout.place_parameter(own), "params", name, recipe)
    for own, name in spelling.copies.items():
        directory.add_tensor(layout.place_parameter(own), "", f"{own} again", params[name])


def _list_recipes(
    recipes: Mapping[str, Recipe], layout: Distributed, model: Architecture
) -> Iterator[tuple[str, str, Recipe]]:
    """(table's name, checkpoint's name, recipe) of each parameter or moment of a slot."""
    spelling = layout.spelling
    for name, row, position in model.table.names(model.sizes):
        if name not in recipes:
            continue
        recipe = recipes[name]
        if row.name in spelling.rotated:
            recipe = rotate_recipe(recipe, model.sizes["head_dim"])
        yield name, spelling.spell(row, position), recipe


def _add_optimizer(
    directory: _Directory,
    layout: Distributed,
    optimizer: Optimizer,
    contents: Contents,
    model: Architecture,
) -> None:
    """The groups' options, then the state of every parameter."""
    names = model.table.names(model.sizes)
    own = {name: layout.spelling.spell(row, position) for name, row, position in names}
    for number, group in enumerate(optimizer.groups):
        members = [own[name] for name in group.names]
        options = dict(group.options)
        if NAMES in options:
            options[NAMES] = members
        if layout.flattened:
            labels: list[str | int] = list(members)
        else:
            labels = [number]
            options[PARAMS] = members
        for label in labels:
            for option, value in options.items():
                directory.add_value(layout.place_option(label, option), value)
    for name, step in optimizer.steps.items():
        directory.add_value(layout.place_state(own[name], STEP), step)
    for slot, entry in optimizer.entries.items():
        for name, known, recipe in _list_recipes(contents.recipes[slot], layout, model):
            directory.add_tensor(layout.place_state(known, entry), slot, name, recipe)
