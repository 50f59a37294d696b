"""Builds the wheel and the source distribution, and runs the quickstart in empty environments.

    python tests/wheel.py                    # with every Python of 3.11, 3.12, 3.13 that is found
    python tests/wheel.py python3.12 --hf    # with one, and with torch and transformers
    python tests/wheel.py --only-install     # without the quickstart, which takes minutes

Each interpreter gets two environments, one for each file. What is installed there comes from the
package index, so this needs one. Prints a line for each environment; exits with 1 where one failed,
and with 2 where no interpreter was found.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("python3.11", "python3.12", "python3.13")


def build(place: Path) -> list[Path]:
    """The wheel and the source distribution, built in an environment of their own."""
    tool = make_environment(Path(sys.executable), place / "tool")
    subprocess.run([tool, "-m", "pip", "install", "--quiet", "build"], check=True)
    # From a copy, because setuptools leaves its work in the tree.
    tree = place / "tree"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=ignored)
    out = place / "built"
    subprocess.run([tool, "-m", "build", "--outdir", out, tree], check=True, capture_output=True)
    return sorted(out.iterdir())


def runs(interpreter: str) -> bool:
    """Whether an interpreter is here and starts: one that a version manager only lists does not."""
    if shutil.which(interpreter) is None:
        return False
    return subprocess.run([interpreter, "--version"], capture_output=True).returncode == 0


def make_environment(interpreter: Path | str, place: Path) -> Path:
    """An empty virtual environment; returns its Python."""
    subprocess.run([interpreter, "-m", "venv", "--clear", place], check=True)
    return place / "bin" / "python"


def try_out(file: Path, interpreter: str, place: Path, extra: str, quickstart: bool) -> str:
    """Install a file in an empty environment and run it; returns what failed, or nothing."""
    python = make_environment(interpreter, place / "environment")
    wanted = f"{file}[{extra}]" if extra else str(file)
    install = [python, "-m", "pip", "install", "--quiet", wanted]
    work = place / "work"
    work.mkdir()
    # Nothing of this tree may be seen from there.
    environ = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    commands = [install, [python, "-m", "pip", "check"], [python.with_name("growkit"), "--help"]]
    if quickstart:
        commands.append([python.with_name("growkit"), "quickstart"])
    for command in commands:
        done = subprocess.run(command, cwd=work, env=environ, capture_output=True, text=True)
        if done.returncode:
            last = (done.stdout + done.stderr).strip().splitlines()[-3:]
            return f"{' '.join(map(str, command))}: {' / '.join(last)}"
    return ""


def main() -> int:
    """Try every file with every interpreter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="*", default=PYTHONS)
    parser.add_argument("--hf", action="store_true", help="install the extra hf as well")
    parser.add_argument("--only-install", action="store_true", help="leave the quickstart out")
    words = parser.parse_args()
    found = [name for name in words.pythons if runs(name)]
    for name in words.pythons:
        if name not in found:
            print(f"{name}: not on this machine, not tried")
    failed = False
    with tempfile.TemporaryDirectory(prefix="growkit-wheel-") as root:
        files = build(Path(root))
        for name in found:
            for file in files:
                place = Path(root) / f"{Path(name).name}-{file.suffix.strip('.')}"
                place.mkdir()
                extra = "hf" if words.hf else ""
                problem = try_out(file, name, place, extra, not words.only_install)
                print(f"{name}, {file.name}: {problem or 'well'}", flush=True)
                failed = failed or bool(problem)
                shutil.rmtree(place)
    if not found:
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
