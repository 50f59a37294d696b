"""Both kinds of model answer alike, items are asked as the harness does, figures repeat."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import random_tensors

pytest.importorskip("lm_eval", reason="growkit[eval] is not installed")
pytest.importorskip("accelerate", reason="growkit[eval] is not installed")

from growkit.checkpoint.location import open_source
from growkit.checkpoint.orbax import write_checkpoint
from growkit.checkpoint.tensor import Contents, copy_tensor, wrap_array
from growkit.cli import run
from growkit.errors import GrowkitError, UsageError
from growkit.evaluation import harness, items, report
from growkit.evaluation.catalogue import (
    NAMES,
    SEED,
    TASKS,
    is_full,
    parse_task_names,
)
from growkit.evaluation.questions import collect_questions
from growkit.evaluation.reference import read_reference
from growkit.models.architecture import Architecture
from growkit.models.gpt_neox import GPT_NEOX
from trainer.data.tokenizer import load_model_tokenizer, train_tokenizer
from trainer.evaluate.batches import pad_length
from trainer.evaluate.harness import load_jax_model
from trainer.model.decoder import compute_logits

SHARED = Path(__file__).parents[3] / "shared" / "data"
WINDOW = 48
MODEL = GPT_NEOX.model(layer=2, embed=32, head=4, mlp=64, vocab=320, context=WINDOW, tied=True)
SENTENCE = (
    "the cat sat on a mat and was glad of its hat "
    "while rain fell over towns where no dog ever slept"
)
WORDS = SENTENCE.split()

ROWS = {
    "lambada": [{"text": f"{' '.join(WORDS[n : n + 4 * n + 5])} word{n}"} for n in range(5)],
    "piqa": [
        {
            "goal": f"Dry the {word}.",
            "sol1": f"Shake it for {n} days. " * (2 * n),
            "sol2": "Wait — in the sun.",
            "label": n % 2,
        }
        for n, word in enumerate(WORDS[1:5], 1)
    ],
    "hellaswag": [
        {
            "activity_label": f"[header] Making a {word}",
            "ctx_a": "They stand [title] there.",
            "ctx_b": ctx_b,
            "endings": [f"{end}  [step] it all" for end in ("eat", "sell", "count", "paint")],
            "label": label,
        }
        for word, ctx_b, label in (("mat", "the man", "3"), ("hat", "", 0))
    ],
    "winogrande": [
        {
            "sentence": "The _ was in the hat, so it slept.",
            "option1": "cat",
            "option2": "rain",
            "answer": "1",
        },
        {
            "sentence": "Rain fell on Dogtown and _ got wet_.",
            "option1": "Dogtown",
            "option2": "rain",
            "answer": "2",
        },
    ],
    "arc_easy": [
        {"question": "What fell?", "choices": ["rain", "a long piece of a tree"], "gold": 1}
    ],
    "arc_challenge": [
        {
            "question": "What is 2+2?",
            "choices": {"text": ["4", "five", "[6]"], "label": labels},
            "answerKey": key,
        }
        for labels, key in ((["A", "B", "C"], "C"), (["1", "2", "3"], "1"))
    ],
}
TEXTS = ["the cat sat. " * 30, "42", '["a", "list"]', "  ", "Ünïcode — 猫 sat on the mat.\n"]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A directory as --data takes it."""
    root = tmp_path_factory.mktemp("items")
    for name, rows in ROWS.items():
        write_rows(root / f"{name}_some.jsonl", rows)
    (root / "bpb" / "notes").mkdir(parents=True)
    write_rows(root / "bpb" / "mixed.jsonl", [{"text": text} for text in TEXTS])
    (root / "bpb" / "notes" / "one.txt").write_text("a cat\n\nand a hat")
    (root / "bpb" / "notes" / "two.txt.gz").write_bytes(gzip.compress(b"rain"))
    return root


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS)] * 3 + TEXTS, 290)


def save_model(
    path: Path, tokenizer, model: Architecture = MODEL, scale: float = 1.0, files: bool = True
) -> Path:
    """A trainer checkpoint of random parameters with its tokenizer."""
    tensors = random_tensors(model)
    recipes = {
        name: copy_tensor(wrap_array(array * np.float32(scale if array.ndim > 1 else 1.0)))
        for name, array in tensors.items()
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
    }
    beside = (
        {"tokenizer.json": tokenizer.json, "tokenizer_config.json": json.dumps(config).encode()}
        if files
        else {}
    )
    record = {"count": 0, "step": 0, "schedule_step": 0, "tokens": 0}
    write_checkpoint(path, Contents(model.config(), {"params": recipes}, [], record, beside))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    return save_model(tmp_path_factory.mktemp("models") / "ck", tokenizer, scale=0.5)


@pytest.fixture(scope="module")
def directory(checkpoint):
    assert run(["export", str(checkpoint), str(checkpoint.parent / "hf")]) == 0
    return checkpoint.parent / "hf"


