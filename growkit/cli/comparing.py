"""The verbs that look at models, inspect, diff and verify, and the check of what growth did to the function.

The check runs both models on the same tokens: by the trainer's forward pass where that knows the architecture,
by transformers elsewhere. Growth itself, and what a plan promises, are in other files.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from growkit.cli.description import KINDS, format_changes
from growkit.cli.terminal import format_json, show_progress

if TYPE_CHECKING:
    from growkit.entries import Entry

TOKENS = 1024
# The logits of so many tokens are in memory at once.
CHUNK = 4096
# How far logits move, as a part of the largest, when weights are rounded to a dtype; float32 is what computes.
ROUNDING = {"bfloat16": 5e-2, "float16": 5e-3}


@click.command()
@click.argument("src")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(src: str, as_json: bool) -> None:
    """Say what SRC is: sizes, parameters, optimizer state, tokenizer, lineage."""
    from growkit.checkpoint.location import open_source

    source = open_source(src)
    facts = {
        "path": str(source.path),
        "kind": source.kind,
        "architecture": source.model.kind,
        "model": source.model.values,
        "parameters": source.model.parameters,
        "dtype": str(source.dtype),
        "bytes": source.size,
        "slots": list(source.tensors),
        "record": source.record,
        "files": sorted(source.files),
        "fingerprint": source.fingerprint,
        "lineage": source.lineage,
    }
    click.echo(json.dumps(facts) if as_json else _facts(facts))


def _facts(facts: dict) -> str:
    from growkit.lineage import Lineage

    record = facts["record"]
    trained = [f"{key} {value}" for key, value in record.items() if not isinstance(value, dict)]
    lines = [
        f"path         {facts['path']} ({facts['kind']})",
        *_model_lines(facts["architecture"], facts["model"]),
        f"parameters   {facts['parameters']:,} in {facts['dtype']}; {facts['bytes'] / 1e6:,.1f} MB of "
        f"{', '.join(facts['slots'])}",
        f"training     {', '.join(trained) or 'no record'}",
        f"files        {', '.join(facts['files']) or 'none beside the weights'}",
        f"fingerprint  {facts['fingerprint'][:16]}",
    ]
    for number, entry in enumerate(Lineage.read(facts["lineage"]), 1):
        lines.append(f"lineage {number:<4} {entry.operation}: {_lineage_line(entry)}")
    return "\n".join(lines)


def _model_lines(kind: str, model: dict) -> list[str]:
    """Sizes, then options."""
    common = f"mlp {model['mlp']}, vocab {model['vocab']}, context {model['context']}"
    head = f"{'tied' if model['tied'] else 'untied'} head"
    size = f"{model['layer']} layers, embed {model['embed']}"
    if kind != "gpt_neox":
        heads = (
            f"{model['kv'] * model['group']} heads of {model['head_dim']} in {model['kv']} groups"
        )
        return [f"model        {kind}: {size}, {heads}, {common}", f"             {head}"]
    residual = "parallel" if model["parallel_residual"] else "sequential"
    return [
        f"model        GPT-NeoX: {size}, {model['head']} heads of {model['head_dim']}, {common}",
        f"             rotary {model['rope']['partial_rotary_factor']:g} of head_dim, {residual} residual, {head}",
    ]


def _lineage_line(entry: Entry) -> str:
    from growkit.entries import Growth, Training

    parts = []
    if isinstance(entry, Growth):
        parts.append(format_changes(entry.before, entry.after))
        parts += [entry.method, f"function {entry.function}"]
    if entry.source:
        parts.append(f"from {entry.source.path}")
    if isinstance(entry, Training) and entry.branch:
        branch = entry.branch
        rates = f"learning rate {branch.rate:g} to {branch.to:g}"
        parts.append(f"{branch.verb}: {rates} over {branch.tokens:,} tokens")
    return ", ".join(parts)


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--json", "as_json", is_flag=True, help="Print every tensor's comparison as JSON.")
def diff(a: str, b: str, as_json: bool) -> int:
    """Compare the models A and B, of any kind: sizes, configuration, every tensor.

    Exit code 0 when both are the same model with the same tensors, bit for bit, 1 when they differ. Fields of the
    configuration that say nothing of the function (transformers' version, say) are shown and do not count.
    """
    from dataclasses import asdict

    from growkit.checkpoint.location import open_source
    from growkit.surgery.comparison import compare_sources, find_differences, model_of

    one, other = open_source(a), open_source(b)
    with show_progress("comparing", one.size + other.size) as progress:
        tensors = list(compare_sources(one, other, progress))
    facts = {
        "a": _side(one),
        "b": _side(other),
        "model": find_differences(model_of(one), model_of(other)),
        "config": find_differences(one.config, other.config),
        "count": [side.record.get("count") for side in (one, other)],
    }
    both = "mu" in one.tensors and "mu" in other.tensors
    same_count = not both or facts["count"][0] == facts["count"][1]
    equal = (
        not facts["model"] and same_count and all(tensor.verdict == "equal" for tensor in tensors)
    )
    if as_json:
        click.echo(
            format_json(
                {"equal": equal} | facts | {"tensors": [asdict(tensor) for tensor in tensors]}
            )
        )
    else:
        click.echo(_diff_text(facts, tensors, equal, same_count))
    return 0 if equal else 1


def _side(source) -> dict:
    return {
        "path": str(source.path),
        "kind": source.kind,
        "dtype": str(source.dtype),
        "slots": list(source.tensors),
    }


def _diff_text(facts: dict, tensors: list, equal: bool, same_count: bool) -> str:
    lines = [
        f"{name}           {side['path']} ({KINDS[side['kind']]}, {side['dtype']}, {', '.join(side['slots'])})"
        for name, side in (("A", facts["a"]), ("B", facts["b"]))
    ]
    model, config = (
        ", ".join(f"{key} {a} and {b}" for key, (a, b) in facts[part].items())
        for part in ("model", "config")
    )
    lines.append(f"model       {model or 'the same sizes and options'}")
    lines += (
        [f"config      {config}{'' if model else ' (not part of the function)'}"] if config else []
    )
    lines += [] if same_count else ["count       {} and {}".format(*facts["count"])]
    for slot in dict.fromkeys(tensor.slot for tensor in tensors):
        found = [tensor.verdict for tensor in tensors if tensor.slot == slot]
        counts = [
            f"{found.count(verdict)} {verdict.replace('differs', 'differ')}"
            for verdict in dict.fromkeys(found)
        ]
        lines.append(f"{slot:<11} {', '.join(counts)}")
        lines += [
            f"  {_tensor_line(tensor)}"
            for tensor in tensors
            if tensor.slot == slot and tensor.verdict != "equal"
        ]
    return "\n".join([*lines, "equal" if equal else "different"])


def _tensor_line(tensor) -> str:
    by = "" if tensor.largest is None else f", by at most {tensor.largest:.3g}"
    return f"{tensor.name}: {tensor.detail or tensor.verdict}{by}"


@click.command()
@click.argument("src")
@click.argument("out")
def verify(src: str, out: str) -> None:
    """Recompute every tensor of OUT from SRC and the plan in OUT's lineage, and compare the bytes.

    Names the first tensor that differs and exits 1. For the machine that grew OUT: another may round a mean or a
    product otherwise. Configuration and Adam's count are compared as well.
    """
    from growkit.checkpoint.location import open_source
    from growkit.errors import GrowkitError
    from growkit.surgery.comparison import find_mismatch, recorded_growth, recorded_plan

    source, result = open_source(src), open_source(out)
    plan = recorded_plan(source, result)
    origin = recorded_growth(result).source
    path, fingerprint = (origin.path, origin.fingerprint) if origin else (None, None)
    another = fingerprint != source.fingerprint
    with show_progress("verifying", result.size) as progress:
        wrong = find_mismatch(source, result, plan, progress)
    note = f"{out} was grown from {path}, whose fingerprint was another than that of {src}"
    if wrong:
        raise GrowkitError(
            f"{out} is not what its plan makes of {src}: {wrong}{f'; {note}' if another else ''}"
        )
    tensors = sum(len(slot) for slot in result.tensors.values())
    click.echo(
        f"verified: all {tensors:,} tensors of {out} ({result.size / 1e6:,.1f} MB) are what {plan.verb} makes of {src}"
    )
    if another:
        click.echo(f"note: {note}")


def require_checkable(source, tokens: int) -> None:
    """Raise UsageError or GrowkitError, before anything is written, where `check_growth` could not run."""
    from growkit.errors import UsageError

    if tokens < 2:
        raise UsageError(
            f"--check takes at least 2 tokens, since the loss is that of the next one; got {tokens}"
        )
    if source.model.kind == "gpt_neox":
        return
    from convert.reference import require_transformers

    require_transformers()
    if source.kind != "huggingface":
        raise UsageError(
            f"--check runs a {source.model.kind} model in transformers, which reads no {KINDS[source.kind]}"
        )


def check_growth(source, out: Path, plan, tokens: int) -> dict:
    """The losses of source and result (nats a token), the largest difference of their logits, and what that means."""
    import numpy as np

    from growkit.checkpoint.location import open_source

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    result = open_source(str(out))
    ids, text = select_tokens(source, tokens)
    losses, gap, largest = np.zeros(2), 0.0, 0.0
    step = max(1, CHUNK // ids.shape[1])
    for start in range(0, len(ids), step):
        chunk = ids[start : start + step]
        logits = [_logits(model, chunk) for model in (source, result)]
        losses += [_loss(each, chunk) * len(chunk) / len(ids) for each in logits]
        gap = float(np.maximum(gap, np.abs(logits[0] - logits[1]).max()))
        largest = max(largest, float(np.abs(logits[0]).max()))
    bound = ROUNDING.get(str(source.dtype), 1e-4) * max(1.0, largest)
    return {
        "tokens": ids.size,
        "text": text,
        "loss": {"before": float(losses[0]), "after": float(losses[1])},
        "largest_logit": largest,
        "largest_difference": gap,
        "rounding": bound,
        "promised": plan.preserved,
        "preserved": gap <= bound,
        "dtype": str(source.dtype),
    }


def select_tokens(source, tokens: int):
    """(ids [B, T] of about `tokens` tokens, what they are): text that every Python has, random without a tokenizer."""
    import numpy as np

    vocab, length = source.model.vocab, min(tokens, source.model.context)
    rows = tokens // length
    ids = _encoded(source, rows * length)
    if ids is None or max(ids) >= vocab:
        return np.random.default_rng(0).integers(0, vocab, (rows, length)), "random tokens"
    return np.resize(np.asarray(ids, np.int64), (rows, length)), "tokens of Python's documentation"


def _encoded(source, tokens: int) -> list[int] | None:
    """Python's documentation by the model's own tokenizer; None without one that can be read."""
    if "tokenizer.json" not in source.files:
        return None
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(source.files["tokenizer.json"].decode())
    except Exception:  # tokenizers raises nothing more specific
        return None
    # No tokenizer makes so few tokens of so many characters; where one does, the text is repeated.
    text = "\n".join(topics[name] for name in sorted(topics))[: 16 * tokens]
    return tokenizer.encode(text, add_special_tokens=False).ids[:tokens] or None


def _logits(source, ids):
    """The logits [B, T, V] of a model on disk, computed in float32."""
    if source.model.kind == "gpt_neox":
        from trainer.model.decoder import compute_logits

        return compute_logits(source, ids)
    from convert.reference import load_logits

    return load_logits(source.here, "float32")(ids)


def _loss(logits, ids) -> float:
    """The mean cross-entropy of each next token, in nats."""
    import numpy as np

    losses = []
    for row, tokens in zip(logits, ids, strict=True):
        wide = row[:-1].astype(np.float64)
        wide -= wide.max(-1, keepdims=True)
        losses.append(
            np.log(np.exp(wide).sum(-1)) - np.take_along_axis(wide, tokens[1:, None], -1)[:, 0]
        )
    return float(np.mean(losses))


def format_check(found: dict) -> str:
    """What the check found, for a reader at a terminal."""
    before, after = found["loss"]["before"], found["loss"]["after"]
    verdict = f"not preserved: {after - before:+.4f} nats a token"
    if found["preserved"]:
        narrow = found["dtype"] in ROUNDING
        verdict = f"PRESERVED to the rounding of {found['dtype']}" if narrow else "PRESERVED"
    return (
        f"check       {verdict}; loss {before:.4f} -> {after:.4f}, logits differ by at most "
        f"{found['largest_difference']:.2e} of {found['largest_logit']:.2f} ({found['tokens']:,} {found['text']})"
    )


def require_preserved(found: dict, out: Path) -> None:
    """Raise GrowkitError where a plan that promised the source's function made another."""
    from growkit.errors import GrowkitError

    if found["promised"] and not found["preserved"]:
        raise GrowkitError(
            f"the plan promised the source's function, and the logits of {out} are off by "
            f"{found['largest_difference']:.2e}, more than rounding explains ({found['rounding']:.2e}); do not use it"
        )


COMMANDS = {"inspect": inspect, "diff": diff, "verify": verify}
