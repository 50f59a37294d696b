"""Which tasks are asked, with items from a local directory if one is given, else from the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from growkit.errors import UsageError
from growkit.evaluation import harness, items
from growkit.evaluation.catalogue import BPB, BPB_LIMIT, NAMES, TASKS


def collect_questions(
    names: list[str] | None, data: Path | None, limit: int | None, say: Callable[[str], None]
) -> list[harness.Question]:
    """The questions of the tasks named.

    names: None for all tasks that have items. data: a directory of items, or None for the Hub.
    limit: items of each task; None for all, but 3000 for bits per byte. say: called with a line
    about what is left out. Raises UsageError if items are missing, GrowkitError if they are broken.
    """
    if data is None:
        return _load_from_hub(names, limit, say)
    if not data.is_dir():
        raise UsageError(f"there is no such directory: {data}")
    passed = items.list_passed_over(data)
    if passed:
        others = f" and {len(passed) - 5} others" if len(passed) > 5 else ""
        say(f"note: no task is read from {', '.join(passed[:5])}{others} of {data}")
    found: list[harness.Question] = []
    for name in names or NAMES:
        read = _read_parts(data, limit) if name == BPB else _read_task(name, data, limit)
        if not read and names:
            raise UsageError(f"{data} has no items of {name}: looked for {_expected_files(name)}")
        if not read:
            say(f"note: {name} is left out, {data} having no {_expected_files(name)}")
        for each in read:
            if each.empty:
                say(f"note: {each.empty} empty documents of {each.name} are left out")
            found.append(harness.build_local_question(each))
    if not found:
        expected = ", ".join(_expected_files(name) for name in NAMES)
        raise UsageError(f"{data} has no items of any task: looked for {expected}")
    return found


def _load_from_hub(
    names: list[str] | None, limit: int | None, say: Callable[[str], None]
) -> list[harness.Question]:
    if names and BPB in names:
        raise UsageError(
            "bits per byte are of local text: give --data DIR with files or folders of it in "
            "DIR/bpb"
        )
    found = []
    for name in names or TASKS:
        say(f"{name}: items from the Hugging Face Hub")
        found.append(harness.load_hub_question(name, limit))
    return found


def _read_task(name: str, data: Path, limit: int | None) -> list[items.Items]:
    path = items.find_task_file(data, name)
    return [] if path is None else [items.read_items(name, path, limit)]


def _read_parts(data: Path, limit: int | None) -> list[items.Items]:
    most = BPB_LIMIT if limit is None else limit
    parts = items.find_parts(data)
    return [items.read_texts(part, files, most) for part, files in parts.items()]


def _expected_files(name: str) -> str:
    """The files that a task's items would be in, in words."""
    return f"text in {BPB}/" if name == BPB else f"{name}*.jsonl, compressed or not"