@pytest.fixture(scope="module")
def in_jax(checkpoint):
    source = open_source(str(checkpoint))
    return load_jax_model(source, load_model_tokenizer(source.files, source.path), WINDOW, 4)


@pytest.fixture(scope="module")
def in_torch(directory, tokenizer):
    from convert.harness import load_hugging_face_model

    return load_hugging_face_model(directory, tokenizer.end_of_text_id, WINDOW, 4)


def asked(names=None, data=None, limit=None):
    said = []
    return collect_questions(names, data, limit, said.append), said


def responses(model, question) -> list:
    """What a model answers to each request of a question: log likelihoods, and hits if any."""
    harness.ask(model, question)
    return [
        np.atleast_1d(np.asarray(request.resps[0], float)) for request in question.task.instances
    ]


def alike(ours: list, theirs: list, tolerance: float = 1e-4) -> bool:
    return len(ours) == len(theirs) and all(
        np.allclose(one, other, rtol=0, atol=tolerance)
        for one, other in zip(ours, theirs, strict=True)
    )


# Both kinds of model


def test_jax_answers_as_transformers_does(data, in_jax, in_torch):
    """Every request of every task, longer ones than the window too; both count the same cuts."""
    found, _ = asked(data=data)
    assert [question.name for question in found] == [*TASKS, "bpb/mixed", "bpb/notes"]
    for question in found:
        ours, theirs = responses(in_jax, question), responses(in_torch, question)
        assert alike(ours, theirs), question.name
        one, other = harness.ask(in_jax, question), harness.ask(in_torch, question)
        assert (one.cut, one.documents_sha256) == (other.cut, other.documents_sha256)
        assert one.version == other.version and set(one.figures) == set(other.figures)
        for metric, figure in one.figures.items():
            assert figure.value == pytest.approx(other.figures[metric].value, rel=1e-4)


@pytest.mark.parametrize("broken", ["window", "prefix", "head", "position"])
def test_a_broken_model_answers_differently(broken, data, in_jax, in_torch, monkeypatch):
    likelihood = in_jax.likelihood
    if broken == "window":
        monkeypatch.setattr(likelihood, "window", WINDOW - 1)
    elif broken == "prefix":
        monkeypatch.setattr(type(in_jax), "eot_token_id", 1)
    elif broken == "head":
        negated = {"weight": -likelihood.params["embed_in"]["weight"]}
        monkeypatch.setattr(likelihood, "params", likelihood.params | {"embed_in": negated})
    else:
        pieces = likelihood._pieces

        def cut_one_early(positions, targets):
            return pieces(np.maximum(positions - 1, 0), targets)

        monkeypatch.setattr(likelihood, "_pieces", cut_one_early)
    (mixed, *_), _ = asked(["bpb"], data)
    assert not alike(responses(in_jax, mixed), responses(in_torch, mixed))


def test_no_torch_is_loaded_for_a_checkpoint(checkpoint, data):
    import subprocess
    import sys

    command = ["evaluate", str(checkpoint), "--data", str(data), "--tasks", "winogrande"]
    code = (
        "import sys; from growkit.cli import run\n"
        f"assert run({command!r}) == 0\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.stderr.splitlines()[-1] == "False", done.stderr
    assert "WinoGrande" in done.stdout


def logits_after(checkpoint, texts: list[list[int]]) -> np.ndarray:
    """The logits [texts, WINDOW, vocab] of texts of at most a window, padded with zeros."""
    tokens = np.array([text + [0] * (WINDOW - len(text)) for text in texts])
    return compute_logits(open_source(str(checkpoint)), tokens).astype(np.float64)


def test_log_likelihoods_are_the_logits(checkpoint, in_jax):
    """Against the whole model's logits, text by text; a context is cut on the left."""
    generator = np.random.default_rng(0)
    pairs = [
        (generator.integers(0, 320, context).tolist(), generator.integers(0, 320, scored).tolist())
        for context, scored in ((1, 1), (30, 18), (17, 2), (100, 9), (1, 48), (2, 1))
    ]
    cut = [(context + scored)[-WINDOW - 1 : -1] for context, scored in pairs]
    logits = logits_after(checkpoint, cut)
    # The same contexts once more, each with its likeliest token.
    likeliest = [
        (text, [int(row[len(text) - 1].argmax())]) for text, row in zip(cut, logits, strict=True)
    ]
    found = in_jax.likelihood.score(pairs + likeliest)
    assert all(hit for _, hit in found[len(pairs) :])
    for (_, scored), text, row, (total, hit) in zip(pairs, cut, logits, found, strict=False):
        row = row[len(text) - len(scored) : len(text)]
        logs = row - np.log(np.exp(row).sum(-1, keepdims=True))
        assert total == pytest.approx(logs[np.arange(len(scored)), scored].sum(), abs=1e-4)
        assert hit == (row.argmax(-1) == scored).all()


def test_few_lengths_and_none_too_short():
    lengths = {pad_length(length, 1024) for length in range(1, 1025)}
    assert sorted(lengths) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(length <= pad_length(length, 1000) <= 1000 for length in range(1, 1001))
    assert pad_length(3, 8) == 8


def test_a_text_without_a_token_has_no_score(in_jax):
    with pytest.raises(GrowkitError, match="no token of its own: '' after 'before'"):
        in_jax.split_requests([(("before", ""), [3], [])])


# What is asked


@pytest.fixture
def hub(monkeypatch):
    """A Hub that answers every request with the rows given."""
    import datasets

    def answers(rows: list[dict]) -> None:
        data = datasets.Dataset.from_list(rows)
        splits = dict.fromkeys(("train", "validation", "test"), data)
        monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: splits)

    return answers


