"""What commands import: only what they use, because importing is most of what a short one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_directory

ROOT = Path(__file__).parents[2]
# Of a Hugging Face directory nobody needs the readers of other trainers' files, the network, or
# threads before anything is written.
UNREAD = {
    "growkit.checkpoint.dcp",
    "growkit.checkpoint.dcp_write",
    "growkit.checkpoint.hf_trainer",
    "growkit.checkpoint.neox",
    "growkit.checkpoint.olmo",
    "growkit.checkpoint.orbax",
    "growkit.checkpoint.remote",
    "growkit.checkpoint.torch_pickle",
    "growkit.checkpoint.torch_zip",
    "growkit.checkpoint.universal",
    "growkit.checkpoint.zero",
    "asyncio",
    "concurrent.futures",
    "etils",
    "http",
    "huggingface_hub",
    "importlib.resources",
    "jax",
    "logging",
    "rich",
    "safetensors",
    "socket",
    "tempfile",
    "xxhash",
    "yaml",
}
# Of a run, before it compiles.
LATER = {
    "orbax",
    "grain",
    "tensorstore",
    "matplotlib",
    "jax.experimental.pallas",
    "jax.experimental.pallas.ops.tpu.splash_attention",
    "transformers",
    "torch",
}


def list_modules(code: str, *words: str) -> set[str]:
    """The modules in memory after code in a fresh interpreter, whose arguments are `words`."""
    ending = "import sys\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{ending}", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    "words", [["inspect", "SRC"], ["depth", "--dry-run", "--map", "3:4", "SRC", "OUT"]]
)
def test_a_look_at_a_directory_imports_its_own_reader_alone(tmp_path, words):
    paths = {"SRC": str(save_directory(tmp_path / "model")), "OUT": str(tmp_path / "out")}
    given = [paths.get(word, word) for word in words]
    code = "import sys\nfrom growkit.cli import run\nassert run(sys.argv[1:]) == 0"
    found = list_modules(code, *given)
    assert "growkit.checkpoint.huggingface" in found and not found & UNREAD


def test_a_run_begins_without_what_it_needs_later():
    found = list_modules(
        "import trainer.cli.training\nfrom trainer.run import stages\nimport trainer.run.begin"
    )
    assert "trainer.run.loop" in found and "jax" in found and not found & LATER


def test_what_is_imported_later_would_be_seen():
    found = list_modules("from trainer.run.later import LATER, _import_all\n_import_all()")
    assert {"orbax", "grain", "tensorstore"} <= found & LATER
