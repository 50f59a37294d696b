"""The verbs that grow a model on disk: depth, width, grow. Options become a plan; a plan is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from growkit.cli.arguments import parse_axes, parse_number, parse_whole
from growkit.cli.description import describe, summarize
from growkit.cli.options import add_rates_option, add_table_option, combine_options
from growkit.cli.output import show_result, tell
from growkit.cli.target import read_target
from growkit.cli.terminal import (
    add_care_options,
    add_shard_option,
    parse_care,
    parse_shard_size,
    write_with_progress,
)
from growkit.growth.depth import FORM
from growkit.growth.depth import METHODS as DEPTH_METHODS
from growkit.growth.plan import MOMENT_OPTIONS, Plan
from growkit.growth.vocabulary import FILLS
from growkit.growth.width import METHODS as WIDTH_METHODS

if TYPE_CHECKING:
    from growkit.checkpoint.location import Care
    from growkit.checkpoint.tensor import Source
    from growkit.cli.checked_text import CheckedText
    from growkit.cli.checking import GrowthCheck

# What `width` alone is told; without any of them --vocab grows the vocabulary alone.
WIDTHS = ("embed", "heads", "mlp", "head_dim", "axes", "method", "spread")
# What new tokens' rows of the head are.
HEADS = ("mean", "measured")
# Tokens of --check without a number.
TOKENS = "1024"


class Growing(click.Command):
    """A growing verb. --check takes a number only if one follows, so `--check SRC OUT` works."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = []
        for word, following in pairwise([*args, ""]):
            alone = word == "--check" and not following.isdigit()
            words.append(f"--check={TOKENS}" if alone else word)
        return super().parse_args(ctx, words)


# The arguments and options that all growing verbs share.
add_growing_options = combine_options(
    click.argument("src"),
    click.argument("out"),
    click.option(
        "--vocab",
        metavar="SIZE",
        help="Tokens of the vocabulary, as 128256, +64, or x128 for the next multiple of 128. Ids "
        "and tokenizer stay.",
    ),
    click.option(
        "--vocab-fill",
        default="mean",
        metavar="|".join(FILLS),
        help="New tokens' rows of the embedding: the mean of the old ones (default), or zero.",
    ),
    click.option(
        "--vocab-head",
        default="mean",
        metavar="|".join(HEADS),
        help="New tokens' rows of the head: the mean of the old ones (default), or measured: SRC "
        "is run on some text, and rows are found that hardly move old tokens' loss there.",
    ),
    add_table_option,
    click.option(
        "--moments",
        default="map",
        metavar="|".join(MOMENT_OPTIONS),
        help="Adam's moments: map by the rule, copy as they are, reset to zero with the count, "
        "nu-only (mu zero), or first (by the rule for the first copy of each unit, zero for "
        "other copies).",
    ),
    click.option(
        "--noise",
        default="0",
        metavar="S",
        help="Add noise to weights that read copied units, S times as large as the model's "
        "initializer_range, or, as 0.5rms, as the tensor's root mean square; it sums to zero over "
        "the copies of a unit.",
    ),
    click.option("--seed", default="0", metavar="N", help="Seed of noise and random fills."),
    add_rates_option,
    click.option(
        "--check",
        metavar="[TOKENS]",
        help=f"Run SRC and OUT on the same tokens (default {TOKENS}), on the CPU, and compare "
        "logits and loss.",
    ),
    click.option(
        "--check-text",
        metavar="FILE",
        help="The text of --check, which it implies: a file of text, or token files. Without it "
        "--check takes a text that comes with Python.",
    ),
    click.option(
        "--groups",
        default="keep",
        metavar="keep|split",
        help="Parameter groups of a checkpoint of transformers' Trainer: keep the source's, or "
        "split them by the learning rates that growth asks for, and new layers from old ones.",
    ),
    click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
    click.option("--force", is_flag=True, help="Replace OUT if it exists."),
    add_shard_option,
    add_care_options,
)


# Of the verbs that copy layers.
add_scale_option = click.option(
    "--scale",
    metavar="layer=S",
    help="What copied layers add to the residual stream is multiplied by S, as layer=0.5; or a "
    "list of one share for each new layer, as layer=1,0.5,1.",
)


