"""The verbs that cross to and from Hugging Face: import, export."""

from __future__ import annotations

from pathlib import Path

import click

from growkit.cli.terminal import add_shard_option, write_with_progress


@click.command("import")
@click.argument("hf_dir")
@click.argument("out")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
def import_(hf_dir: str, out: str, force: bool) -> None:
    """Turn the Hugging Face directory HF_DIR into the trainer checkpoint OUT, bit for bit.

    A directory has no moments: training from OUT starts Adam at count 0.
    """
    from convert.directory import convert_to_checkpoint
    from growkit.checkpoint.files import parse_path
    from growkit.checkpoint.location import open_source

    source = open_source(hf_dir)
    write_with_progress(
        [source], convert_to_checkpoint(source), parse_path(out), "checkpoint", force
    )
    click.echo(
        f"wrote {out}: {source.model.parameters:,} parameters in {source.dtype}; no moments in {hf_dir}, count 0"
    )


@click.command()
@click.argument("src")
@click.argument("out")
@click.option(
    "--dtype",
    metavar="DTYPE",
    help="float32, bfloat16, float16 or float64; the source's own by default.",
)
@click.option(
    "--check", is_flag=True, help="Compare the logits of OUT in transformers with SRC's in JAX."
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@add_shard_option
@click.option(
    "--evaluation",
    metavar="FILE.json",
    help="Put what `evaluate --output` measured of SRC into the card.",
)
def export(
    src: str,
    out: str,
    dtype: str | None,
    check: bool,
    force: bool,
    shard: str | None,
    evaluation: str | None,
) -> None:
    """Turn SRC into the Hugging Face directory OUT: safetensors, config, tokenizer, model card with the lineage."""
    from convert.directory import convert_to_directory
    from convert.reference import require_transformers
    from growkit.checkpoint.files import parse_path
    from growkit.checkpoint.location import open_source
    from growkit.entries import Conversion
    from growkit.lineage import Lineage

    source = open_source(src)
    contents = convert_to_directory(
        source, dtype, read_evaluation(source, Path(evaluation)) if evaluation is not None else ""
    )
    if check:
        require_transformers()
    write_with_progress([source], contents, parse_path(out), "huggingface", force, shard)
    entry = Lineage.read(contents.lineage).last_as(Conversion)
    assert entry is not None, "an export says so in its lineage"
    written = entry.dtype
    left = "; the optimizer's moments stay behind" if "mu" in source.tensors else ""
    click.echo(f"wrote {out}: {source.model.parameters:,} parameters in {written}{left}")
    if "tokenizer.json" not in source.files:
        click.echo(
            f"note: {src} carries no tokenizer.json, so {out} has none; put one there before tokenizing with it"
        )
    if check:
        click.echo(compare_logits(source, parse_path(out), written))


def read_evaluation(source, path: Path) -> str:
    """What a file of evaluations says of a source, in Markdown. Raises UsageError where it says nothing."""
    from growkit.evaluation import report

    return report.format_markdown(report.select_model(report.read_record(path), source, path))


def compare_logits(source, out: Path, dtype: str) -> str:
    """The largest difference between transformers' logits of `out`, written in `dtype`, and ours of `source`, in words.

    Raises GrowkitError when it is more than rounding explains.
    """
    import numpy as np

    from convert.reference import load_logits
    from growkit.checkpoint.location import open_source
    from growkit.errors import GrowkitError
    from trainer.model.decoder import compute_logits

    length = min(128, source.model.context)
    tokens = np.random.default_rng(0).integers(0, source.model.vocab, (2, length))
    ours, theirs = (
        compute_logits(source, tokens),
        load_logits(open_source(str(out)).here, "float32")(tokens),
    )
    gap, size = float(np.abs(ours - theirs).max()), float(np.abs(ours).max())
    # Rounding the weights to fewer bits moves logits by about that precision; anything more is a wrong conversion.
    rounding = (
        {"bfloat16": 5e-2, "float16": 5e-3}.get(dtype, 1e-4) if dtype != str(source.dtype) else 1e-4
    )
    bound = rounding * max(1.0, size)
    if not gap < bound:
        raise GrowkitError(
            f"transformers computes other logits from {out} than growkit from {source.path}: off by {gap:.2e}"
        )
    return (
        f"check: logits of transformers and of JAX differ by at most {gap:.2e} "
        f"({tokens.size} random tokens, largest logit {size:.2f})"
    )


COMMANDS = {"import": import_, "export": export}
