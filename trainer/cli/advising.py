"""The verb that says when to grow, from which size, and what that may save: advise.

Knows how sizes are named, time by the plan's formula, and the telling; leaves the laws to `trainer.study.advice` and one's
own measurements to `trainer.study.evidence`.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import click

MFU = 0.4
LEAST_LAYERS = 2  # G_stack fared worse than from scratch from a source of one layer (section 4.2)
REWARM = (
    "150 to 250 steps after copies of layers (growkit's guide, docs/operators.md; no law is published); the 760M run, "
    "grown from 580M with a fresh optimizer, took 2000"
)


@click.command()
@click.option(
    "--target",
    required=True,
    metavar="SIZE",
    help="A count (760M, 1.1B), a preset (760m, 1b) or a model SRC.",
)
@click.option(
    "--source", metavar="SIZE", help="What grows into it.  [default: what G_stack recommends]"
)
@click.option(
    "--tokens", metavar="N", help="What the target would be trained on from scratch: 41B, 500M, ..."
)
@click.option("--flops", metavar="F", help="Or the training FLOPs that there are: 1.9e20, ...")
@click.option(
    "--topology",
    metavar="NAME",
    help="A slice of TPUs (v3-32), cpu or gpu: adds days, by plan's formula.",
)
@click.option(
    "--mfu",
    type=float,
    metavar="M",
    help=f"The model FLOPs utilization to assume.  [default: {MFU}]",
)
@click.option("--price", type=float, metavar="P", help="What a chip costs an hour, for the cost.")
@click.option(
    "--study", "studies", multiple=True, metavar="DIR", help="A study of your own; may be repeated."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of tables.")
def advise(target, source, tokens, flops, topology, mfu, price, studies, as_json) -> None:
    """Say what published laws and your own studies say of growing --source into --target, against from scratch.

    Nothing is trained or measured here: each figure names where it comes from, and a question outside the range of a
    law is called so.
    """
    from growkit.cli.terminal import format_json
    from growkit.errors import UsageError
    from growkit.quantity import parse_count
    from trainer.study.advice import Growth
    from trainer.study.evidence import read_study

    if (tokens is None) == (flops is None):
        raise UsageError("the budget is either --tokens or --flops, and one of them is needed")
    large, model = read_size(target, "--target")
    if flops is None:
        budget = parse_count(tokens, "--tokens") * large.flops_per_token
    else:
        budget = float(parse_count(flops, "--flops", 1e36))
    small = recommend_source(large, model) if source is None else read_size(source, "--source")[0]
    if budget < large.flops_per_token:
        raise UsageError(
            f"{budget:.3g} FLOPs do not train {large.name} on one token, {large.flops_per_token:.3g} do"
        )
    if small.parameters >= large.parameters:
        raise UsageError(
            f"growth begins with the smaller model, and --source {small.name} has {small.parameters:,} parameters, "
            f"--target {large.name} {large.parameters:,}"
        )
    made = Growth(large, small, budget)
    devices = read_devices(topology, mfu, price)
    measured = [read_study(path) for path in studies]
    if as_json:
        click.echo(format_json(_document(made, source is None, devices, measured)))
    else:
        _show(made, source is None, devices, measured)


# Sizes


def read_size(text: str, option: str):
    """(the size, its architecture or None) that a count of parameters, a preset, a YAML file or SRC names."""
    from growkit.checkpoint.location import open_source
    from growkit.errors import UsageError
    from growkit.quantity import parse_count
    from trainer.config.values import list_presets
    from trainer.study.advice import Size

    # 760M is a count and 760m a preset, which says more.
    if text in list_presets() or text.endswith((".yaml", ".yml")):
        model = _configured(text)
        return _measured_size(text, model), model
    try:
        if text[:1].isdigit() and "/" not in text and not os.path.exists(text):
            return Size.from_count(text, parse_count(text, "a count")), None
        model = open_source(text).model
    except UsageError as problem:
        known = ", ".join(list_presets())
        raise UsageError(
            f"{option} takes a count as 760M, a preset ({known}) or a model; {problem}"
        ) from None
    return _measured_size(text, model), model


def _configured(name: str):
    from growkit.errors import UsageError
    from trainer.config.sections import build_architecture, resolve
    from trainer.config.values import read_values

    values = read_values(name, [])
    if not values.get("model"):
        raise UsageError(f"{name} has no model section, so it has no size")
    return build_architecture(resolve(values).model)


def _measured_size(name: str, model):
    from trainer.study.advice import Size

    flops = model.flops_per_token()
    embeddings = model.vocab * model.embed * (1 if model.tied else 2)
    return Size(name, model.parameters, model.parameters - embeddings, flops, model.embed)


def recommend_source(target, model):
    """The source of the size that G_stack recommends: a fourth of the layers, or of a bare count."""
    from growkit.quantity import format_count
    from trainer.study.advice import FACTOR, Size

    if model is None:
        count = max(1, target.parameters // FACTOR)
        return Size.from_count(format_count(count), count)
    layers = max(LEAST_LAYERS, round(model.layer / FACTOR))
    return _measured_size(
        f"{layers} layers of {target.name}", model.resize(model.sizes | {"layer": layers})
    )


# Time


@dataclass(frozen=True)
class Devices:
    """Where training would happen. peak: FLOP/s of all chips, None if unknown; price: of a chip and hour."""

    name: str
    chips: int
    peak: float | None
    mfu: float
    price: float | None

    def estimate_days(self, flops: float | None) -> float | None:
        """FLOPs / (MFU x peak), as `growkit plan` has it."""
        return (
            None if flops is None or self.peak is None else flops / (self.mfu * self.peak) / 86400
        )

    def estimate_cost(self, flops: float | None) -> float | None:
        days = self.estimate_days(flops)
        return None if days is None or self.price is None else days * 24 * self.price * self.chips


def read_devices(topology: str | None, mfu: float | None, price: float | None) -> Devices | None:
    """The devices that --topology names; None without one. Raises UsageError."""
    from growkit.errors import UsageError
    from trainer.devices.accelerators import parse_slice

    if topology is None:
        if mfu is not None or price is not None:
            raise UsageError("--mfu and --price are about time, which needs a --topology, as v3-32")
        return None
    assumed = MFU if mfu is None else mfu
    if not 0 < assumed <= 1:
        raise UsageError(f"--mfu lies in (0, 1], got {assumed:g}")
    if topology in ("cpu", "gpu"):
        from trainer.plan.plan import find_target

        here = find_target(topology)
        return Devices(topology, here.chips, here.peak, assumed, price)
    part = parse_slice(topology)
    return Devices(topology, part.chips, part.chips * part.accelerator.peak, assumed, price)


# Telling


def _show(made, chosen: bool, devices: Devices | None, studies: list) -> None:
    from rich.console import Console
    from rich.table import Table

    # To a file or a pipe rich would fold lines at 80 columns.
    console = Console(width=None if os.isatty(1) else 120, markup=False, highlight=False)
    time = [
        *(["days"] if devices else []),
        *(["cost"] if devices and devices.price is not None else []),
    ]
    sections = [("At equal compute", ["", "tokens", "FLOPs"], _budgets(made))]
    columns = ["saved", "without the source's", "FLOPs if so here"]
    sections.append(
        ("To from-scratch's loss: published, not measured here", ["", "", *columns], _claims(made))
    )
    for study in studies:
        title = f"To from-scratch's loss: your study {study.path}, {_sizes(study)}"
        sections.append((title, ["", "", "re-warm-up", *columns], _arms(made, study)))
    for title, head, rows in sections:
        table = Table(*head, *time, title=title, title_justify="left")
        for *cells, flops in rows:
            table.add_row(*cells, f"{flops:.3g}" if flops else "-", *_time(devices, flops))
        console.print(table)
    notes = Table.grid(padding=(0, 2))
    for label, words in _notes(made, chosen, devices):
        notes.add_row(label, words)
    console.print(notes)


def _time(devices: Devices | None, flops: float | None) -> list[str]:
    if devices is None:
        return []
    days, cost = devices.estimate_days(flops), devices.estimate_cost(flops)
    shown = [
        "unknown" if flops and devices.peak is None else "-" if days is None else f"{days:.3g}"
    ]
    return shown if devices.price is None else [*shown, "-" if cost is None else f"{cost:,.0f}"]


def _budgets(made) -> list[tuple]:
    """(what, tokens, FLOPs): from scratch, and the same compute with growth by the timing law."""
    from growkit.quantity import format_count

    rows = [(f"from scratch: {_named(made.target)}", format_count(made.tokens), made.flops)]
    if made.affordable:
        rest = made.flops - made.source_flops
        rows += [
            (f"source: {_named(made.source)}", format_count(made.source_tokens), made.source_flops),
            (f"then grown to {made.target.name}", format_count(made.target_tokens), rest),
        ]
    return rows


def _named(size) -> str:
    from growkit.quantity import format_count

    return size.name if size.embed is None else f"{size.name} ({format_count(size.parameters)})"


def _claims(made) -> list[tuple]:
    from trainer.study.advice import CLAIMS

    rows = []
    for claim in CLAIMS:
        saved = f"{claim.saved:.0%}"
        counted = (saved, "-") if claim.counts_source else ("-", saved)
        rows.append(
            (claim.work, claim.where, *counted, made.compute_flops_to_same_loss(claim.saved, claim.counts_source))
        )
    return rows


def _sizes(study) -> str:
    from growkit.quantity import format_count

    sizes = f"{format_count(study.source)} to {format_count(study.target)} parameters"
    return f"{sizes}, {format_count(study.source_tokens)} tokens for the source, {format_count(study.tokens)} from scratch"


def _arms(made, study) -> list[tuple]:
    rows = []
    for arm in study.arms:
        reached = arm.reached or arm.saved.mean is None
        words = arm.operator if reached else f"{arm.operator}; not every run reached the loss"
        steps = "-" if arm.rewarmup is None else str(arm.rewarmup)
        figures = (_spread(saved, arm.at_least) for saved in (arm.saved, arm.saved_without_source))
        rows.append((arm.name, words, steps, *figures, _here(made, arm)))
    return rows


def _here(made, arm) -> float | None:
    """FLOPs if the arm's saving held for the sizes that are asked about."""
    return None if arm.saved.mean is None else made.compute_flops_to_same_loss(arm.saved.mean, True)


