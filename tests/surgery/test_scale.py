"""Work on a model grows with the number of its tensors, and not with its square."""

from __future__ import annotations

import sys
import threading

import pytest
from conftest import SMALL, save_checkpoint, save_directory

from growkit.checkpoint import raw
from growkit.cli import run

FEW, MANY = 6, 24  # layers, of 12 tensors each
TINY = SMALL.change(embed=16, head=2, mlp=8, vocab=16, context=16)
VERBS = {
    "depth": ["depth", "--no-sync", "--max-shard-size", "8KB", "--map"],
    "width": ["width", "--no-sync", "--mlp", "2x"],
    "inspect": ["inspect", "--rows"],
}


def count_calls(words: list[str]) -> int:
    """The calls of functions, C's among them, that a command makes in all its threads."""
    calls = 0

    def note(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        code = run(words)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert code == 0
    return calls


def is_linear(counts: list[int]) -> bool:
    """Whether counts of 1, FEW and MANY layers grow with the layers.

    What does not depend on them is left out. A quarter more than in proportion is a matter of
    caches and progress bars; a square would be four times as much.
    """
    ratio = (counts[2] - counts[0]) / (counts[1] - counts[0])
    return ratio < 1.25 * (MANY - 1) / (FEW - 1)


def test_a_square_would_be_seen():
    assert is_linear([50 + 12 * layers for layers in (1, FEW, MANY)])
    assert not is_linear([50 + layers**2 for layers in (1, FEW, MANY)])


@pytest.mark.parametrize(
    "kind,verb",
    [
        ("huggingface", "depth"),
        ("huggingface", "width"),
        ("huggingface", "inspect"),
        ("checkpoint", "depth"),
        ("checkpoint", "width"),
    ],
)
def test_calls_grow_with_the_tensors(tmp_path, monkeypatch, kind, verb):
    save = save_directory if kind == "huggingface" else save_checkpoint
    words = list(VERBS[verb])
    if kind == "checkpoint" and verb == "depth":
        # Its files are arrays of all layers, whatever their size.
        words = ["depth", "--no-sync", "--map"]
    calls, opened = [], []
    open_regular = raw.open_regular
    for layers in (1, FEW, MANY):
        source = save(tmp_path / f"source{layers}", TINY.change(layer=layers))
        files: list[object] = []

        def note(path, files=files):
            files.append(path)
            return open_regular(path)

        monkeypatch.setattr(raw, "open_regular", note)
        given = [f"{layers}:{layers * 2}"] if verb == "depth" else []
        out = [] if verb == "inspect" else [str(tmp_path / f"out{layers}")]
        calls.append(count_calls([*words, *given, str(source), *out]))
        opened.append(len(files))
    # Less what does not depend on the layers. A quarter more than in proportion is still linear.
    assert is_linear(calls), calls
    assert verb == "inspect" or is_linear(opened), opened
