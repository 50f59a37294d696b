"""Work spread over processes: the same bytes as from one, and nothing left behind at any end."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import contents_of

import trainer.data.processes as module
import trainer.data.text
import trainer.data.tokenizer
from growkit.errors import GrowkitError, UsageError
from trainer.data.processes import map_in_order
from trainer.data.tokenize import tokenize, tokenize_documents
from trainer.data.tokenizer import train_tokenizer

WORDS = "The cat sat on the mat; 日本 too, on 12 mats. "


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer([WORDS * 20], 300)


def documents():
    """Short ones, empty ones, and one that is cut into pieces."""
    generator = random.Random(0)
    texts = [
        " ".join(generator.choices(WORDS.split(), k=generator.randrange(1, 60))) for _ in range(400)
    ]
    return [*texts[:200], "", " \n", " ".join(texts), *texts[200:]]


def small_blocks(monkeypatch):
    monkeypatch.setattr(trainer.data.text, "BLOCK_SIZE", 4000)
    monkeypatch.setattr(trainer.data.tokenizer, "_PIECE_CHARACTERS", 3000)


def test_any_number_of_processes_writes_the_same_bytes(tmp_path, bpe, monkeypatch):
    whole = tokenize_documents(documents(), tmp_path / "whole", bpe)
    assert (whole["documents"], whole["empty_documents"]) == (401, 2)
    small_blocks(monkeypatch)
    for processes in (1, 2, 3):
        out = tmp_path / str(processes)
        tokenize_documents(documents(), out, bpe, processes=processes)
        assert contents_of(out) == contents_of(tmp_path / "whole")


def test_results_in_another_order_would_be_seen(tmp_path, bpe, monkeypatch):
    """The sibling of the test above: results as they come in, here the last first."""
    small_blocks(monkeypatch)
    short = [text for text in documents() if len(text) < 3000]
    tokenize_documents(short, tmp_path / "whole", bpe)
    monkeypatch.setattr(
        module,
        "_collect_results",
        lambda pool, tasks, ahead: reversed(list(pool.map(module._run_task, tasks))),
    )
    tokenize_documents(short, tmp_path / "turned", bpe, processes=2)
    assert contents_of(tmp_path / "turned") != contents_of(tmp_path / "whole")


def test_little_work_starts_no_process(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(module, "ProcessPoolExecutor", None)
    tokenize_documents(["one", "two"], tmp_path / "out", bpe, processes=8)
    small_blocks(monkeypatch)
    with pytest.raises(TypeError):
        tokenize_documents(documents(), tmp_path / "more", bpe, processes=8)


def test_the_number_of_processes_is_positive(tmp_path, bpe):
    with pytest.raises(UsageError, match="at least 1, not 0"):
        tokenize_documents(["one"], tmp_path / "out", bpe, processes=0)


def test_an_error_in_a_process_is_one_sentence(tmp_path, bpe, monkeypatch):
    small_blocks(monkeypatch)
    path, tokenizer = tmp_path / "a.jsonl", tmp_path / "given.json"
    path.write_text('{"text": "fine and good"}\n' * 2000 + '{"body": 3}\n')
    tokenizer.write_bytes(bpe.json)
    with pytest.raises(GrowkitError, match="a.jsonl, line 2001 must be an object with") as caught:
        tokenize([path], tmp_path / "out", tokenizer, processes=2)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [path, tokenizer]


class Square:
    """Squares numbers; dies of 13."""

    def __call__(self, number):
        if number == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return number**2


def test_a_process_that_is_killed_is_one_sentence():
    with pytest.raises(
        GrowkitError, match="one of the 2 processes was killed, perhaps for want of memory"
    ):
        list(map_in_order(Square, (), range(20), 2))


def test_no_more_tasks_are_read_than_can_be_worked_on():
    read = []
    results = map_in_order(
        Square, (), (read.append(number) or number for number in range(20, 120)), 2
    )
    assert [next(results) for _ in range(5)] == [number**2 for number in range(20, 25)]
    assert len(read) <= 5 + 2 * module._TASKS_AHEAD
    results.close()
    assert len(read) < 100


def start(directory, out):
    """Run the command over some 20 MB of text in its own process group; wait for its output."""
    code = "from growkit.cli import main; main()"
    arguments = [
        "tokenize",
        directory / "text.jsonl",
        "--tokenizer",
        directory / "given.json",
        "--out",
        out,
    ]
    command = [sys.executable, "-c", code, *map(str, arguments), "--processes", "2"]
    begun = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until((out.parent / f".{out.name}.partial").exists)
    return begun


def wait_until(holds):
    for _ in range(600):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("waited 30 seconds in vain")


def group_is_gone(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture(scope="module")
def large(tmp_path_factory, bpe):
    path = tmp_path_factory.mktemp("large")
    line = '{"text": "' + WORDS * 50 + '"}\n'
    (path / "text.jsonl").write_text(line * 8000)
    (path / "given.json").write_bytes(bpe.json)
    return path


def end(large, out, number, to_group, delay):
    """Signal the command, or its whole group; returns its exit code and what it said."""
    begun = start(large, out)
    time.sleep(delay)
    (os.killpg if to_group else os.kill)(begun.pid, number)
    said = begun.communicate(timeout=60)
    wait_until(lambda: group_is_gone(begun.pid))
    assert not out.exists()
    return begun.returncode, said


SIGNALS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 75, "terminated")]


def check_ends(large, out, number, code, word, to_group, delay):
    ended, (output, errors) = end(large, out, number, to_group, delay)
    said = errors.removeprefix("reading 1 file (1 .jsonl)\n")
    # Click ends the line that Ctrl-C is shown in.
    assert (ended, output, said.lstrip("\n")) == (code, "", f"growkit: {word}\n"), (
        f"after {delay} s"
    )
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(("ending", "to_group"), list(zip(SIGNALS, [True, False], strict=True)))
def test_a_signal_leaves_nothing(tmp_path, large, ending, to_group):
    check_ends(large, tmp_path / "out", *ending, to_group, random.uniform(0, 2))


@pytest.mark.slow
@pytest.mark.parametrize("repeat", range(20))
def test_signals_at_random_moments_leave_nothing(tmp_path, large, repeat):
    moment = random.uniform(0, 2)
    check_ends(large, tmp_path / "out", *random.choice(SIGNALS), random.random() < 0.5, moment)


def test_a_kill_ends_all_processes_and_the_next_command_clears_up(tmp_path, large, bpe):
    code, (_, errors) = end(large, tmp_path / "out", signal.SIGKILL, False, 1.0)
    assert code == -signal.SIGKILL
    assert "Traceback" not in errors
    tokenize_documents(["one"], tmp_path / "out", bpe)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def see_environment(name):
    return os.environ.get(name)


def make_see():
    return see_environment


@pytest.mark.parametrize("asked", [None, "3"])
def test_processes_start_no_threads_of_their_own(monkeypatch, asked):
    name = "OPENBLAS_NUM_THREADS"
    monkeypatch.delenv(name, raising=False)
    if asked:
        monkeypatch.setenv(name, asked)
    seen = list(map_in_order(make_see, (), [name, name, name], 2))
    assert seen == [asked or "1"] * 3 and os.environ.get(name) == asked


def test_a_tokenizer_is_sent_as_its_file(bpe):
    sent = pickle.dumps(bpe)
    assert len(sent) < len(bpe.json) + 2000
    again = pickle.loads(sent)
    assert again.json == bpe.json and (again.end_of_text_id, again.vocab_size) == (
        bpe.end_of_text_id,
        bpe.vocab_size,
    )
    for ours, theirs in zip(again.encode([WORDS, ""]), bpe.encode([WORDS, ""]), strict=True):
        assert ours.dtype == np.int32 and np.array_equal(ours, theirs)