def requests_of(task) -> list:
    with harness.silence_libraries():
        task.build_all_requests()
    return [(request.request_type, request.args, request.doc_id) for request in task.instances]


@pytest.mark.parametrize("name", TASKS)
def test_the_shipped_task_asks_what_the_harness_asks(name, data, hub):
    rows = ROWS[name]
    if name == "arc_easy":  # as published
        rows = [
            {
                "question": row["question"],
                "choices": {"text": row["choices"], "label": ["A", "B"]},
                "answerKey": "AB"[row["gold"]],
            }
            for row in rows
        ]
    if name == "winogrande":  # the harness takes a sentence up to its first gap, too
        assert rows[1]["sentence"].count("_") == 2
    if name == "hellaswag":
        rows = [row | {"label": str(row["label"])} for row in rows]
    hub(rows)
    own, ([question], _) = harness.load_hub_question(name, None).task, asked([name], data)
    assert requests_of(question.task) == requests_of(own)
    assert question.task.VERSION == own.VERSION
    shown = {metric["metric"]: metric["aggregation"] for metric in question.task.config.metric_list}
    assert shown == {metric["metric"]: metric["aggregation"] for metric in own.config.metric_list}
    golds = [question.task.doc_to_target(doc) for doc in question.task.test_docs()]
    texts = [question.task.doc_to_text(doc) for doc in question.task.test_docs()]
    assert golds == [own.doc_to_target(doc) for doc in own.eval_docs]
    assert texts == [own.doc_to_text(doc) for doc in own.eval_docs]


def test_a_document_in_brackets_or_of_digits_is_text(data):
    """The harness's own template would make a list of such a document."""
    ([mixed, *_], _) = asked(["bpb"], data)
    assert [args[0] for _, args, _ in requests_of(mixed.task)] == [
        text for text in TEXTS if text.strip()
    ]
    mixed.task.set_config(key="doc_to_target", value="{{text}}")
    assert ["a", "list"] in [args[0] for _, args, _ in requests_of(mixed.task)]


def test_a_limit_draws_from_all_of_a_sorted_file(tmp_path):
    write_rows(tmp_path / "lambada.jsonl", [{"text": f"number {n}"} for n in range(100)])
    path = tmp_path / "lambada.jsonl"
    chosen = [int(row["target"]) for row in items.read_items("lambada", path, 20).documents]
    assert len(chosen) == 20 and chosen == sorted(set(chosen)) and chosen[-1] > 60
    assert chosen == [int(row["target"]) for row in items.read_items("lambada", path, 20).documents]
    assert items.read_items("lambada", path, 20).total == 100
    assert len(items.read_items("lambada", path, 100).documents) == len(
        items.read_items("lambada", path, None).documents
    )


def test_every_document_is_as_likely_to_be_drawn(monkeypatch):
    counts = np.zeros(10)
    for seed in range(2000):
        monkeypatch.setattr(items, "SEED", seed)
        counts[items.draw_sample(range(10), 3)] += 1
    # 2000 draws of probability 0.3: a standard deviation of 20.
    assert abs(counts - 600).max() < 90
    assert SEED != 0 and items.draw_sample("abc", None) == ["a", "b", "c"]


def test_bits_per_byte_are_of_at_most_3000_documents(tmp_path):
    (tmp_path / "bpb").mkdir()
    write_rows(tmp_path / "bpb" / "long.jsonl", [{"text": f"document {n}"} for n in range(3005)])
    write_rows(tmp_path / "lambada.jsonl", [{"text": f"number {n}"} for n in range(3005)])
    found, said = asked(None, tmp_path)
    assert [(question.documents, question.total) for question in found] == [
        (3005, 3005),
        (3000, 3005),
    ]
    assert len(said) == 5 and said[0].startswith("note: piqa is left out")
    assert asked(["bpb"], tmp_path, 7)[0][0].documents == 7


# Figures