def _spread(measured, at_least: bool) -> str:
    if measured.mean is None:
        return {0: "no run yet", 1: "loss not reached"}.get(
            measured.runs, "loss not reached by every run"
        )
    spread = "" if measured.std is None else f" ± {measured.std:.1%}"
    more = "at least " if at_least else ""
    return f"{more}{measured.mean:.1%}{spread} ({measured.runs} run{'' if measured.runs == 1 else 's'})"


def _notes(made, chosen: bool, devices: Devices | None) -> list[tuple[str, str]]:
    """(label, words): the law with its formula, source and range; size, re-warm-up, and what was assumed."""
    from trainer.study import advice

    law = f"log10 d = {advice.PARAMETERS:g} log10 N + {advice.COMPUTE:g} / log10 C - {-advice.CONSTANT:g}"
    whole = " (of a bare count all)" if made.target.embed is None else ""
    notes = [
        ("when", _when(made)),
        ("law", f"{advice.GSTACK}, equation 2: {law}. d: tokens of the source; "
         f"N = {made.target.without_embeddings:.3g}, the target's parameters without embeddings{whole}; "
         f"C = {made.flops:.3g}, FLOPs of source and target together"),
        ("range", _range(made)),
        ("size", _size(made, chosen)),
        ("re-warm-up", REWARM),
        ("saved", "of from-scratch's FLOPs to its last loss, the source's counted or not; a speedup s saves "
         "1 - 1 / (1 + s)"),
        ("FLOPs", "; ".join(f"of {size.name} {_counting(size)}" for size in (made.target, made.source))),
    ]  # fmt: skip
    if devices and devices.peak is None:
        notes.append(("days", f"unknown: the peak FLOP/s of {devices.name} is not known"))
    elif devices:
        speed = f"{devices.mfu:.0%} MFU, assumed, x {devices.peak / 1e12:,.0f} TFLOP/s of {devices.name}"
        notes.append(("days", f"FLOPs / ({speed}); growkit plan says what fits"))
    return notes


