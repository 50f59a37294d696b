"""The optimizer across the border: bit for bit both ways, and the next step is the other side's."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import BESIDE, SMALL, random_tensors, save_checkpoint
from runs import TINY, new_run, recipe, values
from trained import load_state, make_state, save_trained

from convert.schedule import compute_height
from growkit.checkpoint.location import open_source
from growkit.checkpoint.optimizer import list_undecayed
from growkit.checkpoint.orbax import write_checkpoint
from growkit.checkpoint.tensor import Contents, copy_tensor, wrap_array
from growkit.cli import run
from growkit.entries import Growth, Training
from growkit.growth.width import plan_width
from growkit.models import list_trained, read_config
from growkit.models.definition import list_defined
from growkit.models.llama import LLAMA
from trainer.config.sections import Config, Schedule, build_section, resolve
from trainer.run.begin import begin, prepare
from trainer.run.loop import Run
from trainer.step.schedule import compute_learning_rate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TINY_LLAMA = LLAMA.model(
    layer=2, embed=16, kv=2, group=2, head_dim=4, mlp=32, vocab=64, context=16, tied=False
)
LR, FLOOR, WARMUP, LENGTH = 1e-2, 0.1, 3, 8
SETTINGS = {
    "model": asdict(build_section(TINY_LLAMA)),
    "dropout": {"hidden": 0.0, "attention": 0.0},
    "batch": {"sequences": 4, "accumulation": 1},
    # An eps and a decay large enough that wrong ones are seen.
    "optimizer": {"learning_rate": LR, "eps": 1e-3, "weight_decay": 0.1, "clip": 0.0},
    "schedule": {"kind": "cosine", "steps": LENGTH, "warmup": WARMUP, "floor": FLOOR},
    "checkpoint": {"every": 1, "minutes": 0, "keep_last": 20},
    "eval": {"every": 100, "windows": 4},
}
BEFORE, AFTER = 4, 5


def training(model, more=(), **optimizer):
    """The lineage of a training with the default configuration, after the entries `more`."""
    config = resolve({"model": asdict(build_section(model)), "optimizer": optimizer}, True)
    return [*more, Training(multipliers=bool(more), config=config.to_dict()).to_json()]


def save_run(path, model, lineage, slots=("params", "mu", "nu"), **record):
    """A trainer checkpoint with a lineage, of random numbers."""
    tensors = {slot: random_tensors(model, "float32", n) for n, slot in enumerate(slots)}
    recipes = {
        slot: {
            name: copy_tensor(wrap_array(np.square(array) if slot == "nu" else array))
            for name, array in each.items()
        }
        for slot, each in tensors.items()
    }
    record = {"count": 71, "step": 70, "schedule_step": 60} | record
    write_checkpoint(path, Contents(model.config(), recipes, lineage, record, BESIDE))
    return path


def all_of(path):
    """Every number of a model on disk with its moments, as bytes, and the counters."""
    source = open_source(str(path))
    counters = {name: source.record[name] for name in ("count", "step", "schedule_step")}
    return counters, {
        (slot, name): (str(tensor.dtype), tensor.shape, tensor.read().tobytes())
        for slot, tensors in source.tensors.items()
        for name, tensor in tensors.items()
    }


def export(source, out, *more):
    return run(["export", "--optimizer", "hf", str(source), str(out), *more])


def tiny(kind):
    """A tiny model of a family that the trainer trains."""
    from growkit.derive.tiny import shrink, tiny_fields
    from growkit.models.tables import list_shipped

    fields = tiny_fields(kind) if kind in list_shipped() else shrink(kind)
    network = pytest.importorskip("growkit.derive.network")
    config = network.make_config(kind, fields).to_dict() | {"model_type": kind}
    return read_config(config)


DEFAULT = ("gpt_neox", "llama", "qwen3", "gpt2")
KINDS = [
    pytest.param(kind, marks=[] if kind in DEFAULT else pytest.mark.slow) for kind in list_trained()
]


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_again_is_bit_for_bit(tmp_path, kind):
    model = SMALL if kind == "gpt_neox" else tiny(kind)
    run_path = save_run(tmp_path / "run", model, training(model))
    assert export(run_path, tmp_path / "hf") == 0
    assert open_source(str(tmp_path / "hf")).kind == "hf_trainer"
    assert run(["import", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    assert export(tmp_path / "back", tmp_path / "again") == 0
    first, *others = (all_of(tmp_path / name) for name in ("run", "hf", "back", "again"))
    assert first[0] == {"count": 71, "step": 70, "schedule_step": 60}
    assert all(other == first for other in others)
    assert str(load_state(tmp_path / "hf")) == str(load_state(tmp_path / "again"))


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_lets_decay_what_the_trainer_does(kind):
    model = tiny(kind)
    defined = list_defined(model)
    kept = {name for name, row in defined if not row.decays}
    assert kept == list_undecayed(defined)[0]


def test_from_transformers_and_back_is_bit_for_bit(tmp_path, capsys):
    hf = save_trained(tmp_path / "hf")
    assert run(["import", str(hf), str(tmp_path / "ck")]) == 0
    said = capsys.readouterr().out
    assert "with moments; step 20, count 20" in said and "schedule.continued=true goes on" in said
    assert "lr 0.001, initial_lr 0.002, betas (0.9, 0.999), eps 1e-08, weight_decay 0.1" in said
    assert export(tmp_path / "ck", tmp_path / "out") == 0
    assert all_of(hf) == all_of(tmp_path / "ck") == all_of(tmp_path / "out")
    before, after = load_state(hf), load_state(tmp_path / "out")
    assert str(before["state"]) == str(after["state"])
    assert before["param_groups"] == after["param_groups"]
    schedule = torch.load(tmp_path / "out" / "scheduler.pt", weights_only=True)
    assert (schedule["base_lrs"], schedule["last_epoch"]) == ([2e-3, 2e-3], 20)
    assert json.loads((tmp_path / "out/trainer_state.json").read_text())["global_step"] == 20


@pytest.mark.parametrize(
    "entries", [("exp_avg",), ("momentum_buffer",), ("state1", "state2")], ids=str
)
def test_other_optimizers_come_back_as_they_were(tmp_path, capsys, entries):
    hf = save_trained(tmp_path / "hf", entries=entries)
    assert run(["import", str(hf), str(tmp_path / "ck")]) == 0
    alone = "the trainer has AdamW alone and starts both its moments at zero"
    assert (alone in capsys.readouterr().out) == (len(entries) == 1)
    assert export(tmp_path / "ck", tmp_path / "out") == 0
    assert all_of(hf) == all_of(tmp_path / "out")
    assert str(load_state(hf)["state"]) == str(load_state(tmp_path / "out")["state"])


def test_training_goes_on_with_the_moments(tmp_path, data):
    """The trainer takes the count of the other side, and not its own."""
    hf = save_trained(tmp_path / "hf", TINY)
    assert run(["import", str(hf), str(tmp_path / "ck")]) == 0
    out = tmp_path / "run"
    setup = prepare(recipe(data, schedule={"steps": 3}), out, start=str(tmp_path / "ck"))
    snapshot = begin(setup).snapshot
    import optax

    assert int(optax.tree.get(snapshot.state.optimizer, "count")) == 20
    mu = optax.tree.get(snapshot.state.optimizer, "mu")
    theirs = open_source(str(hf)).tensors["mu"]["gpt_neox.embed_in.weight"].read()
    assert np.array_equal(mu["embed_in"]["weight"], theirs)


# What is refused: a sentence, nothing written.


def refused(capsys, command, out, said):
    capsys.readouterr()
    assert run(command) != 0
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1, err
    assert not out.exists()


def test_imports_that_would_lose_something(tmp_path, capsys):
    out = tmp_path / "out"
    most = save_trained(tmp_path / "most", entries=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
    refused(capsys, ["import", str(most), str(out)], out, "was trained with AMSGrad")
    state = make_state()
    state["state"][3]["step"] = torch.tensor(7.0)
    uneven = save_trained(tmp_path / "uneven", state=state)
    refused(capsys, ["import", str(uneven), str(out)], out, "took 7 to 20 steps")
    state = make_state()
    for entry in state["state"].values():
        entry["exp_avg_sq_row"] = entry.pop("exp_avg")
    rows = save_trained(tmp_path / "rows", state=state)
    refused(capsys, ["import", str(rows), str(out)], out, "Adafactor keeps sums")
    (rows / "optimizer.pt").unlink()
    assert run(["import", str(rows), str(out)]) == 0


def test_split_groups_need_their_lineage(tmp_path, capsys):
    hf = save_trained(tmp_path / "hf")
    split = ["width", "--embed", "2x", "--groups", "split", str(hf), str(tmp_path / "wide")]
    assert run(split) == 0
    assert run(["import", str(tmp_path / "wide"), str(tmp_path / "ck")]) == 0
    options = open_source(str(tmp_path / "ck")).lineage[-1]["optimizer"]["options"]
    assert (options["lr"], options["eps"], options["weight_decay"]) == (1e-3, 1e-8, 0.1)
    assert export(tmp_path / "ck", tmp_path / "back") == 0
    assert all_of(tmp_path / "back") == all_of(tmp_path / "wide")
    ours, theirs = (
        {
            name: [
                group[key] for key in ("lr", "initial_lr", "eps", "weight_decay", "growkit_clip")
            ]
            for group in load_state(tmp_path / where)["param_groups"]
            for name in group["param_names"]
        }
        for where in ("back", "wide")
    )
    assert ours == theirs
    (tmp_path / "wide" / "lineage.json").unlink()
    out = tmp_path / "out"
    refused(capsys, ["import", str(tmp_path / "wide"), str(out)], out, "no lineage.json there says")


def test_exports_that_cannot_be(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["export", "--optimizer", "hf"]
    bare = save_checkpoint(tmp_path / "bare")
    refused(capsys, [*command, str(bare), str(out)], out, "neither a training nor an import")
    half = save_run(tmp_path / "half", SMALL, training(SMALL), ("params", "mu"))
    refused(capsys, [*command, str(half), str(out)], out, "holds mu, and its lineage says")
    none = save_run(tmp_path / "none", SMALL, training(SMALL), ("params",))
    refused(capsys, [*command, str(none), str(out)], out, "holds no moments of all its parameters")
    hf = save_trained(tmp_path / "hf")
    refused(capsys, [*command, str(hf), str(out)], out, "is a checkpoint of transformers' Trainer")
    refused(capsys, ["export", "--optimizer", "fsdp", str(bare), str(out)], out, "got 'fsdp'")
    narrow = [*command, "--dtype", "bfloat16", str(bare), str(out)]
    refused(capsys, narrow, out, "leave one of --dtype and --optimizer out")
    strange = training(SMALL)
    strange[0]["config"]["optimizer"]["beta1"] = "much"
    odd = save_run(tmp_path / "odd", SMALL, strange)
    refused(capsys, [*command, str(odd), str(out)], out, "states an optimizer that cannot be read")


def test_factors_of_growth_are_in_the_groups(tmp_path, capsys):
    plan = plan_width(SMALL, embed="2x")
    lineage = training(plan.grown, [Growth.of(plan).to_json()], learning_rate=1e-3)
    path = save_run(tmp_path / "run", plan.grown, lineage, reduction=0.5)
    assert export(path, tmp_path / "out") == 0
    assert "growkit.torch.param_groups(model, OUT)" in capsys.readouterr().out
    groups = load_state(tmp_path / "out")["param_groups"]
    assert {group["initial_lr"] for group in groups} == {5e-4, 2.5e-4}
    assert {group["weight_decay"] for group in groups} == {0.1, 0.2, 0.0}


def test_the_schedule_is_the_trainers():
    for kind in ("cosine", "linear", "wsd", "constant"):
        for warmup, floor in ((0, 0.0), (5, 0.1)):
            schedule = Schedule(kind=kind, steps=40, warmup=warmup, floor=floor)
            for step in range(45):
                ours = compute_height(asdict(schedule), step)
                theirs = float(compute_learning_rate(schedule, 1.0, step))
                assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7), (kind, step)


def arguments_said(text):
    """The TrainingArguments that an export names."""
    line = next(line for line in text.splitlines() if "TrainingArguments of the run" in line)
    return eval(f"dict({line.partition('schedule: ')[2]})")


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_transformers_takes_the_same_rates_from_then_on(tmp_path, capsys, kind, floor):
    done = 10
    lineage = training(SMALL)
    schedule = {"kind": kind, "steps": 40, "warmup": 5, "floor": floor, "decay": 0.25}
    lineage[0]["config"]["schedule"] |= schedule
    path = save_run(tmp_path / "run", SMALL, lineage, schedule_step=done, step=done)
    assert export(path, tmp_path / "out") == 0
    said = arguments_said(capsys.readouterr().out)
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [{"params": [each]} for each in parameters]
    optimizer = torch.optim.SGD(groups, lr=said["learning_rate"])
    scheduler = transformers.get_scheduler(
        said["lr_scheduler_type"],
        optimizer,
        said["warmup_steps"],
        said["max_steps"],
        said.get("lr_scheduler_kwargs"),
    )
    for group, saved in zip(
        optimizer.param_groups, load_state(tmp_path / "out")["param_groups"], strict=True
    ):
        group["lr"] = saved["lr"]
    scheduler.load_state_dict(torch.load(tmp_path / "out/scheduler.pt", weights_only=True))
    section = Schedule(**(asdict(Config().schedule) | schedule | {"plateau": Schedule().plateau}))
    for step in range(done, 40):
        wanted = float(compute_learning_rate(section, said["learning_rate"], step))
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(wanted, rel=1e-4, abs=1e-10), step
        optimizer.step()
        scheduler.step()


# The next step.


@pytest.fixture(scope="module")
def exported(data, tmp_path_factory):
    """A tiny Llama trained in JAX, exported at one step, and the trainer's next step."""
    place = tmp_path_factory.mktemp("exported")
    made = new_run(data, place / "run", **(SETTINGS | {"schedule": SETTINGS["schedule"]}))
    batches = {}
    draw = made.position.next_batch

    def drawing(step, layout):
        batches[step] = np.asarray(draw(step, layout))[0]
        return draw(step, layout)

    made.position.next_batch = drawing
    made.go()
    assert export(f"{place / 'run'}@{BEFORE}", place / "hf") == 0
    return SimpleNamespace(
        run=place / "run", hf=place / "hf", batches=batches, next=f"{place / 'run'}@{AFTER}"
    )