def test_bits_per_byte_of_an_untrained_model(tmp_path, tokenizer):
    """With near-zero parameters each token costs log2(vocabulary) bits, padding rows included."""
    source = open_source(str(save_model(tmp_path / "ck", tokenizer, scale=1e-4)))
    (tmp_path / "bpb").mkdir()
    text = " ".join(WORDS) * 20
    (tmp_path / "bpb" / "text.txt").write_text(text)
    model = load_jax_model(source, tokenizer, WINDOW, 4)
    answer = harness.ask(model, asked(["bpb"], tmp_path)[0][0])
    tokens = len(tokenizer.tokenizer.encode(text).ids)
    assert answer.figures["bits_per_byte"].value == pytest.approx(
        math.log2(MODEL.vocab) * tokens / len(text), rel=1e-3
    )
    assert math.isnan(answer.figures["bits_per_byte"].error) and answer.cut == 0


def test_bits_per_byte_are_all_nats_over_all_bytes(data, in_jax):
    ([mixed, *_], said) = asked(["bpb"], data)
    assert said == ["note: 1 empty documents of bpb/mixed are left out"]
    nats = -sum(float(response[0]) for response in responses(in_jax, mixed))
    size = sum(len(text.encode()) for text in TEXTS if text.strip())
    assert harness.ask(in_jax, mixed).figures["bits_per_byte"].value == pytest.approx(
        nats / size / math.log(2)
    )


def test_standard_errors():
    """The error of a mean is the harness's; others are the spread of resampled figures."""
    from lm_eval.api.metrics import bits_per_byte, mean_stderr, perplexity

    generator = np.random.default_rng(0)
    hits = generator.integers(0, 2, 300).tolist()
    assert harness.error_of_mean(hits) == pytest.approx(mean_stderr(hits))
    logs = generator.normal(-2, 1, 400)
    sizes = generator.integers(50, 2000, 400)
    pairs = [
        (-float(size) * rate, int(size))
        for size, rate in zip(sizes, generator.normal(0.7, 0.1, 400), strict=True)
    ]
    draws = [generator.integers(0, 400, 400) for _ in range(1000)]
    spread = np.std([perplexity(logs[draw]) for draw in draws])
    assert harness.error_of_perplexity(logs) == pytest.approx(spread, rel=0.15)
    spread = np.std([bits_per_byte([pairs[n] for n in draw]) for draw in draws])
    assert harness.error_of_bits_per_byte(pairs) == pytest.approx(spread, rel=0.15)
    assert harness.error_of_mean([1.0]) != harness.error_of_mean([1.0])


def test_published_figures_stand_beside_full_sets_only():
    assert is_full("piqa", 1838, 1838) and not is_full("piqa", 500, 500)
    assert is_full("bpb/pile_arxiv", 3000, 9000) and is_full("bpb/pile_arxiv", 20, 20)
    assert not is_full("bpb/pile_arxiv", 100, 9000) and not is_full("bpb/arxiv", 3000, 3000)
    published = read_reference()
    assert list(published.select(["hellaswag"])) == ["GPT2-XL"]
    assert not published.select(["winogrande"])


def test_parts_of_the_pile_are_named_as_that_run_names_them(tmp_path):
    (tmp_path / "bpb").mkdir()
    (tmp_path / "bpb" / "Pile-CC.txt").write_text("x")
    assert list(items.find_parts(tmp_path)) == ["pile_cc"]
    (tmp_path / "bpb" / "pile_cc.jsonl").write_text("x")
    with pytest.raises(UsageError, match="has both Pile-CC.txt and pile_cc.jsonl"):
        items.find_parts(tmp_path)


# The command


