"""The verb that says when to grow, from which size, and what that may save: advise."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from growkit.cli.options import PATH
from growkit.cli.output import show_result
from trainer.plan.cost import MFU

if TYPE_CHECKING:
    from growkit.models.architecture import Architecture
    from trainer.plan.cost import Devices
    from trainer.study.advice import Growth, Size

MOST_FLOPS = 1e36  # of a budget


@click.command()
@click.option(
    "--target",
    required=True,
    metavar="SIZE",
    help="A count (760M, 1.1B), a preset (760m, 1b) or a model SRC.",
)
@click.option(
    "--source", metavar="SIZE", help="The model to grow.  [default: what G_stack recommends]"
)
@click.option(
    "--source-tokens",
    metavar="N",
    help="Tokens that the source has seen.  [default: as its checkpoint says, else G_stack's]",
)
@click.option(
    "--tokens", metavar="N", help="Tokens to train the target on from scratch: 41B, 500M, ..."
)
@click.option("--flops", metavar="F", help="Or the training FLOPs available: 1.9e20, ...")
@click.option(
    "--topology",
    metavar="NAME",
    help="A TPU slice (v3-32), cpu or gpu: adds days, by the plan's formula.",
)
@click.option(
    "--mfu",
    type=float,
    metavar="M",
    help=f"The model FLOPs utilization to assume.  [default: {MFU}]",
)
@click.option(
    "--price", type=float, metavar="P", help="Price of a chip for an hour; adds the cost."
)
@click.option(
    "--study",
    "studies",
    type=PATH,
    multiple=True,
    metavar="DIR",
    help="A study of your own; may be repeated.  [default: those in this directory]",
)
def advise(
    target: str,
    source: str | None,
    source_tokens: str | None,
    tokens: str | None,
    flops: str | None,
    topology: str | None,
    mfu: float | None,
    price: float | None,
    studies: tuple[str, ...],
) -> None:
    """Say what published laws and your own studies say about growing --source into --target.

    Nothing is trained or measured. Each figure names its source; four laws stand side by side with
    what they were measured on, extrapolations are marked, and so is where they disagree.
    """
    from trainer.cli.advice_report import Advice, build_document, show_advice
    from trainer.study.evidence import find_studies, read_study

    growth = _read_growth(target, source, source_tokens, tokens, flops)
    advice = Advice(
        growth=growth,
        recommended=source is None,
        devices=_read_devices(topology, mfu, price),
        studies=[read_study(path) for path in studies] or find_studies(),
        found=not studies,
    )
    show_result(lambda: show_advice(advice), lambda: build_document(advice))


def _read_growth(
    target: str,
    source: str | None,
    source_tokens: str | None,
    tokens: str | None,
    flops: str | None,
) -> Growth:
    """The growth that the options ask about. Raises UsageError."""
    from growkit.errors import UsageError
    from growkit.quantity import parse_count
    from trainer.study.advice import Growth

    if (tokens is None) == (flops is None):
        raise UsageError("give the budget as either --tokens or --flops")
    large, model = read_size(target, "--target")
    budget = _read_budget(large, tokens, flops)
    if source is None:
        small = recommend_source(large, model)
    else:
        small, _ = read_size(source, "--source")
    if source_tokens is not None:
        small = replace(small, tokens=parse_count(source_tokens, "--source-tokens"))
    if budget < large.flops_per_token:
        raise UsageError(
            f"{budget:.3g} FLOPs do not train {large.name} on one token; that takes "
            f"{large.flops_per_token:.3g}"
        )
    if small.parameters >= large.parameters:
        raise UsageError(
            f"the source must be smaller than the target: --source {small.name} has "
            f"{small.parameters:,} parameters, --target {large.name} {large.parameters:,}"
        )
    return Growth(large, small, budget)


def _read_budget(target: Size, tokens: str | None, flops: str | None) -> float:
    """The training FLOPs of the budget."""
    from growkit.quantity import parse_count

    if flops is not None:
        return float(parse_count(flops, "--flops", MOST_FLOPS))
    return parse_count(str(tokens), "--tokens") * target.flops_per_token


def read_size(text: str, option: str) -> tuple[Size, Architecture | None]:
    """A size, and its architecture where it is more than a bare count.

    text: a count of parameters, a preset, a YAML file or a model SRC. Raises UsageError.
    """
    from growkit.checkpoint.location import open_source
    from growkit.errors import UsageError
    from growkit.quantity import parse_count
    from trainer.config.values import list_presets
    from trainer.study.advice import Size

    # Presets first: 760m is a preset, which says more than the count 760M.
    if text in list_presets() or text.endswith((".yaml", ".yml")):
        model = _read_configured_model(text)
        return Size.from_model(text, model), model
    try:
        if text[:1].isdigit() and "/" not in text and not os.path.exists(text):
            return Size.from_count(text, parse_count(text, "a count")), None
        source = open_source(text)
    except UsageError as problem:
        known = ", ".join(list_presets())
        raise UsageError(
            f"{option} takes a count such as 760M, a preset ({known}) or a model; {problem}"
        ) from None
    size = Size.from_model(text, source.model)
    return replace(size, tokens=source.record.get("tokens")), source.model


def _read_configured_model(name: str) -> Architecture:
    """The model of a preset or a YAML file. Raises UsageError when it has none."""
    from growkit.errors import UsageError
    from trainer.config.sections import build_architecture, resolve
    from trainer.config.values import read_values

    values = read_values(name, [])
    if not values.get("model"):
        raise UsageError(f"{name} has no model section, so it has no size")
    return build_architecture(resolve(values).model)


def recommend_source(target: Size, model: Architecture | None) -> Size:
    """The source that G_stack recommends: a fourth of the target's layers, or of a bare count."""
    from growkit.quantity import format_count
    from trainer.study.advice import Size, recommend_layers, recommend_parameters

    if model is None:
        count = recommend_parameters(target.parameters)
        return Size.from_count(format_count(count), count)
    layers = recommend_layers(model.layer)
    smaller = model.resize({**model.sizes, "layer": layers})
    return Size.from_model(f"{layers} layers of {target.name}", smaller)


def _read_devices(topology: str | None, mfu: float | None, price: float | None) -> Devices | None:
    """The devices that --topology names; None without one. Raises UsageError."""
    from growkit.errors import UsageError
    from trainer.plan.cost import find_devices

    if topology is None:
        if mfu is not None or price is not None:
            raise UsageError("--mfu and --price need a --topology, such as v3-32")
        return None
    return find_devices(topology, MFU if mfu is None else mfu, price)


COMMANDS = {"advise": advise}
