"""Tasks during training: a run scores as its checkpoints do, and training does not change."""

from __future__ import annotations

import json
import os
import signal

import jax
import numpy as np
import pytest
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from matplotlib import pyplot

pytest.importorskip("lm_eval", reason="growkit[eval] is not installed")

from growkit.checkpoint.location import open_source
from growkit.cli import quickstart
from growkit.cli import run as run_command
from growkit.errors import GrowkitError, UsageError
from growkit.evaluation import harness
from trainer.data.tokenize import tokenize_documents
from trainer.data.tokenizer import train_tokenizer
from trainer.log import curves
from trainer.log.history import COLUMNS, History, parse_rows, render_rows
from trainer.run.stages import train

STEPS = 30


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Runs of one configuration share their programs: compiling is most of a small run."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Token files of source code, as in the quickstart; as items other code and two
    questions.
    """
    root = tmp_path_factory.mktemp("data")
    *texts, last = (text for _, text in quickstart.read_standard_library(400_000))
    tokenizer = train_tokenizer(texts[:4], 400)
    tokenize_documents(texts, root / "tokens", tokenizer, ["Python standard library"])
    (root / "items" / "bpb").mkdir(parents=True)
    (root / "items" / "bpb" / "code.txt").write_text(last[:4000])
    rows = [{"goal": "Wait.", "sol1": "Sleep.", "sol2": "Wake.", "label": n} for n in (0, 1)]
    (root / "items" / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def values(root, **evaluated) -> dict:
    return {
        "model": {"layer": 2, "embed": 32, "head": 4, "mlp": 64, "vocab": 448, "context": 64},
        "data": {"train": str(root / "tokens"), "held_out": 0.05},
        "dropout": {"hidden": 0.0, "attention": 0.0},
        "precision": {"compute": "float32"},
        "batch": {"sequences": 8},
        "optimizer": {"learning_rate": 0.01},
        "schedule": {"steps": STEPS, "warmup": 5},
        "checkpoint": {"every": 20},
        "eval": {"every": 20, "windows": 8} | evaluated,
    }


def measured(root) -> dict:
    return {"tasks": "piqa,bpb", "tasks_every": 12, "data": str(root / "items")}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train(values(data, **measured(data)), out).step == STEPS
    return out


def scores_of(run) -> dict[int, dict[str, float]]:
    return {
        int(row["step"]): json.loads(row["scores"])
        for row in History(epath.Path(run)).rows
        if row["scores"]
    }


def test_a_run_is_measured_as_its_checkpoint_is(whole, data, tmp_path):
    """Each task at its steps and at both ends; training on code improves the score on code."""
    found = scores_of(whole)
    assert list(found) == [0, 12, 24, STEPS]
    assert list(found[0]) == ["piqa acc", "piqa acc_norm", "bpb/code bits_per_byte"]
    code = [scores["bpb/code bits_per_byte"] for scores in found.values()]
    assert code[0] - code[-1] > 0.5 and sorted(code, reverse=True) == code
    kept = tmp_path / "scores.json"
    command = ["evaluate", str(whole), "--data", str(data / "items"), "--output", str(kept)]
    assert run_command(command) == 0
    results = json.loads(kept.read_text())["models"][0]["results"]
    again = {
        f"{r['name']} {metric}": figure["value"]
        for r in results
        for metric, figure in r["figures"].items()
    }
    assert again == pytest.approx(found[STEPS], rel=1e-5)
    assert again != pytest.approx(found[24], rel=1e-5)


def test_measuring_changes_no_bit(whole, data, tmp_path):
    train(values(data), tmp_path / "bare")
    bare, with_tasks = (open_source(str(run)).stack() for run in (tmp_path / "bare", whole))
    assert not scores_of(tmp_path / "bare")
    assert bare["embed_in"]["weight"].tobytes() == with_tasks["embed_in"]["weight"].tobytes()


def test_a_signal_while_a_task_is_asked(data, tmp_path, whole, monkeypatch):
    """The task is dropped and the run saved; the resumed run asks and ends as the whole one."""
    asked = []
    ask = harness.ask

    def signalled(model, question):
        asked.append(question.name)
        if len(asked) == 3:  # the first task at step 12
            os.kill(os.getpid(), signal.SIGTERM)
        return ask(model, question)

    monkeypatch.setattr(harness, "ask", signalled)
    result = train(values(data, **measured(data)), tmp_path / "run")
    assert (result.step, result.signal, asked[2:]) == (12, signal.SIGTERM, ["piqa"])
    assert list(scores_of(tmp_path / "run")) == [0]
    assert train(values(data, **measured(data)), tmp_path / "run").step == STEPS
    resumed, uninterrupted = scores_of(tmp_path / "run"), scores_of(whole)
    assert list(resumed) == [0, 12, 24, STEPS] and resumed == uninterrupted


def test_scores_travel_with_a_model_and_are_drawn_over_compute(whole, data, tmp_path, monkeypatch):
    assert run_command(["depth", "--map", "2:3", str(whole), str(tmp_path / "grown")]) == 0
    settings = values(data, **measured(data)) | {"schedule": {"steps": 1, "warmup": 0}}
    del settings["model"]
    figures = []
    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", figures.append)
    train(settings, tmp_path / "further", str(tmp_path / "grown"))
    history = History(epath.Path(tmp_path / "further"))
    rows = history.earlier + history.rows
    found = curves.collect_scores(rows)
    assert (
        list(found) == ["acc", "acc_norm", "bits_per_byte"] and len(found["acc"]["piqa"]) == 4 + 2
    )
    flops = [flops for flops, _ in found["bits_per_byte"]["bpb/code"]]
    assert flops == sorted(flops) and flops[3] == flops[4] > 0
    panels = figures[-1].axes
    assert [panel.get_title() for panel in panels] == list(found)
    assert panels[0].get_xlabel() == "FLOPs" and (tmp_path / "further" / "scores.png").exists()
    # Two lines, of the source and of the grown model, and the mark where one became the other.
    source, grown, mark = panels[2].lines
    assert [len(line.get_xdata()) for line in (source, grown)] == [4, 2]
    assert (
        mark.get_xdata()[0] == pytest.approx(flops[4]) and source.get_color() == grown.get_color()
    )
    assert [text.get_text() for text in panels[2].get_legend().get_texts()] == ["bpb/code"]
    for figure in figures:
        close(figure)


def test_rows_of_before_there_were_scores(tmp_path):
    old = (
        render_rows([dict.fromkeys(COLUMNS, "1") | {"validation_losses": ""}])
        .replace(",scores", "")
        .replace("1,1,1,1,1,1,1,1,1,,1", "1,1,1,1,1,1,1,1,,1")
    )
    assert "scores" not in old and len(parse_rows(old)[0]) == len(COLUMNS) - 1
    history = History(epath.Path(tmp_path))
    history.begin(old.encode())
    history.add(step=2, tokens=2, scores={"piqa acc": 0.5})
    assert history.find_scores(1) is None and history.find_scores(2) == {"piqa acc": 0.5}
    carried = parse_rows(history.export().decode())
    assert [row["scores"] for row in carried] == [
        "",
        '{"piqa acc": 0.5}',
    ] and not curves.collect_scores(carried[:1])
    assert np.allclose(
        curves.collect_scores([carried[1] | {"flops": "3"}])["acc"]["piqa"], (3, 0.5)
    )


@pytest.mark.parametrize(
    "changed,kind,words",
    [
        ({"tasks": "piqqa"}, UsageError, "there is no task 'piqqa'.*did you mean 'piqa'"),
        ({"tasks": "lambada"}, UsageError, "has no items of lambada"),
        ({"tasks_every": 0}, UsageError, "eval.tasks_every must be at least 1"),
        ({"limit": -1}, UsageError, "eval.limit must be at least 0"),
        ({"data": "nowhere"}, UsageError, "there is no such directory: nowhere"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_run_begins(changed, kind, words, data, tmp_path):
    with pytest.raises(kind, match=words):
        train(values(data, **measured(data) | changed), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_a_tokenizer_nothing_is_asked(data, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("tokens.bin", "tokens.idx"):
        (bare / f"other{name[6:]}").write_bytes((data / "tokens" / name).read_bytes())
    settings = values(data, **measured(data)) | {
        "data": {"train": str(bare / "other"), "held_out": 0.05}
    }
    with pytest.raises(GrowkitError, match="carries no tokenizer.json"):
        train(settings, tmp_path / "run")
