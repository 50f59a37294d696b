"""The verbs that grow a model on disk: depth, width, grow.

Knows how options become a plan and how a plan is told; leaves plans, their execution and the running of models
to others.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from growkit.cli.description import describe
from growkit.cli.terminal import (
    add_shard_option,
    format_json,
    parse_shard_size,
    write_with_progress,
)
from growkit.growth.depth import FORM
from growkit.growth.depth import METHODS as DEPTH_METHODS
from growkit.growth.plan import MOMENTS
from growkit.growth.width import METHODS as WIDTH_METHODS

TOKENS = "1024"


class Growing(click.Command):
    """A growing verb. Its --check takes a number only where one follows: `--check SRC OUT` means what it says."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        followed = zip(args, [*args[1:], ""], strict=True)
        words = [
            f"--check={TOKENS}" if word == "--check" and not after.isdigit() else word
            for word, after in followed
        ]
        return super().parse_args(ctx, words)


def add_growing_options(command):
    """The arguments and options that all growing verbs share."""
    for option in reversed(
        (
            click.argument("src"),
            click.argument("out"),
            click.option(
                "--moments", default="map", metavar="|".join(MOMENTS),
                help="Adam's moments: by the rule (map), gathered as they are, all zero and the count too, or mu zero.",
            ),
            click.option(
                "--noise", default="0", metavar="S",
                help="Noise of S initializer_ranges on what reads copied units; it sums to zero over the copies.",
            ),
            click.option("--seed", default="0", metavar="N", help="The seed of noise and of random fills."),
            click.option(
                "--check", metavar="[TOKENS]",
                help=f"Run SRC and OUT on the same tokens ({TOKENS}) and compare logits and loss.",
            ),
            click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
            click.option("--force", is_flag=True, help="Replace OUT if it exists."),
            add_shard_option,
            click.option("--json", "as_json", is_flag=True, help="Print the plan, and what --check found, as JSON."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


@click.command(cls=Growing)
@click.option(
    "--map", "layers", required=True, metavar="MAP", help=f"{FORM.removeprefix('--map takes ')}."
)
@click.option(
    "--method",
    metavar="|".join(DEPTH_METHODS),
    help="Which layers SOURCE:TARGET copies; replicate.",
)
@add_growing_options
def depth(layers: str, method: str | None, src: str, out: str, **options) -> None:
    """Grow SRC in depth into OUT: parameters, and the optimizer's moments where SRC has them.

    18:24 replicates whole layers in place, new layer i being a copy of layer floor(i*18/24) (Gopher, arXiv
    2112.11446, section G.3.3). --method nearest rounds to nearest, stack repeats the whole model (0,1,2,0,1,2),
    identity inserts copies that add nothing yet, so that the function is preserved. OUT is of the same kind as SRC.
    """
    from growkit.growth.depth import plan_depth

    _grow(src, out, lambda model: plan_depth(model, layers, method), **options)


@click.command(cls=Growing)
@click.option("--embed", metavar="SIZE", help="The residual stream, as 2048 or 2x.")
@click.option("--heads", metavar="SIZE", help="The attention heads, as 16 or 2x.")
@click.option("--mlp", metavar="SIZE", help="The units of each mlp, as 8192 or 2x.")
@click.option(
    "--head-dim", metavar="SIZE", help="The dimensions of a head, as 96; as many stay rotated."
)
@click.option(
    "--method", metavar="|".join(WIDTH_METHODS),
    help="embed by copies (whole multiples) or by padding (any size); copies where they are exact.",
)  # fmt: skip
@click.option(
    "--spread",
    default="0",
    metavar="S",
    help="How uneven the shares of copied heads and mlp units are, < 1.",
)
@add_growing_options
def width(embed, heads, mlp, head_dim, method, spread, src: str, out: str, **options) -> None:
    """Grow SRC in width into OUT, its function preserved, its optimizer's moments with it.

    What is not given follows: embed is heads x head_dim, and mlp keeps its ratio to embed.
    """
    from growkit.growth.width import plan_width

    share = _number("spread", spread)
    _grow(
        src,
        out,
        lambda model: plan_width(model, embed, heads, mlp, head_dim, method, share),
        **options,
    )


@click.command("grow", cls=Growing)
@click.option(
    "--like",
    required=True,
    metavar="TARGET",
    help="A preset, a trainer's YAML, a config.json, or a model.",
)
@add_growing_options
def grow_like(like: str, src: str, out: str, **options) -> None:
    """Grow SRC into OUT with the sizes of another model: every axis that differs, in one pass.

    Layers are replicated; width is copied where copies are exact and padded elsewhere. What growth keeps (context,
    how many dimensions are rotated) stays SRC's; vocabulary, a tied head and the kind of residual must agree.
    """
    from growkit.growth.width import plan_like

    _grow(src, out, lambda model: plan_like(model, read_target(like, model)), **options)


def read_target(text: str, model):
    """The model that --like names, what it leaves open being `model`'s. Raises UsageError."""
    from growkit.checkpoint.files import read_json
    from growkit.checkpoint.location import open_source
    from growkit.errors import GrowkitError, UsageError
    from growkit.models import read_config

    path = Path(os.path.expanduser(text))
    config = path / "config.json" if path.is_dir() else path
    if path.is_dir() and not config.exists():
        return open_source(text).model
    try:
        if config.suffix == ".json" and config.is_file():
            return read_config(read_json(config))
        return _preset_model(text, model)
    except GrowkitError as problem:
        raise UsageError(f"--like {text}: {problem}") from None


def _preset_model(text: str, model):
    """The model of a preset or a YAML file; a section states what is to differ, the rest is `model`'s."""
    from growkit.errors import UsageError
    from trainer.config.sections import resolve, resolve_model
    from trainer.config.values import read_values

    values = read_values(text, [])
    resolve(values)
    stated = resolve_model(values.get("model"))
    if not stated:
        raise UsageError("it has no section `model`, so there are no sizes to grow to")
    if model.kind != "gpt_neox":
        raise UsageError(f"it describes a gpt_neox model, the source is a {model.kind} one")
    sizes = model.sizes | {axis: stated.pop(axis) for axis in model.fields if axis in stated}
    if "layer_norm_eps" in stated:
        stated["norm_eps"] = stated.pop("layer_norm_eps")
    return model.resize(sizes).change(**stated)


def _number(option: str, text: str, whole: bool = False) -> float | int:
    """The number that an option's text is. Raises UsageError."""
    from growkit.errors import UsageError

    try:
        return int(text) if whole else float(text)
    except ValueError:
        raise UsageError(
            f"--{option} takes a {'whole ' if whole else ''}number, got {text!r}"
        ) from None


def _grow(
    src: str,
    out: str,
    plan_of,
    moments: str,
    noise: str,
    seed: str,
    check: str | None,
    shard: str,
    **output,
) -> None:
    """Open the source, plan its growth with the options, refuse what cannot be, then grow."""
    from growkit.checkpoint.files import parse_path
    from growkit.checkpoint.location import check_writable, open_source
    from growkit.errors import UsageError
    from growkit.growth.plan import set_options

    values = {"noise": _number("noise", noise), "seed": _number("seed", seed, whole=True)}
    tokens = None if check is None else _number("check", check, whole=True)
    if tokens is not None and output["dry_run"]:
        raise UsageError("--check runs the output, and --dry-run writes none; give one of them")
    source = open_source(src)
    plan = set_options(plan_of(source.model), moments, **values)
    check_writable(parse_path(out), [source], output["force"])
    parse_shard_size(shard, source.kind)
    if tokens is not None:
        from growkit.cli.comparing import require_checkable

        require_checkable(source, tokens)
    grow(source, plan, parse_path(out), shard=shard, tokens=tokens, **output)


def grow(
    source,
    plan,
    out: Path,
    dry_run: bool,
    force: bool,
    as_json: bool,
    shard: str | None = None,
    tokens: int | None = None,
) -> None:
    """Print what a plan will do, then do it; tokens: how many to check the result on, None for no check."""
    from growkit.cli.comparing import check_growth, format_check, require_preserved
    from growkit.surgery.grow import prepare_growth

    contents = prepare_growth(source, plan)
    if not as_json:
        click.echo(describe(source, plan, contents.size, out))
    found = None
    if not dry_run:
        write_with_progress([source], contents, out, source.kind, force, shard)
        found = None if tokens is None else check_growth(source, out, plan, tokens)
    if as_json:
        click.echo(_summary(source, plan, contents.size, out, dry_run, found))
    elif not dry_run:
        click.echo(f"wrote {out}")
    if found is not None:
        if not as_json:
            click.echo(format_check(found))
        require_preserved(found, out)


def _summary(source, plan, size: int, out: Path, dry_run: bool, found: dict | None) -> str:
    """The plan and what the check found, as one JSON document."""
    from growkit.entries import Growth

    summary = {
        "source": str(source.path),
        "out": str(out),
        "kind": source.kind,
        "dry_run": dry_run,
        "parameters": {"before": plan.model.parameters, "after": plan.grown.parameters},
        "bytes": {"before": source.size, "after": size},
        "notes": plan.notes,
        "tied_copies": plan.tied_copies,
    }
    checked = {"check": found} if found else {}
    return format_json(summary | checked | Growth.of(plan).resolved())


COMMANDS = {"depth": depth, "width": width, "grow": grow_like}
