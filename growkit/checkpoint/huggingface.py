"""Hugging Face directories: config.json, safetensors files with or without an index, small files.

Reading takes the headers alone; writing makes shards, with the index last.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from growkit.checkpoint.around import Around, find_text, keep_width, split_tensors
from growkit.checkpoint.carried import (
    Beside,
    drop_code_keys,
    list_beside,
    require_inside,
    select_carried,
)
from growkit.checkpoint.files import encode_json, holds_nonfinite, read_json
from growkit.checkpoint.fill import Filled, Job, Progress, collect_jobs, create_file, fill
from growkit.checkpoint.hashes import (
    ALGORITHMS,
    KEY,
    Hashed,
    drop_hashes,
    read_stated,
    state_in_lineage,
)
from growkit.checkpoint.kinds import PICKLED, PICKLED_INDEX
from growkit.checkpoint.naming import MASKS, Named, name_tensors
from growkit.checkpoint.numbers import Findings
from growkit.checkpoint.raw import Finish, Passing
from growkit.checkpoint.safetensors import NAMES, read_header
from growkit.checkpoint.tensor import (
    Contents,
    Recipe,
    Source,
    Tensor,
    open_raw,
    read_model,
)
from growkit.checkpoint.unsuited import refuse_config, refuse_file, refuse_packed
from growkit.errors import GrowkitError
from growkit.models.architecture import Architecture
from growkit.models.given import describe_origin

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
LINEAGE = "lineage.json"
# Bytes of tensors in one file, unless told otherwise.
SHARD = 5_000_000_000
# Bytes of config.json, the index and the lineage at most.
JSON_LIMIT = 100_000_000
# Weights in other formats, which are named where there are no others.
WEIGHTS = (".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot")
# Around a text decoder any tensor may hold whole numbers: they are carried along.
ANY_NAME = ("",)
# Files that growkit writes itself.
OWN = ("config.json", LINEAGE)


def open_directory(path: Path, read: tuple[str, ...] = ()) -> Source:
    """Open a Hugging Face directory; reads config.json and the headers of the weight files.

    read: names of files beside the weights that the caller reads. Raises GrowkitError naming the
    file at fault.
    """
    require_inside(path, path / "config.json")
    config = read_json(path / "config.json", JSON_LIMIT)
    if not isinstance(config, dict):
        raise GrowkitError(f"{path / 'config.json'} is not a JSON object")
    refuse_config(path, config)
    config, dropped = drop_code_keys(config)
    files = _list_weight_files(path)
    lineage = read_lineage(path)
    entries = lineage if isinstance(lineage, list) else []
    named, around, stated = _read_tensors(path, config, entries, files)
    hashed = find_hashes(path, lineage, stated)
    beside = list_beside(path, (*OWN, *read, INDEX, PICKLED_INDEX, *(file.name for file in files)))
    return Source(
        path=path,
        kind="huggingface",
        config=named.config,
        tensors={"params": named.tensors},
        weights=[*files, path / "config.json"],
        # Hashes are of the tensors here, and not of what is made from them.
        lineage=drop_hashes(lineage) if isinstance(lineage, list) else lineage,
        record={},
        read_files=beside.read,
        known_model=named.model,
        notes=(
            *named.notes,
            *_note_table(named.model),
            *dropped,
            *_note_nonfinite(config),
            *_note_optimizer(beside),
            *beside.notes,
        ),
        optimizer=beside.optimizer,
        hashed=hashed,
        around=around,
    )


def _note_nonfinite(config: dict[str, Any]) -> tuple[str, ...]:
    """A note of fields that JSON has no words for; Python's own reader takes them.

    Those that growth knows are refused when the model is read.
    """
    names = [name for name, value in config.items() if holds_nonfinite(value)]
    if not names:
        return ()
    return (f"{', '.join(names)} of config.json: NaN or infinity, kept as it is",)


def _read_tensors(
    path: Path, config: dict[str, Any], lineage: list[Any], files: list[Path]
) -> tuple[Named, Around | None, dict[str, Tensor]]:
    """The tensors by the names of the table, what lies around a decoder, and the tensors by the
    names that hashes have.
    """
    text = _find_text(config, lineage, path)
    model = read_model(config if text is None else text, path, lineage)
    tensors = _read_headers(path, files, (*model.buffers, *MASKS) if text is None else ANY_NAME)
    refuse_packed(path, tensors)
    if text is None:
        named = name_tensors(tensors, model, config, path)
        return replace(named, config=config | named.config), None, named.tensors
    own, around = split_tensors(tensors, model, config)
    named = name_tensors(own, keep_width(model, around), text, path)
    named = replace(named, config=text | named.config, notes=(*named.notes, around.note))
    return named, around, tensors


def _find_text(config: dict[str, Any], lineage: list[Any], path: Path) -> dict[str, Any] | None:
    """The configuration of a decoder within a larger model. Raises GrowkitError naming the path."""
    try:
        return find_text(config, lineage)
    except GrowkitError as problem:
        raise GrowkitError(f"{path}: {problem}") from None


def _note_table(model: Architecture) -> tuple[str, ...]:
    """A note that the table is none of growkit's own, if it is none."""
    if not model.family.given:
        return ()
    return (f"the table is {describe_origin(model.family)}",)


