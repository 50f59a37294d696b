"""The verbs that look at models on disk: inspect, diff and verify."""

from __future__ import annotations

import re
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import click

from growkit.cli.description import KINDS, format_changes
from growkit.cli.options import add_table_option
from growkit.cli.output import show_result
from growkit.cli.records import describe_record
from growkit.cli.terminal import say, show_progress

if TYPE_CHECKING:
    from growkit.checkpoint.tensor import Source
    from growkit.entries import Entry
    from growkit.models.architecture import Architecture
    from growkit.surgery.comparison import Comparison


# Entries of a lineage that are shown, the last ones.
MOST_ENTRIES = 100
# Characters of a field's value that are shown.
LONGEST_VALUE = 60


@click.command()
@click.argument("src")
@click.option(
    "--rows",
    is_flag=True,
    help="Show the axes and the rows of the table too, and how growth would change each.",
)
@click.option(
    "--new",
    is_flag=True,
    help="Show which parameters, and which parts of others, growth added since all parameters "
    "were trained last.",
)
@add_table_option
def inspect(src: str, rows: bool, new: bool) -> None:
    """Describe SRC: sizes, parameters, optimizer state, tokenizer, lineage."""
    from growkit.checkpoint.location import open_source
    from growkit.cli.news import collect_new, format_new
    from growkit.cli.rows import collect_rows, format_rows

    source = open_source(src)

    def collect() -> dict[str, Any]:
        table = collect_rows(source.model) if rows else {}
        made = collect_new(source) if new else {}
        return _collect_facts(source) | table | made

    def show() -> None:
        say(_format_facts(source))
        if rows:
            say(format_rows(source.model))
        if new:
            say(format_new(source))

    show_result(show, collect)


def _collect_facts(source: Source) -> dict[str, Any]:
    """All that is known of a source, for JSON."""
    return {
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
        "notes": list(source.notes),
        "fingerprint": source.fingerprint,
        "lineage": source.lineage,
    }


def _format_facts(source: Source) -> str:
    """The same, for a reader at a terminal."""
    from growkit.lineage import Lineage

    slots = ", ".join(source.tensors)
    lines = [
        f"path         {source.path} ({KINDS[source.kind]})",
        *_format_model(source.model),
        f"parameters   {source.model.parameters:,} in {source.dtype}; {source.size / 1e6:,.1f} MB "
        f"of {slots}",
        f"training     {describe_record(source.record)}",
        f"files        {', '.join(sorted(source.files)) or 'none beside the weights'}",
        f"fingerprint  {source.fingerprint[:16]}",
    ]
    lines += [f"note         {note}" for note in source.notes]
    earlier = max(0, len(source.lineage) - MOST_ENTRIES)
    if earlier:
        lines.append(f"lineage      {earlier:,} earlier entries")
    for number, entry in enumerate(Lineage.read(source.lineage[earlier:]), earlier + 1):
        words = [entry.operation, _format_entry(entry)]
        lines.append(f"lineage {number:<4} {': '.join(filter(None, words))}")
    return "\n".join(lines)


def _format_model(model: Architecture) -> list[str]:
    """A line of sizes, then a line of options."""
    from growkit.models.counts import describe_mlp

    sizes = [f"{model.layer} layers", f"embed {model.embed}"]
    if model.head_count:
        groups = f" in {model.sizes['kv']} groups" if "group" in model.sizes else ""
        sizes.append(f"{model.head_count} heads of {model.head_dim}{groups}")
    # What a model has none of, as a recurrent one of heads, or does not state, is 0.
    if model.mlp:
        sizes.append(f"mlp {describe_mlp(model)}")
    stated = {"vocab": model.vocab, "context": model.context}
    sizes += [f"{name} {size}" for name, size in stated.items() if size]
    options = []
    if model.family.rotary and model.family.rotary.part:
        options.append(f"rotary {model.rotary_pct:g} of head_dim")
    if "parallel_residual" in model.options:
        parallel = model.options["parallel_residual"]
        options.append("parallel residual" if parallel else "sequential residual")
    options.append("tied head" if model.tied else "untied head")
    return [
        f"model        {model.family.title}: {', '.join(sizes)}",
        f"             {', '.join(options)}",
    ]