@click.command(cls=Growing)
@click.option(
    "--map", "layers", required=True, metavar="MAP", help=f"{FORM.removeprefix('--map takes ')}."
)
@click.option(
    "--method",
    metavar="|".join(DEPTH_METHODS),
    help="Which layers SOURCE:TARGET copies; default replicate.",
)
@add_scale_option
@add_growing_options
def depth(
    layers: str, method: str | None, scale: str | None, src: str, out: str, **options: Any
) -> None:
    """Grow SRC in depth into OUT: parameters, and optimizer moments if SRC has them.

    18:24 replicates whole layers in place: new layer i copies layer floor(i*18/24) (Gopher, arXiv
    2112.11446, section G.3.3). --method nearest rounds to nearest, stack repeats the whole model
    (0,1,2,0,1,2), identity inserts copies that add nothing yet, so the function is preserved. OUT
    is of the same kind as SRC.
    """
    from growkit.growth.depth import plan_depth

    def plan(source: Source) -> Plan:
        return plan_depth(source.model, layers, method, scale)

    plan_and_grow("depth", src, out, plan, options)


@click.command(cls=Growing)
@click.option("--embed", metavar="SIZE", help="Width of the residual stream, as 2048 or 2x.")
@click.option("--heads", metavar="SIZE", help="Attention heads, as 16 or 2x.")
@click.option("--mlp", metavar="SIZE", help="Units of each mlp, as 8192 or 2x.")
@click.option(
    "--head-dim",
    metavar="SIZE",
    help="Dimensions of a head, as 96; the number of rotated ones stays.",
)
@click.option(
    "--axis",
    "axes",
    multiple=True,
    metavar="NAME=SIZE",
    help="Another axis of the model's table, as moe_intermediate_size=2x or group=4; may be "
    "repeated.",
)
@click.option(
    "--method",
    metavar="|".join(WIDTH_METHODS),
    help="Grow embed by copies (whole multiples) or by padding (any size). Default: copies where "
    "they are exact.",
)
@click.option(
    "--spread",
    default="0",
    metavar="S",
    help="How uneven the shares of copied heads, mlp and other units are, from 0 to below 1.",
)
@add_growing_options
def width(
    embed: str | None,
    heads: str | None,
    mlp: str | None,
    head_dim: str | None,
    axes: tuple[str, ...],
    method: str | None,
    spread: str,
    src: str,
    out: str,
    **options: Any,
) -> None:
    """Grow SRC in width into OUT: its function preserved, its optimizer moments grown with it.

    Sizes that are not given follow: embed is heads x head_dim, and mlp keeps its ratio to embed.
    """
    from growkit.growth.width import plan_width

    share = parse_number("spread", spread)
    others = parse_axes(axes)

    only_vocab = options["vocab"] is not None and not _are_given(WIDTHS)

    def plan(source: Source) -> Plan | None:
        if only_vocab:
            return None
        return plan_width(source.model, embed, heads, mlp, head_dim, method, share, others)

    plan_and_grow("width", src, out, plan, options)


@click.command("grow", cls=Growing)
@click.option(
    "--like",
    required=True,
    metavar="TARGET",
    help="A preset, a trainer's YAML file, a config.json, or a model.",
)
@add_scale_option
@add_growing_options
def grow_like(like: str, scale: str | None, src: str, out: str, **options: Any) -> None:
    """Grow SRC into OUT with the sizes of another model: every axis that differs, in one pass.

    Layers are replicated; width is copied where copies are exact and padded elsewhere. What growth
    cannot change (context, how many dimensions are rotated) stays SRC's. A tied head and the kind
    of residual must be the same in both, and so must the vocabulary, unless --vocab says it.
    """
    from growkit.growth.width import plan_like

    vocab = options["vocab"]

    def plan(source: Source) -> Plan | None:
        model = source.model
        target = read_target(like, model)
        if vocab is None:
            return plan_like(model, target, scale)
        # The vocabulary is the option's.
        target = target.resize({**target.sizes, "vocab": model.vocab})
        same = target.sizes == model.sizes and scale is None
        return None if same else plan_like(model, target, scale)

    plan_and_grow("grow", src, out, plan, options)


@dataclass(frozen=True)
class Output:
    """What to do with a plan. shard: bytes of a file, as text. tokens: of --check, or None; text:
    the name of its text, None for the default.

    care: how careful writing is, None for as careful as can be. groups: 'keep' or 'split'.
    """

    dry_run: bool = False
    force: bool = False
    shard: str | None = None
    tokens: int | None = None
    text: str | None = None
    care: Care | None = None
    groups: str = "keep"


