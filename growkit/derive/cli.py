"""The verb `derive`: a table from transformers' own class, proved, written to a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from growkit.checkpoint.files import read_json
from growkit.errors import GrowkitError, UsageError, did_you_mean

# Bytes of a config.json at most.
JSON_LIMIT = 100_000_000


@click.command("derive")
@click.argument("model")
@click.option("--out", metavar="FILE", help="Write the table to this file.")
def derive_command(model: str, out: str | None) -> None:
    """Derive the table of a model type of transformers, or of the model in a directory.

    MODEL is a model type, as olmo2, or a directory with a config.json, whose options are then the
    ones that are proved first. No code of the directory is run. A tiny random model of the type is
    grown along each axis, computed by transformers in float64, and compared with its source; an
    axis that is not exact is frozen. The verbs that open models take FILE as --table.
    """
    kind, config = read_argument(model)
    place = None if out is None else Path(os.path.expanduser(out))
    if place is not None:
        _check_place(place)
    derivation, version = _derive(kind, config)
    from growkit.models.table_file import write_family

    for line in describe(derivation):
        click.echo(line)
    proof = {axis: f"{gap:.1e}" for axis, gap in derivation.gaps.items()}
    text = write_family(derivation.family, proof, f"derived from transformers {version}")
    if place is None:
        click.echo(f"\n{text}", nl=False)
        return
    place.write_text(text)
    click.echo(f"wrote {place}; growkit depth --table {place} grows such a model")


def _check_place(out: Path) -> None:
    """Raise UsageError, before any work is done, where no file can be written."""
    if out.is_dir():
        raise UsageError(f"--out {out} is a directory; name a file in it, as {out / 'table.txt'}")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no directory {out.parent}")


def read_argument(model: str) -> tuple[str, dict[str, Any]]:
    """The model type that MODEL names, and the configuration where it is a directory."""
    path = Path(os.path.expanduser(model))
    if not path.is_dir():
        if os.sep in model or path.exists():
            raise UsageError(f"there is no directory {model}; name a model directory or a type")
        return model, {}
    file = path / "config.json"
    if not file.is_file():
        raise UsageError(f"{model} has no config.json; name a model directory or a model type")
    config = read_json(file, JSON_LIMIT)
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise GrowkitError(f"{file} states no model_type")
    if isinstance(config.get("text_config"), dict):
        # The decoder of a model of text and images has a type of its own.
        within = config["text_config"].get("model_type")
        return (within, config["text_config"]) if isinstance(within, str) else (kind, config)
    return kind, config


def _derive(kind: str, config: dict[str, Any]) -> tuple[Any, str]:
    try:
        from growkit.derive.derive import derive
        from growkit.derive.network import VERSION, UnprovableError, model_types
        from growkit.derive.tiny import options_of, tiny_fields
    except ImportError as problem:
        raise UsageError(f"derive needs {problem.name}: pip install 'growkit[hf]'") from None
    known = model_types()
    if kind not in known:
        raise UsageError(_refuse_type(kind, config, known, VERSION))
    within = find_text_type(kind)
    if within in known:
        raise UsageError(
            f"the text decoder of {kind} models is of the type {within!r}; derive that"
        )
    try:
        return derive(kind, tiny_fields(kind, options_of(kind, config))), VERSION
    except GrowkitError:
        raise
    except UnprovableError as problem:
        raise GrowkitError(f"no table of {kind} can be proved: {problem}") from None
    except Exception as problem:
        # What transformers and torch say of their own models is about their code, not about MODEL.
        raise GrowkitError(
            f"no table of {kind} can be proved: transformers {VERSION} does not build or run the "
            f"tiny model that a proof needs ({type(problem).__name__})"
        ) from None


def _refuse_type(kind: str, config: dict[str, Any], known: list[str], version: str) -> str:
    """Why a type has no table: no text decoder, or none of this transformers'."""
    from growkit.derive.network import CONFIG_MAPPING

    said = f"transformers {version} has no causal language model of the type {kind!r}"
    if kind not in CONFIG_MAPPING:
        if "auto_map" in config:
            return f"{said}, and the code that the directory names for it (auto_map) is never run"
        return f"{said}{did_you_mean(kind, known)}"
    if getattr(CONFIG_MAPPING[kind], "is_encoder_decoder", False):
        return f"{said}: it is an encoder and a decoder, and growkit grows decoders"
    within = find_text_type(kind)
    if within:
        return f"{said}: its text decoder is of the type {within!r}; derive that"
    return f"{said}: it is an encoder or no model of text, and growkit grows text decoders"


def find_text_type(kind: str) -> str:
    """The type of the text decoder within a type's models, empty where there is none."""
    from growkit.derive.network import CONFIG_MAPPING

    try:
        within = CONFIG_MAPPING[kind]().text_config.model_type
    except Exception:
        return ""
    return str(within) if within != kind else ""


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
        # Tables say so of vocab, which has an option and rules of its own.
        f"  {axis:<24} {'grows by --vocab' if axis == 'vocab' else f'frozen: {why}'}"
        for axis, why in family.frozen.items()
        if axis not in known
    ]
    for name, value in family.proved.items():
        lines.append(f"  holds for {name} = {json.dumps(value)} alone")
    return lines


COMMANDS = {"derive": derive_command}