def _counting(size) -> str:
    counted = size.flops_per_token == 6.0 * size.parameters
    return "6 x parameters a token" if counted else "by its sizes (PaLM, appendix B)"


def _when(made) -> str:
    from growkit.quantity import format_count
    from trainer.study.advice import LARGEST_SHARE

    share = made.source_flops / made.flops
    asked = f"{format_count(made.source_tokens)} tokens, {f'{share:.1%} of' if share < 1 else f'{share:.3g} times'} the budget"
    if made.affordable:
        return f"grow when {made.source.name} has seen {asked}"
    return (
        f"no advice: the law asks the source for {asked}, and above {LARGEST_SHARE:.0%} (growkit's limit) growth has "
        "too little left to save; take a smaller source, a larger budget, or a study of your own"
    )


def _range(made) -> str:
    from growkit.quantity import format_count
    from trainer.study.advice import FACTOR, FITTED

    if outside := made.list_deviations():
        return f"EXTRAPOLATION, outside of what the law was fitted to: {'; '.join(outside)}"
    sizes = f"targets of {format_count(min(FITTED))} to {format_count(max(FITTED))}"
    return f"inside of what the law was fitted to: {sizes}, growth by {FACTOR} in depth, and budgets as this at this size"


def _size(made, chosen: bool) -> str:
    from trainer.study.advice import FACTOR, FACTORS

    own = f"{made.source.name} is 1/{made.factor:.3g} of {made.target.name}"
    if None not in (made.source.embed, made.target.embed):
        own += ", embeddings left out"
    best = f"its best factor lay between {FACTORS[0]} and {FACTORS[1]}"
    law = f"G_stack (section 4.2) recommends {FACTOR}, in depth (depth --method stack)"
    return f"{own}{', by default' if chosen else ''}; {law}; {best}"


