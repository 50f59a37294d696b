"""Dependencies point one way, nothing heavy is imported before it is needed, and files and functions stay small."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
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


def trees():
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in FILES]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(tree: ast.AST) -> set[str]:
    """The top-level packages that a file imports anywhere, within functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their package in full"
            names.add(node.module.split(".")[0])
    return names


def loaded_by(statement: str) -> set[str]:
    """The top-level packages in memory after a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}}, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import growkit",
        "import growkit.checkpoint, growkit.growth.plan, growkit.surgery.grow, growkit.cli",
        "import growkit.cli.growing, convert.cli, convert.directory, convert.card",
        "import growkit.evaluation.questions, growkit.evaluation.report, growkit.cli.evaluating",
        "from growkit.cli import run; assert run(['--help']) == 0",
        "from growkit.cli import run; assert run(['depth', '--help']) == 0",
    ],
)
def test_nothing_heavy_is_imported_early(statement):
    loaded = loaded_by(statement)
    assert "growkit" in loaded and not loaded & HEAVY
    if "convert" not in statement:
        assert not loaded & SIBLINGS


def test_help_does_without_numpy():
    assert "numpy" not in loaded_by("from growkit.cli import run; assert run(['--help']) == 0")


def threads_after(statement: str) -> int:
    """Threads of a fresh interpreter after a statement that leaves the environment as it was."""
    code = (
        f"import os, sys\nbefore = dict(os.environ)\n{statement}\nassert dict(os.environ) == before\n"
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
    assert threads_after(verb) == 1
    if threads_after("import numpy") == 1:
        pytest.skip("this numpy starts no threads of its own, or there is one core")


def test_what_is_heavy_would_be_seen():
    assert loaded_by("import optax") & HEAVY


@pytest.mark.parametrize("path", trees())
def test_dependencies_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    found = imported(parsed(path))
    if package in SIBLINGS:
        assert not found & (SIBLINGS - {package})
    elif path.parent != ROOT / "growkit" / "cli":
        assert not found & SIBLINGS
    assert "tests" not in found and "conftest" not in found


@pytest.mark.parametrize("name", ["growth/axes", "models/notation", "growth/rule", "growth/plan", "models/gpt_neox", "surgery/grow", "errors"])
def test_the_core_knows_neither_jax_nor_files_formats(name):
    found = imported(parsed(ROOT / "growkit" / f"{name}.py"))
    assert not found & (HEAVY | {"safetensors", "click", "rich", "huggingface_hub"})


@pytest.mark.parametrize("path", trees())
def test_a_file_says_what_it_is_and_stays_small(path):
    tree = parsed(path)
    assert ast.get_docstring(tree), "every file opens with what it is"
    assert len(path.read_text().splitlines()) <= 420
    assert path.stem not in (
        "util",
        "utils",
        "helper",
        "helpers",
        "manager",
        "managers",
        "common",
        "misc",
    )
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= 60
    ]
    assert not long


def test_the_rules_bite():
    """The same rules on sources that break them."""
    assert imported(ast.parse("def f():\n    import trainer.model.decoder")) == {"trainer"}
    assert imported(ast.parse("from convert.directory import x\nimport a.b as c")) == {
        "convert",
        "a",
    }
    with pytest.raises(AssertionError, match="in full"):
        imported(ast.parse("from . import axes"))
    assert len(FILES) > 25 and {path.parent.name for path in FILES} == {
        *PACKAGES,
        "checkpoint",
        "cli",
        "evaluation",
        "study",
    }
