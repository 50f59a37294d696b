"""From what a user types to an opened source, and from contents to an output of either kind.

SRC is a Hugging Face directory, a Hub id with an optional @revision, a trainer checkpoint, a run directory
(its last checkpoint), RUN@STEP or RUN@best. Knows which kind a path is; leaves each format to its file.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growkit.checkpoint.files import is_remote, parse_path, read_json
from growkit.checkpoint.huggingface import SHARD, is_directory, open_directory, write_directory
from growkit.checkpoint.orbax import META, is_checkpoint, open_checkpoint, write_checkpoint
from growkit.checkpoint.output import Progress, check_output, commit_output
from growkit.checkpoint.remote import check_free, download, explain_failures, upload
from growkit.checkpoint.tensor import Contents, Source
from growkit.errors import GrowkitError, UsageError, find_nearest

CHECKPOINTS = "checkpoints"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def open_source(text: str) -> Source:
    """Open what SRC names. Raises UsageError when it names nothing, GrowkitError when what it names is broken."""
    path = locate(text)
    here = download(path) if is_remote(path) else path
    if is_checkpoint(here):
        source = open_checkpoint(here)
    elif is_directory(here):
        source = open_directory(here)
    else:
        raise GrowkitError(
            f"{path} is not a model: it has neither config.json (a Hugging Face directory) nor "
            f"_CHECKPOINT_METADATA (a trainer checkpoint) nor {CHECKPOINTS}/ (a run)"
        )
    source.path = path
    return source


def locate(text: str) -> Path:
    """The directory that SRC names, downloaded if it is a Hub id."""
    if not text:
        raise UsageError("the source is an empty name; name a directory")
    path = parse_path(text)
    if is_remote(path):
        return _locate_remote(path)
    if path.is_dir():
        return find_checkpoint(path, None) if (path / CHECKPOINTS).is_dir() else path
    if path.exists():
        raise UsageError(f"{text} is a file; name the directory that holds the model")
    name, _, at = text.rpartition("@")
    if name and (run := Path(os.path.expanduser(name)) / CHECKPOINTS).is_dir():
        return find_checkpoint(run.parent, at)
    if HUB_ID.fullmatch(name or text) and "/" in text and not Path(text.split("/")[0]).exists():
        return _download(name or text, at if name else None)
    beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    near = find_nearest(path.name, beside)
    hint = f"; did you mean {str(path.parent / near)!r}?" if near else ""
    raise UsageError(f"there is no such directory: {text}{hint}")


def _locate_remote(path: Any) -> Any:
    """As `locate`, in a bucket."""
    with explain_failures(path):
        if path.is_dir():
            return find_checkpoint(path, None) if (path / CHECKPOINTS).is_dir() else path
        name, _, at = os.fspath(path).rpartition("@")
        if "/" in name and (parse_path(name) / CHECKPOINTS).is_dir():
            return find_checkpoint(parse_path(name), at)
    raise UsageError(f"there is no such directory: {path}")


def find_checkpoint(run: Path, at: str | None) -> Path:
    """A run's checkpoint: the last (None), the one of a step, or the one with the lowest validation loss ('best')."""
    root = run / CHECKPOINTS
    steps = sorted(
        int(p.name)
        for p in root.iterdir()
        if p.name.isdigit() and (p / "_CHECKPOINT_METADATA").exists()
    )
    if not steps:
        raise GrowkitError(f"the run {run} has no finished checkpoint yet")
    if at is None:
        return root / str(steps[-1])
    if at == "best":
        losses = {step: _validation_loss(root / str(step)) for step in steps}
        if min(losses.values()) == float("inf"):
            raise GrowkitError(
                f"no checkpoint of the run {run} has a validation loss; name a step, as {run}@{steps[-1]}"
            )
        return root / str(min(steps, key=losses.__getitem__))
    if not at.isdigit() or int(at) not in steps:
        raise UsageError(
            f"the run {run} has no checkpoint {at!r}; it has {', '.join(map(str, steps))}, and 'best'"
        )
    return root / at


def _validation_loss(checkpoint: Path) -> float:
    loss = read_json(checkpoint / META / "metadata").get("record", {}).get("validation_loss")
    return float("inf") if loss is None else loss


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            name, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]
        )
    except (
        Exception
    ) as problem:  # whatever the network, the hub or its library says, the user needs one sentence
        raise GrowkitError(
            f"there is no directory {name!r}, and it could not be had from the Hugging Face Hub "
            f"({type(problem).__name__}: {(str(problem).strip() or 'no answer').splitlines()[0]})"
        ) from None
    return Path(found)


def check_writable(out: Any, sources: Sequence[Source], force: bool) -> None:
    """Raise UsageError when `out` must not be written: it exists, or it is, holds or lies within a source."""
    if is_remote(out):
        check_free(out, force)
        if out in [source.path for source in sources]:
            raise UsageError(
                f"the output is the source: {out}; the source is never written to, name another directory"
            )
        return
    for path in [source.path for source in sources if not is_remote(source.path)] or [None]:
        check_output(out, path, force)


def write_output(
    out: Any,
    kind: str,
    contents: Contents,
    sources: Sequence[Source] = (),
    force: bool = False,
    progress: Progress | None = None,
    shard: int = SHARD,
) -> None:
    """Write `contents`, made of `sources`, as `kind` ('huggingface' or 'checkpoint') to `out`: whole, or not at all."""
    check_writable(out, sources, force)
    if is_remote(out):
        with tempfile.TemporaryDirectory(prefix="growkit-") as here:
            write_output(Path(here) / "out", kind, contents, sources, False, progress, shard)
            upload(Path(here) / "out", out, force)
        return
    with commit_output(out, force) as new:
        if kind == "checkpoint":
            write_checkpoint(new, contents, progress)
        else:
            write_directory(new, contents, progress, shard)
        for source in sources:
            source.check_unchanged()
