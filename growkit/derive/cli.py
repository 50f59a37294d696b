"""The verb `derive`: a table from transformers' own class, proved, written to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from growkit.errors import GrowkitError, UsageError, did_you_mean

BOUND = 1e-10


@click.command("derive")
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path), help="Write the table to this file.")
def derive_command(model: str, out: Path | None) -> None:
    """Derive the table of a model type of transformers, or of the model in a directory.

    MODEL is a model type, as olmo2, or a directory with a config.json, whose options are then the
    ones that are proved first. No code of the directory is run. A tiny random model of the type is
    grown along each axis, computed by transformers in float64, and compared with its source; an
    axis that is not exact is frozen.
    """
    kind, config = read_argument(model)
    derivation, version = _derive(kind, config)
    from growkit.models.table_file import write_family

    for line in describe(derivation):
        click.echo(line)
    proof = {axis: f"{gap:.1e}" for axis, gap in derivation.gaps.items()}
    text = write_family(derivation.family, proof, f"derived from transformers {version}")
    if out is None:
        click.echo(f"\n{text}", nl=False)
        return
    out.write_text(text)
    click.echo(f"wrote {out}")


def read_argument(model: str) -> tuple[str, dict[str, Any]]:
    """The model type that MODEL names, and the configuration where it is a directory."""
    path = Path(model)
    if not path.is_dir():
        return model, {}
    file = path / "config.json"
    if not file.is_file():
        raise UsageError(f"{model} has no config.json; name a model directory or a model type")
    config = json.loads(file.read_text())
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise GrowkitError(f"{file} states no model_type")
    return kind, config


def _derive(kind: str, config: dict[str, Any]) -> tuple[Any, str]:
    try:
        from growkit.derive.derive import derive
        from growkit.derive.network import VERSION, model_types
        from growkit.derive.tiny import options_of, tiny_fields
    except ImportError as problem:
        raise UsageError(f"derive needs {problem.name}: pip install 'growkit[hf]'") from None
    known = model_types()
    if kind not in known:
        raise UsageError(
            f"transformers {VERSION} has no causal language model of the type "
            f"{kind!r}{did_you_mean(kind, known)}"
        )
    try:
        return derive(kind, tiny_fields(kind, options_of(kind, config))), VERSION
    except GrowkitError:
        raise
    except Exception as problem:
        said = " ".join(str(problem).split())[:200]
        raise GrowkitError(f"no table of {kind} can be proved: {said}") from None


def describe(derivation: Any) -> list[str]:
    """What grows and how exactly, one line an axis."""
    family = derivation.family
    lines = [f"{family.class_name}, in float64, of the largest logit:"]
    for axis, gap in derivation.gaps.items():
        reason = family.frozen.get(axis)
        if reason is None and axis == "identity":
            reason = family.no_identity or None
        if reason is None and axis == "padding":
            reason = family.unpadded or None
        lines.append(
            f"  {axis:<24} {f'exact to {gap:.0e}' if reason is None else f'frozen: {reason}'}"
        )
    known = derivation.gaps
    lines += [
        f"  {axis:<24} frozen: {why}" for axis, why in family.frozen.items() if axis not in known
    ]
    for name, value in family.proved.items():
        lines.append(f"  holds for {name} = {json.dumps(value)} alone")
    return lines


COMMANDS = {"derive": derive_command}
