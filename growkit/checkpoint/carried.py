"""Which files of a model's directory are read and carried along: a list of kinds, nothing else.

A model's directory is data from strangers. Files of no kind here are left behind: weights in other
formats, pickles, Python, what belongs to the training before. So are files that lie elsewhere: a
link must stay in the directory, or lead from a snapshot of the Hub's cache to that cache's blobs.
"""

from __future__ import annotations

import base64
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growkit.checkpoint.files import KINDS as FILE_KINDS
from growkit.checkpoint.files import LFS_POINTER, change_json, read_regular
from growkit.errors import GrowkitError

# Names of files that are carried, in lower case.
TOKENIZER = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.json|vocab\.txt|vocab\.bpe|encoder\.json|merges\.txt|normalizer\.json|tekken\.json"
    r"|tokenizer\.model(\.v\d+)?|(spiece|spm|sentencepiece|sentencepiece\.bpe|bpe|source|target)"
    r"\.(model|vocab)|[\w.-]+\.tiktoken"
)
GENERATION = re.compile(r"generation_config\.json|chat_template\.jinja|chat_template\.json")
# How pictures and sound become numbers, for models around a text decoder.
PROCESSORS = re.compile(
    r"((image_|video_)?pre)?processor_config\.json|(feature_extractor|image_processor)_config\.json"
)
LICENCES = re.compile(
    r"(licen[cs]es?|copying|copyright|notice|third[-_]?party[-_]?notices?|use[-_]policy"
    r"|authors|citation)([-_.][\w.-]+)?(\.(txt|md|cff|rst))?"
)
CARDS = re.compile(r"(readme|model[-_]?card)([-_.]\w+)?\.md|readme(\.txt)?")
CARRIED = (TOKENIZER, GENERATION, PROCESSORS, LICENCES, CARDS)
# Endings that none of them has, whatever comes before.
NEVER = re.compile(
    r"\.(safetensors|bin|pth?|ckpt|h5|msgpack|gguf|onnx|ot|np[yz]|pkl|pickle|joblib|tflite|py|pyc"
    r"|so|sh|zip|tar|gz)$"
)
# Tokenizers are well below this. Anything larger is data or weights, and is read into memory.
LIMIT = 100_000_000
# How weights, archives and pickles begin, whatever they are called.
BINARIES = (b"PK\x03\x04", b"\x1f\x8b", b"\x7fELF", b"\x89HDF", b"GGUF", b"\x93NUMPY")
PICKLE = re.compile(rb"\x80[\x02-\x05]")
# Names of what is an optimizer's, a schedule's or a random state's, of several trainers.
OPTIMIZER = re.compile(
    r"optimizer.*|.*optim_states\.pt|global_step\d+|pytorch_model_fsdp_\d+|distributed_checkpoint"
)
# Names shown of files that were left behind.
SHOWN = 5
# Keys of JSON files that name Python to be run.
CODE_KEYS = ("auto_map", "custom_pipelines")


def is_carried_name(name: str) -> bool:
    """Whether files of this name are carried along."""
    low = name.lower()
    if low.startswith(".") or NEVER.search(low) or "/" in name or "\0" in name:
        return False
    return any(kind.fullmatch(low) for kind in CARRIED)


@dataclass(frozen=True)
class Beside:
    """What lies beside the weights of a model's directory.

    carried: the files to carry along. notes: what was passed over and why, a sentence each.
    optimizer: the name of what holds an optimizer, empty for none.
    """

    carried: tuple[Path, ...]
    notes: tuple[str, ...]
    optimizer: str

    def read(self) -> dict[str, bytes]:
        """The carried files, by name, without what names Python to be run."""
        contents = {path.name: read_regular(path, LIMIT) for path in self.carried}
        return {
            name: drop_code(name, content)
            for name, content in contents.items()
            if not is_binary(content)
        }


def list_beside(directory: Path, used: tuple[str, ...]) -> Beside:
    """Sort the files beside the weights. used: names that were read already."""
    carried: list[Path] = []
    left: list[str] = []
    notes: list[str] = []
    optimizer = ""
    for path in sorted(directory.iterdir()):
        if path.name in used or path.name.startswith("."):
            continue
        if OPTIMIZER.fullmatch(path.name):
            optimizer = optimizer or path.name
        reason = _find_reason(directory, path)
        if reason is None:
            carried.append(path)
        elif reason:
            notes.append(f"{path.name} is left behind: {reason}")
        elif not path.is_dir():
            left.append(path.name)
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        notes.append(
            f"{', '.join(left[:SHOWN])}{more} left behind: growkit carries tokenizers, generation "
            "settings, chat templates, processors' settings, licences and cards"
        )
    return Beside(tuple(carried), tuple(notes), optimizer)


