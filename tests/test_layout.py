"""Dependencies point one way, nothing heavy is imported early, files and functions stay small."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("growkit", "trainer", "convert")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
HEAVY = {
    "lm_eval",
    "datasets",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "torch",
    "transformers",
    "orbax",
    "tensorstore",
    "grain",
    "matplotlib",
}
SIBLINGS = {"trainer", "convert"}
LONGEST_FILE = 420
LONGEST_FUNCTION = 40
MOST_STATEMENTS = 30
# A room may import the rooms below it and itself. Rooms on one line do not know each other.
FLOORS = {
    "growkit": [
        ["errors"],
        ["quantity", "textfiles", "forms"],
        ["models"],
        ["growth", "checkpoint"],
        ["entries"],
        ["lineage"],
        ["surgery", "evaluation"],
        ["derive", "torch"],
        ["api", "cli", "__init__"],
        ["__main__"],
    ],
    "trainer": [
        ["config"],
        ["data", "devices"],
        ["model"],
        ["step"],
        ["plan", "evaluate", "search", "log"],
        ["run"],
        ["study"],
        ["cli", "__init__"],
    ],
}
# Imports that point upwards, each for a reason.
EXCEPTIONS: set[tuple[str, str]] = set()


def trees():
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in FILES]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def find_imports(tree: ast.AST) -> set[str]:
    """The modules that a file imports anywhere, within functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their package in full"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def find_packages(tree: ast.AST) -> set[str]:
    """The top-level packages that a file imports."""
    return {name.split(".")[0] for name in find_imports(tree)}


def skip_typing(tree: ast.Module) -> ast.Module:
    """The file without what it imports for the type checker alone."""
    kept = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    return ast.Module(kept, [])


def list_loaded(statement: str) -> set[str]:
    """The top-level packages in memory after a statement in a fresh interpreter."""
    code = (
        f"{statement}\nimport sys\n"
        "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import growkit",
        "import growkit.checkpoint.location, growkit.growth.plan, growkit.surgery.grow",
        "import growkit.cli",
        "import growkit.cli.growing, convert.cli, convert.directory, convert.card",
        "import growkit.evaluation.questions, growkit.evaluation.report, growkit.cli.evaluating",
        "from growkit.cli import run; assert run(['--help']) == 0",
        "from growkit.cli import run; assert run(['depth', '--help']) == 0",
    ],
)
def test_nothing_heavy_is_imported_early(statement):
    loaded = list_loaded(statement)
    assert "growkit" in loaded and not loaded & HEAVY
    if "convert" not in statement:
        assert not loaded & SIBLINGS


def test_help_does_without_numpy():
    assert "numpy" not in list_loaded("from growkit.cli import run; assert run(['--help']) == 0")


def count_threads(statement: str) -> int:
    """Threads of a fresh interpreter after a statement that leaves the environment as it was."""
    code = (
        f"import os, sys\nbefore = dict(os.environ)\n{statement}\n"
        "assert dict(os.environ) == before\n"
        "print('threads', len(os.listdir('/proc/self/task')), file=sys.stderr)"
    )
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OPENBLAS", "OMP", "GOTO"))
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environ
    )
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split("threads")[-1])


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_verbs_import_numpy_without_threads_that_spin():
    verb = "from growkit.cli import run; assert run(['depth', '--help']) == 0; import numpy"
    assert count_threads(verb) == 1
    if count_threads("import numpy") == 1:
        pytest.skip("this numpy starts no threads of its own, or there is one core")


def test_what_is_heavy_would_be_seen():
    assert list_loaded("import optax") & HEAVY


@pytest.mark.parametrize("path", trees())
def test_packages_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    found = find_packages(parse(path))
    if package in SIBLINGS:
        assert not found & (SIBLINGS - {package})
    elif path.parent != ROOT / "growkit" / "cli":
        assert not found & SIBLINGS
    assert "tests" not in found and "conftest" not in found


def find_room(module: str) -> tuple[str, str]:
    """(package, room) of a module: the folder or file below the package."""
    package, _, rest = module.partition(".")
    return package, rest.split(".")[0] or "__init__"


