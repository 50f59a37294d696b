"""The proof: grown checkpoints trained on by transformers' Trainer as the small model would be.

Small models are trained for 40 steps. Their checkpoints of step 20 are grown, and the Trainer
resumes from the grown ones. Losses are those of single batches, not rounded.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from growkit.checkpoint.location import open_source
from growkit.cli import run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from growkit.errors import GrowkitError, UsageError  # noqa: E402
from growkit.torch import clip_grad_norm_, freeze_old, param_groups  # noqa: E402
from growkit.torch.callbacks import KeepLineage, Rewarm, WeightedClip  # noqa: E402

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
GROUPED = {"num_key_value_heads": 2}
HALF, WHOLE = 20, 40
# An eps and a decay large enough that a wrong one is seen.
SETTINGS = {
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "adam_epsilon": 1e-3,
    "warmup_steps": 5,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.0,
    "optim": "adamw_torch_fused",
}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Texts(torch.utils.data.Dataset):
    def __init__(self):
        numbers = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, SIZES["vocab_size"], (160, 12), generator=numbers)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, place):
        return {"input_ids": self.tokens[place], "labels": self.tokens[place]}


class Recording(transformers.Trainer):
    """A Trainer that keeps every loss as it is."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
        return loss


def new_model(kind):
    torch.manual_seed(0)
    config = {
        "llama": lambda: transformers.LlamaConfig(**SIZES, **GROUPED),
        "qwen3": lambda: transformers.Qwen3Config(
            **SIZES, **GROUPED, head_dim=4, tie_word_embeddings=True
        ),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES, rotary_pct=0.5),
    }[kind]()
    return transformers.AutoModelForCausalLM.from_config(config)


def load(path, dtype="float32"):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model


def train(model, out, source=None, groups=None, callbacks=(), **settings):
    """The losses of a training, and the Trainer. groups: of the optimizer, None for the Trainer's.

    source: the checkpoint to resume from.
    """
    options = {"save_steps": HALF} | SETTINGS | settings
    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=WHOLE,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
        **options,
    )
    optimizer = None if groups is None else torch.optim.AdamW(groups)
    trainer = Recording(
        model=model,
        args=arguments,
        train_dataset=Texts(),
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )
    trainer.losses = []
    trainer.train(resume_from_checkpoint=None if source is None else str(source))
    return trainer.losses, trainer


def wide(dtype):
    """Compute in float64 what transformers computes in float32 whatever the model's dtype."""
    if dtype == "float32":
        return nullcontext()
    from growkit.derive.network import KeepWide

    return KeepWide()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models as small as these are slower on two threads, and far slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(losses, checkpoint of step 20) of a small model, by kind, dtype and settings."""
    made = {}

    def make(kind, dtype="float32", **settings):
        key = (kind, dtype, *settings.items())
        if key not in made:
            out = tmp_path_factory.mktemp(kind)
            with wide(dtype):
                model = new_model(kind).to(getattr(torch, dtype))
                losses, _ = train(model, out, **settings)
            made[key] = losses[HALF:], out / f"checkpoint-{HALF}"
        return made[key]

    return make


def grow(source, out, *words):
    assert run([*words, str(source), str(out)]) == 0
    return out


def furthest(some, others):
    assert len(some) == len(others) == WHOLE - HALF
    return max(abs(a - b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize(
    "kind,dtype,tolerance",
    [
        ("llama", "float32", 1e-5),
        ("gpt_neox", "float64", 1e-10),
        pytest.param("qwen3", "float32", 1e-5, marks=pytest.mark.slow),
        pytest.param("gpt_neox", "float32", 1e-5, marks=pytest.mark.slow),
        pytest.param("llama", "float64", 1e-10, marks=pytest.mark.slow),
        pytest.param("qwen3", "float64", 1e-10, marks=pytest.mark.slow),
    ],
)
def test_width_goes_on_as_the_small_model(small, tmp_path, kind, dtype, tolerance):
    losses, source = small(kind, dtype)
    words = ("width", "--embed", "2x", "--mlp", "3x", "--groups", "split")
    path = grow(source, tmp_path / "grown", *words)
    with wide(dtype):
        model = load(path, dtype)
        found, trainer = train(model, tmp_path / "run", path, param_groups(model, path))
    assert furthest(found, losses) < tolerance
    # The Trainer's own checkpoint of the grown model grows again, and keeps its groups.
    saved = tmp_path / "run" / f"checkpoint-{WHOLE}"
    again = grow(saved, tmp_path / "again", "depth", "--map", "2:3")
    model = load(again)
    states = [len(group["params"]) for group in param_groups(model, again)]
    assert sum(states) == len(list(model.parameters()))
    assert len(states) == len(trainer.optimizer.param_groups)


@pytest.mark.slow
@pytest.mark.parametrize("left_out", ["lr", "eps", "weight_decay"])
def test_every_column_of_the_groups_counts(small, tmp_path, left_out):
    """The groups are in optimizer.pt: each column put back to the source's is noticed."""
    losses, source = small("llama", "float64")
    path = grow(source, tmp_path / "grown", "width", "--embed", "2x", "--groups", "split")
    state = torch.load(path / "optimizer.pt", weights_only=True)
    before = torch.load(source / "optimizer.pt", weights_only=True)["param_groups"]
    for group in state["param_groups"]:
        if group["weight_decay"]:
            group[left_out] = before[0][left_out]
    torch.save(state, path / "optimizer.pt")
    if left_out == "lr":
        schedule = torch.load(path / "scheduler.pt", weights_only=True)
        schedule["base_lrs"] = [SETTINGS["learning_rate"]] * len(schedule["base_lrs"])
        torch.save(schedule, path / "scheduler.pt")
    with wide("float64"):
        model = load(path, "float64")
        found, _ = train(model, tmp_path / "run", path, param_groups(model, path))
    assert furthest(found, losses) > 1e-6


