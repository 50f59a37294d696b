"""The derivation of a model type: one table for all values of its options, each of them proved."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from growkit.checkpoint.location import open_source, write_output
from growkit.derive import proof
from growkit.derive.assemble import fields_of, kinds_of, make_family, row_lines
from growkit.derive.lists import find_by_layer
from growkit.derive.network import (
    CONFIG_MAPPING,
    UnprovableError,
    load,
    make_config,
    run,
    set_plain,
    wide,
)
from growkit.derive.options import Sample, find_options, merge
from growkit.derive.proof import BOUND, depth_gap, identity_map, measure_gap, source_logits
from growkit.derive.sizes import runs_with
from growkit.derive.stream import TOKENS
from growkit.derive.variant import Variant, read_variant
from growkit.derive.workings import Workings, pooled, work_out
from growkit.growth.axes import make_map, tile
from growkit.growth.plan import build_plan
from growkit.models.family import Family
from growkit.models.given import use_family
from growkit.models.tables import list_shipped, read_shipped
from growkit.surgery.grow import prepare_growth

INVERSE = {
    "sqrt(embed)": "1/sqrt(embed)",
    "1/sqrt(embed)": "sqrt(embed)",
    "embed": "1/embed",
    "1/embed": "embed",
}
TIE = "tie_word_embeddings"


@dataclass
class Derivation:
    """A family, how exactly each growth of it was found to be, and what was tried besides."""

    family: Family
    gaps: dict[str, float]
    notes: list[str] = field(default_factory=list)

    @property
    def wide(self) -> bool:
        """Whether the width of the stream grows by copies, exactly."""
        heads = self.family.heads
        axis = heads if self.family.coupled else "embed"
        return axis in self.gaps and axis not in self.family.frozen

    @property
    def deep(self) -> bool:
        """Whether layers are copied as transformers' own are."""
        return "layer" not in self.family.frozen


def derive(kind: str, fields: Mapping[str, Any] | None = None) -> Derivation:
    """Derive a type's family.

    Raises UnprovableError where not even depth can be derived, and whatever transformers and torch
    raise where they compute no tiny model.
    """
    if getattr(CONFIG_MAPPING[kind](), "is_encoder_decoder", False):
        raise UnprovableError(f"{kind} models are an encoder and a decoder")
    work = work_out(kind, fields)
    base = work.variant
    if base.config.model_type != kind:
        raise UnprovableError(f"files of {kind} say {base.config.model_type}: derive that")
    layout, function = find_options(base)
    proved: dict[str, Any] = {}
    variants = [base, *read_variants(work, layout, proved)]
    family, options, kept = settle_options(work, variants, layout, proved)
    for name in function:
        changed = with_fields(base, {name: not base.probe.stated[name]})
        if changed is None or not holds(family, changed, work):
            proved[name] = base.probe.stated[name]
    family = replace(assemble(work, kept, options, proved), whole_heads=wants_whole_heads(base))
    family = prove_padding(family, kept, work)
    if kind in list_shipped():
        # How a gate chooses, and what becomes a mixture, is stated by hand and proved by tests.
        shipped = read_shipped(kind)
        by_hand = ("experts", "expert_defaults", "upcycling", "upcycled")
        family = replace(family, **{name: getattr(shipped, name) for name in by_hand})
    work.gaps["files"] = max(prove_files(family, variant, work) for variant in kept)
    if work.gaps["files"] > BOUND:
        raise UnprovableError(f"growth through files is not exact: {work.gaps['files']:.1e}")
    return Derivation(family, work.gaps, [f"{n}: {p}" for n, p in work.problems.items()])


def settle_options(
    work: Workings, variants: list[Variant], layout: list[str], proved: dict[str, Any]
) -> tuple[Family, list[str], list[Variant]]:
    """One family for as many options as it can hold for, these options, and their variants.

    proved: gets the one value of each option that is given up.
    """
    base = work.variant
    while True:
        kept = [v for v in variants if agrees(v, base, proved)]
        options = [name for name in layout if name not in proved]
        try:
            family = assemble(work, kept, options, proved)
        except ValueError:
            name = pick(options)
        else:
            wrong = next((v for v in kept[1:] if not holds(family, v, work)), None)
            if wrong is None:
                return family, options, kept
            name = next(n for n in options if differs(wrong, base, n))
        proved[name] = base.probe.stated[name]


def pick(options: list[str]) -> str:
    """The option to give up first: not the tied head, which every user has a value for."""
    others = [name for name in options if name != TIE]
    return (others or options)[0]