def evaluated(capsys, *words) -> tuple[int, str, str]:
    code = run(["evaluate", *map(str, words)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_a_table_of_both_and_what_is_kept(tmp_path, data, checkpoint, directory, capsys):
    kept = tmp_path / "new" / "scores.json"
    words = [
        checkpoint,
        directory,
        "--data",
        data,
        "--tasks",
        "hellaswag,bpb",
        "--output",
        kept,
        "--batch",
        3,
    ]
    code, out, err = evaluated(capsys, *words)
    assert (
        code == 0
        and "HellaSwag" in out
        and "acc_norm, %" in out
        and "bits per byte" in out
        and "±" in out
    )
    assert f"{checkpoint}: bpb/mixed, 4 documents in" in err
    record = json.loads(kept.read_text())
    ours, theirs = record["models"]
    assert ours["kind"] == "checkpoint" and theirs["kind"] == "huggingface"
    assert ours["fingerprint"] == open_source(str(checkpoint)).fingerprint
    for one, other in zip(ours["results"], theirs["results"], strict=True):
        assert (
            one["documents_sha256"] == other["documents_sha256"]
            and len(one["documents_sha256"]) == 64
        )
        assert one["files"] == other["files"] and one["version"] == 1.0
    path, digest = next(iter(ours["results"][0]["files"].items()))
    assert path == str(data / "hellaswag_some.jsonl") and digest == items.hash_file(Path(path))
    assert record["settings"] == {
        "limit": None,
        "data": str(data),
        "batch": 3,
        "max_length": WINDOW,
        "dtype": "float32",
        "seed": SEED,
    }
    assert record["versions"]["lm_eval"]
    card = kept.with_suffix(".md").read_text()
    assert card.startswith("| model | HellaSwag (acc, %) | HellaSwag (acc_norm, %) |")
    assert "notes (bits per byte)" in card and "one standard error" in card
    assert evaluated(capsys, *words)[0] == 2
    assert run(["export", str(checkpoint), str(tmp_path / "hf"), "--evaluation", str(kept)]) == 0
    readme = (tmp_path / "hf" / "README.md").read_text()
    assert (
        readme.index("## Lineage") < readme.index("## Evaluation") < readme.index("| this model |")
    )
    assert readme.count("this model") == 2 and str(tmp_path) not in readme


def test_figures_of_another_model_are_not_put_into_a_card(
    tmp_path, checkpoint, tokenizer, data, capsys
):
    kept = tmp_path / "scores.json"
    assert (
        evaluated(capsys, checkpoint, "--data", data, "--tasks", "winogrande", "--output", kept)[0]
        == 0
    )
    other = save_model(tmp_path / "other", tokenizer)
    assert run(["export", str(other), str(tmp_path / "hf"), "--evaluation", str(kept)]) == 2
    assert f"has figures of {checkpoint}, and none of {other}" in capsys.readouterr().err
    kept.write_text('{"models": [{}]}')
    assert run(["export", str(other), str(tmp_path / "hf"), "--evaluation", str(kept)]) == 1
    assert "is not what growkit evaluate --output writes" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_models_of_different_contexts_read_the_same_window(
    tmp_path, checkpoint, tokenizer, data, capsys
):
    short = save_model(tmp_path / "short", tokenizer, MODEL.change(context=32), scale=0.5)
    kept = tmp_path / "scores.json"
    words = ["--data", data, "--tasks", "piqa,bpb", "--output", kept]
    code, out, err = evaluated(capsys, checkpoint, short, *words)
    assert code == 0 and "contexts differ, so every model reads at most 32 tokens" in err
    # The same parameters: on the same window they are the same model.
    one, other = (model["results"] for model in json.loads(kept.read_text())["models"])
    assert one == other and one[0]["cut"] > 0
    cut = f"Longer requests, their contexts cut on the left: PIQA {one[0]['cut']}"
    assert cut in " ".join(out.split())
    assert evaluated(capsys, checkpoint, *words, "--force")[0] == 0
    alone = json.loads(kept.read_text())["models"][0]["results"]
    assert alone[1]["figures"] != one[1]["figures"] and alone[0]["cut"] < one[0]["cut"]


def test_a_narrow_terminal_has_all_columns_below_one_another(data, checkpoint, capsys, monkeypatch):
    record = report.start_record({"max_length": 1, "dtype": "float32"})
    figures = {
        "acc": {"value": 0.5, "standard_error": 0.1},
        "acc_norm": {"value": 1.0, "standard_error": None},
    }
    results = [
        {"name": name, "figures": figures, "documents": full, "total": full, "cut": 0}
        for name, full in (("hellaswag", 10042), ("piqa", 1838))
    ]
    record["models"] = [{"source": "m", "results": results}]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    report.print_record(record)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    assert sum("GPT2-XL, published" in line for line in lines) == 2
    assert sum("50.00 ± 10.00" in line for line in lines) == 2
    card = report.format_markdown(record)
    assert "40.03" in card and "arxiv.org/abs/2101.00027" in card


def test_names():
    assert parse_task_names("bpb, piqa,piqa") == ["bpb", "piqa"] and len(NAMES) == 7


# Refusals, each in one sentence


def refused(capsys, code: int, *words) -> str:
    found, out, err = evaluated(capsys, *words)
    lines = [line for line in err.splitlines() if line.startswith("growkit: ")]
    assert found == code and not out and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.fixture(params=["checkpoint", "directory"])
def damaged(request, tmp_path):
    """A model with one bit flipped in the middle of its largest file."""
    copy = shutil.copytree(request.getfixturevalue(request.param), tmp_path / "damaged")
    largest = max(copy.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    return copy


def test_a_flipped_bit_is_refused_unless_it_is_told_not_to_look(damaged, data, capsys):
    words = [damaged, "--tasks", "lambada", "--data", data, "--limit", "1"]
    assert f"{damaged} is damaged: the bytes of " in refused(capsys, 1, *words)
    assert evaluated(capsys, *words, "--no-verify")[0] == 0
    words = ["generate", str(damaged), "--prompt", "a", "--tokens", "1"]
    assert run(words) == 1
    assert f"{damaged} is damaged: the bytes of " in capsys.readouterr().err
    assert run([*words, "--no-verify"]) == 0


def test_an_unknown_task_names_the_nearest(checkpoint, capsys):
    assert "no task 'helaswag'" in refused(capsys, 2, checkpoint, "--tasks", "piqa,helaswag")
    assert "did you mean 'hellaswag'?" in refused(capsys, 2, checkpoint, "--tasks", "piqa,helaswag")
    assert "there is no task in ','; the tasks are lambada" in refused(
        capsys, 2, checkpoint, "--tasks", ","
    )


def test_what_a_data_directory_lacks(tmp_path, checkpoint, capsys):
    assert "has no items of any task" in refused(capsys, 2, checkpoint, "--data", tmp_path)
    words = refused(capsys, 2, checkpoint, "--data", tmp_path, "--tasks", "piqa")
    assert (
        words
        == f"growkit: {tmp_path} has no items of piqa: looked for piqa*.jsonl, compressed or not"
    )
    assert "looked for text in bpb/" in refused(
        capsys, 2, checkpoint, "--data", tmp_path, "--tasks", "bpb"
    )
    assert "no such directory" in refused(capsys, 2, checkpoint, "--data", tmp_path / "none")
    for name in ("piqa_a.jsonl", "piqa_b.jsonl.gz"):
        (tmp_path / name).touch()
    words = refused(capsys, 2, checkpoint, "--data", tmp_path, "--tasks", "piqa")
    assert "several files for piqa: piqa_a.jsonl, piqa_b.jsonl.gz; keep one" in words


BROKEN = {
    "lambada": [
        ({"txt": "a b"}, "the column 'text' is missing; the line has txt"),
        ({"text": ""}, "'text' is empty"),
        ({"text": "word"}, "a passage and a last word"),
        ({"text": 3}, "must be text, got 3"),
        ({"text": "a \ud800"}, "half a surrogate pair"),
    ],
    "piqa": [
        ({"label": 2}, "'label' must be a number from 0 to 1, got 2"),
        ({"sol1": " "}, "the column 'sol1' is empty"),
        ({"label": True}, "got True"),
    ],
    "hellaswag": [
        ({"endings": []}, "must be a list of texts"),
        ({"endings": ["a", ""]}, "number 1 is empty"),
        ({"label": "-1"}, "from 0 to 3"),
    ],
    "winogrande": [
        ({"sentence": "No gap."}, "must have a gap"),
        ({"answer": "3"}, "must be 1 or 2, got '3'"),
    ],
    "arc_easy": [({"gold": 2}, "from 0 to 1, got 2")],
    "arc_challenge": [
        ({"answerKey": "D"}, "one of the 3 labels"),
        ({"choices": {"text": ["a"]}}, "'label' is missing"),
    ],
}


@pytest.mark.parametrize(
    "task,change,words", [(task, *case) for task, cases in BROKEN.items() for case in cases]
)
def test_a_broken_item_is_named_by_its_line(task, change, words, tmp_path):
    good = ROWS[task][0]
    write_rows(
        tmp_path / "items.jsonl", [good, {"txt": "a b"} if "txt" in change else good | change]
    )
    with pytest.raises(GrowkitError) as caught:
        items.read_items(task, tmp_path / "items.jsonl", None)
    assert f"{tmp_path / 'items.jsonl'}, line 2" in str(caught.value) and words in str(caught.value)
    assert not isinstance(caught.value, UsageError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content,words",
    [
        (b"{", "line 1 is not JSON"),
        (b"[1]", "must be a JSON object, got list"),
        (b'{"text": "\xff"}', "not UTF-8 text"),
        (b"\n\n", "holds no text"),
        (b'{"text": ""}\n{"text": " "}', "every document is empty"),
        (b'{"body": "x"}', "the column 'text' is missing; the line has body"),
    ],
)
def test_a_broken_text_is_named(content, words, tmp_path, checkpoint, capsys):
    (tmp_path / "bpb").mkdir()
    (tmp_path / "bpb" / "text.jsonl").write_bytes(content)
    assert words in refused(capsys, 1, checkpoint, "--data", tmp_path)
    (tmp_path / "bpb" / "text.jsonl").unlink()
    (tmp_path / "bpb" / "text.jsonl.gz").write_bytes(
        gzip.compress(b'{"text": "%s"}' % random.Random(0).randbytes(99).hex().encode())[:-20]
    )
    assert "is not a whole gzip file" in refused(capsys, 1, checkpoint, "--data", tmp_path)


def test_models_that_cannot_be_asked(tmp_path, tokenizer, data, capsys):
    bare = save_model(tmp_path / "bare", tokenizer, files=False)
    assert "carries no tokenizer.json" in refused(capsys, 1, bare, "--data", data)
    small = save_model(tmp_path / "small", tokenizer, MODEL.change(vocab=280))
    assert "and the vocabulary of the model ends at 279; leave that text out" in refused(
        capsys, 1, small, "--data", data, "--tasks", "bpb"
    )
    assert "no such directory" in refused(capsys, 2, tmp_path / "none", "--data", data)


def add_padding(path: Path, vocab: int) -> int:
    """Give a model's tokenizer a token for padding, whose id is the first that the model lacks."""
    content = json.loads((path / "tokenizer.json").read_text())
    number = 1 + max(
        max(content["model"]["vocab"].values()), max(each["id"] for each in content["added_tokens"])
    )
    assert number == vocab
    added = content["added_tokens"][0] | {"id": number, "content": "<|pad|>"}
    content["added_tokens"].append(added)
    (path / "tokenizer.json").write_text(json.dumps(content))
    return number


@pytest.mark.parametrize("kind", ["checkpoint", "directory"])
def test_a_token_beyond_the_vocabulary_that_no_text_has(tmp_path, tokenizer, kind, capsys):
    vocab = tokenizer.vocab_size
    checkpoint = save_model(tmp_path / "ck", tokenizer, MODEL.change(vocab=vocab))
    assert run(["export", str(checkpoint), str(tmp_path / "hf")]) == 0
    number = add_padding(tmp_path / "hf", vocab)
    if kind == "checkpoint":
        assert run(["import", str(tmp_path / "hf"), str(tmp_path / "imported")]) == 0
    model = tmp_path / {"checkpoint": "imported", "directory": "hf"}[kind]
    (tmp_path / "data" / "bpb").mkdir(parents=True)
    text = tmp_path / "data" / "bpb" / "a.txt"
    text.write_text("the cat sat")
    assert evaluated(capsys, model, "--data", tmp_path / "data")[0] == 0
    text.write_text("the cat <|pad|> sat")
    words = refused(capsys, 1, model, "--data", tmp_path / "data")
    assert f"the token '<|pad|>' with the id {number}" in words
    assert f"the vocabulary of the model ends at {vocab - 1}" in words


def test_texts_are_read_as_tokenize_reads_them(tmp_path):
    """Under other endings, compressed under any name, with marks; nothing is passed over unsaid."""
    folder = tmp_path / "bpb"
    folder.mkdir()
    lines = b'{"text": "the cat"}\n{"text": null}\n'
    mark = b"\xef\xbb\xbf"
    files = {
        "a.NDJSON": lines,
        "b.txt": lines,
        "c.jsonl.xz": lzma.compress(mark + lines),
        "d.jsonl": gzip.compress(lines),
        "e.JSON.BZ2": bz2.compress(lines),
        "f.txt": mark + b"the cat",
        "g.txt": "the cat".encode("utf-16"),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    parts = items.find_parts(tmp_path)
    assert list(parts) == list("abcdefg")
    for name, paths in parts.items():
        found = items.read_texts(name, paths, None)
        assert found.documents == [{"text": "the cat"}], name
        assert found.empty == (name not in "fg"), name
    for name in ("x.pdf", "y.csv"):
        (folder / name).touch()
    (tmp_path / "PIQA_some.jsonl.gz").write_bytes(gzip.compress(b"{}\n"))
    (tmp_path / "readme").touch()
    assert items.find_task_file(tmp_path, "piqa").name == "PIQA_some.jsonl.gz"
    assert items.list_passed_over(tmp_path) == ["bpb/x.pdf", "bpb/y.csv", "readme"]
    said = []
    with pytest.raises(GrowkitError):
        collect_questions(["piqa"], tmp_path, None, said.append)
    assert said == [f"note: no task is read from bpb/x.pdf, bpb/y.csv, readme of {tmp_path}"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1 nests too deep"),
    ],
)
def test_texts_that_cannot_be_read_are_one_sentence(tmp_path, content, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(GrowkitError, match=words):
        items.read_texts("a", [path], None)


def test_without_a_network_and_without_data(checkpoint, capsys, monkeypatch):
    import datasets

    def unreachable(*given, **named):
        raise ConnectionError("Couldn't reach the Hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    words = refused(capsys, 1, checkpoint, "--tasks", "piqa")
    assert "the items of piqa could not be had from the Hugging Face Hub" in words
    assert "(ConnectionError: Couldn't reach the Hub)" in words
    assert words.endswith("--data DIR takes them from local files")
    assert "give --data DIR" in refused(capsys, 2, checkpoint, "--tasks", "bpb")


def test_the_hubs_items_are_drawn_too(hub, in_jax):
    """A part of the harness's own task, by the same seed."""
    hub(ROWS["piqa"] * 10)
    question = harness.load_hub_question("piqa", 5)
    assert question.chosen == items.draw_sample(range(40), 5) != list(range(5)) and (
        question.documents,
        question.total,
    ) == (
        5,
        40,
    )
    answer = harness.ask(in_jax, question)
    assert len({request.doc_id for request in question.task.instances}) == 5 and answer.files == {}
    whole = harness.ask(in_jax, harness.load_hub_question("piqa", None))
    assert whole.documents == 40 and whole.documents_sha256 != answer.documents_sha256


def test_other_usage(tmp_path, checkpoint, data, capsys, monkeypatch):
    assert "--limit must be at least 1, got 0" in refused(capsys, 2, checkpoint, "--limit", 0)
    assert "--batch must be at least 1, got -1" in refused(capsys, 2, checkpoint, "--batch", -1)
    assert "name of a .json file" in refused(capsys, 2, checkpoint, "--output", tmp_path / "scores")
    (tmp_path / "scores.md").touch()
    words = refused(capsys, 2, checkpoint, "--output", tmp_path / "scores.json")
    assert words == f"growkit: the output exists: {tmp_path / 'scores.md'}; --force replaces it"
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert "lm_eval is not installed; pip install 'growkit[eval]'" in refused(
        capsys, 1, checkpoint, "--data", data
    )


# On real items


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real items are not beside this checkout")
def test_jax_answers_as_transformers_does_on_real_items(in_jax, in_torch):
    found, _ = asked(data=SHARED / "eval", limit=100)
    assert len(found) == 6 + 5
    for question in found:
        theirs = [response[0] for response in responses(in_torch, question)]
        ours = [response[0] for response in responses(in_jax, question)]
        # The sum over a document of some ten thousand tokens: as many roundings.
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4, err_msg=question.name)
        one, other = harness.ask(in_jax, question), harness.ask(in_torch, question)
        for metric, figure in one.figures.items():
            assert figure.value == pytest.approx(other.figures[metric].value, rel=1e-4), (
                question.name,
                metric,
            )


# Models that growkit did not make


def save_hugging_face(path: Path, checkpoint: Path, kind: str, **sizes) -> Path:
    """A tiny random model of transformers, with the tokenizer of a checkpoint."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind, vocab_size=320, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes(open_source(str(checkpoint)).files[name])
    return path


@pytest.fixture(scope="module")
def gpt2(checkpoint):
    path = checkpoint.parent / "gpt2"
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": WINDOW}
    return save_hugging_face(path, checkpoint, "gpt2", **sizes)


@pytest.fixture(scope="module")
def foreign(checkpoint):
    path = checkpoint.parent / "foreign"
    sizes = {"d_model": 32, "max_position_embeddings": WINDOW}
    parts = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32}
    return save_hugging_face(path, checkpoint, "bart", **sizes, **parts)


def test_rows_of_gpt2_and_of_a_model_without_a_table(gpt2, foreign, data, tmp_path, capsys):
    """Any causal model of transformers is asked; rows of earlier files stand beside new ones."""
    with pytest.raises(GrowkitError, match="'bart'"):
        open_source(str(foreign))
    kept = tmp_path / "gpt2.json"
    words = ["--data", data, "--tasks", "winogrande,bpb"]
    code, _, err = evaluated(capsys, f"GPT2={gpt2}", *words, "--output", kept)
    assert code == 0 and "GPT2: winogrande" in err
    code, out, err = evaluated(
        capsys, kept, f"other={foreign}", *words, "--output", tmp_path / "both.json"
    )
    assert code == 0 and "other: winogrande" in err and "GPT2: winogrande" not in err
    rows = [line.split()[0] for line in out.splitlines() if "±" in line[8:30]]
    assert rows == ["GPT2", "other"] * 2
    mine, other = json.loads((tmp_path / "both.json").read_text())["models"]
    assert mine["results"] == json.loads(kept.read_text())["models"][0]["results"]
    assert (mine["label"], mine["kind"]) == ("GPT2", "huggingface")
    assert (other["label"], other["kind"], other["lineage"]) == ("other", "transformers", [])
    assert other["parameters"] > 10_000 and len(other["fingerprint"]) == 64


def test_gpt2_with_the_files_of_its_older_tokenizer(gpt2, data, tmp_path, capsys):
    """vocab.json and merges.txt, which transformers reads, and the same figures."""
    older = shutil.copytree(gpt2, tmp_path / "older")
    content = json.loads((older / "tokenizer.json").read_text())
    (older / "tokenizer.json").unlink()
    added = {each["content"]: each["id"] for each in content["added_tokens"]}
    (older / "vocab.json").write_text(json.dumps(content["model"]["vocab"] | added))
    merges = [
        each if isinstance(each, str) else " ".join(each) for each in content["model"]["merges"]
    ]
    (older / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (older / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    kept = tmp_path / "kept.json"
    words = ["--data", data, "--tasks", "bpb,piqa", "--output", kept]
    assert evaluated(capsys, gpt2, older, *words)[0] == 0
    one, other = (each["results"] for each in json.loads(kept.read_text())["models"])
    assert one == other


def test_weights_that_transformers_would_make_up_are_refused(foreign, data, tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    copy = shutil.copytree(foreign, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    tensors.pop("model.decoder.layers.1.fc1.weight")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    words = refused(capsys, 1, copy, "--data", data, "--tasks", "winogrande")
    assert "layers.1.fc1.weight" in words and "would make up" in words
    (copy / "model.safetensors").unlink()
    words = refused(capsys, 1, copy, "--data", data, "--tasks", "winogrande")
    assert "transformers cannot load" in words and "and growkit does not open it" in words
