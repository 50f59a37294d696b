"""Small files and the paths users type: read and write JSON, replace one file atomically.

A path may be on this machine or in a bucket (`gs://`, `s3://`, `az://`); both are handled alike.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growkit.errors import GrowkitError


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in a bucket."""
    return "://" in os.fspath(path)


def parse_path(text: str) -> Any:
    """The path a user typed: a bucket's path for gs:// and the like, else one on this machine."""
    if not is_remote(text):
        return Path(os.path.expanduser(text))
    from etils import epath

    return epath.Path(text)


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises GrowkitError if it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text())
    except OSError as problem:
        raise GrowkitError(f"cannot read {path}: {problem.strerror}") from None
    except (ValueError, RecursionError) as problem:
        raise GrowkitError(f"{path} is not valid JSON: {problem}") from None


def encode_json(value: Mapping[str, Any] | list[Any]) -> bytes:
    """JSON as growkit writes it: indented by two spaces, with a newline at the end."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_atomically(path: Any, content: bytes) -> None:
    """Replace a file: readers see the old content or the new one, even if this process is killed.

    A bucket stores an object whole or not at all, so there the file is written directly.
    """
    if is_remote(path):
        path.write_bytes(content)
        return
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


def replace_nonfinite(value: Any) -> Any:
    """The value with None in place of infinities and NaN, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: replace_nonfinite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [replace_nonfinite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