def _find_reason(directory: Path, path: Path) -> str | None:
    """Why a file is not carried: None for one that is, empty where its kind says it."""
    if not is_carried_name(path.name):
        return ""
    problem = find_outside(directory, path)
    if problem:
        return problem
    if path.stat().st_size > LIMIT:
        return f"it has more than {LIMIT:,} bytes"
    head = read_head(path)
    if is_binary(head):
        return "its bytes are a pickle's or an archive's"
    if head.startswith(LFS_POINTER):
        return "it is a Git LFS pointer, not the file; `git lfs pull` fetches that"
    return None


def require_inside(directory: Path, path: Path) -> None:
    """Raise GrowkitError unless a path is a plain file that lies in the directory."""
    problem = find_outside(directory, path)
    if problem:
        raise GrowkitError(f"{path} is not read: {problem}")


def find_outside(directory: Path, path: Path) -> str:
    """Why a file may not be read: it lies elsewhere, or is not a plain file. Empty if it may."""
    home = Path(os.path.realpath(directory))
    real = Path(os.path.realpath(path))
    # Resolved paths are compared: a link in the directory may lead through other links.
    if home not in real.parents and _find_blobs(home) != real.parent:
        return f"it leads to {real}, outside the directory; put the file itself there"
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except OSError as problem:
        return f"{problem.strerror}"
    if kind != stat.S_IFREG:
        return f"it is {FILE_KINDS.get(kind, 'no file')}, not a plain file"
    return ""


def list_inside(directory: Path, pattern: re.Pattern[str]) -> tuple[str, ...]:
    """The names that fit a pattern, sorted, of plain files that lie in a directory themselves."""
    return tuple(
        sorted(
            file.name
            for file in directory.iterdir()
            if pattern.fullmatch(file.name) and not find_outside(directory, file)
        )
    )


def _find_blobs(home: Path) -> Path | None:
    """The blobs of the Hub's cache that a directory is a snapshot of.

    hub/models--OWNER--NAME/snapshots/REVISION has links to hub/models--OWNER--NAME/blobs.
    """
    for snapshot in (home, *home.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith("models--"):
            return repository / "blobs"
    return None


def read_head(path: Path, size: int = 200) -> bytes:
    """The first bytes of a plain file."""
    with open(path, "rb") as file:
        return file.read(size)


def is_binary(content: bytes) -> bool:
    """Whether bytes begin as a pickle, an archive or a program does."""
    return content.startswith(BINARIES) or PICKLE.match(content) is not None


def select_carried(files: Mapping[str, bytes], also: tuple[str, ...] = ()) -> dict[str, bytes]:
    """The files, from a checkpoint, that may be carried along. also: further names."""
    return {
        name: drop_code(name, content)
        for name, content in files.items()
        if name in also or (is_carried_name(name) and not is_binary(content))
    }


def drop_code(name: str, content: bytes) -> bytes:
    """A configuration file without the keys that name Python to be run; others as they are."""
    # A quick look at the bytes first: tokenizers have megabytes and hardly ever name code.
    if not name.endswith(".json") or not any(key.encode() in content for key in CODE_KEYS):
        return content
    return change_json(content, _leave_out_code)


def _leave_out_code(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: part for key, part in value.items() if key not in CODE_KEYS}


def drop_code_keys(config: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A configuration without the keys that name Python to be run, and a note of them."""
    found = [key for key in CODE_KEYS if key in config]
    if not found:
        return config, ()
    kept = {key: value for key, value in config.items() if key not in found}
    return kept, (
        f"{' and '.join(found)} of config.json left out: it names Python files to be run, and "
        "growkit carries none",
    )


def encode_files(files: Mapping[str, bytes]) -> dict[str, dict[str, str]]:
    """Small files as JSON: UTF-8 text as text, anything else in base64."""
    encoded = {}
    for name, content in files.items():
        # Text stays readable in the JSON, and as small as it is; base64 takes a third more.
        try:
            encoded[name] = {"text": content.decode()}
        except UnicodeDecodeError:
            encoded[name] = {"base64": base64.b64encode(content).decode()}
    return encoded


def decode_files(encoded: Mapping[str, Mapping[str, str]]) -> dict[str, bytes]:
    """The inverse of `encode_files`. Raises GrowkitError for a name that leaves its directory."""
    files = {}
    for name, entry in encoded.items():
        if name in ("", ".", "..") or "/" in name:
            raise GrowkitError(f"the checkpoint carries a file under a name that is none: {name!r}")
        if "text" in entry:
            files[name] = entry["text"].encode()
        else:
            files[name] = base64.b64decode(entry["base64"], validate=True)
    return files
