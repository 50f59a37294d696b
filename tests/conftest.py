"""Small GPT-NeoX models on disk, made by transformers; models, trees and fixtures of all tests."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from growkit.checkpoint.huggingface import NAMES
from growkit.checkpoint.orbax import write_checkpoint
from growkit.checkpoint.tensor import Contents, copy_tensor, wrap_array
from growkit.models.architecture import Architecture
from growkit.models.gpt_neox import GPT_NEOX

# Random cases are the same in every run; `pytest --hypothesis-profile=default` looks for new ones.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")

SMALL = GPT_NEOX.model(
    layer=3, embed=32, head=4, mlp=64, vocab=96, context=32, rotary_pct=0.25, tied=False
)


def save_transformers_model(
    path: Path, model: Architecture, dtype: str = "float32", seed: int = 0
) -> Path:
    """A directory saved by transformers' own class; all parameters are random, norms too."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.GPTNeoXConfig(
        vocab_size=model.vocab,
        hidden_size=model.embed,
        num_hidden_layers=model.layer,
        num_attention_heads=model.head_count,
        intermediate_size=model.mlp,
        max_position_embeddings=model.context,
        rotary_pct=model.rotary_pct,
        use_parallel_residual=model.options["parallel_residual"],
        tie_word_embeddings=model.tied,
        layer_norm_eps=model.norm_eps,
    )
    network = transformers.GPTNeoXForCausalLM(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.3) if parameter.ndim == 1 else parameter.mul_(4.0)
        for name, parameter in network.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    network.to(getattr(torch, dtype)).save_pretrained(path)
    return path


def transformers_logits(path: Path, tokens: np.ndarray, dtype: str = "float32"):
    """(logits, rotary tables [T, R/2]) of a directory, as transformers computes them with sdpa
    attention.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    network, report = transformers.GPTNeoXForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="sdpa", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    ids = torch.from_numpy(np.asarray(tokens, np.int64))
    with torch.no_grad():
        rotary = network.gpt_neox.rotary_emb(torch.zeros(1), torch.arange(ids.shape[1])[None])
        logits = network.eval()(ids).logits
    half = rotary[0].shape[-1] // 2
    return logits.numpy(), tuple(table[0, :, :half].numpy() for table in rotary)


@pytest.fixture(scope="session", autouse=True)
def programs_apart(tmp_path_factory):
    """Processes that tests start keep their compiled programs where the session's files are, and
    not the user's.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        patch.setenv("GROWKIT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def programs_of_patched_code(request):
    """A test that may patch what a step is made of shares no compiled step with other tests."""
    module = sys.modules.get("trainer.step.update")
    patched = module is not None and "monkeypatch" in request.fixturenames
    if patched:
        module.forget_programs()
    yield
    if patched:
        module.forget_programs()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two token directories of random ids, text and code, for the small runs of `runs`."""
    from runs import write_tokens

    return write_tokens(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def compiled_once():
    """The small runs of a module share programs and new models."""
    from runs import share_programs

    with share_programs():
        yield


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A small run that nothing interrupted."""
    from runs import STEPS, new_run

    out = tmp_path_factory.mktemp("whole") / "run"
    result = new_run(data, out).go()
    assert (result.step, result.signal) == (STEPS, None)
    return out


@pytest.fixture(scope="module")
def small(data, tmp_path_factory):
    """A small model trained for a dozen steps without dropout, validated at the last."""
    from runs import RECIPE, values

    from trainer.run.stages import train

    out = tmp_path_factory.mktemp("small") / "run"
    train(values(data, **RECIPE), out)
    return out


@pytest.fixture
def strict_promotion():
    """JAX mixes no dtypes and adds no dimensions that the code under test does not name."""
    import jax

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, SMALL.vocab, (2, 17))


# What may lie beside a model's weights: text, and bytes that are not text.
BESIDE = {
    "tokenizer.json": b'{"version": "1.0"}',
    "LICENSE": b"free",
    "spiece.model": b"\xff\x00\xfe",
}


def random_tensors(
    model: Architecture, dtype: str = "float32", seed: int = 0
) -> dict[str, np.ndarray]:
    """Every parameter of a model by its name in files, all different, norms around one."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, row, _ in model.table.names(model.sizes):
        array = generator.normal(0.0, 0.3, row.shape(model.sizes)) + (row.begins == "ones")
        tensors[name] = array.astype(np.dtype(dtype))
    return tensors


def save_tensors(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A safetensors file, written by the format's description and not by growkit's writer."""
    header, data = {}, b""
    for name, array in tensors.items():
        kind = (
            NAMES.get(array.dtype)
            or {"bool": "BOOL", "uint8": "U8", "int64": "I64"}[str(array.dtype)]
        )
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def save_directory(
    path: Path, model: Architecture = SMALL, dtype: str = "float32", seed: int = 0, **config
) -> Path:
    """A Hugging Face directory of random parameters with small files beside them; needs neither
    torch nor jax.
    """
    path.mkdir(parents=True)
    save_tensors(path / "model.safetensors", random_tensors(model, dtype, seed))
    (path / "config.json").write_text(json.dumps(model.config() | config))
    for name, content in BESIDE.items():
        (path / name).write_bytes(content)
    return path


def save_checkpoint(
    path: Path, model: Architecture = SMALL, seed: int = 0, dtype: str = "float32", **record
) -> Path:
    """A trainer checkpoint of random parameters and moments (nu positive), counters and files."""
    slots = {
        slot: random_tensors(model, dtype, seed + n)
        for n, slot in enumerate(("params", "mu", "nu"))
    }
    slots["nu"] = {name: np.square(array) for name, array in slots["nu"].items()}
    recipes = {
        slot: {name: copy_tensor(wrap_array(array)) for name, array in tensors.items()}
        for slot, tensors in slots.items()
    }
    record = {"count": 70, "step": 70, "schedule_step": 70, "tokens": 9000} | record
    write_checkpoint(path, Contents(model.config(), recipes, [], record, BESIDE))
    return path


def contents_of(path: Path) -> dict[str, bytes]:
    """Every file below a directory, by relative path, to see that nothing changed."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
