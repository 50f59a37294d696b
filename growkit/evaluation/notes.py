"""What a reader must know about tables of evaluations, a sentence each.

Rows may come from several commands, so what is not the same for all of them is said of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from growkit.evaluation.catalogue import find_title, is_full
from growkit.evaluation.reference import Reference, read_reference

Record = dict[str, Any]


def build_notes(
    record: Record, names: Sequence[str], reference: Reference | None = None
) -> list[str]:
    """The notes below the tables of a record. names: what its models are called there.

    reference: published rows that stand in the tables; None for the usual ones, beside full sets.
    """
    models = record["models"]
    plain = (
        "Standard errors are in the file of --output. " if reference and reference.tables else ""
    )
    notes = [f"{plain}± is one standard error."]
    notes += _say_of_all(names, [_describe_documents(model) for model in models], "Documents")
    settings = [_describe_settings(record, model) for model in models]
    notes += _say_of_all(names, settings, "lm-evaluation-harness")
    notes += _describe_other_documents(models, names)
    cut = [_describe_cut(model) for model in models]
    if any(cut):
        words = [each or "none" for each in cut]
        notes += _say_of_all(names, words, "Longer requests, their contexts cut on the left")
    return [*notes, *_describe_published(models, reference)]


def _say_of_all(names: Sequence[str], words: Sequence[str], what: str) -> Iterator[str]:
    """One sentence where the words are the same for all models, else one for each of them."""
    if len(set(words)) == 1:
        yield f"{what}: {words[0]}."
        return
    for name, own in zip(names, words, strict=True):
        yield f"{what}, {name}: {own}."


def _describe_documents(model: Record) -> str:
    counts = [f"{find_title(r['name'])} {_format_count(r)}" for r in model["results"]]
    return ", ".join(counts)


def _describe_cut(model: Record) -> str:
    """How many requests of each task were longer than the window; empty for none."""
    return ", ".join(f"{find_title(r['name'])} {r['cut']}" for r in model["results"] if r["cut"])


def _format_count(result: Record) -> str:
    """'1,838', or '500 of 1,838'."""
    documents = result["documents"]
    total = result["total"]
    return f"{documents:,}" if documents == total else f"{documents:,} of {total:,}"


def _describe_settings(record: Record, model: Record) -> str:
    """The harness and how it was used. Rows of another file have versions and settings of its."""
    settings = model.get("settings") or record["settings"]
    versions = model.get("versions") or record["versions"]
    return (
        f"version {versions.get('lm_eval', 'unknown')}, zero-shot, in {settings['dtype']}, windows "
        f"of at most {settings['max_length']} tokens"
    )


def _describe_other_documents(models: Sequence[Record], names: Sequence[str]) -> Iterator[str]:
    """A note for each task of which two models were asked as many documents, but others."""
    first: dict[tuple[str, int], tuple[str, str]] = {}
    for name, model in zip(names, models, strict=True):
        for result in model["results"]:
            digest = result.get("documents_sha256", "")
            key = (result["name"], result["documents"])
            other, theirs = first.setdefault(key, (name, digest))
            if digest != theirs:
                yield (
                    f"{name} was asked other documents of {find_title(result['name'])} than "
                    f"{other}, so these two figures do not compare."
                )


def _describe_published(models: Sequence[Record], reference: Reference | None) -> Iterator[str]:
    """Where published rows come from, and which sets they are not like."""
    results = [result for model in models for result in model["results"]]
    partial = [r for r in results if not is_full(r["name"], r["documents"], r["total"])]
    short = list(dict.fromkeys(r["name"] for r in partial))
    asked = list(dict.fromkeys(r["name"] for r in results))
    published = reference or read_reference()
    if reference is None:
        asked = [name for name in asked if name not in short]
    if not published.select(asked):
        return
    if published.sources:
        yield f"Published: {'; '.join(published.sources)}."
    compared = [find_title(name) for name in short if published.select([name])]
    if reference and compared:
        yield (
            "Published figures are of full sets, and those measured here of "
            f"{', '.join(compared)} are not."
        )