def plan_and_grow(
    verb: str,
    src: str,
    out: str,
    plan_growth: Callable[[Source], Plan | None],
    options: dict[str, Any],
) -> None:
    """Open the source and plan its growth; refuse what cannot work; then grow.

    plan_growth: the plan of all but the vocabulary; None where nothing else grows. options: the
    values of `add_growing_options`, by name.
    """
    from growkit.checkpoint.files import parse_path
    from growkit.checkpoint.location import check_writable, open_source
    from growkit.growth.plan import set_options

    noise = options.pop("noise")
    seed = parse_whole("seed", options.pop("seed"))
    moments = options.pop("moments")
    rates = options.pop("rates")
    vocab = options.pop("vocab")
    fill = options.pop("vocab_fill")
    head = _parse_head(options.pop("vocab_head"))
    output = _parse_output(options)
    source = open_source(src)
    plan = _add_vocabulary(verb, source, plan_growth, vocab, fill)
    if head == "measured":
        from growkit.cli.measuring import measure_row

        plan = measure_row(source, plan)
    plan = set_options(plan, moments, noise, seed, rates)
    source.require_readable()
    check_writable(parse_path(out), [source], output.force)
    parse_shard_size(output.shard, source.kind)
    text = None
    if output.tokens is not None:
        from growkit.cli.checked_text import prepare_check

        text = prepare_check(source, output.tokens, output.text, plan.grown)
    grow(source, plan, parse_path(out), output, text)


def _parse_head(text: str) -> str:
    """What new tokens' rows of the head are. Raises UsageError."""
    from growkit.errors import UsageError, did_you_mean

    if text not in HEADS:
        near = did_you_mean(text, HEADS)
        raise UsageError(f"--vocab-head is one of {', '.join(HEADS)}, got {text!r}{near}")
    return text


def _are_given(names: tuple[str, ...]) -> bool:
    """Whether the user gave one of these options."""
    find_origin = click.get_current_context().get_parameter_source
    return any(find_origin(name) is ParameterSource.COMMANDLINE for name in names)


def _add_vocabulary(
    verb: str,
    source: Source,
    plan_growth: Callable[[Source], Plan | None],
    vocab: str | None,
    fill: str,
) -> Plan:
    """The plan of a verb with that of --vocab, where it is given. Raises UsageError."""
    from growkit.errors import UsageError
    from growkit.growth.vocabulary import add_tokens

    if vocab is None and fill != "mean":
        raise UsageError("--vocab-fill says what new tokens hold, and goes with --vocab")
    plan = plan_growth(source)
    model = source.model if plan is None else plan.model
    if vocab is None:
        assert plan is not None, "without --vocab a verb makes a plan or refuses"
        return plan
    return add_tokens(verb, plan, model, vocab, fill)


def _parse_output(options: dict[str, Any]) -> Output:
    """The options that say what to do with a plan. Raises UsageError."""
    from growkit.errors import UsageError

    check = options.pop("check")
    text = options.pop("check_text")
    if text is not None and check is None:
        check = TOKENS
    tokens = None if check is None else parse_whole("check", check)
    if tokens is not None and options["dry_run"]:
        raise UsageError("--check runs the output, and --dry-run writes none; give one of them")
    care = parse_care(options)
    return Output(tokens=tokens, text=text, care=care, **options)


def grow(
    source: Source, plan: Plan, out: Path, output: Output, text: CheckedText | None = None
) -> None:
    """Print what a plan will do, then do it, and check the result on a text if there is one.

    Raises GrowkitError if the check finds another function than the plan promised.
    """
    from growkit.surgery.grow import prepare_growth

    contents = prepare_growth(source, plan, output.groups)
    planned = describe(source, plan, contents.size, out, output.groups)
    # A dry run has no other result than the plan.
    if not output.dry_run:
        tell(planned)
    check = None
    if not output.dry_run:
        write_with_progress(
            [source], contents, out, source.kind, output.force, output.shard, output.care
        )
        check = _check(source, plan, out, text)
    summary = summarize(source, plan, contents.size, out, output.dry_run)
    checked = {"check": check.to_json()} if check else {}
    words = planned if output.dry_run else f"wrote {out}"
    if check:
        words = f"{words}\n{check.describe()}"
    show_result(words, summary | checked)
    if check:
        check.require_promise(out)


def _check(source: Source, plan: Plan, out: Path, text: CheckedText | None) -> GrowthCheck | None:
    """The result of --check, None without it."""
    if text is None:
        return None
    from growkit.cli.checking import check_growth

    return check_growth(source, out, plan, text)


COMMANDS = {"depth": depth, "width": width, "grow": grow_like}
