"""The verbs that change or describe a model on disk: depth, inspect. No model is run here."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path

import click

from growkit.depth import FORM

WARM = "   (warm up again for 150 to 250 steps)"
NOT_PRESERVED = "not preserved: a copied layer adds its part once more, so the loss rises until training recovers it"


def output_options(command):
    """--dry-run, --force and --json, which all growing verbs share."""
    command = click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")(command)
    command = click.option("--force", is_flag=True, help="Replace OUT if it exists.")(command)
    return click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")(command)


@click.command()
@click.option("--map", "layers", required=True, metavar="MAP", help=f"{FORM.removeprefix('--map takes ')}.")
@click.argument("src")
@click.argument("out")
@output_options
def depth(layers: str, src: str, out: str, dry_run: bool, force: bool, as_json: bool) -> None:
    """Grow SRC in depth into OUT: parameters, and the optimizer's moments where SRC has them.

    18:24 replicates whole layers in place, new layer i being a copy of layer floor(i*18/24) (Gopher, arXiv
    2112.11446, section G.3.3). OUT is of the same kind as SRC.
    """
    from growkit.checkpoint import check_output, open_source
    from growkit.depth import plan_depth

    source = open_source(src)
    plan = plan_depth(source.model, layers)
    check_output(Path(out), source.path, force)
    grow(source, plan, Path(out), dry_run, force, as_json)


def grow(source, plan, out: Path, dry_run: bool, force: bool, as_json: bool) -> None:
    """Print what a plan will do, then do it."""
    from growkit.checkpoint import write_output
    from growkit.surgery import grown

    contents = grown(source, plan)
    if as_json:
        summary = {"source": str(source.path), "out": str(out), "kind": source.kind, "dry_run": dry_run}
        parameters = {"before": plan.model.parameters, "after": plan.grown.parameters}
        size = {"before": source.size, "after": contents.size}
        click.echo(json.dumps(summary | {"parameters": parameters, "bytes": size} | plan.resolved()))
    else:
        click.echo(describe(source, plan, contents.size, out))
    if dry_run:
        return
    # Orbax imports jax; an output is written by this machine's processor, whatever else it has.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with progress_bar("writing", contents.size) as progress:
        write_output(out, source.kind, contents, source, force, progress)
    if not as_json:
        click.echo(f"wrote {out}")


def describe(source, plan, size: int, out: Path) -> str:
    """What a plan will do, for a reader at a terminal."""
    from growkit.depth import picture

    before, after = plan.model, plan.grown
    kind = {"checkpoint": "trainer checkpoint", "huggingface": "Hugging Face directory"}[source.kind]
    function = "preserved" if plan.preserved else NOT_PRESERVED
    lines = [
        f"source      {source.path} ({kind}, {source.dtype})",
        f"output      {out}",
        f"sizes       {changes(before.sizes, after.sizes)}",
        *(f"growth      {words}" for words in plan.method.split("; ")),
        *(f"by rule     {note}" for note in plan.notes),
        *([picture(plan.maps["layer"].index.tolist())] if "layer" in plan.maps else []),
        f"parameters  {before.parameters:,} -> {after.parameters:,} ({after.parameters / before.parameters:.2f}x)",
        f"on disk     {source.size / 1e6:,.1f} MB -> {size / 1e6:,.1f} MB",
        f"function    {function}",
        f"optimizer   {_optimizer(source, plan)}",
        f"next        growkit train CONFIG --from {out} --out RUN{WARM}",
    ]
    return "\n".join(lines)


def changes(before: dict[str, int], after: dict[str, int]) -> str:
    """'layer 18 -> 24, mlp 64 -> 128': the axes whose sizes differ."""
    return ", ".join(f"{axis} {before[axis]} -> {after[axis]}" for axis in after if before[axis] != after[axis])


def _optimizer(source, plan) -> str:
    """What becomes of the moments, in words."""
    if "mu" not in source.tensors:
        return "none in the source: training starts its moments at zero"
    mu = "mu grown by the rule" if plan.preserved else "mu zero"
    words = {
        "map": f"{mu}, nu {'grown by the rule' if plan.preserved else 'copied'}",
        "copy": "mu and nu copied as they are",
        "nu-only": "mu zero, nu grown by the rule",
        "reset": "mu, nu and count zero",
    }[plan.moments]
    return words if plan.moments == "reset" else f"{words}, count kept ({source.record.get('count', 0)})"


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


@click.command()
@click.argument("src")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(src: str, as_json: bool) -> None:
    """Say what SRC is: sizes, parameters, optimizer state, tokenizer, lineage."""
    from dataclasses import asdict

    from growkit.checkpoint import open_source

    source = open_source(src)
    facts = {
        "path": str(source.path),
        "kind": source.kind,
        "architecture": "gpt_neox",
        "model": asdict(source.model) | {"head_dim": source.model.head_dim},
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
    model, record = facts["model"], facts["record"]
    residual = "parallel" if model["parallel_residual"] else "sequential"
    trained = [f"{key} {value}" for key, value in record.items() if not isinstance(value, dict)]
    lines = [
        f"path         {facts['path']} ({facts['kind']})",
        f"model        GPT-NeoX: {model['layer']} layers, embed {model['embed']}, {model['head']} heads of "
        f"{model['head_dim']}, mlp {model['mlp']}, vocab {model['vocab']}, context {model['context']}",
        f"             rotary {model['rotary_pct']:g} of head_dim, {residual} residual, "
        f"{'tied' if model['tied'] else 'untied'} head",
        f"parameters   {facts['parameters']:,} in {facts['dtype']}; {facts['bytes'] / 1e6:,.1f} MB of "
        f"{', '.join(facts['slots'])}",
        f"training     {', '.join(trained) or 'no record'}",
        f"files        {', '.join(facts['files']) or 'none beside the weights'}",
        f"fingerprint  {facts['fingerprint'][:16]}",
    ]
    for number, entry in enumerate(facts["lineage"], 1):
        lines.append(f"lineage {number:<4} {entry.get('operation')}: {_lineage_line(entry)}")
    return "\n".join(lines)


def _lineage_line(entry: dict) -> str:
    parts = []
    if "sizes" in entry:
        parts += [changes(**entry["sizes"]), entry["method"], f"function {entry['function']}"]
    if "source" in entry:
        parts.append(f"from {entry['source']['path']}")
    return ", ".join(parts)


COMMANDS = {"depth": depth, "inspect": inspect}
