"""Which tasks are asked, and with which items: from local files where a directory is given, else from the Hub.

Knows what is there and what is missing; leaves files to `items` and the harness's tasks to `harness`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from growkit.errors import UsageError
from growkit.evaluation import harness, items
from growkit.evaluation.catalogue import BPB, BPB_LIMIT, NAMES, TASKS


def collect_questions(
    names: list[str] | None, data: Path | None, limit: int | None, say: Callable[[str], None]
) -> list[harness.Question]:
    """The questions of the tasks named (None: all there are), `limit` items each (None: all, 3000 for bits per byte).

    say: told what is left out. Raises UsageError where items are not there, GrowkitError where they are broken.
    """
    if data is None:
        return _from_hub(names, limit, say)
    if not data.is_dir():
        raise UsageError(f"there is no such directory: {data}")
    found: list[harness.Question] = []
    for name in names or NAMES:
        read = _parts(data, limit) if name == BPB else _task(name, data, limit)
        if not read and names:
            raise UsageError(f"{data} has no items of {name}: looked for {_looked_for(name)}")
        if not read:
            say(f"note: {name} is left out, {data} having no {_looked_for(name)}")
        for each in read:
            if each.empty:
                say(f"note: {each.empty} empty documents of {each.name} are left out")
            found.append(harness.build_local_question(each))
    if not found:
        raise UsageError(
            f"{data} has no items of any task: looked for {', '.join(map(_looked_for, NAMES))}"
        )
    return found


def _from_hub(
    names: list[str] | None, limit: int | None, say: Callable[[str], None]
) -> list[harness.Question]:
    if names and BPB in names:
        raise UsageError(
            "bits per byte are of local text: give --data DIR with files or folders of it in DIR/bpb"
        )
    found = []
    for name in names or TASKS:
        say(f"{name}: items from the Hugging Face Hub")
        found.append(harness.load_hub_question(name, limit))
    return found


def _task(name: str, data: Path, limit: int | None) -> list[items.Items]:
    path = items.find_task_file(data, name)
    return [] if path is None else [items.read_items(name, path, limit)]


def _parts(data: Path, limit: int | None) -> list[items.Items]:
    found = items.find_parts(data)
    return [
        items.read_texts(part, files, BPB_LIMIT if limit is None else limit)
        for part, files in found.items()
    ]


def _looked_for(name: str) -> str:
    return f"text in {BPB}/" if name == BPB else f"{name}*.jsonl or {name}*.jsonl.gz"