def test_clipping_by_weights_goes_on_too(small, tmp_path):
    clip = 0.3
    losses, source = small("llama", max_grad_norm=clip)
    path = grow(source, tmp_path / "grown", "width", "--embed", "2x", "--groups", "split")
    model = load(path)
    groups = param_groups(model, path)
    found, _ = train(model, tmp_path / "run", path, groups, [WeightedClip(clip)])
    assert furthest(found, losses) < 1e-5
    model = load(path)
    plain, _ = train(model, tmp_path / "plain", path, param_groups(model, path), max_grad_norm=clip)
    assert furthest(plain, losses) > 1e-3
    with pytest.raises(UsageError, match="the Trainer clips too, by max_grad_norm=0.3"):
        train(model, tmp_path / "x", path, groups, [WeightedClip(clip)], max_grad_norm=clip)


@pytest.mark.parametrize(
    "optim",
    ["adamw_torch_fused", pytest.param("adamw_torch", marks=pytest.mark.slow)],
)
def test_depth_resumes_without_a_change_of_the_script(small, tmp_path, optim):
    losses, source = small("llama", **({} if optim == SETTINGS["optim"] else {"optim": optim}))
    path = grow(source, tmp_path / "grown", "depth", "--map", "2:3", "--method", "identity")
    found, trainer = train(load(path), tmp_path / "run", path, optim=optim)
    assert found[0] == pytest.approx(losses[0], abs=1e-6) and len(found) == HALF
    assert trainer.state.global_step == WHOLE
    copies = grow(source, tmp_path / "copies", "depth", "--map", "2:4")
    found, trainer = train(load(copies), tmp_path / "run2", copies, optim=optim)
    assert len(found) == HALF and trainer.state.global_step == WHOLE
    steps = {float(each["step"]) for each in trainer.optimizer.state_dict()["state"].values()}
    assert steps == {WHOLE}


def test_new_layers_warm_up(small, tmp_path):
    _, source = small("llama")
    words = ("depth", "--map", "2:4", "--groups", "split")
    path = grow(source, tmp_path / "grown", *words)
    rates = {}

    class Watch(Rewarm):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            before = kwargs["optimizer"].param_groups[0]["lr"]
            super().on_pre_optimizer_step(args, state, control, **kwargs)
            for group in kwargs["optimizer"].param_groups:
                if not group["weight_decay"]:
                    continue
                kind = "new" if group["growkit_new"] else "old"
                rates.setdefault(kind, []).append(group["lr"] / before)

    model = load(path)
    groups = param_groups(model, path)
    assert sum(group["growkit_new"] for group in groups) == 2
    train(model, tmp_path / "run", path, groups, [Watch(8)])
    assert rates["old"] == [1.0] * HALF
    wanted = [min(1.0, step / 8) for step in range(1, HALF + 1)]
    assert rates["new"] == pytest.approx(wanted)
    with pytest.raises(UsageError, match="no parameter group is of new layers"):
        train(load(source), tmp_path / "x", source, callbacks=[Rewarm(8)])
    with pytest.raises(UsageError, match="at least 1, got 0"):
        Rewarm(0)