def _format_entry(entry: Entry) -> str:
    """What a lineage entry did, and to which model."""
    from growkit.entries import Growth, Training

    parts = []
    if isinstance(entry, Growth):
        # A method in width says the sizes itself.
        changes = format_changes(entry.before, entry.after).split(", ")
        parts += [words for words in changes if words and not _says(entry.method, words)]
        parts.append(entry.method)
        parts.append(f"function {entry.function}")
    if entry.source:
        parts.append(f"from {entry.source.path}")
    if isinstance(entry, Training) and entry.branch:
        branch = entry.branch
        rates = f"learning rate {branch.rate:g} to {branch.to:g}"
        parts.append(f"{branch.verb}: {rates} over {branch.tokens:,} tokens")
    return ", ".join(parts)


def _says(text: str, words: str) -> bool:
    """Whether a text has these words, and not longer ones: 'mlp 4 -> 8' is not 'mlp 4 -> 80'."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


@click.command()
@click.argument("a")
@click.argument("b")
@add_table_option
def diff(a: str, b: str) -> int:
    """Compare the models A and B, of any kind: sizes, configuration, every tensor.

    Exit code 0 if both are the same model with the same tensors, bit for bit; 1 if they differ.
    Configuration fields that do not affect the function (transformers' version, say) are shown and
    do not count.
    """
    from dataclasses import asdict

    from growkit.checkpoint.location import open_source
    from growkit.surgery.comparison import compare_sources

    one = open_source(a)
    other = open_source(b)
    with show_progress("comparing", one.size + other.size) as progress:
        tensors = list(compare_sources(one, other, progress))
    facts = _compare_facts(one, other)
    # Without moments on both sides, Adam's count means nothing.
    both_moments = "mu" in one.tensors and "mu" in other.tensors
    same_count = not both_moments or facts["count"][0] == facts["count"][1]
    same_tensors = all(tensor.verdict == "equal" for tensor in tensors)
    equal = not facts["model"] and same_count and same_tensors
    compared = [asdict(tensor) for tensor in tensors]
    show_result(
        lambda: say(_format_diff(facts, tensors, equal, same_count)),
        {"equal": equal} | facts | {"tensors": compared},
    )
    return 0 if equal else 1


def _compare_facts(one: Source, other: Source) -> dict[str, Any]:
    """What the two sides are, and what differs beside their tensors."""
    from growkit.surgery.comparison import find_differences, model_of

    return {
        "a": _describe_side(one),
        "b": _describe_side(other),
        "model": find_differences(model_of(one), model_of(other)),
        "config": find_differences(one.config, other.config),
        "count": [side.record.get("count") for side in (one, other)],
    }


def _describe_side(source: Source) -> dict[str, Any]:
    return {
        "path": str(source.path),
        "kind": source.kind,
        "dtype": str(source.dtype),
        "slots": list(source.tensors),
    }


def _format_diff(
    facts: dict[str, Any], tensors: list[Comparison], equal: bool, same_count: bool
) -> str:
    """The comparison for a reader: both sides, the configuration, then each slot's tensors."""
    lines = []
    for name, side in (("A", facts["a"]), ("B", facts["b"])):
        slots = ", ".join(side["slots"])
        kind = KINDS[side["kind"]]
        lines.append(f"{name}           {side['path']} ({kind}, {side['dtype']}, {slots})")
    model = _format_fields(facts["model"])
    config = _format_fields(facts["config"])
    lines.append(f"model       {model or 'the same sizes and options'}")
    if config:
        lines.append(f"config      {config}{'' if model else ' (not part of the function)'}")
    if not same_count:
        lines.append("count       {} and {}".format(*facts["count"]))
    for slot in dict.fromkeys(tensor.slot for tensor in tensors):
        lines += _format_slot(slot, [tensor for tensor in tensors if tensor.slot == slot])
    lines.append("equal" if equal else "different")
    return "\n".join(lines)


def _format_fields(fields: dict[str, tuple[Any, Any]]) -> str:
    """'layer 2 and 3, mlp 12 and 24'"""
    return ", ".join(_format_field(key, a, b) for key, (a, b) in fields.items())


def _format_field(key: str, a: Any, b: Any) -> str:
    """A field whose values differ; None stands for one that is absent."""
    from growkit.surgery.comparison import find_differences

    if a is None or b is None:
        side, value = ("B", b) if a is None else ("A", a)
        return f"{key} only in {side} ({_shorten(value)})"
    if isinstance(a, dict) and isinstance(b, dict):
        inner = find_differences(a, b)
        return f"{key} ({_format_fields(inner)})"
    if isinstance(a, list) and isinstance(b, list):
        pairs = zip(a, b, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return f"{key} from entry {same} on (of {len(a)} and {len(b)})"
    return f"{key} {_shorten(a)} and {_shorten(b)}"


def _shorten(value: Any) -> str:
    """A value of a configuration, on one line with others."""
    words = f"a list of {len(value)}" if isinstance(value, list) else str(value)
    return words if len(words) <= LONGEST_VALUE else f"{words[:LONGEST_VALUE]}..."


def _format_slot(slot: str, tensors: list[Comparison]) -> list[str]:
    """How many tensors have each verdict, and a line for each tensor that is not equal.

    A slot that one side alone has, as that of moments, is one line.
    """
    verdicts = [tensor.verdict for tensor in tensors]
    counts = [
        f"{verdicts.count(verdict)} {verdict.replace('differs', 'differ')}"
        for verdict in dict.fromkeys(verdicts)
    ]
    lines = [f"{slot:<11} {', '.join(counts)}"]
    if len(counts) == 1 and verdicts[0].startswith("only in"):
        return lines
    for tensor in tensors:
        if tensor.verdict != "equal":
            by = "" if tensor.largest is None else f", by at most {tensor.largest:.3g}"
            lines.append(f"  {tensor.name}: {tensor.detail or tensor.verdict}{by}")
    return lines


@click.command()
@click.argument("src")
@click.argument("out")
@add_table_option
def verify(src: str, out: str) -> None:
    """Recompute every tensor of OUT from SRC and the plan in OUT's lineage; compare all bytes.

    Names the first tensor that differs and exits with 1. Run it on the machine that grew OUT:
    another may round means and products differently. Configuration and Adam's count are compared
    as well. A table that OUT was grown by is in its lineage.
    """
    from growkit.checkpoint.location import open_source
    from growkit.errors import GrowkitError
    from growkit.surgery.comparison import find_mismatch, recorded_plan

    result = open_source(out)
    source = _open_alike(src, result)
    plan = recorded_plan(source, result)
    note = _note_other_source(source, result)
    with show_progress("verifying", result.size) as progress:
        wrong = find_mismatch(source, result, plan, progress)
    if wrong:
        reasons = [_find_reason(src, out, result), note]
        hint = "".join(f"; {reason}" for reason in reasons if reason)
        raise GrowkitError(f"{out} is not what its plan makes of {src}: {wrong}{hint}")
    tensors = sum(len(slot) for slot in result.tensors.values())
    words = (
        f"verified: all {tensors:,} tensors of {out} ({result.size / 1e6:,.1f} MB) are what "
        f"{plan.verb} makes of {src}"
    )
    document = {
        "verified": True,
        "source": str(source.path),
        "output": str(result.path),
        "operation": plan.verb,
        "tensors": tensors,
        "bytes": result.size,
        "note": note or None,
    }
    show_result(f"{words}\nnote: {note}" if note else words, document, brief=words)


def _open_alike(src: str, result: Source) -> Source:
    """The source of a growth, read by the table that the growth states.

    Raises UsageError where the user gave another table than that one.
    """
    from growkit.checkpoint.location import open_source
    from growkit.errors import UsageError
    from growkit.models.given import describe_origin, parse_given, use_family
    from growkit.surgery.comparison import recorded_growth

    stated = recorded_growth(result).table
    used = result.model.family
    if not stated:
        return open_source(src)
    if used.given != stated:
        wanted = describe_origin(parse_given(stated))
        raise UsageError(
            f"{result.path} was grown by another table than the one of --table: its own is "
            f"{wanted}, the one given is {describe_origin(used)}; leave --table out, the lineage "
            f"holds it"
        )
    with use_family(used):
        return open_source(src)


def _find_reason(src: str, out: str, result: Source) -> str:
    """Which side changed since the growth, by the hashes on record; empty where there are none."""
    if result.hashed is None:
        return ""
    changed = result.hashed.find_changed()
    if changed:
        return f"{out} was changed after it was written: {changed[0]!r} has another hash"
    return (
        f"{out} is byte for byte what was written, so {src} is not what it was grown from, or this "
        "machine rounds otherwise"
    )


def _note_other_source(source: Source, result: Source) -> str:
    """A note if the growth on record began with another model than `source`, else nothing."""
    from growkit.surgery.comparison import recorded_growth

    origin = recorded_growth(result).source
    if origin is None:
        return f"the lineage of {result.path} does not name its source"
    if origin.fingerprint == source.fingerprint:
        return ""
    return (
        f"{result.path} was grown from {origin.path}, whose fingerprint was another than that of "
        f"{source.path}"
    )


COMMANDS = {"inspect": inspect, "diff": diff, "verify": verify}
