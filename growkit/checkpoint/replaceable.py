"""Whether --force may replace a directory: only what growkit, or a model's author, wrote there.

A name like config.json is not enough: projects of all kinds have one. What is inside must be what
an output holds, and nothing else may lie beside it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from growkit.checkpoint.carried import is_carried_name
from growkit.checkpoint.files import read_json, read_regular
from growkit.checkpoint.kinds import FINISHED, FOLDERS, LATEST, METADATA
from growkit.errors import GrowkitError

# What directories of models hold beside the files that growkit carries.
MODEL_FILE = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|ot|json|md|py|png|jinja)|\.gitattributes",
    re.IGNORECASE,
)
DATA_FILE = re.compile(r"\.metadata|__\d+_\d+\.distcp")
PROGRAM_FILE = re.compile(r"(random_states|custom_checkpoint)_\d+\.pkl")
# What lies in the directory of a universal checkpoint of DeepSpeed's.
UNIVERSAL_FILE = re.compile(
    r"mp_rank_00_model_states\.pt|zero/(optimizer_state\.pt|[^/]+/(fp32|exp_avg|exp_avg_sq|step)\.pt)"
)
# A few kilobytes of a run's configuration say what it is.
HEAD = 65536


def find_foreign(out: Path) -> str:
    """What says that a directory is not an output of growkit's, as a clause; empty if it is one.

    An empty directory is one.
    """
    names = {path.name: path for path in out.iterdir()}
    if not names:
        return ""
    for mark, is_output in OUTPUTS.items():
        if mark in names and names[mark].is_file():
            return is_output(names)
    return f"holds none of {', '.join(OUTPUTS)}"


def _check_model(names: Mapping[str, Path]) -> str:
    config = _read(names["config.json"])
    if not isinstance(config, dict) or not {"model_type", "architectures"} & config.keys():
        return "has a config.json that describes no model"
    if FOLDERS[0] in names and (names[FOLDERS[0]] / METADATA).is_file():
        return _check_folders(names)
    # A config.json alone could be any transformers project's.
    if not any(name.endswith(".safetensors") for name in names):
        return "holds no .safetensors file"
    return _find_other(names, lambda name: is_carried_name(name) or MODEL_FILE.fullmatch(name))


def _check_folders(names: Mapping[str, Path]) -> str:
    """The directories of accelerate's, and what lies around them."""
    for folder in FOLDERS:
        inner = names[folder].iterdir() if folder in names else ()
        other = _find_other({path.name: path for path in inner}, DATA_FILE.fullmatch)
        if other:
            return f"has a directory {folder!r} that {other}"
    return _check_distributed({n: path for n, path in names.items() if n not in FOLDERS})


def _check_universal(names: Mapping[str, Path]) -> str:
    tag = read_regular(names[LATEST], HEAD).decode(errors="replace").strip()
    home = names.get(tag)
    if home is None or not (home / "zero").is_dir():
        return f"has a {LATEST} that names no directory with zero/"
    for path in sorted(home.rglob("*")):
        name = path.relative_to(home).as_posix()
        if not path.is_dir() and not UNIVERSAL_FILE.fullmatch(name):
            return f"holds the file {f'{tag}/{name}'!r}, which no output of growkit's has"
    around = {name: path for name, path in names.items() if name not in (tag, LATEST)}
    return _find_other(around, lambda name: is_carried_name(name) or MODEL_FILE.fullmatch(name))


def _check_distributed(names: Mapping[str, Path]) -> str:
    def is_own(name: str) -> bool:
        patterns = (MODEL_FILE, DATA_FILE, PROGRAM_FILE)
        return is_carried_name(name) or any(each.fullmatch(name) for each in patterns)

    if METADATA in names and not any(name.endswith(".distcp") for name in names):
        return "holds no .distcp file"
    return _find_other(names, is_own)


def _check_checkpoint(names: Mapping[str, Path]) -> str:
    return "" if names.keys() >= {"state", "meta"} else "holds no state and meta of a checkpoint"


def _check_tokens(names: Mapping[str, Path]) -> str:
    manifest = _read(names["manifest.json"])
    if not isinstance(manifest, dict) or "tokenizer_sha256" not in manifest:
        return "has a manifest.json that describes no tokens"
    return _find_other(names, lambda name: name.endswith((".bin", ".json", ".npy", ".idx")))


def _check_run(names: Mapping[str, Path]) -> str:
    with open(names["config.yaml"], "rb") as file:
        head = file.read(HEAD).decode(errors="replace")
    if not re.search(r"^growkit:", head, re.MULTILINE):
        return "has a config.yaml that growkit did not write"
    return ""


OUTPUTS: dict[str, Callable[[Mapping[str, Path]], str]] = {
    FINISHED: _check_checkpoint,
    METADATA: _check_distributed,
    LATEST: _check_universal,
    "config.json": _check_model,
    "manifest.json": _check_tokens,
    "config.yaml": _check_run,
}


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except GrowkitError:
        return None


def _find_other(names: Mapping[str, Path], is_own: Callable[[str], Any]) -> str:
    """A clause that names what no output holds."""
    for name, path in sorted(names.items()):
        if not is_own(name) or (path.is_dir() and not path.is_symlink()):
            kind = "the directory" if os.path.isdir(path) else "the file"
            return f"holds {kind} {name!r}, which no output of growkit's has"
    return ""