def differs(variant: Variant, base: Variant, name: str) -> bool:
    return bool(variant.probe.stated.get(name) != base.probe.stated.get(name))


def agrees(variant: Variant, base: Variant, proved: Mapping[str, Any]) -> bool:
    """Whether a variant has the one value of every option that is not free."""
    return all(not differs(variant, base, name) for name in proved)


def read_variants(work: Workings, layout: list[str], proved: dict[str, Any]) -> list[Variant]:
    """The type with each option changed, and with all of them changed."""
    base = work.variant
    flips = [{name: not base.probe.stated[name]} for name in layout]
    if len(flips) > 1:
        flips.append({name: value for flip in flips for name, value in flip.items()})
    found = []
    for flip in flips:
        try:
            variant = read_variant(base.kind, base.probe.fields | flip, like=base)
        except Exception:
            variant = None
        if variant is not None and fields_of(variant) == fields_of(base):
            found.append(variant)
        elif len(flip) == 1:
            proved |= {name: base.probe.stated[name] for name in flip}
    return found


def with_fields(base: Variant, changed: Mapping[str, Any]) -> Variant | None:
    """The same parameters under other options; None where transformers refuses them."""
    try:
        config = make_config(base.kind, base.probe.fields | dict(changed))
    except Exception:
        return None
    return replace(base, config=config, known={})


def assemble(
    work: Workings, variants: list[Variant], options: list[str], proved: Mapping[str, Any]
) -> Family:
    """The family of all variants.

    Raises UnprovableError where their options do not tell their rows apart.
    """
    samples = []
    for variant in variants:
        values = {name: bool(variant.probe.stated[name]) for name in options}
        samples.append(Sample(values, row_lines(variant, work.choice, pooled(variant))))
    flags = {"tied" if name == TIE else name: name for name in options}
    patterns, stated = find_patterns(work.variant)
    family = make_family(
        work.variant,
        merge(samples),
        reasons(work),
        flags,
        scalars=scalars_of(work, TIE in options),
        proved=dict(proved),
        patterns=patterns,
        stated=stated,
        uniform=tuple(sorted(work.even_only)),
        no_identity=no_identity(work),
    )
    return replace(
        family, defaults=dict(family.defaults) | {n: default_of(work.variant, n) for n in proved}
    )


def default_of(variant: Variant, name: str) -> Any:
    return getattr(CONFIG_MAPPING[variant.kind](), name, None)


def reasons(work: Workings) -> dict[str, str]:
    """Why each frozen axis is, with what was measured."""
    found = {}
    for axis, reason in work.frozen.items():
        gap = work.gaps.get(axis, float("inf"))
        if axis in work.problems and gap == float("inf"):
            reason = "transformers computes no model with more of it"
        elif gap != float("inf") and axis in work.gaps:
            reason = f"{reason}, {gap:.0e} of the largest logit away"
        found[axis] = reason
    return found


def no_identity(work: Workings) -> str:
    """Why no layers that add nothing can be inserted; empty where they can."""
    if work.gaps.get("identity", 1.0) < BOUND:
        return ""
    if "must keep their kind" in work.problems.get("identity", ""):
        return "layers would not keep their kinds in the places that it gives them"
    if any(problem.startswith("nothing silences") for problem in work.variant.problems):
        return "no parameters of a layer make it add nothing"
    return "a layer that adds nothing changes what the others compute"


def scalars_of(work: Workings, free: bool) -> dict[str, str]:
    """Scalars for tied and untied heads. free: whether both are in the table."""
    final = [draft.name for draft in work.variant.drafts if draft.final]
    embedding = next((d.name for d in work.variant.drafts if d.role == "embedding"), "")
    scalars = dict(work.scalars)
    factor = scalars.get(embedding, "")
    if not free or not factor:
        return scalars
    for name in final:
        scalars.pop(name, None)
        # A tied head is scaled with its embedding; the norm before it makes up for that.
        scalars[f"{name} tied"] = INVERSE[factor]
    return scalars


def holds(family: Family, variant: Variant, work: Workings) -> bool:
    """Whether a family grows a variant as exactly as it does the base."""
    try:
        if work.maps and measure_gap(family, variant, work.maps) > BOUND:
            return False
        layers = variant.names.layers
        if "layer" not in work.frozen:
            index = work.copies[0]
            if depth_gap(family, variant, index)[0] > BOUND:
                return False
        if work.gaps.get("identity", 1.0) > BOUND or "layer" in work.frozen:
            return True
        return measure_gap(family, variant, {"layer": identity_map(layers)}) < BOUND
    except Exception:
        return False


