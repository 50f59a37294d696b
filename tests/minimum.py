"""Runs the tests in an environment that has exactly the minimum versions of pyproject.toml.

    python tests/minimum.py                      # the default tests, in .venv-minimum
    python tests/minimum.py tests/run -k resume  # others; all words are pytest's

Every requirement NAME>=VERSION of the package and of its extras hf, eval and data is installed as
NAME==VERSION. What those require in turn is as new as they admit, and so are pytest and hypothesis.
The environment is made once; remove it after a change of versions. It takes some GB, because an
older torch brings CUDA libraries.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / ".venv-minimum"
EXTRAS = ("hf", "eval", "data")
# Older libraries call what newer ones they are installed beside have since deprecated.
QUIET = ("-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning")
TOOLS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100")


def list_minimums(project: dict[str, object], extras: tuple[str, ...] = EXTRAS) -> list[str]:
    """NAME==VERSION of every requirement that states a minimum, in the order of the file.

    project: the table of that name. Raises ValueError for a requirement without a minimum.
    """
    optional = project["optional-dependencies"]
    texts = [*project["dependencies"], *(text for extra in extras for text in optional[extra])]
    stated = [Requirement(text) for text in texts]
    return [pin(each) for each in stated if each.name != project["name"]]


def pin(requirement: Requirement) -> str:
    """NAME>=VERSION as NAME==VERSION, its marker kept."""
    versions = [each.version for each in requirement.specifier if each.operator == ">="]
    if len(versions) != 1:
        raise ValueError(f"{requirement} states no minimum")
    marker = f"; {requirement.marker}" if requirement.marker else ""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}=={versions[0]}{marker}"


def make_environment(place: Path) -> Path:
    """Make the environment where it is not there yet; returns its Python."""
    python = place / "bin" / "python"
    done = place / "complete"
    if done.exists():
        return python
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    venv.create(place, with_pip=True, clear=True)
    install = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, *list_minimums(project), *TOOLS], check=True)
    subprocess.run([*install, "--no-deps", "--editable", ROOT], check=True)
    done.touch()
    return python


def main(words: list[str]) -> int:
    """Run pytest on the words, and return its exit code."""
    python = make_environment(PLACE)
    # A shell's background and nohup ignore them, and what is started inherits that: tests that
    # send signals to growkit would wait in vain.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    run = subprocess.run([python, "-m", "pytest", *QUIET, *words], cwd=ROOT, check=False)
    return run.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