def load_torch(path, **changes):
    """The model, an optimizer and a schedule as the Trainer makes them, with a checkpoint's state.

    changes: options of the first group that are other ones than the file's.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    decayed = transformers.Trainer.get_decay_parameter_names(None, model)
    named = list(model.named_parameters())
    groups = [
        {"params": [each for name, each in named if (name in decayed) == wanted]}
        for wanted in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    kwargs = {"min_lr_rate": FLOOR}
    scheduler = transformers.get_scheduler("cosine_with_min_lr", optimizer, WARMUP, LENGTH, kwargs)
    optimizer.load_state_dict(load_state(path))
    scheduler.load_state_dict(torch.load(path / "scheduler.pt", weights_only=True))
    optimizer.param_groups[0].update(changes)
    return model, optimizer, scheduler


def step_torch(model, optimizer, scheduler, batch):
    tokens = torch.from_numpy(np.array(batch)).long()
    loss = model(input_ids=tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    return float(loss.detach())


def furthest(model, optimizer, path):
    """The largest difference of any parameter or moment from a trainer checkpoint's."""
    source = open_source(str(path))
    differences = []
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert float(state["step"]) == source.record["count"]
        for slot, each in (("params", parameter), ("mu", "exp_avg"), ("nu", "exp_avg_sq")):
            ours = each.detach() if slot == "params" else state[each]
            theirs = source.tensors[slot][name].read()
            differences.append(float(np.abs(ours.numpy() - theirs).max()))
    return max(differences)


