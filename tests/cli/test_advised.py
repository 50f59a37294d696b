"""What growth advises to do next can be done with that model."""

from __future__ import annotations

import pytest
from conftest import SMALL, save_directory
from trained import save_trained

from growkit.checkpoint.location import open_source
from growkit.cli import run
from growkit.models import find_family
from growkit.models.architecture import Architecture
from growkit.models.fields import Frozen


def save_shipped(path, kind):
    """A tiny model of a family whose table was derived, with its defaults."""
    family = find_family(kind)
    axes = {axis for row in family.rows for axis in row.axes}
    sizes = {axis: 4 for axis in (*family.fields, *axes)} | dict(family.constants)
    options = {name: family.defaults[field] for name, field in family.options.items()}
    rope = {"rope_theta": 1e4, "partial_rotary_factor": 1.0}
    model = Architecture(family, Frozen(sizes), Frozen(options | {"rope": rope}))
    save_directory(path, model)
    return path


@pytest.mark.parametrize(
    "kind,mlp,said",
    [
        ("phi", "2x", "growkit.torch.param_groups multiplies learning rates x0.5 for mlp.fc2"),
        ("phi", "5", "cannot hold them: they differ within a parameter"),
        ("flex_olmo", "2x", "param_groups multiplies learning rates x0.5 for mlp.experts"),
    ],
)
def test_rates_of_families_that_the_trainer_does_not_train(tmp_path, capsys, kind, mlp, said):
    source = save_shipped(tmp_path / "source", kind)
    assert run(["width", "--mlp", mlp, "--dry-run", str(source), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert said in out and "optimizer.multipliers" not in out and "growkit train" not in out


def test_kept_groups_do_not_promise_exact_training(tmp_path, capsys):
    source = save_trained(tmp_path / "source")
    arguments = [str(source), str(tmp_path / "out"), "--dry-run", "--embed", "2x"]
    assert run(["width", *arguments]) == 0
    assert "training would continue exactly as the source's with --groups split" in (
        capsys.readouterr().out
    )
    assert run(["width", *arguments, "--groups", "split"]) == 0
    assert "training continues exactly as the source's would: the split" in capsys.readouterr().out


def test_groups_that_an_earlier_growth_split_are_named(tmp_path, capsys):
    source = save_trained(tmp_path / "source")
    split, out = tmp_path / "split", str(tmp_path / "out")
    assert run(["width", "--embed", "2x", "--groups", "split", str(source), str(split)]) == 0
    capsys.readouterr()
    assert run(["depth", "--map", f"{SMALL.layer}:9", "--dry-run", str(split), out]) == 0
    assert "groups      kept as the source's, split by learning rate" in capsys.readouterr().out


def test_the_output_directory_of_the_trainer_names_its_last_checkpoint(tmp_path, capsys):
    for step in (5, 10):
        save_trained(tmp_path / f"checkpoint-{step}")
    assert run(["inspect", str(tmp_path)]) == 1
    assert f"did you mean '{tmp_path}/checkpoint-10'?" in capsys.readouterr().err


def test_growth_of_nothing_names_every_option(tmp_path, capsys):
    save_directory(tmp_path / "source", SMALL)
    assert run(["width", str(tmp_path / "source"), str(tmp_path / "out")]) == 2
    assert "--head-dim, --axis and --vocab" in capsys.readouterr().err
    arguments = ["--axis", "vocab=99", str(tmp_path / "source"), str(tmp_path / "out")]
    assert run(["width", *arguments]) == 2
    assert "--axis vocab is not needed: its size is --vocab" in capsys.readouterr().err


def test_a_source_with_other_axes_is_named_as_such(tmp_path, capsys):
    source = save_shipped(tmp_path / "phi", "phi")
    save_directory(tmp_path / "other", SMALL)
    out = str(tmp_path / "out")
    assert run(["width", "--mlp", "2x", str(source), out]) == 0
    assert run(["verify", str(tmp_path / "other"), out]) == 2
    error = capsys.readouterr().err
    assert "another model" in error and "None" not in error


def test_groups_of_a_mixture_are_those_of_memory(tmp_path):
    torch = pytest.importorskip("torch")
    from growkit.errors import GrowkitError
    from growkit.torch.groups import param_groups

    source = save_shipped(tmp_path / "source", "mixtral")
    with pytest.raises(GrowkitError, match=r"no parameter 'model.layers.0.mlp.experts"):
        param_groups(make_module(torch, source), source, lr=1e-3)


def make_module(torch, source):
    """A module with all parameters of a mixture but those of experts."""
    model = torch.nn.Module()
    for name, tensor in open_source(str(source)).tensors["params"].items():
        if ".experts." not in name:
            *path, last = name.split(".")
            module = model
            for word in path:
                if not hasattr(module, word):
                    module.add_module(word, torch.nn.Module())
                module = getattr(module, word)
            parameter = torch.nn.Parameter(torch.zeros(tensor.shape))
            module.register_parameter(last, parameter)
    return model