def find_upward(module: str, imports: set[str]) -> set[str]:
    """The imports of a module that point to a room above its own, or beside it."""
    package, room = find_room(module)
    height = {name: n for n, floor in enumerate(FLOORS[package]) for name in floor}
    assert room in height, f"{room} is in no floor of {package}"
    upward = set()
    for name in imports:
        other_package, other = find_room(name)
        if other_package != package or other == room or other not in height:
            continue
        if height[other] >= height[room] and other != "__init__":
            upward.add(name)
    return upward


def name_module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize(
    "path", [path for path in trees() if path.values[0].relative_to(ROOT).parts[0] in FLOORS]
)
def test_rooms_stand_on_the_rooms_below(path):
    module = name_module(path)
    upward = find_upward(module, find_imports(skip_typing(parse(path))))
    assert not {name for name in upward if (module, name) not in EXCEPTIONS}


@pytest.mark.parametrize(
    "name",
    [
        "growth/axes",
        "growth/rule",
        "growth/plan",
        "models/notation",
        "models/family",
        "surgery/grow",
        "errors",
    ],
)
def test_the_core_knows_neither_jax_nor_file_formats(name):
    found = find_packages(parse(ROOT / "growkit" / f"{name}.py"))
    assert not found & (HEAVY | {"safetensors", "click", "rich", "huggingface_hub"})


def count_statements(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The statements of a function, those of functions within it not counted."""
    count = 0
    todo: list[ast.stmt] = list(function.body)
    while todo:
        node = todo.pop()
        count += 1
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        for name in ("body", "orelse", "finalbody"):
            todo += [child for child in getattr(node, name, []) if isinstance(child, ast.stmt)]
        for handler in getattr(node, "handlers", []):
            todo += handler.body
    return count


def list_large_functions(tree: ast.AST, lines_of_file: Sequence[str] = ()) -> list[str]:
    """The functions that are too large. Comments count nothing: a reason is not what makes one so.

    lines_of_file: the text that the tree was parsed from, for its comments.
    """
    large = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        own = lines_of_file[node.lineno - 1 : node.end_lineno]
        comments = sum(line.lstrip().startswith("#") for line in own)
        lines = node.end_lineno - node.lineno + 1 - comments
        statements = count_statements(node)
        if lines > LONGEST_FUNCTION or statements > MOST_STATEMENTS:
            large.append(f"{node.name}: {lines} lines, {statements} statements")
    return large


@pytest.mark.parametrize("path", trees())
def test_a_file_says_what_it_does_and_stays_small(path):
    tree = parse(path)
    opening = ast.get_docstring(tree)
    assert opening, "every file opens with what it does"
    assert "Knows " not in opening, "a file says what it does, not what it knows"
    assert len(path.read_text().splitlines()) <= LONGEST_FILE
    banned = ("util", "utils", "helper", "helpers", "manager", "managers", "common", "misc")
    assert path.stem not in banned
    assert not list_large_functions(tree, path.read_text().splitlines())


def test_names_of_test_files_are_unique():
    """pytest imports test files by their base names: a second one of a name is not run."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_the_rules_bite():
    """The same rules on sources that break them."""
    assert find_packages(ast.parse("def f():\n    import trainer.model")) == {"trainer"}
    found = find_packages(ast.parse("from convert.cli import x\nimport a.b as c"))
    assert found == {"convert", "a"}
    with pytest.raises(AssertionError, match="in full"):
        find_imports(ast.parse("from . import axes"))
    assert find_upward("growkit.models.llama", {"growkit.growth.axes"})
    assert find_upward("trainer.data.text", {"trainer.devices.hosts"})
    assert not find_upward("trainer.run.loop", {"trainer.step.update", "growkit.errors"})
    body = "\n".join(f"    x{n} = {n}; y{n} = {n}" for n in range(20))
    assert list_large_functions(ast.parse(f"def f():\n{body}"))
    long = "def f():\n" + "    x = (\n" + "        1 +\n" * LONGEST_FUNCTION + "        1)\n"
    assert list_large_functions(ast.parse(long), long.splitlines())
    remarks = "def f():\n" + "    # why\n" * LONGEST_FUNCTION + "    x = 1\n"
    assert not list_large_functions(ast.parse(remarks), remarks.splitlines())
    assert len(FILES) > 100
