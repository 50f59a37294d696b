"""Makes the golden record and compares with it.

    python tests/golden/record.py --write FILE   make all of it, to the bit, for this machine
    python tests/golden/record.py --exact FILE   make it again and compare with FILE to the bit
    python tests/golden/record.py --store        rewrite growth.json and training.json

With --exact, `--cases 'pad-*'` takes only those cases of growth, and no training. The code under
test is that of the tree in which this file lies, and its command line alone is used.

Growth and conversion give the same bits on every machine. Training does so on one machine only:
tests/test_golden.py compares the rows of its metrics by size, and a comparison to the bit needs a
record from the same machine and the same version of jax.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GROWTH, TRAINING = HERE / "growth.json", HERE / "training.json"


def text_of(record: Mapping[str, Any]) -> str:
    """A record as JSON, a line for each case, row and configuration, so that a diff can be read."""
    cases = {name: _case(case) for name, case in record["cases"].items()}
    configs = {name: json.dumps(record["configs"][name]) for name in sorted(record["configs"])}
    return f'{{"cases": {_lines(cases)},\n"configs": {_lines(configs)}}}\n'


def _lines(entries: Mapping[str, str]) -> str:
    """A JSON object of entries that are JSON already, a line for each."""
    body = ",\n".join(f"{json.dumps(name)}: {entry}" for name, entry in entries.items())
    return f"{{\n{body}\n}}"


def _case(case: Mapping[str, Any]) -> str:
    if "rows" not in case:
        return json.dumps(case)
    rest = json.dumps({part: value for part, value in case.items() if part != "rows"})
    rows = ",\n".join(json.dumps(row) for row in case["rows"])
    return f'{rest[:-1]}, "rows": [\n{rows}\n]}}'


def selected(pattern: str) -> dict[str, str]:
    """The cases of growth whose names match, and those whose outputs they begin with."""
    from golden.cases import CASES

    names = {name for name in CASES if fnmatch(name, pattern)}
    while True:
        words = {word for name in names for word in CASES[name].split()}
        more = {word[1:] for word in words if word.startswith("@")} - names
        if not more:
            return {name: words for name, words in CASES.items() if name in names}
        names |= more


def make(pattern: str | None) -> dict[str, Any]:
    """{"growth": record, "training": record}; with a pattern only growth, those cases of it."""
    from golden.growths import growths
    from golden.trainings import trainings

    record = {}
    with tempfile.TemporaryDirectory(prefix="golden-") as directory:
        begun = time.monotonic()
        record["growth"] = growths(Path(directory), selected(pattern or "*"))
        grown = time.monotonic()
        print(f"{len(record['growth']['cases'])} cases of growth: {grown - begun:.1f} s")
        if pattern is None:
            record["training"] = trainings(Path(directory))
            print(f"training: {time.monotonic() - grown:.1f} s")
    return record


def compared(path: Path, found: Mapping[str, Any]) -> list[str]:
    """In what a new record differs, to the bit, from the one in a file.

    Where only some cases were made, only they are compared.
    """
    from golden.compare import differences

    before = json.loads(path.read_text())
    sentences = []
    for name, record in found.items():
        cases = before[name]["cases"]
        if "training" not in found:
            cases = {case: content for case, content in cases.items() if case in record["cases"]}
        sentences += differences(before[name] | {"cases": cases}, record)
    return sentences


def main() -> int:
    """Run the command line; returns the exit code: 1 where the records differ."""
    parser = argparse.ArgumentParser(description="Make the golden record, or compare with one.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FILE", help="make a record for this machine")
    what.add_argument("--exact", type=Path, metavar="FILE", help="compare with such a record")
    what.add_argument("--store", action="store_true", help="rewrite the records beside this file")
    parser.add_argument("--cases", metavar="PATTERN", help="only these cases, and no training")
    options = parser.parse_args()
    if options.cases and not options.exact:
        parser.error("--cases goes with --exact: a record holds all cases")
    if options.cases and not selected(options.cases):
        parser.error(f"no case of growth matches {options.cases}")
    record = make(options.cases)
    if options.exact:
        return told(compared(options.exact, record))
    if options.write:
        options.write.write_text(json.dumps(record))
    else:
        store(record)
    return 0


def store(record: Mapping[str, Any]) -> None:
    """Rewrite the records beside this file."""
    from golden.compare import EXACT_OF_GROWTH, EXACT_OF_TRAINING, without

    GROWTH.write_text(text_of(without(record["growth"], EXACT_OF_GROWTH)))
    TRAINING.write_text(text_of(without(record["training"], EXACT_OF_TRAINING)))


def told(sentences: list[str]) -> int:
    """Print in what the records differ; returns the exit code."""
    for sentence in sentences:
        print(sentence)
    print(f"{len(sentences)} differences" if sentences else "the same to the bit")
    return 1 if sentences else 0


if __name__ == "__main__":
    # The modules beside this file, and the code under test in the tree that it lies in.
    sys.path[:1] = [str(HERE.parent), str(HERE.parent.parent)]
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
    import growkit

    print(f"growkit of {Path(growkit.__file__).parent}")
    sys.exit(main())
