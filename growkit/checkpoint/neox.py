"""GPT-NeoX's own checkpoints, of EleutherAI's gpt-neox, with Adam's moments.

    global_step1000/layer_00-model_00-model_states.pt     the embedding, of tensor-parallel rank 0
    global_step1000/layer_02-model_00-model_states.pt     the first layer; 01 has no parameters
    global_step1000/mp_rank_00_model_states.pt            the step, and the order of parameters
    global_step1000/zero_pp_rank_0_mp_rank_00_optim_states.pt    see `growkit.checkpoint.zero`
    global_step1000/configs/*.yml, or *.yml               the settings of the training

The parameters are those that the optimizer updates, in float32. The layer files hold them in the
precision of the training; each is compared, cast, with the parameter that was cut for it, so a
wrong cut is an error and never a wrong model. Neither torch nor deepspeed is needed, and no pickle
is run. Names and how ranks are joined: gpt-neox, tools/ckpts/convert_neox_to_hf.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from growkit.checkpoint.carried import list_beside, require_inside
from growkit.checkpoint.neox_settings import Settings, read_settings
from growkit.checkpoint.tensor import Source, Tensor
from growkit.checkpoint.torch_pickle import Stored
from growkit.checkpoint.torch_zip import TorchFile, open_torch_file
from growkit.checkpoint.zero import (
    Cut,
    Partition,
    cut_parameters,
    open_partitions,
    open_state,
    require_single,
)
from growkit.errors import GrowkitError

KIND = "neox"
SLOTS = ("params", "mu", "nu")
LAYER_FILE = re.compile(r"layer_(\d+)-(?:model_(\d+)-)?model_states\.pt")
STATES = "mp_rank_{:02d}_model_states.pt"
# Modules of a layer under another name in newer versions.
RENAMED = {"mlp.linear1.": "mlp.dense_h_to_4h.", "mlp.linear2.": "mlp.dense_4h_to_h."}
# How the parts of the ranks are joined: end to end on the first axis or the second, or as the mean
# of replicas, or as their sum.
FIRST, SECOND, MEAN, SUM = "first", "second", "mean", "sum"
LAYER = {
    "input_layernorm.weight": MEAN,
    "input_layernorm.bias": MEAN,
    "attention.query_key_value.weight": FIRST,
    "attention.query_key_value.bias": FIRST,
    "attention.dense.weight": SECOND,
    "attention.dense.bias": MEAN,
    "post_attention_layernorm.weight": MEAN,
    "post_attention_layernorm.bias": MEAN,
    "mlp.dense_h_to_4h.weight": FIRST,
    "mlp.dense_h_to_4h.bias": FIRST,
    "mlp.dense_4h_to_h.weight": SECOND,
    "mlp.dense_4h_to_h.bias": MEAN,
}
# With parallel residuals each rank adds its bias before the sum over the ranks.
SUMMED = ("attention.dense.bias", "mlp.dense_4h_to_h.bias")
VOCAB = "gpt_neox.embed_in.weight"
MLP = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
# What layer files hold beside parameters.
BUFFERS = ("inv_freq", "attention.bias", "attention.masked_bias")
TIED = re.compile(r"tied_modules\.\w+\.")


@dataclass(frozen=True)
class Piece:
    """A parameter on one rank of tensor parallelism: cut from the optimizer, and as it was used."""

    name: str
    cut: Cut
    used: Tensor

    def read(self, slot: str, first: int, last: int) -> np.ndarray:
        """The rows [first, last). Raises GrowkitError where parameters are not those used."""
        rows = self.cut.read(slot, first, last)
        if slot == "params":
            used = self.used.rows(first, last)
            with np.errstate(over="ignore"):
                cast = rows.astype(used.dtype)
            if not np.array_equal(cast, used, equal_nan=used.dtype.kind == "f"):
                raise GrowkitError(
                    f"{self.name}: the optimizer's float32 numbers are not those of the layer file "
                    f"when rounded to {used.dtype}; the checkpoint is damaged, of two saves, or "
                    "its vectors are in an order that growkit does not know"
                )
        return rows


def open_neox(path: Path) -> Source:
    """Open a checkpoint of gpt-neox; reads the settings and the pickles, no tensor.

    It cannot be grown as it is, and `Source.refusal` says what to do. Raises GrowkitError, naming
    the file, for what is missing, and for a model that transformers has no class for.
    """
    files = _list_files(path)
    settings = read_settings(path)
    layers = _list_layers(path, settings)
    ranks = [_open_rank(path, rank, each) for rank, each in enumerate(layers)]
    names = _name_parameters(settings, ranks[0].pieces)
    tensors: dict[str, dict[str, Tensor]] = {
        slot: {
            name: _join([rank.pieces[key] for rank in ranks], how, slot)
            for key, (name, how) in names.items()
        }
        for slot in SLOTS
    }
    beside = list_beside(path, tuple(_list_used(path)))
    return Source(
        path=path,
        kind=KIND,
        config=settings.make_config(_find_size(tensors, VOCAB), _find_size(tensors, MLP)),
        tensors=tensors,
        weights=files,
        lineage=[],
        record=_read_record(path, ranks[0].partitions),
        read_files=beside.read,
        notes=(*_note_replicas(ranks, names), *beside.notes),
        refusal=f"{path} is a checkpoint of gpt-neox: `growkit import {path} OUT` makes a trainer "
        "checkpoint of it, with its moments, and that grows",
    )


def _list_files(path: Path) -> list[Path]:
    """The files of torch.save. Raises GrowkitError for another checkpoint of DeepSpeed."""
    if (path / "zero").is_dir():
        raise GrowkitError(
            f"{path} is within a universal checkpoint of DeepSpeed; name the directory above it, "
            "which has latest_universal"
        )
    files = sorted(file for file in path.iterdir() if file.suffix == ".pt")
    for file in files:
        require_inside(path, file)
    if not any(LAYER_FILE.fullmatch(file.name) for file in files):
        raise GrowkitError(
            f"{path} is a checkpoint of DeepSpeed without layer_*-model_states.pt; growkit reads "
            "those that gpt-neox saves with pipe_parallel_size 1"
        )
    return files


def _find_size(tensors: Mapping[str, Mapping[str, Tensor]], name: str) -> int:
    """The first size of a parameter, of all ranks together; 0 where it is missing."""
    tensor = tensors["params"].get(name)
    return tensor.shape[0] if tensor is not None else 0


def _list_used(path: Path) -> list[str]:
    """Files that are read here, or that belong to the training."""
    return [file.name for file in path.iterdir() if file.suffix in (".pt", ".yml", ".yaml", ".py")]


def _list_layers(path: Path, settings: Settings) -> list[dict[int, TorchFile]]:
    """The layer files of each rank of tensor parallelism, by number."""
    found: dict[int, dict[int, Path]] = {}
    for file in sorted(path.iterdir()):
        match = LAYER_FILE.fullmatch(file.name)
        if match:
            of_rank = found.setdefault(int(match[2] or 0), {})
            require_single(of_rank.setdefault(int(match[1]), file), file)
    count = settings.ranks or max(found) + 1
    wanted = [0, *(2 + n for n in range(settings.layers)), settings.layers + 3]
    wanted += [] if settings.tied else [settings.layers + 4]
    for rank in range(count):
        for layer in wanted:
            if layer not in found.get(rank, {}):
                name = f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"
                raise GrowkitError(
                    f"{path / name} is missing: the model has {settings.layers} layers, and was "
                    f"cut among {count} ranks"
                )
    if len(found) > count:
        raise GrowkitError(
            f"{path} has layer files of {len(found)} ranks; the settings say {count}"
        )
    return [{n: _open_layer(found[rank][n]) for n in wanted} for rank in range(count)]


def _open_layer(path: Path) -> TorchFile:
    file = open_torch_file(path)
    if not isinstance(file.value, Mapping):
        raise GrowkitError(f"{path} holds no tensors by name, but a {type(file.value).__name__}")
    return file


@dataclass(frozen=True)
class Rank:
    """What one rank of tensor parallelism holds. pieces: LAYER.NAME -> its piece."""

    pieces: dict[str, Piece]
    partitions: list[Partition]


def _open_rank(path: Path, rank: int, layers: Mapping[int, TorchFile]) -> Rank:
    """Open the files of one rank. Raises GrowkitError where its files do not fit each other."""
    used = {}
    for number, file in layers.items():
        for key, stored in file.value.items():
            if isinstance(stored, Stored) and not str(key).endswith(BUFFERS):
                used[f"{number}.{key}"] = file.open_tensor(stored, str(key))
    partitions = open_partitions(path, rank)
    groups = _read_groups(path, rank)
    shapes = {name: tensor.shape for name, tensor in used.items()}
    if groups is None:
        groups = _make_groups(shapes, len(partitions[0].masters))
    listed = {name: shape for group in groups for name, shape in group.items()}
    for name in sorted(listed.keys() | shapes.keys()):
        if listed.get(name) != shapes.get(name):
            raise GrowkitError(
                f"{path}: {name} has the shape {_show(listed.get(name))} in the optimizer of rank "
                f"{rank}, and {_show(shapes.get(name))} in its layer file"
            )
    cuts = cut_parameters(partitions, groups)
    pieces = {name: Piece(f"{path}: {name}", cuts[name], used[name]) for name in used}
    return Rank(pieces, partitions)


def _show(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def _read_groups(path: Path, rank: int) -> list[dict[str, tuple[int, ...]]] | None:
    """The parameters of each group in the order of its vector, where the checkpoint states it.

    DeepSpeed states it since 0.4, in mp_rank_*_model_states.pt.
    """
    file = path / STATES.format(rank)
    if not file.is_file():
        raise GrowkitError(f"{file} is missing: it has the order of the parameters")
    groups = open_state(file).value.get("param_shapes")
    if not isinstance(groups, list) or not all(isinstance(each, Mapping) for each in groups):
        return None
    shapes = [shape for group in groups for shape in group.values()]
    if not all(isinstance(shape, tuple) for shape in shapes):
        raise GrowkitError(f"{file}: param_shapes has a shape that is none")
    return [{TIED.sub("0.", str(name)): group[name] for name in group} for group in groups]


def _make_groups(
    shapes: Mapping[str, tuple[int, ...]], count: int
) -> list[dict[str, tuple[int, ...]]]:
    """The groups as gpt-neox makes them: what decays, then norms and biases, each in the order of
    the modules, which is that of the layer files (get_params_for_weight_decay_optimization).

    count: of the groups; without decay there is one.
    """
    if count == 1:
        return [dict(shapes)]
    exempt = {name for name in shapes if name.endswith(".bias") or "norm." in name}
    return [
        {name: shape for name, shape in shapes.items() if name not in exempt},
        {name: shape for name, shape in shapes.items() if name in exempt},
    ]


def _name_parameters(settings: Settings, pieces: Mapping[str, Piece]) -> dict[str, tuple[str, str]]:
    """LAYER.NAME -> (name in files of transformers, how ranks are joined).

    Raises GrowkitError for a parameter that transformers' GPT-NeoX has no place for.
    """
    last = settings.layers
    ends = {
        "0.word_embeddings.weight": (VOCAB, FIRST),
        f"{last + 3}.norm.weight": ("gpt_neox.final_layer_norm.weight", MEAN),
        f"{last + 3}.norm.bias": ("gpt_neox.final_layer_norm.bias", MEAN),
        f"{last + 4}.final_linear.weight": ("embed_out.weight", FIRST),
    }
    names = {}
    for key, piece in pieces.items():
        number, _, inner = key.partition(".")
        for new, old in RENAMED.items():
            inner = inner.replace(new, old)
        how = LAYER.get(inner)
        if settings.parallel and inner in SUMMED:
            how = SUM
        if key in ends:
            names[key] = ends[key]
        elif how is not None and 2 <= int(number) < last + 2:
            names[key] = (f"gpt_neox.layers.{int(number) - 2}.{inner}", how)
        else:
            raise GrowkitError(f"{piece.name}: transformers' GPT-NeoX has no such parameter")
    return names


def _join(pieces: Sequence[Piece], how: str, slot: str) -> Tensor:
    """A slot of a parameter, of the pieces of all ranks."""
    shape = pieces[0].cut.shape
    rows: Callable[[int, int], np.ndarray]
    if len(pieces) == 1:
        return Tensor(shape, np.dtype(np.float32), lambda a, b: pieces[0].read(slot, a, b))
    if how == FIRST:
        each = shape[0]
        shape = (each * len(pieces), *shape[1:])

        def rows(start: int, stop: int) -> np.ndarray:
            return np.concatenate(
                [
                    piece.read(slot, max(start - n * each, 0), min(stop - n * each, each))
                    for n, piece in enumerate(pieces)
                    if start < (n + 1) * each and stop > n * each
                ]
            )
    elif how == SECOND:
        shape = (shape[0], shape[1] * len(pieces))

        def rows(start: int, stop: int) -> np.ndarray:
            return np.concatenate([piece.read(slot, start, stop) for piece in pieces], axis=1)
    else:

        def rows(start: int, stop: int) -> np.ndarray:
            # Of equal replicas the mean is each of them, exactly: float64 holds the sum.
            total = sum(piece.read(slot, start, stop).astype(np.float64) for piece in pieces)
            share = 1 if how == SUM and slot == "params" else len(pieces)
            return np.asarray(total / share, np.float32)

    return Tensor(shape, np.dtype(np.float32), rows)


def _note_replicas(ranks: Sequence[Rank], names: Mapping[str, tuple[str, str]]) -> tuple[str, ...]:
    """A note of replicated parameters that are not equal on all ranks, if there are any."""
    if len(ranks) == 1:
        return ()
    differing = []
    for key, (name, how) in names.items():
        if how not in (MEAN, SUM):
            continue
        cuts = [rank.pieces[key].cut for rank in ranks]
        found = [cut.read("params", 0, cut.shape[0]) for cut in cuts]
        if not all(np.array_equal(found[0], other) for other in found[1:]):
            differing.append(name)
    if not differing:
        return ()
    more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
    return (f"{differing[0]}{more} differ between the ranks; they are joined as if they did not",)


def _read_record(path: Path, partitions: Sequence[Partition]) -> dict[str, Any]:
    """The step, and how many steps Adam took: as it says, or those that were not skipped."""
    held = open_state(path / STATES.format(0)).value
    step = _take_whole(held.get("iteration"), held.get("global_steps"))
    taken = max(0, step - _take_whole(held.get("skipped_steps")))
    schedule = held.get("lr_scheduler")
    passed = schedule.get("num_iters") if isinstance(schedule, Mapping) else None
    count = partitions[0].count
    return {
        "step": step,
        "schedule_step": _take_whole(passed, taken),
        "count": taken if count is None else count,
    }


def _take_whole(*values: Any) -> int:
    """The first that is a whole number from 0; 0 if none is."""
    return next((value for value in values if type(value) is int and value >= 0), 0)