def _note_optimizer(beside: Beside) -> tuple[str, ...]:
    """A note that there is an optimizer's state which is not read, if there is."""
    if not beside.optimizer:
        return ()
    return (
        f"{beside.optimizer} holds an optimizer's state of another trainer, which growkit does not "
        "read yet; what is made from this model has no moments",
    )


def read_lineage(path: Path) -> list[Any]:
    """The lineage beside the weights, empty for none."""
    file = path / LINEAGE
    if not os.path.lexists(file):
        return []
    require_inside(path, file)
    lineage: list[Any] = read_json(file, JSON_LIMIT)
    return lineage


def find_hashes(path: Path, lineage: Any, tensors: dict[str, Tensor]) -> Hashed | None:
    """The hashes that the last entry of a lineage states of the tensors here, if it does.

    The tensors that have one are hashed from here on as they are read.
    """
    last = lineage[-1] if isinstance(lineage, list) and lineage else None
    if not isinstance(last, dict) or KEY not in last:
        return None
    algorithm, arrays = read_stated(last[KEY], list(tensors), path / LINEAGE)
    if algorithm in ALGORITHMS:
        tensors |= {name: _hash_when_read(tensors[name], algorithm) for name in arrays}
    spans = {name: tensors[name].span for name in arrays}
    finish = {
        name: Finish(span.passing, span) for name, span in spans.items() if span and span.passing
    }
    return Hashed(algorithm, arrays, lambda name: tensors[name].read_bytes(), finish=finish)


def _hash_when_read(tensor: Tensor, algorithm: str) -> Tensor:
    """The tensor, hashed from here on as it is read; the same one where it is not raw bytes."""
    span = tensor.span
    if span is None:
        return tensor
    passing = Passing(span.offset, span.size, algorithm)
    found = open_raw(span.path, span.offset, tensor.shape, tensor.dtype, span.stamp, passing)
    assert found.span is not None
    return replace(found, span=replace(found.span, checksum=span.checksum))


def _list_weight_files(path: Path) -> list[Path]:
    """The files that transformers would read: the whole file, else the shards of the index.

    With neither, every safetensors file of the directory.
    """
    if (path / WHOLE).exists():
        files = [path / WHOLE]
    elif (path / INDEX).exists():
        files = _list_shards(path, INDEX)
    else:
        # Some tools write shards without an index; which tensor is where, the headers say.
        files = sorted(path.glob("*.safetensors")) or _list_pickled(path)
    for file in files:
        require_inside(path, file)
    if files:
        return files
    refuse_file(path)
    hint = ""
    others = sorted(file.name for file in path.iterdir() if file.suffix in WEIGHTS)
    if others:
        hint = f"; it has {others[0]}: save it from transformers as safetensors first"
    raise GrowkitError(
        f"{path} has a config.json but no .safetensors file, and no {PICKLED} either{hint}"
    )


def _list_pickled(path: Path) -> list[Path]:
    """The files that torch pickled, where there are no others."""
    if (path / PICKLED).exists():
        return [path / PICKLED]
    return _list_shards(path, PICKLED_INDEX) if (path / PICKLED_INDEX).exists() else []


