"""Small files and the paths that users type: JSON read and written, one file replaced as a whole.

A path may lie on this machine or in a bucket (`gs://`, `s3://`, `az://`); both are read and written alike.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growkit.errors import GrowkitError


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path lies in a bucket."""
    return "://" in os.fspath(path)


def parse_path(text: str) -> Any:
    """The path that a user typed: of a bucket if it begins with gs:// or the like, else of this machine."""
    if not is_remote(text):
        return Path(os.path.expanduser(text))
    from etils import epath

    return epath.Path(text)


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises GrowkitError when it is not one."""
    try:
        return json.loads(path.read_text())
    except OSError as problem:
        raise GrowkitError(f"cannot read {path}: {problem.strerror}") from None
    except (ValueError, RecursionError) as problem:
        raise GrowkitError(f"{path} is not valid JSON: {problem}") from None


def encode_json(value: Mapping[str, Any] | list) -> bytes:
    """How growkit writes JSON: indented, with a newline at the end."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_atomically(path: Any, content: bytes) -> None:
    """Write a file so that whoever reads it, after a kill too, finds the old content or the new."""
    if is_remote(path):
        path.write_bytes(content)
        return
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)
