"""Find and open the model a user names, and write a model in either format.

SRC is a Hugging Face directory, a Hub id with an optional @revision, a trainer checkpoint, a run
directory (its last checkpoint), RUN@STEP or RUN@best, or a checkpoint of another trainer:
transformers' Trainer, PyTorch's distributed ones, DeepSpeed's universal ones, gpt-neox, OLMo 2.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growkit.checkpoint.files import is_remote, parse_path, read_json
from growkit.checkpoint.hub import download_from_hub, is_hub_id
from growkit.checkpoint.kinds import (
    FINISHED,
    ROOM,
    WRITERS,
    find_kind,
    is_distributed,
)
from growkit.checkpoint.unsuited import refuse_file
from growkit.errors import GrowkitError, UsageError, find_nearest

if TYPE_CHECKING:
    from growkit.checkpoint.fill import Progress
    from growkit.checkpoint.numbers import Findings
    from growkit.checkpoint.tensor import Contents, Source


# The directory of a run that holds its checkpoints, one directory for each step.
CHECKPOINTS = "checkpoints"
# OLMo-core's directory of the model and the optimizer in a checkpoint.
OLMO = "model_and_optim"
# Names of checkpoints of other trainers: transformers' Trainer's, torchtitan's, OLMo-core's.
NUMBERED = re.compile(r"(?:checkpoint-|step-?)(\d+)")
# Weights, and what `growkit.checkpoint.carried` carries.
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICEN*", "NOTICE*"]


def open_source(text: str) -> Source:
    """Open the model that SRC names.

    Raises UsageError if it names nothing, GrowkitError if what it names is broken.
    """
    path = locate(text)
    here = _fetch(path)
    _refuse_outer(here)
    kind = find_kind(here)
    if kind is None:
        if not is_remote(here):
            refuse_file(here)
            _refuse_tokens(here)
        raise GrowkitError(
            f"{path} is not a model: it has neither config.json (a Hugging Face directory) nor "
            f"_CHECKPOINT_METADATA (a trainer checkpoint) nor {CHECKPOINTS}/ (a run)"
            f"{_suggest_trainer_checkpoint(here)}"
        )
    source = kind.open(here)
    source.path = path
    return source


def _fetch(path: Any) -> Path:
    """The directory on this machine: a copy of one in a bucket, else the same."""
    if not is_remote(path):
        return Path(path)
    from growkit.checkpoint.remote import download

    return download(path)


def _refuse_tokens(path: Path) -> None:
    """Raise GrowkitError for what `growkit tokenize` writes."""
    if (path / "tokens.idx").is_file():
        raise GrowkitError(
            f"{path} holds token files and no model; a run trains on them by data.train={path}"
        )


def _refuse_outer(path: Path) -> None:
    """Raise GrowkitError for OLMo-core's directory around the checkpoint itself."""
    inner = path / OLMO
    if is_distributed(inner) and not is_distributed(path):
        raise GrowkitError(
            f"{path} is a checkpoint of OLMo-core, and what grows is within: did you mean "
            f"{str(inner)!r}?"
        )


def locate(text: str) -> Any:
    """The directory that SRC names, downloaded if it is a Hub id.

    Raises UsageError if there is none.
    """
    if not text:
        raise UsageError("the source is an empty name; name a directory")
    if is_remote(text):
        return _locate_remote(text)
    path = Path(os.path.expanduser(text))
    if path.is_dir():
        return _enter_run(path)
    if path.exists():
        refuse_file(path)
        raise UsageError(f"{text} is a file; name the directory that holds the model")
    # From the right, because a directory's name may hold an @.
    name, _, at = text.rpartition("@")
    run = Path(os.path.expanduser(name))
    if name and (run / CHECKPOINTS).is_dir():
        return find_checkpoint(run, at)
    from growkit.checkpoint.output import find_left

    left = find_left(path)
    if left is not None:
        raise UsageError(
            f"there is no such directory: {text}; a command that was stopped while it replaced it "
            f"left the old one in {left}; move it back, or run that command again"
        )
    if _may_be_hub_id(text):
        return download_from_hub(text, HUB_FILES, _suggest_sibling(path))
    raise UsageError(f"there is no such directory: {text}{_suggest_sibling(path)}")


def _enter_run(path: Path) -> Path:
    """The last checkpoint if `path` is a run, else `path`."""
    return find_checkpoint(path, None) if (path / CHECKPOINTS).is_dir() else path


def _may_be_hub_id(text: str) -> bool:
    """Whether this is OWNER/NAME, with an optional @revision.

    Nothing of this name is here. A directory of the owner's name may be, as for transformers, but
    not a model or a run: then this was meant to lie in it.
    """
    owner = Path(text.split("/")[0])
    if find_kind(owner) is not None or (owner / CHECKPOINTS).is_dir():
        return False
    return is_hub_id(text)


def _suggest_trainer_checkpoint(path: Any) -> str:
    """A clause that names the last checkpoint in the output directory of another trainer."""
    if is_remote(path) or not path.is_dir():
        return ""
    matches = [(NUMBERED.fullmatch(each.name), each) for each in path.iterdir()]
    found = [(int(match[1]), str(each)) for match, each in matches if match]
    return f"; did you mean {max(found)[1]!r}?" if found else ""


def _suggest_sibling(path: Path) -> str:
    """A clause that names the directory beside `path` whose name is nearest, if one is near."""
    if not path.parent.is_dir():
        return ""
    siblings = [child.name for child in path.parent.iterdir() if child.is_dir()]
    near = find_nearest(path.name, siblings)
    return f"; did you mean {str(path.parent / near)!r}?" if near else ""


