"""Rows of several files and published ones stand in one table of 80 columns, with what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from growkit.cli import run
from growkit.cli.answering import split_label
from growkit.errors import UsageError
from growkit.evaluation import report
from growkit.evaluation.catalogue import PILE, TASKS
from growkit.evaluation.reference import read_reference
from growkit.evaluation.tables import LONGEST_NAME, shorten_names

LONG = "/a/very/long/way/to/the/place/where/somebody/keeps/their/many/models/of/all/kinds/760m"


def result(name: str, documents: int | None = None, **figures: float) -> dict:
    total = TASKS[name].full if name in TASKS else 9000
    asked = documents or (total if name in TASKS else 3000)
    return {
        "name": name,
        "figures": {
            metric: {"value": value, "standard_error": 0.01} for metric, value in figures.items()
        },
        "documents": asked,
        "total": total,
        "cut": 0,
        "documents_sha256": f"{name}{asked}",
    }


RESULTS = [
    result("lambada", acc=0.58, perplexity=6.96),
    result("piqa", acc=0.7008, acc_norm=0.71),
    result("hellaswag", acc=0.3662, acc_norm=0.4),
    *(result(f"bpb/{part}", bits_per_byte=0.9 + n / 100) for n, part in enumerate(PILE)),
]


def keep(path: Path, *models: dict, **settings) -> Path:
    """Write what `evaluate --output` writes."""
    asked = {"limit": None, "max_length": 1024, "dtype": "float32"} | settings
    record = {"versions": {"lm_eval": "0.4.13"}, "settings": asked, "models": list(models)}
    path.write_text(json.dumps(record))
    return path


def model(source: str, results: list[dict] = RESULTS, **more) -> dict:
    return {"source": source, "fingerprint": source, "results": results} | more


def shown(capsys, *words) -> str:
    assert run(["evaluate", *map(str, words)]) == 0
    out = capsys.readouterr().out
    tables = [line for line in out.splitlines() if not line.startswith("wrote ")]
    assert max(map(len, tables)) <= 80
    return out


FORM = """\
model        LAMBADA  LAMBADA   PIQA  Hellaswag
               (ACC)    (PPL)  (ACC)      (ACC)
-----------  -------  -------  -----  ---------
GPT-760M       58.00     6.96  70.08      36.62
models/760m    58.00     6.96  70.08      36.62
GPT2-Large     47.60    12.97  70.30          -
GPT2-XL        51.21    10.63  70.78      40.03

model        Pile CC  OpenWebText2       Pile   Arxiv  BookCorpus2
               (BPB)         (BPB)  Wikipedia   (BPB)        (BPB)
                                        (BPB)