def wants_whole_heads(variant: Variant) -> bool:
    """Whether transformers wants embed to be a multiple of the number of heads."""
    hidden = str(variant.hidden)
    if variant.coupled or variant.hidden is None:
        return True
    return not runs_with(variant.probe, {hidden: variant.probe.value(hidden) + 2})


def find_patterns(variant: Variant) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """What lists by layer are where config.json leaves them out: kinds that repeat, or to be
    stated.
    """
    patterns: dict[str, tuple[str, ...]] = {}
    stated = []
    config_class = CONFIG_MAPPING[variant.kind]
    for name in find_by_layer(variant):
        if name in (*kinds_of(variant).rules, *kinds_of(variant).cycles):
            continue
        entries = getattr(config_class(), name, None)
        if not isinstance(entries, list) or follows_others(config_class, name, entries):
            stated += [name] if isinstance(entries, list) else []
            continue
        period = next(p for p in range(1, len(entries) + 1) if repeats(entries, p))
        if period > len(entries) // 2:
            stated.append(name)
        elif period > 1:
            patterns[name] = tuple(entries[:period])
    return patterns, tuple(stated)


def repeats(entries: list[Any], period: int) -> bool:
    return all(entry == entries[place % period] for place, entry in enumerate(entries))


def follows_others(config_class: Any, name: str, entries: list[Any]) -> bool:
    """Whether a list is made by a rule of other fields than the number of layers."""
    for other, value in config_class().to_dict().items():
        if other.endswith("layers") or not isinstance(value, int):
            continue
        changed = not value if isinstance(value, bool) else value * 2
        with contextlib.suppress(Exception):
            if getattr(config_class(**{other: changed}), name) != entries:
                return True
    return False


def prove_padding(family: Family, variants: list[Variant], work: Workings) -> Family:
    """Pad embed by half: under the rule of LayerNorm or of RMSNorm, whichever is exact for all
    variants.
    """
    if "embed" in family.frozen or (family.coupled and family.heads in family.frozen):
        return replace(family, unpadded="its copies are not exact either")
    gaps = {}
    for norm in ("rms", "layer"):
        tried = replace(family, norm=norm)
        gaps[norm] = max(pad_gap(tried, variant) for variant in variants)
    norm = min(gaps, key=lambda name: gaps[name])
    work.gaps["padding"] = gaps[norm]
    if gaps[norm] < BOUND:
        return replace(family, norm=norm)
    return replace(family, unpadded="padding it is another function")


def pad_gap(family: Family, variant: Variant) -> float:
    try:
        model = proof.read_model(family, proof.source_of(variant))
        maps = {}
        if family.coupled:
            maps[family.heads] = tile(model.sizes[family.heads], model.sizes[family.heads] * 3 // 2)
        return measure_gap(family, variant, maps, {"embed": model.embed * 3 // 2})
    except Exception:
        return float("inf")


def prove_files(family: Family, variant: Variant, work: Workings) -> float:
    """Grow through files: saved by transformers, grown on disk, loaded by transformers."""
    with tempfile.TemporaryDirectory() as folder, use_family(family):
        path = Path(folder)
        save(variant, path / "source")
        source = open_source(str(path / "source"))
        maps = dict(work.maps)
        expected = source_logits(variant)
        layers = variant.names.layers
        if work.gaps.get("identity", 1.0) < BOUND and "layer" not in work.frozen:
            maps["layer"] = identity_map(layers)
        elif not maps and "layer" not in work.frozen:
            index = work.copies[0]
            maps["layer"] = make_map(index, layers)
            expected = proof.reordered_logits(proof.source_of(variant), variant, index)
        plan = build_plan("grow", "", source.model, maps)
        write_output(path / "out", "huggingface", prepare_growth(source, plan), [source])
        return proof.gap(load_logits(path / "out"), expected)


def save(variant: Variant, path: Path) -> None:
    with wide():
        load(variant.config, variant.state).save_pretrained(path)


def load_logits(path: Path) -> torch.Tensor:
    """The logits of a directory, as transformers loads it by itself."""
    config = set_plain(transformers.AutoConfig.from_pretrained(path))
    with wide():
        network, report = transformers.AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float64, output_loading_info=True
        )
    if any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise UnprovableError(f"transformers does not find all parameters: {report}")
    return run(network.eval(), TOKENS)
