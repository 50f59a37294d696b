"""Growth and conversion: every case run, and what its output holds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from golden.cases import CASES
from golden.command import attempted, command
from golden.inputs import BESIDE, LIKE, SOURCES, Inputs
from golden.outputs import combined, described, digest


def growths(root: Path, cases: Mapping[str, str] = CASES) -> dict[str, Any]:
    """{"cases": {name: what its output holds}, "configs": {digest: content of a config.json}}.

    root: a directory for inputs and outputs. Inputs that lie there already are taken as they are.
    A case that fails has {"failed": words}.
    """
    inputs = Inputs(root / "inputs")
    inputs.root.mkdir(exist_ok=True)
    words = " ".join(cases.values()).split()
    needed = {word[1:] for word in words if word.startswith("@")}
    found: dict[str, Any] = {}
    configs: dict[str, Any] = {}
    for name, case in cases.items():
        out = root / name
        arguments = list(_arguments(case, inputs, root, out))
        found[name] = attempted(partial(_grown, arguments, out, configs), root)
        if name not in needed:
            shutil.rmtree(out, ignore_errors=True)
    return {"cases": found, "configs": configs}


def _grown(arguments: list[str], out: Path, configs: dict[str, Any]) -> dict[str, Any]:
    command(arguments)
    return kept(described(out, BESIDE), configs)


def _arguments(case: str, inputs: Inputs, root: Path, out: Path) -> Iterator[str]:
    """The words of a case; paths for the names of inputs, of earlier cases and of the output."""
    for word in case.split():
        if word == "OUT":
            yield str(out)
        elif word.startswith("@"):
            yield str(root / word[1:])
        elif word in SOURCES or word in LIKE:
            yield str(inputs.path(word))
        else:
            yield word


def kept(content: dict[str, Any], configs: dict[str, Any]) -> dict[str, Any]:
    """An output, digests of its slots added and its configuration gone into `configs`."""
    config = content["config"]
    configs[digest(config)] = config
    slots = {slot: combined(tensors) for slot, tensors in content["tensors"].items()}
    return content | {"config": digest(config), "slots": slots}