def _list_shards(path: Path, name: str) -> list[Path]:
    """The files that an index names. Raises GrowkitError for a broken index or a missing file."""
    index = path / name
    require_inside(path, index)
    content = read_json(index, JSON_LIMIT)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise GrowkitError(f"{index} has no weight_map of tensor names to file names")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise GrowkitError(f"{index} has no weight_map of tensor names to file names")
    files = [path / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not os.path.lexists(file):
            raise GrowkitError(f"{index} names the shard {file.name!r}, which is not there")
    return files


def _read_headers(path: Path, files: list[Path], buffers: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of all weight files. Raises GrowkitError for a tensor that is there twice."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = _read_file(file, buffers)
        twice = tensors.keys() & found.keys()
        if twice:
            raise GrowkitError(
                f"{path} holds the tensor {min(twice)!r} twice, the second time in {file.name}"
            )
        tensors |= found
    _check_index(path, files, tensors)
    return tensors


def _read_file(file: Path, buffers: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of one file, without its bytes."""
    if file.suffix == ".safetensors":
        return read_header(file, buffers)
    from growkit.checkpoint.pickled import read_pickled

    return read_pickled(file, lambda name: name.endswith(buffers))


def _check_index(path: Path, files: list[Path], tensors: dict[str, Tensor]) -> None:
    """Raise GrowkitError if the index, where it was used, names a tensor that no shard holds."""
    safe = files[0].suffix == ".safetensors"
    index = path / (
        INDEX
        # transformers reads the whole file where there is one, and then no index.
        if safe
        else PICKLED_INDEX
    )
    if files[0].name in (WHOLE, PICKLED) or not index.exists():
        return
    missing = set(read_json(index)["weight_map"]) - set(tensors)
    if missing:
        raise GrowkitError(f"{index} names the tensor {min(missing)!r}, which no shard holds")


def write_directory(
    path: Path, contents: Contents, progress: Progress | None = None, shard: int = SHARD
) -> Findings:
    """Write the params of `contents` as a Hugging Face directory at `path`, which must not exist.

    shard: the most bytes of tensors in one file (a larger tensor gets a file of its own). The last
    entry of the lineage gets the hashes of the tensors. Returns what was found in the numbers.
    """
    path.mkdir()
    contents = _put_back_around(contents)
    with collect_jobs() as jobs:
        weight_map = begin_shards(path, contents.recipes["params"], shard, jobs)
        filled = fill(jobs, progress)
    write_beside(path, contents, weight_map, filled)
    return filled.findings


def _put_back_around(contents: Contents) -> Contents:
    """The contents with what lies around a text decoder, under the names of its files."""
    around = contents.around
    if around is None:
        return contents
    params = around.write_recipes(contents.recipes["params"])
    config = around.write_config(contents.config)
    return replace(contents, config=config, recipes={**contents.recipes, "params": params})


def write_beside(
    path: Path,
    contents: Contents,
    weight_map: Mapping[str, str],
    filled: Filled,
    also: tuple[str, ...] = (),
) -> None:
    """Write all that is not weights: small files, configuration, lineage, index.

    also: further names of small files. The hash of a moment stands under SLOT.NAME.
    """
    for name, content in select_carried(contents.files, also).items():
        (path / name).write_bytes(content)
    hashes = {
        name if slot == "params" else f"{slot}.{name}": value
        for (slot, name), value in filled.hashes.items()
        if slot
    }
    (path / "config.json").write_bytes(encode_json(drop_code_keys(contents.config)[0]))
    (path / LINEAGE).write_bytes(encode_json(state_in_lineage(contents.lineage, hashes)))
    if len(set(weight_map.values())) > 1:
        # The index comes last: a directory without it does not load as one of shards.
        total = sum(recipe.size for recipe in contents.recipes["params"].values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / INDEX).write_bytes(encode_json(index))


def begin_shards(
    path: Path, recipes: dict[str, Recipe], limit: int, jobs: list[Job]
) -> dict[str, str]:
    """Reserve all weight files and add the jobs that fill them; returns the file of each tensor."""
    shards = _split_into_shards(recipes, limit)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file_name = WHOLE
        if len(shards) > 1:
            file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, file_name)
        jobs += _begin_shard(path / file_name, {name: recipes[name] for name in names})
    return weight_map


def _split_into_shards(recipes: dict[str, Recipe], limit: int) -> list[list[str]]:
    """The names of the tensors of each file, in order, at most `limit` bytes a file."""
    shards: list[list[str]] = [[]]
    room = limit
    for name, recipe in recipes.items():
        # A tensor larger than the limit stands alone: files are never cut within a tensor.
        if shards[-1] and recipe.size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= recipe.size
    return shards


def _begin_shard(path: Path, recipes: dict[str, Recipe]) -> list[Job]:
    """Reserve the file, write its header, and return the jobs that fill it."""
    # transformers 4 refuses a file whose metadata does not say which framework wrote it.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    offset = 0
    for name, recipe in recipes.items():
        offsets[name] = offset
        header[name] = {
            "dtype": NAMES[recipe.dtype],
            "shape": list(recipe.shape),
            "data_offsets": [offset, offset + recipe.size],
        }
        offset += recipe.size
    text = json.dumps(header, separators=(",", ":")).encode()
    # Data begins at a multiple of 8 bytes, so that every dtype is aligned in a mapped file.
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    file = create_file(path, base + offset)
    os.pwrite(file, struct.pack("<Q", len(text)) + text, 0)
    return [
        Job("params", name, (recipe,), file, base + offsets[name])
        for name, recipe in recipes.items()
    ]
