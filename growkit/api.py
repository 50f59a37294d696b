"""growkit from Python, on disk: open a model, grow it into a new directory, read its lineage.

Everything here and the functions that work on arrays in memory are names of the package `growkit`
itself; docs/python.md shows them.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from growkit.checkpoint import location
from growkit.checkpoint.files import parse_path
from growkit.checkpoint.tensor import Source
from growkit.errors import UsageError, require_type
from growkit.growth.plan import Plan
from growkit.lineage import Lineage
from growkit.models.given import read_table, use_family
from growkit.surgery.grow import prepare_growth
from growkit.surgery.upcycling import express_source

PATH = (str, os.PathLike)
PATH_HINT = "a directory, a run as RUN@STEP, or a Hub id"


def open_source(
    path: str | os.PathLike[str], table: str | os.PathLike[str] | None = None
) -> Source:
    """Open the model that `path` names, as the command line does; only headers are read.

    table: a file that `growkit derive` wrote, for a type that growkit ships no table for. `.model`
    is the architecture, `.stack()` the parameters as a tree of arrays, `.stack("mu")` a moment
    where there are any. Raises UsageError when the path names nothing, GrowkitError when what it
    names is broken.
    """
    require_type("path", path, PATH, PATH_HINT)
    if table is None:
        return location.open_source(os.fspath(path))
    require_type("table", table, PATH, "a file that `growkit derive` wrote")
    with use_family(read_table(Path(table))):
        return location.open_source(os.fspath(path))


def write_grown(
    source: Source,
    plan: Plan,
    out: str | os.PathLike[str],
    force: bool = False,
    groups: str = "keep",
    *,
    sync: bool = True,
    verify: bool = True,
    strict: bool = False,
) -> None:
    """Grow a model on disk into the directory `out`, of the same format, a megabyte at a time.

    The directory appears whole or not at all. force: whether to replace one that exists. groups:
    'split' divides the parameter groups of a checkpoint of transformers' Trainer by what growth
    asks for, see `growkit.torch`. sync: whether it is on the disk, and not only in the system's
    memory, when this returns. verify: whether the source's bytes must have the hashes on record.
    strict: whether NaN, infinities and negative second moments are refused; a UserWarning tells
    them otherwise. Raises UsageError for an output that must not be written and for a plan made for
    another model.
    """
    require_type("source", source, Source, "as growkit.open_source(path) returns")
    require_type("plan", plan, Plan, "as growkit.plan_depth or growkit.plan_width return")
    require_type("out", out, PATH, "the directory to write")
    if plan.model != express_source(source, plan.experts):
        raise UsageError(
            f"the plan was made for another model than {source.path}; make one for its .model"
        )
    contents = prepare_growth(source, plan, groups)
    care = location.Care(sync=sync, verify=verify, strict=strict)
    path = parse_path(os.fspath(out))
    findings = location.write_output(path, source.kind, contents, [source], force, care=care)
    if findings:
        warnings.warn(f"{path}: {findings.describe()}", stacklevel=2)


def read_lineage(path: str | os.PathLike[str]) -> Lineage:
    """What was done to the model at `path`, the oldest entry first; see `growkit.entries`."""
    return Lineage.read(open_source(path).lineage)
