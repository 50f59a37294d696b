"""The verbs that convert from and to Hugging Face directories: import, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from growkit.cli.options import PATH
from growkit.cli.output import show_result
from growkit.cli.terminal import (
    add_care_options,
    add_shard_option,
    parse_care,
    write_with_progress,
)
from growkit.errors import UsageError

if TYPE_CHECKING:
    from growkit.checkpoint.tensor import Contents, Source


@click.command("import")
@click.argument("hf_dir")
@click.argument("out")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@add_care_options
def import_(hf_dir: str, out: str, force: bool, **options: Any) -> None:
    """Turn the Hugging Face directory HF_DIR into the trainer checkpoint OUT, bit for bit.

    A checkpoint of transformers' Trainer brings its optimizer: moments, count and step. Any other
    directory has no moments, and training from OUT starts Adam at count 0. HF_DIR may also be a
    checkpoint of gpt-neox (global_step1000, or a branch of EleutherAI/neox-ckpt-pythia-*) or an
    unsharded one of OLMo 2: its moments and its step come along.
    """
    from convert.directory import convert_to_checkpoint
    from convert.optimizer import carries_optimizer, describe_import
    from growkit.checkpoint.files import parse_path
    from growkit.checkpoint.location import open_source

    source = open_source(hf_dir)
    contents = convert_to_checkpoint(source)
    care = parse_care(options)
    write_with_progress([source], contents, parse_path(out), "checkpoint", force, care=care)
    notes = list(source.notes)
    moments = f"; no moments in {hf_dir}, count 0"
    if not carries_optimizer(source):
        moments = f"; the optimizer of {hf_dir} stays behind, count 0"
    elif len(contents.recipes) > 1:
        record = source.record
        moments = f", with moments; step {record['step']}, count {record['count']}"
        notes += describe_import(source)
    brief = f"wrote {out}: {source.model.parameters:,} parameters in {source.dtype}{moments}"
    document = {
        "output": out,
        "source": str(source.path),
        "parameters": source.model.parameters,
        "dtype": str(source.dtype),
        "slots": list(contents.recipes),
        "record": contents.record,
        "notes": notes,
    }
    show_result("\n".join([*(f"note: {note}" for note in notes), brief]), document, brief)


@click.command()
@click.argument("src")
@click.argument("out")
@click.option(
    "--dtype",
    metavar="DTYPE",
    help="float32, bfloat16, float16 or float64. Default: the source's own.",
)
@click.option(
    "--optimizer",
    "form",
    metavar="hf",
    help="Write the optimizer too: OUT is a checkpoint from which transformers' Trainer resumes.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Compare the logits of OUT in transformers with SRC's in JAX, on the CPU.",
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@add_shard_option
@add_care_options
@click.option(
    "--private-lineage",
    is_flag=True,
    help="Keep the paths of this machine in OUT's lineage and settings, as for a model that stays "
    "here. Without it only their last names are kept.",
)
@click.option(
    "--evaluation",
    type=PATH,
    metavar="FILE.json",
    help="Put the figures that `evaluate --output` measured of SRC into the model card, with those "
    "of other models in that file as rows to compare with.",
)
def export(
    src: str,
    out: str,
    dtype: str | None,
    form: str | None,
    check: bool,
    force: bool,
    shard: str | None,
    private_lineage: bool,
    evaluation: str | None,
    **options: Any,
) -> None:
    """Turn SRC into the Hugging Face directory OUT: weights, config, tokenizer, model card.

    Weights are safetensors files; the model card has the lineage.
    """
    from convert.directory import choose_dtype
    from growkit.checkpoint.files import parse_path
    from growkit.checkpoint.location import open_source

    _require_form(form, dtype)
    source = open_source(src)
    figures = "" if evaluation is None else read_evaluation(source, Path(evaluation))
    kind = "hf_trainer" if form else "huggingface"
    contents, notes = _prepare_export(source, dtype, form, figures, private_lineage)
    care = parse_care(options)
    if check:
        _require_check(source)
    write_with_progress([source], contents, parse_path(out), kind, force, shard, care)
    written = str(choose_dtype(source, dtype))
    lines = _describe_export(source, src, out, written, notes)
    document = {"slots": list(contents.recipes), "dtype": written}
    _show_export(source, out, lines, document, written if check else None)


def _show_export(
    source: Source, out: str, lines: list[str], document: dict[str, Any], checked: str | None
) -> None:
    """Print the result of an export, and of its --check in the dtype `checked`."""
    from growkit.checkpoint.files import parse_path

    document |= {
        "output": out,
        "source": str(source.path),
        "parameters": source.model.parameters,
        "notes": [line.removeprefix("note: ") for line in lines[1:]],
    }
    brief = lines[0]
    if checked is not None:
        from growkit.cli.checking import check_export

        document["check"] = check_export(source, parse_path(out), checked)
        lines.append(document["check"])
        brief = f"{brief}\n{document['check']}"
    show_result("\n".join(lines), document, brief)


def _require_form(form: str | None, dtype: str | None) -> None:
    """Raise UsageError for an --optimizer that is none, or that --dtype would leave behind."""
    if form not in (None, "hf"):
        raise UsageError(f"--optimizer is hf, a checkpoint of transformers' Trainer; got {form!r}")
    if form and dtype:
        raise UsageError(
            "--dtype changes weights that the optimizer goes on with; leave one of --dtype and "
            "--optimizer out"
        )


def _prepare_export(
    source: Source, dtype: str | None, form: str | None, figures: str, paths: bool
) -> tuple[Contents, list[str]]:
    """The contents of an export, and what to tell of its optimizer."""
    from convert.directory import convert_to_directory, convert_to_trained
    from convert.optimizer import describe_export

    if form is None:
        return convert_to_directory(source, dtype, figures, paths), []
    contents, settings = convert_to_trained(source, figures, paths)
    assert contents.torch_optimizer is not None
    return contents, describe_export(settings, contents.torch_optimizer)


def _describe_export(source: Source, src: str, out: str, dtype: str, notes: list[str]) -> list[str]:
    """What was written, then notes on what the output lacks. notes: of an optimizer that was."""
    left = ""
    if "mu" in source.tensors:
        left = "; the optimizer's moments stay behind"
        # What is a checkpoint of PyTorch already is not written as one once more.
        left += "" if source.torch_optimizer else " (--optimizer hf takes them along)"
    if notes:
        record = source.record
        left = f"; optimizer.pt at step {record.get('step', 0)}, count {record.get('count', 0)}"
    lines = [f"wrote {out}: {source.model.parameters:,} parameters in {dtype}{left}"]
    lines += [f"note: {note}" for note in (*source.notes, *notes)]
    if "tokenizer.json" not in source.files:
        lines.append(
            f"note: {src} carries no tokenizer.json, so {out} has none; put one there before "
            "tokenizing with it"
        )
    return lines


def _require_check(source: Source) -> None:
    """Raise UsageError or GrowkitError, before anything is written, if --check could not run."""
    from convert.reference import require_transformers
    from growkit.cli.checking import require_checkable

    require_transformers()
    require_checkable(source)


def read_evaluation(source: Source, path: Path) -> str:
    """The figures of a source in a file of evaluations, in Markdown, and those of other models.

    Raises UsageError where there are none of the source.
    """
    from convert.privacy import strip_paths
    from growkit.evaluation import report

    record = report.select_model(report.read_record(path), source, path)
    models = [model | {"source": strip_paths(model["source"])} for model in record["models"]]
    return report.format_markdown(record | {"models": models})


COMMANDS = {"import": import_, "export": export}