def test_later_checkpoints_have_the_lineage(small, tmp_path, capsys):
    """What is new, and by which factors groups are split, is known of them as of the grown one."""
    _, source = small("llama")
    words = ("depth", "--map", "2:3", "--groups", "split", "--method", "identity")
    path = grow(source, tmp_path / "grown", *words)
    model = load(path)
    groups = param_groups(model, path)
    train(model, tmp_path / "run", path, groups, [KeepLineage(path)], save_steps=WHOLE)
    later = tmp_path / "run" / f"checkpoint-{WHOLE}"
    # Hashes are of other tensors than the trained ones.
    open_source(str(later)).require_whole()
    assert freeze_old(load(later), later) == freeze_old(load(path), path)
    model = load(later)
    assert [len(group["params"]) for group in param_groups(model, later)] == [
        len(group["params"]) for group in groups
    ]
    assert run(["inspect", "--new", str(later)]) == 0
    assert "layer" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"has no lineage.json to keep"):
        KeepLineage(source)


def test_old_layers_are_frozen(small, tmp_path):
    _, source = small("llama")
    path = grow(source, tmp_path / "grown", "depth", "--map", "2:3", "--method", "identity")
    model = load(path)
    trained = freeze_old(model, path)
    assert trained and all(name.startswith("model.layers.1.") for name in trained)
    assert {name for name, each in model.named_parameters() if each.requires_grad} == set(trained)
    groups = param_groups(model, path)
    assert sum(len(group["params"]) for group in groups) == len(trained)
    wide_path = grow(source, tmp_path / "wide", "width", "--mlp", "2x")
    with pytest.raises(UsageError, match="added no layers"):
        freeze_old(load(wide_path), wide_path)
    with pytest.raises(UsageError, match="no growth in its lineage"):
        freeze_old(load(source), source)


def test_groups_of_a_model_without_an_optimizer(small, tmp_path):
    """From the lineage, as from a file: the same learning rates for the same parameters."""
    _, source = small("llama")
    words = ("width", "--embed", "2x", "--groups", "split")
    path = grow(source, tmp_path / "grown", *words)
    model = load(path)
    stated = {
        name: group for group in param_groups(model, path, lr=1.0) for name in group["param_names"]
    }
    (path / "optimizer.pt").unlink()
    with pytest.raises(UsageError, match="holds no optimizer.pt with learning rates: give lr"):
        param_groups(model, path)
    made = param_groups(model, path, lr=1.0, weight_decay=0.1, eps=1e-3)
    assert sum(len(group["params"]) for group in made) == len(stated)
    for group in made:
        for name in group["param_names"]:
            for key in ("lr", "eps", "weight_decay", "growkit_clip"):
                assert group[key] == stated[name][key], (name, key)
    torch.optim.AdamW(made)


def test_another_model_is_refused(small, tmp_path):
    _, source = small("llama")
    path = grow(source, tmp_path / "grown", "width", "--embed", "2x")
    with pytest.raises(GrowkitError, match="load the model from there"):
        param_groups(load(source), path)
    deeper = grow(source, tmp_path / "deeper", "depth", "--map", "2:3")
    with pytest.raises(GrowkitError, match="the model has no parameter 'model.layers.2"):
        param_groups(load(source), deeper)
    with pytest.raises(GrowkitError, match="has no parameter 'model.layers.2"):
        param_groups(load(deeper), source)


def test_without_weights_it_clips_as_torch_does():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Linear(5, 3) for _ in range(2))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        one.grad = torch.randn_like(one)
        other.grad = one.grad.clone()
    norm = clip_grad_norm_(torch.optim.AdamW(ours.parameters()), 0.7)
    wanted = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.7)
    assert norm == pytest.approx(wanted)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert clip_grad_norm_(torch.optim.AdamW(torch.nn.Linear(1, 1).parameters()), 1.0) == 0