def test_torch_takes_the_step_that_jax_takes(exported):
    model, optimizer, scheduler = load_torch(exported.hf)
    assert furthest(model, optimizer, f"{exported.run}@{BEFORE}") == 0
    step_torch(model, optimizer, scheduler, exported.batches[BEFORE])
    assert furthest(model, optimizer, exported.next) < 1e-5


@pytest.mark.parametrize(
    "change", [{"weight_decay": 0.0}, {"eps": 1e-8}, {"betas": (0.8, 0.95)}, {"lr": 9e-3}], ids=str
)
def test_another_option_would_be_seen(exported, change):
    model, optimizer, scheduler = load_torch(exported.hf, **change)
    step_torch(model, optimizer, scheduler, exported.batches[BEFORE])
    assert furthest(model, optimizer, exported.next) > 1e-5


def test_jax_takes_the_step_that_torch_takes(exported, data, tmp_path):
    """After a step in torch: imported, the trainer's next one, with its rate, is torch's next."""
    model, optimizer, scheduler = load_torch(exported.hf)
    step_torch(model, optimizer, scheduler, exported.batches[BEFORE])
    saved = tmp_path / f"checkpoint-{AFTER}"
    model.save_pretrained(saved)
    torch.save(optimizer.state_dict(), saved / "optimizer.pt")
    torch.save(scheduler.state_dict(), saved / "scheduler.pt")
    (saved / "trainer_state.json").write_text(json.dumps({"global_step": AFTER}))
    assert run(["import", str(saved), str(tmp_path / "ck")]) == 0
    assert open_source(str(tmp_path / "ck")).record == {
        "count": AFTER,
        "step": AFTER,
        "schedule_step": AFTER,
    }
    sections = {name: each for name, each in SETTINGS.items() if name != "model"}
    sections["schedule"] = SETTINGS["schedule"] | {"continued": True}
    settings = values(data, **sections)
    settings.pop("model")
    made = Run(begin(prepare(settings, tmp_path / "run", start=str(tmp_path / "ck"))))
    made.go()
    first = made.position.stream.batch(made.position.drawn(0), 4)
    step_torch(model, optimizer, scheduler, first)
    assert furthest(model, optimizer, f"{tmp_path / 'run'}@1") < 1e-5


def test_the_trainer_resumes(exported, tmp_path):
    """transformers' own Trainer goes on from an export, saves, and the result comes back."""
    from growkit.torch.callbacks import KeepLineage

    class Same(torch.utils.data.Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, place):
            tokens = torch.arange(16) * (place + 1) % 64
            return {"input_ids": tokens, "labels": tokens}

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=AFTER + 1,
        per_device_train_batch_size=4,
        learning_rate=LR,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(exported.hf)
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Same(), callbacks=[KeepLineage(exported.hf)]
    )
    trainer.train(resume_from_checkpoint=str(exported.hf))
    assert trainer.state.global_step == AFTER + 1
    saved = tmp_path / "out" / f"checkpoint-{AFTER + 1}"
    steps = {float(entry["step"]) for entry in load_state(saved)["state"].values()}
    assert steps == {AFTER + 1}
    source = open_source(str(saved))
    source.require_whole()
    assert [entry["operation"] for entry in source.lineage] == ["train", "export"]
    assert source.record == {"count": 6, "step": 6, "schedule_step": 6}
    assert run(["import", str(saved), str(tmp_path / "ck")]) == 0
