"""The verbs that grow a model on disk: depth, width, grow.

Knows how options become a plan and how a plan is told; leaves plans, their execution and the running of models
to others.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from math import isfinite
from pathlib import Path

import click

from growkit.depth import FORM
from growkit.depth import METHODS as DEPTH_METHODS
from growkit.plan import MOMENTS
from growkit.width import METHODS as WIDTH_METHODS

KINDS = {"checkpoint": "trainer checkpoint", "huggingface": "Hugging Face directory"}
TOKENS = "1024"
WARM = "   (warm up again for 150 to 250 steps)"
NOT_PRESERVED = "not preserved: a copied layer adds its part once more, so the loss rises until training recovers it"


class Growing(click.Command):
    """A growing verb. Its --check takes a number only where one follows: `--check SRC OUT` means what it says."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        followed = zip(args, [*args[1:], ""], strict=True)
        words = [f"--check={TOKENS}" if word == "--check" and not after.isdigit() else word for word, after in followed]
        return super().parse_args(ctx, words)


def growing_options(command):
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
            click.option("--json", "as_json", is_flag=True, help="Print the plan, and what --check found, as JSON."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


@click.command(cls=Growing)
@click.option("--map", "layers", required=True, metavar="MAP", help=f"{FORM.removeprefix('--map takes ')}.")
@click.option("--method", metavar="|".join(DEPTH_METHODS), help="Which layers SOURCE:TARGET copies; replicate.")
@growing_options
def depth(layers: str, method: str | None, src: str, out: str, **options) -> None:
    """Grow SRC in depth into OUT: parameters, and the optimizer's moments where SRC has them.

    18:24 replicates whole layers in place, new layer i being a copy of layer floor(i*18/24) (Gopher, arXiv
    2112.11446, section G.3.3). --method nearest rounds to nearest, stack repeats the whole model (0,1,2,0,1,2),
    identity inserts copies that add nothing yet, so that the function is preserved. OUT is of the same kind as SRC.
    """
    from growkit.depth import plan_depth

    _grow(src, out, lambda model: plan_depth(model, layers, method), **options)


@click.command(cls=Growing)
@click.option("--embed", metavar="SIZE", help="The residual stream, as 2048 or 2x.")
@click.option("--heads", metavar="SIZE", help="The attention heads, as 16 or 2x.")
@click.option("--mlp", metavar="SIZE", help="The units of each mlp, as 8192 or 2x.")
@click.option("--head-dim", metavar="SIZE", help="The dimensions of a head, as 96; as many stay rotated.")
@click.option(
    "--method", metavar="|".join(WIDTH_METHODS),
    help="embed by copies (whole multiples) or by padding (any size); copies where they are exact.",
)  # fmt: skip
@click.option(
    "--spread", default="0", metavar="S", help="How uneven the shares of copied heads and mlp units are, < 1."
)
@growing_options
def width(embed, heads, mlp, head_dim, method, spread, src: str, out: str, **options) -> None:
    """Grow SRC in width into OUT, its function preserved, its optimizer's moments with it.

    What is not given follows: embed is heads x head_dim, and mlp keeps its ratio to embed.
    """
    from growkit.width import plan_width

    share = _number("spread", spread)
    _grow(src, out, lambda model: plan_width(model, embed, heads, mlp, head_dim, method, share), **options)


@click.command("grow", cls=Growing)
@click.option("--like", required=True, metavar="TARGET", help="A preset, a trainer's YAML, a config.json, or a model.")
@growing_options
def grow_like(like: str, src: str, out: str, **options) -> None:
    """Grow SRC into OUT with the sizes of another model: every axis that differs, in one pass.

    Layers are replicated; width is copied where copies are exact and padded elsewhere. What growth keeps (context,
    how many dimensions are rotated) stays SRC's; vocabulary, a tied head and the kind of residual must agree.
    """
    from growkit.width import plan_like

    _grow(src, out, lambda model: plan_like(model, like_model(like, model)), **options)


def like_model(text: str, model):
    """The model that --like names, what it leaves open being `model`'s. Raises UsageError."""
    from growkit.architecture import read_config
    from growkit.checkpoint import open_source
    from growkit.checkpoint.huggingface import read_json
    from growkit.errors import GrowkitError, UsageError

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
    from dataclasses import replace

    from growkit.errors import UsageError
    from trainer.config import read_values, resolve, resolve_model

    values = read_values(text, [])
    resolve(values)
    stated = resolve_model(values.get("model"))
    if not stated:
        raise UsageError("it has no section `model`, so there are no sizes to grow to")
    if model.kind != "gpt_neox":
        raise UsageError(f"it describes a gpt_neox model, the source is a {model.kind} one")
    sizes = model.sizes | {axis: stated.pop(axis) for axis in model.fields if axis in stated}
    return replace(model.resized(sizes), **stated)


def _number(option: str, text: str, whole: bool = False) -> float | int:
    """The number that an option's text is. Raises UsageError."""
    from growkit.errors import UsageError

    try:
        return int(text) if whole else float(text)
    except ValueError:
        raise UsageError(f"--{option} takes a {'whole ' if whole else ''}number, got {text!r}") from None


def _grow(src: str, out: str, plan_of, moments: str, noise: str, seed: str, check: str | None, **output) -> None:
    """Open the source, plan its growth with the options, refuse what cannot be, then grow."""
    from growkit.checkpoint import check_output, open_source
    from growkit.errors import UsageError
    from growkit.plan import with_options

    values = {"noise": _number("noise", noise), "seed": _number("seed", seed, whole=True)}
    tokens = None if check is None else _number("check", check, whole=True)
    if tokens is not None and output["dry_run"]:
        raise UsageError("--check runs the output, and --dry-run writes none; give one of them")
    source = open_source(src)
    plan = with_options(plan_of(source.model), moments, **values)
    check_output(Path(out), source.path, output["force"])
    if tokens is not None:
        from growkit.cli.comparing import check_possible

        check_possible(source, tokens)
    grow(source, plan, Path(out), tokens=tokens, **output)


def grow(source, plan, out: Path, dry_run: bool, force: bool, as_json: bool, tokens: int | None = None) -> None:
    """Print what a plan will do, then do it; tokens: how many to check the result on, None for no check."""
    from growkit.cli.comparing import check, check_kept, check_words
    from growkit.surgery import grown

    contents = grown(source, plan)
    if not as_json:
        click.echo(describe(source, plan, contents.size, out))
    found = None
    if not dry_run:
        _write(source, contents, out, force)
        found = None if tokens is None else check(source, out, plan, tokens)
    if as_json:
        click.echo(_summary(source, plan, contents.size, out, dry_run, found))
    elif not dry_run:
        click.echo(f"wrote {out}")
    if found is not None:
        if not as_json:
            click.echo(check_words(found))
        check_kept(found, out)


def _write(source, contents, out: Path, force: bool) -> None:
    from growkit.checkpoint import write_output

    # Orbax imports jax; an output is written by this machine's processor, whatever else it has.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with progress_bar("writing", contents.size) as progress:
        write_output(out, source.kind, contents, source, force, progress)


def _summary(source, plan, size: int, out: Path, dry_run: bool, found: dict | None) -> str:
    """The plan and what the check found, as one JSON document."""
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
    return json_text(summary | ({"check": found} if found else {}) | plan.resolved())


def json_text(value: dict) -> str:
    """One JSON document; numbers that are not finite are null there, JSON having no other word for them."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def describe(source, plan, size: int, out: Path) -> str:
    """What a plan will do, for a reader at a terminal."""
    from growkit.depth import picture

    before, after = plan.model, plan.grown
    lines = [
        f"source      {source.path} ({KINDS[source.kind]}, {source.dtype})",
        f"output      {out}",
        f"sizes       {changes(before.sizes, after.sizes)}",
        *(f"growth      {words}" for words in plan.method.split("; ")),
        *(f"by rule     {note}" for note in plan.notes),
        *([picture(plan.maps["layer"].index.tolist())] if "layer" in plan.maps else []),
        *(f"padding     {words}" for words in _padding(plan)),
        *([f"noise       {_noise(plan)}"] if plan.noise else []),
        f"parameters  {before.parameters:,} -> {after.parameters:,} ({after.parameters / before.parameters:.2f}x)",
        f"on disk     {source.size / 1e6:,.1f} MB -> {size / 1e6:,.1f} MB",
        f"function    {_function(source, plan)}",
        f"optimizer   {_optimizer(source, plan)}",
        *([f"rate        {_rates(source, plan)}"] if plan.preserved else []),
        *([f"warning     {_tied(plan)}"] if plan.tied_copies else []),
        f"next        {_next(source, plan, out)}",
    ]
    return "\n".join(lines)


def changes(before: dict[str, int], after: dict[str, int]) -> str:
    """'layer 18 -> 24, mlp 64 -> 128': the axes whose sizes differ."""
    return ", ".join(f"{axis} {before[axis]} -> {after[axis]}" for axis in after if before[axis] != after[axis])


def _padding(plan) -> list[str]:
    """What the new units of padded axes hold, in words."""
    fill = {"layer": "the mean of their old entries", "rms": "zeros"}[plan.model.norm]
    words = {
        "embed": f"embed: writers of the residual stream get {fill}, readers random columns "
        f"(seed {plan.seed}); norm weights and eps are scaled to match",
        "head_dim": f"head_dim: new keys are zero, new queries and values random (seed {plan.seed}) and not read yet; "
        "old queries are scaled up",
    }
    return [words[axis] for axis in plan.pads]


def _noise(plan) -> str:
    return (
        f"{plan.noise:g} x initializer_range {plan.model.initializer_range:g}, seed {plan.seed}, on what reads copied "
        "units; it sums to zero over the copies of each"
    )


def _function(source, plan) -> str:
    if not plan.preserved:
        return NOT_PRESERVED
    narrow = source.dtype.itemsize < 4
    return (
        f"preserved, to the rounding of the weights to {source.dtype} (--check measures it)" if narrow else "preserved"
    )


def _optimizer(source, plan) -> str:
    """What becomes of the moments, in words."""
    if "mu" not in source.tensors:
        return "none in the source: training starts its moments at zero"
    inserted = " (zero in inserted layers)" if "layer" in plan.maps else ""
    mu, nu = (f"grown by the rule{inserted}", "grown by the rule") if plan.preserved else ("zero", "copied")
    words = {
        "map": f"mu {mu}, nu {nu}",
        "copy": "mu and nu copied as they are",
        "nu-only": f"mu zero, nu {nu}",
        "reset": "mu, nu and count zero",
    }[plan.moments]
    return words if plan.moments == "reset" else f"{words}, count kept ({source.record.get('count', 0)})"


def _rates(source, plan) -> str:
    """What preserves the training as well as the function: the learning rate's multipliers, where they do."""
    from growkit.expansion import share_scale

    if not plan.continues:
        return "the function is the source's now, the training that follows is not"
    tensors: dict[str, list[str]] = {}
    for row in plan.grown.table.rows:
        scale = share_scale(row, plan.maps)
        if scale is not None:
            low, high = float(scale.min()), float(scale.max())
            factor = f"x{low:.3g}" if low == high else f"x{low:.3g} to x{high:.3g}"
            tensors.setdefault(factor, []).append(".".join(row.path).removeprefix("layers."))
    factors = "; ".join(f"{factor} for {', '.join(names)}" for factor, names in tensors.items())
    exact = "training goes on exactly as the source's would: " if "mu" in source.tensors else ""
    return f"{exact}the trainer multiplies learning rates {factors} (optimizer.multipliers), eps and clip to match"


def _next(source, plan, out: Path) -> str:
    """The command that trains the result."""
    command = f"growkit train CONFIG --from {out} --out RUN"
    if not plan.continues:
        return command + WARM
    return f"{command} schedule.continued=true" if "mu" in source.tensors else command


def _tied(plan) -> str:
    by = "dropout or --noise separates" if "embed" in plan.tied_copies else "dropout, --noise or --spread separates"
    return f"copies of {', '.join(plan.tied_copies)} stay equal, for equal copies get equal gradients; only {by} them"


@contextmanager
def progress_bar(what: str, total: int):
    """A bar of bytes on a terminal, nothing elsewhere; yields the function that advances it."""
    import sys

    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


@contextmanager
def counter(what: str):
    """A live line of documents and tokens on a terminal, nothing elsewhere."""
    import sys

    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.status import Status

    with Status(what, console=Console(stderr=True)) as status:
        yield lambda documents, tokens, size: status.update(
            f"{what}: {documents:,} documents, {tokens:,} tokens, {size / 1e6:,.1f} MB of text"
        )


COMMANDS = {"depth": depth, "width": width, "grow": grow_like}
