"""The wheel holds every file that the packages read: tables, presets, tasks."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("growkit", "trainer", "convert")


def list_files() -> list[Path]:
    """The files of the packages, relative to the tree, without what Python leaves there."""
    every = (path for package in PACKAGES for path in (ROOT / package).rglob("*"))
    return sorted(
        path.relative_to(ROOT)
        for path in every
        if path.is_file() and "__pycache__" not in path.parts
    )


def is_packed(path: Path, patterns: dict[str, list[str]]) -> bool:
    """Whether a data file is one that pyproject.toml names for its package."""
    for package, wanted in patterns.items():
        folder = Path(*package.split("."))
        if folder in path.parents:
            inner = path.relative_to(folder).as_posix()
            if any(fnmatch(inner, pattern) for pattern in wanted):
                return True
    return False


def test_every_data_file_is_named_for_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]
    data = [path for path in list_files() if path.suffix != ".py"]
    assert len(data) > 100
    assert not [path for path in data if not is_packed(path, patterns)]
    assert not is_packed(Path("growkit/models/tables/llama.json"), patterns)
    # setuptools looks for packages by their __init__.py, and passes over a folder without one.
    folders = {path.parent for path in list_files() if path.suffix == ".py"}
    assert not [folder for folder in folders if not (ROOT / folder / "__init__.py").exists()]


@pytest.mark.slow
def test_the_built_wheel_holds_the_tree(tmp_path):
    """Needs the package index, for setuptools."""
    # Another process looks for pip: once it was looked for, setuptools gives way to distutils.
    if subprocess.run([sys.executable, "-m", "pip", "--version"], check=False).returncode:
        pytest.skip("pip is not here")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*command, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("growkit-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        scripts = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert b"growkit = growkit.cli:main" in archive.read(scripts[0])
    assert packed == {path.as_posix() for path in list_files()}