def _document(made, chosen: bool, devices: Devices | None, studies: list) -> dict[str, Any]:
    """The advice as JSON: counts, FLOPs, days; null where nothing can be said."""
    from trainer.study import advice

    def costs(flops: float | None) -> dict[str, float | None]:
        return {
            "flops": flops,
            "days": devices.estimate_days(flops) if devices else None,
            "cost": devices.estimate_cost(flops) if devices else None,
        }

    rest = made.flops - made.source_flops if made.affordable else None
    return {
        "target": asdict(made.target),
        "source": asdict(made.source) | {"recommended": chosen, "factor": made.factor},
        "scratch": {"tokens": made.tokens} | costs(made.flops),
        "law": {
            "name": advice.GSTACK,
            "constants": {"a": advice.PARAMETERS, "b": advice.COMPUTE, "c": advice.CONSTANT},
            "outside": made.list_deviations(),
            "affordable": made.affordable,
            "source": {"tokens": made.source_tokens} | costs(made.source_flops),
            "grown": {"tokens": made.target_tokens if made.affordable else None} | costs(rest),
        },
        "published": [
            asdict(claim)
            | {"if_so_here": costs(made.compute_flops_to_same_loss(claim.saved, claim.counts_source))}
            for claim in advice.CLAIMS
        ],
        "studies": [
            asdict(study)
            | {
                "arms": [
                    asdict(arm) | {"if_so_here": costs(_here(made, arm))} for arm in study.arms
                ]
            }
            for study in studies
        ],
        "rewarmup": REWARM,
        "topology": asdict(devices) if devices else None,
    }


COMMANDS = {"advise": advise}