-----------  -------  ------------  ---------  ------  -----------
GPT-760M      0.9000        0.9100     0.9200  0.9300       0.9400
models/760m   0.9000        0.9100     0.9200  0.9300       0.9400
GPT2-Large    0.9582        0.9539     0.9795  1.1778       1.0061
GPT2-XL       0.9355        0.9171     0.9655  1.1381       0.9783
"""


def test_the_two_tables_of_the_760m_run(tmp_path, capsys):
    mine = keep(tmp_path / "a.json", model("runs/760m"))
    other = keep(tmp_path / "b.json", model(f"/a/very/long/way/to/{'x' * 50}/models/760m"))
    out = shown(capsys, f"GPT-760M={mine}", other, "--reference", "760m")
    assert out.startswith(FORM)
    # What the two tables have no column for follows.
    rest = out.removeprefix(FORM)
    assert "PIQA" in rest and "71.00 ± 1.00" in rest and "GPT2" not in rest
    # A measured row and a published one of the same name are told apart.
    same = shown(capsys, f"GPT2-XL={mine}", "--reference", "760m")
    assert same.count("\nGPT2-XL  ") == 3 and same.count("\nGPT2-XL, published ") == 2
    words = " ".join(out.split())
    assert "LAMBADA, PIQA and HellaSwag: https://github.com/EleutherAI/gpt-neo" in words
    assert "The Pile, https://arxiv.org/abs/2101.00027" in words
    kept = tmp_path / "all.json"
    shown(capsys, f"GPT-760M={mine}", other, "--reference", "760m", "--output", kept)
    assert [each.get("label") for each in json.loads(kept.read_text())["models"]] == [
        "GPT-760M",
        None,
    ]
    card = kept.with_suffix(".md").read_text()
    assert card.startswith("| model | LAMBADA (ACC) | LAMBADA (PPL) | PIQA (ACC) | Hellaswag (ACC)")
    # The file of both is shown as they were.
    assert shown(capsys, kept, "--reference", "760m").startswith(FORM)


def test_long_paths_and_equal_names(tmp_path, capsys):
    kept = keep(tmp_path / "a.json", model(LONG), model(f"/other{LONG}"), model("x" * 99))
    out = shown(capsys, kept)
    for name in ("models/of/all/kinds/760m", "of/all/kinds/760m (2)", "xxxxxxxxxxx..xxxxxxxxxxx"):
        assert any(line.startswith(f"{name} ") for line in out.splitlines())
    models = [{"source": text} for text in ("a", "a", "a", "b" * 99, "b" * 99)]
    names = shorten_names(models)
    assert len(set(names)) == 5 and max(map(len, names)) <= LONGEST_NAME


def test_what_is_not_alike_is_said_of_each(tmp_path, capsys):
    one = keep(tmp_path / "one.json", model("one"))
    part = [result("piqa", 500, acc=0.6)]
    other = keep(tmp_path / "other.json", model("other", part), max_length=64)
    changed = [each | {"documents_sha256": "other", "cut": 7} for each in RESULTS[:1]]
    third = keep(tmp_path / "third.json", model("third", changed))
    words = " ".join(shown(capsys, one, other, third, "--reference", "760m").split())
    assert "Documents, other: PIQA 500 of 1,838." in words
    assert "lm-evaluation-harness, other: version 0.4.13, zero-shot, in float32, windows" in words
    assert "windows of at most 64 tokens" in words and "at most 1024 tokens" in words
    assert "cut on the left, third: LAMBADA 7." in words and "left, one: none." in words
    assert "third was asked other documents of LAMBADA than one" in words
    assert "Published figures are of full sets, and those measured here of PIQA are not." in words
    # Without --reference published rows stand beside full sets only.
    assert "published" not in shown(capsys, other)
    assert "GPT2-XL, published" in shown(capsys, one)


def test_published_rows_of_a_file_of_ones_own(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "sources: a paper\nrows:\n  Theirs: {piqa: {acc: 68.5}, bpb/notes: {bits_per_byte: 1}}\n"
    )
    reference = read_reference(str(path))
    assert reference.rows == {
        "Theirs": {("piqa", "acc"): 0.685, ("bpb/notes", "bits_per_byte"): 1.0}
    }
    kept = keep(tmp_path / "a.json", model("a"))
    out = shown(capsys, kept, "--reference", path)
    assert "Theirs, published" in out and "68.50" in out and "GPT2" not in out
    assert "Published: a paper." in out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("rows: [1]", "has no rows: a file of published results is YAML with"),
        ("[", "is not YAML"),
        ("rows: {A: 3}", "A is not {TASK: {METRIC: NUMBER}}"),
        ("rows: {A: {piqa: 3}}", "A: piqa is not {METRIC: NUMBER}"),
        ("rows: {A: {piqa: {accc: 3}}}", "got 'accc'; did you mean 'acc'?"),
        ("rows: {A: {piqa: {acc: x}}}", "piqa acc must be a number, got 'x'"),
        ("rows: {}\ntables: [a]", "a table is {TITLE: TASK METRIC}, got 'a'"),
        ("rows: {}\ntables: [{A: piqa}]", "the metrics are acc, acc_norm, perplexity"),
    ],
)
def test_a_broken_file_of_published_rows_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "rows.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        read_reference(str(path))
    assert words in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_of_models_and_of_references(tmp_path, capsys, monkeypatch):
    (tmp_path / "a=b").mkdir()
    assert split_label("GPT2=openai-community/gpt2") == ("GPT2", "openai-community/gpt2")
    for word in (str(tmp_path / "a=b"), "runs/a=b", "plain"):
        assert split_label(word) == (None, word)
    for word in ("=x", "x=", f"{'x' * 101}=y"):
        with pytest.raises(UsageError, match="a model is SRC or NAME=SRC"):
            split_label(word)
    with pytest.raises(UsageError, match="did you mean '760m'"):
        read_reference("760")
    two = keep(tmp_path / "two.json", model("a"), model("b"))
    assert run(["evaluate", f"x={two}"]) == 2
    assert "two.json has 2 models, so 'x' names none" in capsys.readouterr().err
    assert run(["evaluate", str(keep(tmp_path / "none.json"))]) == 1
    monkeypatch.chdir(tmp_path)
    assert run(["evaluate", "GPT2-Large=gpt2-large"]) == 2
    assert "on the Hub it is openai-community/gpt2-large" in capsys.readouterr().err
    assert run(["evaluate", str(tmp_path / "missing.json")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    record = report.read_record(two)
    assert len(report.format_markdown(record).splitlines()) > 8