def _locate_remote(text: str) -> Any:
    """The same as `locate`, in a bucket."""
    from growkit.checkpoint.remote import explain_failures

    path = parse_path(text)
    with explain_failures(path):
        if path.is_dir():
            return _enter_run(path)
        name, _, at = os.fspath(path).rpartition("@")
        if "/" in name and (parse_path(name) / CHECKPOINTS).is_dir():
            return find_checkpoint(parse_path(name), at)
    raise UsageError(f"there is no such directory: {path}")


def find_checkpoint(run: Path, at: str | None) -> Path:
    """A run's checkpoint: the last (None), that of a step, or 'best', by validation loss.

    Raises GrowkitError if the run has no such checkpoint yet, UsageError for an unknown step.
    """
    root = run / CHECKPOINTS
    steps = sorted(int(path.name) for path in root.iterdir() if _is_finished(path))
    if not steps:
        raise GrowkitError(f"the run {run} has no finished checkpoint yet")
    if at is None:
        return root / str(steps[-1])
    if at == "best":
        losses = {step: _read_validation_loss(root / str(step)) for step in steps}
        best = min(steps, key=losses.__getitem__)
        if losses[best] == float("inf"):
            raise GrowkitError(
                f"no checkpoint of the run {run} has a validation loss; name a step, as "
                f"{run}@{steps[-1]}"
            )
        return root / str(best)
    if not at.isdigit() or int(at) not in steps:
        raise UsageError(
            f"the run {run} has no checkpoint {at!r}; it has {', '.join(map(str, steps))}, "
            "and 'best'"
        )
    return root / at


def _is_finished(path: Path) -> bool:
    """Whether this is a finished checkpoint in a run; its name is its step."""
    return path.name.isdigit() and (path / FINISHED).exists()


def _read_validation_loss(checkpoint: Path) -> float:
    """The validation loss in nats a token; infinity if it was not measured."""
    from growkit.checkpoint.orbax import META, read_record

    meta = read_json(checkpoint / META / "metadata")
    loss = read_record(checkpoint, meta).get("validation_loss")
    return float("inf") if loss is None or math.isnan(loss) else float(loss)


def check_writable(out: Any, sources: Sequence[Source], force: bool) -> None:
    """Raise UsageError if `out` must not be written.

    It must not exist (without force), and it must not be, hold or lie within a source.
    """
    from growkit.checkpoint.output import check_output

    if is_remote(out):
        from growkit.checkpoint.remote import check_free

        check_free(out, force)
        if out in [source.path for source in sources]:
            raise UsageError(
                f"the output is the source: {out}; the source is never written to, name another "
                "directory"
            )
        return
    local = [source.path for source in sources if not is_remote(source.path)]
    if not local:
        check_output(out, None, force)
    for path in local:
        check_output(out, path, force)


@dataclass(frozen=True)
class Care:
    """How careful writing is.

    sync: whether the output is on the disk before it has its name. verify: whether hashes on record
    are compared before a source is used. strict: whether NaN, infinities and negative second
    moments are refused, and not only told.
    """

    sync: bool = True
    verify: bool = True
    strict: bool = False


def write_output(
    out: Any,
    kind: str,
    contents: Contents,
    sources: Sequence[Source] = (),
    force: bool = False,
    progress: Progress | None = None,
    shard: int | None = None,
    care: Care | None = None,
) -> Findings:
    """Write `contents`, made of `sources`, to `out`: the whole of it, or nothing.

    kind: 'huggingface', 'hf_trainer', 'dcp', 'universal' or 'checkpoint'. progress: told the number
    of bytes after each piece. shard: the most bytes of weights in one file of a Hugging Face
    directory, of anything in one file of a distributed checkpoint; None for 5 GB. Returns what was
    found in the numbers. Raises GrowkitError for a source whose bytes are not those that were
    written.
    """
    care = care or Care()
    check_writable(out, sources, force)
    if is_remote(out):
        # A temporary directory need not survive a power cut.
        local = replace(care, sync=False)
        given = (kind, contents, sources, False, progress, shard, local)
        return _write_remote(out, force, lambda here: write_output(here, *given))
    from growkit.checkpoint.output import commit_output

    with commit_output(out, force, care.sync) as new:
        findings = _write_kind(new, kind, contents, progress, shard)
        # After the last byte was read and before the output has its name.
        for source in sources:
            source.check_unchanged()
            if care.verify:
                source.require_whole(used=True)
        if care.strict and findings:
            raise GrowkitError(f"nothing is written, because of --strict: {findings.describe()}")
    return findings


def _write_remote(out: Any, force: bool, write: Callable[[Path], Findings]) -> Findings:
    """Write a directory of this machine and upload it to a bucket."""
    import tempfile

    from growkit.checkpoint.remote import upload

    with tempfile.TemporaryDirectory(prefix="growkit-") as directory:
        here = Path(directory) / "out"
        findings = write(here)
        upload(here, out, force)
    return findings


def _write_kind(
    path: Path, kind: str, contents: Contents, progress: Progress | None, shard: int | None
) -> Findings:
    """Write a directory of one kind, which must not exist."""
    module, function = WRITERS.get(kind, WRITERS["huggingface"])
    write: Callable[..., Findings] = getattr(import_module(f"{ROOM}.{module}"), function)
    # A trainer checkpoint has one file for each array, whatever its size.
    limit = {} if shard is None or kind == "checkpoint" else {"shard": shard}
    return write(path, contents, progress, **limit)
