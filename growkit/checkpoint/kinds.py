"""What a directory holds, by the names in it: which reader opens it, and which writer makes one.

Only names are looked at here, and only the reader that is wanted is imported: those of other
trainers' files take longer to import than a Hugging Face directory takes to open.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from growkit.checkpoint.tensor import Source

ROOM = "growkit.checkpoint"
# The trainer's own: Orbax writes FINISHED last, STATE holds the arrays.
FINISHED, STATE = "_CHECKPOINT_METADATA", "state"
# PyTorch's distributed checkpoints, and accelerate's folders of them: of the model, the optimizer.
METADATA = ".metadata"
FOLDERS = ("pytorch_model_fsdp_0", "optimizer_0")
# Hugging Face directories, and what transformers' Trainer puts beside the weights.
CONFIG = "config.json"
# Weights that torch pickled, whole or in shards that an index names.
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
LATEST = "latest_universal"
OLMO = ("optim.safetensors", "config.yaml")
NEOX = "mp_rank_00_model_states.pt"


def is_checkpoint(path: Path) -> bool:
    """Whether this is one of the trainer's checkpoints, finished or not."""
    return (path / FINISHED).is_file() or (path / STATE).is_dir()


def is_distributed(path: Path) -> bool:
    """Whether a directory is a distributed checkpoint of PyTorch."""
    return any((path / folder / METADATA).is_file() for folder in ("", FOLDERS[0]))


def is_universal(path: Path) -> bool:
    """Whether this is a directory that an engine of DeepSpeed loads a universal checkpoint from."""
    return (path / LATEST).is_file()


def is_directory(path: Path) -> bool:
    """Whether this looks like a Hugging Face directory."""
    return (path / CONFIG).is_file()


def is_trained(path: Path) -> bool:
    """Whether this is a Hugging Face directory with an optimizer of PyTorch beside it."""
    return is_directory(path) and (path / OPTIMIZER).is_file()


def is_olmo(path: Path) -> bool:
    """Whether this is an unsharded checkpoint of OLMo in safetensors files."""
    return all((path / name).is_file() for name in OLMO)


def is_neox(path: Path) -> bool:
    """Whether this is a checkpoint of DeepSpeed, as gpt-neox saves it."""
    return (path / NEOX).is_file()


@dataclass(frozen=True)
class Kind:
    """One kind of directory. reader: the module and the function that open one."""

    holds: Callable[[Path], bool]
    reader: tuple[str, str]

    def open(self, path: Path) -> Source:
        """Open a directory of this kind."""
        module, function = self.reader
        source: Source = getattr(import_module(f"{ROOM}.{module}"), function)(path)
        return source


# The first that holds is the kind: a Hugging Face directory may have more beside it.
KINDS = (
    Kind(is_checkpoint, ("orbax", "open_checkpoint")),
    Kind(is_distributed, ("dcp", "open_distributed")),
    Kind(is_universal, ("universal", "open_universal")),
    Kind(is_trained, ("hf_trainer", "open_trained")),
    Kind(is_directory, ("huggingface", "open_directory")),
    Kind(is_olmo, ("olmo", "open_olmo")),
    Kind(is_neox, ("neox", "open_neox")),
)
# The kind of an output -> the module and the function that write one.
WRITERS = {
    "checkpoint": ("orbax", "write_checkpoint"),
    "hf_trainer": ("hf_trainer", "write_trained"),
    "dcp": ("dcp_write", "write_distributed"),
    "universal": ("universal_output", "write_universal"),
    "huggingface": ("huggingface", "write_directory"),
}


def find_kind(path: Path) -> Kind | None:
    """The kind of a directory; None for one that is no model."""
    return next((kind for kind in KINDS if kind.holds(path)), None)
