"""The growing verbs, diff and verify, as a user calls them, on both kinds of source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import contents_of, save_checkpoint, save_directory
from tokenizers import Tokenizer, models

from growkit.checkpoint import tensor
from growkit.checkpoint.location import open_source
from growkit.cli import run
from growkit.cli.comparing import _says
from growkit.growth.plan import Plan
from growkit.models.gpt_neox import GPT_NEOX
from growkit.models.llama import LLAMA
from growkit.surgery import blocks, comparison

TINY = GPT_NEOX.model(
    layer=2, embed=16, head=2, mlp=12, vocab=40, context=16, rotary_pct=0.5, tied=True
)
TARGET = TINY.change(layer=3, embed=36, head=3, mlp=20, rotary_pct=1 / 3)
GROWTHS = {
    "replicate": ["depth", "--map", "2:5"],
    "nearest": ["depth", "--map", "2:5", "--method", "nearest"],
    "stack": ["depth", "--map", "2:5", "--method", "stack"],
    "identity": ["depth", "--map", "2:5", "--method", "identity"],
    "list": ["depth", "--map", "0,1,0-1", "--method", "replicate"],
    "clone": ["width", "--embed", "2x"],
    "noise": ["width", "--embed", "2x", "--noise", "0.5", "--seed", "3"],
    "pad": ["width", "--embed", "24"],
    "head_dim": ["width", "--head-dim", "12", "--moments", "copy"],
    "uneven": ["width", "--mlp", "1.5x", "--spread", "0.5", "--moments", "nu-only"],
    "like": ["grow", "--like", "target.json", "--moments", "reset"],
}
LAYERS = {
    "replicate": [0, 0, 0, 1, 1],
    "nearest": [0, 0, 1, 1, 1],
    "stack": [0, 1, 0, 1, 0],
    "list": [0, 1, 0, 1],
}
EMBED, QKV = "gpt_neox.embed_in.weight", "gpt_neox.layers.1.attention.query_key_value.weight"
# The head is tied: the final norm reads embed for it.
READERS = ("query_key_value.weight", "dense.weight", "dense_h_to_4h.weight", "dense_4h_to_h.weight")
READERS += ("final_layer_norm.weight", "final_layer_norm.bias")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    path = tmp_path_factory.mktemp("originals")
    save_directory(path / "hf", TINY)
    save_directory(path / "half", TINY, "bfloat16")
    save_checkpoint(path / "ck", TINY)
    (path / "target.json").write_text(json.dumps(TARGET.config()))
    return path


@pytest.fixture
def place(originals, tmp_path, monkeypatch):
    """A directory to stand in, with models of both kinds in it."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def light(originals, tmp_path, monkeypatch):
    """A directory with what refusals need."""
    shutil.copytree(originals / "hf", tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arrays(path: str, slot: str = "params") -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in open_source(path).tensors[slot].items()}


def flip(path: str, slot: str, name: str) -> None:
    """Change the last bit of one byte in the middle of a tensor."""
    span = open_source(path).tensors[slot][name].span
    with open(span.path, "r+b") as file:
        file.seek(span.offset + span.size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def grown_by(options: list[str], source: str, out: str, *more: str) -> int:
    return run([*options, *more, source, out])


# Every operator, on both kinds: written as planned, verified, and a flipped byte found


@pytest.mark.parametrize("kind", ["hf", "ck"])
@pytest.mark.parametrize("name", GROWTHS)
def test_what_is_grown_is_verified_and_one_flipped_byte_is_found(place, capsys, name, kind):
    before = contents_of(place / kind)
    assert grown_by(GROWTHS[name], kind, "out") == 0
    assert contents_of(place / kind) == before
    out = open_source("out")
    assert out.kind == open_source(kind).kind and list(out.tensors) == list(
        open_source(kind).tensors
    )
    assert run(["verify", kind, "out"]) == 0
    assert (
        f"verified: all {sum(map(len, out.tensors.values()))} tensors of out"
        in capsys.readouterr().out
    )
    slot = list(out.tensors)[-1]
    flip("out", slot, QKV)
    assert run(["verify", kind, "out"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        f"growkit: out is not what its plan makes of {kind}: {QKV!r} of {slot} differs in 1 of "
    )
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("name", LAYERS)
def test_methods_of_depth_copy_the_layers_they_say(place, name):
    assert grown_by(GROWTHS[name], "hf", "out") == 0
    old, new = arrays("hf"), arrays("out")
    for layer, source in enumerate(LAYERS[name]):
        ours, theirs = QKV.replace("1", str(layer)), QKV.replace("1", str(source))
        assert np.array_equal(new[ours], old[theirs])


def test_sizes_of_width_and_of_a_target(place, capsys):
    assert run(["width", "--embed", "2x", "--heads", "2", "hf", "heads"]) == 0
    model = open_source("heads").model
    assert (model.embed, model.head_count, model.head_dim, model.mlp) == (32, 2, 16, 24)
    assert "head_dim 8 -> 16, so that embed is heads x head_dim" in capsys.readouterr().out
    assert grown_by(GROWTHS["like"], "ck", "like") == 0
    sizes = open_source("like").model.sizes
    assert sizes == TARGET.sizes and sizes != TINY.sizes
    (place / "like.yaml").write_text("model: {layer: 3, head: 4, embed: 32}\n")
    assert run(["grow", "--like", "like.yaml", "ck", "yaml"]) == 0
    # What a section leaves open is the source's.
    assert open_source("yaml").model == TINY.change(layer=3, head=4, embed=32)
    assert run(["grow", "--like", "like", "ck", "same"]) == 0
    assert open_source("same").model.sizes == TARGET.sizes


# Options act


def test_moments(place):
    for moments in ("map", "copy", "reset", "nu-only"):
        assert grown_by(GROWTHS["clone"], "ck", moments, "--moments", moments) == 0
    tile = np.arange(32) % 16
    old = {slot: arrays("ck", slot)[EMBED] for slot in ("mu", "nu")}
    new = {
        name: {slot: arrays(name, slot)[EMBED] for slot in ("mu", "nu")}
        for name in ("map", "copy", "nu-only")
    }
    for slot, scale in (("mu", 2), ("nu", 4)):
        assert np.array_equal(new["map"][slot], old[slot][:, tile] / scale)
        assert np.array_equal(new["copy"][slot], old[slot][:, tile])
    assert not new["nu-only"]["mu"].any() and np.array_equal(new["nu-only"]["nu"], new["map"]["nu"])
    assert not any(array.any() for slot in ("mu", "nu") for array in arrays("reset", slot).values())
    assert [open_source(name).record["count"] for name in ("reset", "map", "copy", "nu-only")] == [
        0,
        70,
        70,
        70,
    ]


def test_noise_changes_readers_only_and_the_seed_matters(place, capsys):
    noisy = [*GROWTHS["clone"], "--noise", "0.5"]
    for out, options in (
        ("still", GROWTHS["clone"]),
        ("a", noisy),
        ("b", noisy),
        ("c", [*noisy, "--seed", "1"]),
    ):
        assert grown_by(options, "ck", out) == 0
    capsys.readouterr()
    assert run(["diff", "a", "b"]) == 0
    assert run(["diff", "a", "c"]) == 1
    capsys.readouterr()
    assert run(["diff", "still", "a", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["tensors"]
    changed = {(tensor["slot"], tensor["name"]) for tensor in found if tensor["verdict"] != "equal"}
    assert changed == {("params", name) for name in arrays("a") if name.endswith(READERS)}
    old, new = arrays("still")[QKV], arrays("a")[QKV]
    assert np.allclose(old.reshape(-1, 2, 16).sum(1), new.reshape(-1, 2, 16).sum(1), atol=1e-6)


def test_noise_of_the_size_of_each_tensor(place, capsys):
    assert grown_by([*GROWTHS["clone"], "--noise", "0.5rms"], "ck", "out") == 0
    assert "0.5 x the root mean square of each tensor, seed 0" in capsys.readouterr().out
    entry = open_source("out").lineage[-1]
    assert entry["noise"] == "0.5rms" and entry["function"] == "preserved"
    assert run(["verify", "ck", "out"]) == 0
    assert grown_by([*GROWTHS["clone"], "--noise", "0.5"], "ck", "plain") == 0
    assert grown_by(GROWTHS["clone"], "ck", "still") == 0
    noise = arrays("out")[QKV] - arrays("still")[QKV]
    size = np.sqrt(np.square(arrays("still")[QKV]).mean())
    assert noise.std() == pytest.approx(0.5 * size, rel=0.1)
    assert not np.array_equal(arrays("out")[QKV], arrays("plain")[QKV])
    assert run(["export", "out", "exported"]) == 0
    assert "noise 0.5rms, function preserved" in (place / "exported" / "README.md").read_text()


def test_the_seed_of_random_fills(place):
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert grown_by(GROWTHS["pad"], "hf", out, "--seed", seed) == 0
    assert run(["diff", "a", "b"]) == 0 and run(["diff", "a", "c"]) == 1


def test_a_plan_says_what_it_does(place, capsys):
    assert grown_by(GROWTHS["clone"], "ck", "out", "--dry-run") == 0
    said = capsys.readouterr().out
    assert (
        "by rule     mlp 12 -> 24, to keep its ratio to embed" in said
        and "mu grown by the rule" in said
    )
    assert "learning rates x0.5 for" in said and "attention.query_key_value.weight" in said
    assert said.endswith("--out RUN data.train=TOKENS schedule.continued=true\n")
    assert (
        "warning     copies of embed, head, mlp stay equal" in said
        and "schedule.warmup=200" not in said
    )
    assert grown_by([*GROWTHS["noise"], "--moments", "reset"], "ck", "out", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "noise       0.5 x initializer_range 0.02, seed 3" in said and "warning" not in said
    assert (
        "mu, nu and count zero" in said
        and "schedule.warmup=200" in said
        and "learning rates" not in said
    )
    assert grown_by(GROWTHS["head_dim"], "half", "out", "--dry-run") == 0
    said = capsys.readouterr().out
    assert (
        "padding     head_dim: new keys are zero" in said
        and "to the rounding of the weights to bfloat16" in said
    )
    assert not (place / "out").exists()


def test_an_exported_model_tells_how_it_was_grown(place):
    assert (
        grown_by(GROWTHS["noise"], "ck", "out", "--moments", "copy")
        == run(["export", "out", "exported"])
        == 0
    )
    card = (place / "exported" / "README.md").read_text()
    assert "1. width: embed 16 to 32, head 2 to 4, mlp 12 to 24 by embed 16 -> 32 by copies" in card
    assert "equal shares, moments copy, noise 0.5, function preserved, after 70 steps" in card
    assert (
        run(["width", "--mlp", "2x", "hf", "plain"])
        == run(["export", "plain", "exported", "--force"])
        == 0
    )
    card = (place / "exported" / "README.md").read_text()
    assert (
        "1. width: mlp 12 to 24 by" in card and "noise" not in card and "moments copy" not in card
    )


@pytest.mark.parametrize("name", ["identity", "clone", "like"])
def test_json_is_one_document(place, capsys, name):
    for more in ([], ["--dry-run", "--force"]):
        assert grown_by(GROWTHS[name], "ck", "out", "--json", *more) == 0
        out, err = capsys.readouterr()
        plan = json.loads(out)
        assert err == "" and plan["operation"] == GROWTHS[name][0] and plan["dry_run"] == bool(more)
        assert plan["sizes"]["after"] == open_source("out").model.sizes and "check" not in plan


@pytest.mark.parametrize(
    "options,tied",
    [
        (["--embed", "2x"], ["embed", "head", "mlp"]),
        (["--embed", "2x", "--spread", "0.5"], ["embed"]),
        (["--embed", "2x", "--moments", "reset"], ["embed", "head", "mlp"]),
        (["--embed", "2x", "--noise", "0.1"], []),
        (["--embed", "24"], []),
        (["--head-dim", "12", "--heads", "2", "--mlp", "2x"], []),
        (["--embed", "64", "--head-dim", "16"], ["mlp"]),
    ],
)
def test_copies_that_stay_tied(place, capsys, options, tied):
    assert run(["width", *options, "ck", "out", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tied_copies"] == tied


# The check


@pytest.mark.parametrize("name,source", [("clone", "ck"), ("like", "hf")])
def test_an_exact_growth_is_checked(place, capsys, name, source):
    growth = GROWTHS[name] if name == "clone" else ["width", "--embed", "36", "--heads", "3"]
    assert grown_by([*growth, "--check"], source, "out") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("check       PRESERVED; loss ") and line.endswith(
        "(1,024 random tokens, computed on the CPU)"
    )


def test_a_gap_is_told(place, capsys):
    assert grown_by([*GROWTHS["replicate"], "--json", "--check", "64"], "hf", "out") == 0
    found = json.loads(capsys.readouterr().out)["check"]
    assert not found["promised"] and not found["preserved"] and found["tokens"] == 64
    assert found["largest_difference"] > 0.1 and found["loss"]["before"] != found["loss"]["after"]


def test_a_narrow_source_is_checked_to_its_rounding(place, capsys):
    assert run(["width", "--mlp", "3x", "--check", "64", "half", "out"]) == 0
    said = capsys.readouterr().out
    assert "check       PRESERVED to the rounding of bfloat16; loss" in said
    gap = float(said.split("differ by at most ")[1].split()[0])
    assert 1e-4 < gap < 0.2


def test_a_corrupted_output_fails_the_check(place, capsys, monkeypatch):
    right = blocks.grow_array

    def corrupted(array, row, *rest):
        return right(array, row, *rest) * (1.01 if "4h_to_h.weight" in row.name else 1)

    monkeypatch.setattr(blocks, "grow_array", corrupted)
    assert run(["width", "--mlp", "2x", "--check", "64", "hf", "out"]) == 1
    out, err = capsys.readouterr()
    assert (
        "not preserved" in out
        and "the plan promised the source's function" in err
        and len(err.splitlines()) == 1
    )


def test_a_wrong_map_fails_the_check(place, capsys, monkeypatch):
    monkeypatch.setattr(Plan, "preserved", True)
    assert grown_by(["depth", "--map", "2:3", "--json"], "hf", "out", "--check=64") == 1
    out, err = capsys.readouterr()
    assert not json.loads(out)["check"]["preserved"] and "off by" in err


def test_the_check_reads_text_where_there_is_a_tokenizer(place, capsys):
    letters = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKL"
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    (place / "hf" / "tokenizer.json").write_text(tokenizer.to_str())
    from growkit.cli.checking import select_tokens

    ids, text = select_tokens(open_source("hf"), 50)
    assert (
        ids.shape == (3, 16)
        and text == "tokens of Python's documentation"
        and 4 in ids
        and ids.max() < 40
    )
    ids, text = select_tokens(open_source("ck"), 10)
    assert ids.shape == (1, 10) and text == "random tokens"


def test_another_architecture_is_checked_in_transformers(place, capsys):
    pytest.importorskip("transformers")
    model = LLAMA.model(
        layer=3, embed=24, kv=2, group=3, head_dim=4, mlp=20, vocab=96, context=32, norm_eps=0.05
    )
    save_directory(place / "llama", model)
    assert run(["width", "--mlp", "2x", "--check", "64", "llama", "out"]) == 0
    assert "PRESERVED" in capsys.readouterr().out
    assert run(["verify", "llama", "out"]) == 0 and run(["inspect", "llama"]) == 0
    assert "6 heads of 4 in 2 groups" in capsys.readouterr().out


# inspect


def test_inspect_says_each_growth_once(place, capsys):
    assert run(["width", "--mlp", "2x", "hf", "wide"]) == 0
    assert run(["depth", "--map", "2:3", "wide", "deep"]) == 0
    capsys.readouterr()
    assert run(["inspect", "deep"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "path         deep (Hugging Face directory)"
    first, second = [line for line in said if line.startswith("lineage")]
    assert first.count("mlp 12 -> 24") == 1 and "width: mlp 12 -> 24 by copies" in first
    assert "depth: layer 2 -> 3, replicate: floor(i*2/3), function not preserved" in second
    # One size's words are not in those of a longer one.
    assert not _says("mlp 4 -> 80 by copies", "mlp 4 -> 8")
    assert not _says("head_dim 4 -> 8 by padding", "dim 4 -> 8")


# diff


def test_diff_of_moments_that_one_side_has_is_a_line(place, capsys):
    assert run(["export", "ck", "exported"]) == 0
    capsys.readouterr()
    assert run(["diff", "ck", "exported"]) == 1
    said = capsys.readouterr().out
    count = len(arrays("hf"))
    assert f"mu          {count} only in A\n" in said and f"nu          {count} only in A\n" in said
    assert said.endswith("different\n") and "  gpt_neox" not in said
    assert run(["diff", "exported", "ck"]) == 1
    assert f"nu          {count} only in B\n" in capsys.readouterr().out


def test_diff_of_what_is_equal(place, capsys):
    assert run(["import", "hf", "imported"]) == 0
    assert run(["diff", "hf", "imported"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "equal" and "model       the same sizes and options" in said
    assert run(["diff", "ck", "ck", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] and len(found["tensors"]) == 3 * len(arrays("hf"))


def test_diff_of_one_flipped_bit(place, capsys):
    shutil.copytree("ck", "other")
    flip("other", "nu", QKV)
    assert run(["diff", "ck", "other"]) == 1
    said = capsys.readouterr().out
    assert f"  {QKV}: differs, by at most " in said and said.count("  gpt_neox") == 1


def test_diff_of_sizes_kinds_and_dtypes(place, capsys):
    assert run(["depth", "--map", "2:3", "hf", "deep"]) == 0
    capsys.readouterr()
    assert run(["diff", "hf", "deep"]) == 1
    said = capsys.readouterr().out
    assert (
        "model       layer 2 and 3" in said
        and "12 only in B" in said
        and said.endswith("different\n")
    )
    assert run(["diff", "half", "ck", "--json"]) == 1
    tensors = json.loads(capsys.readouterr().out)["tensors"]
    first = next(tensor for tensor in tensors if tensor["name"] == EMBED)
    assert first["detail"] == "bfloat16 and float32" and 0 < first["largest"] < 0.01
    assert {tensor["verdict"] for tensor in tensors if tensor["slot"] == "nu"} == {"only in B"}
    assert run(["width", "--mlp", "2x", "hf", "wide"]) == 0
    capsys.readouterr()
    assert run(["diff", "hf", "wide"]) == 1
    assert "dense_4h_to_h.weight: shape [16, 12] and [16, 24]" in capsys.readouterr().out


def test_the_largest_difference():
    a = np.float32([1, np.nan, np.inf, -0.0])
    assert (
        comparison.largest_difference(a, a) == 0 and comparison.count_differing(a, a.copy())[0] == 0
    )
    assert comparison.count_differing(a, np.float32([1, np.nan, np.inf, 0.0])) == (1, 3)
    assert comparison.largest_difference(a, np.float32([1.5, np.nan, np.inf, 0])) == 0.5
    assert np.isnan(comparison.largest_difference(a, np.float32([1, 0, np.inf, 0])))


def test_differences_are_found_in_every_block(monkeypatch):
    monkeypatch.setattr(tensor, "BLOCK", 64)
    monkeypatch.setattr(comparison, "BLOCK", 64)
    ours = np.zeros((40, 3), np.float32)
    theirs = ours.copy()
    assert (
        comparison._compare("params", "a", *map(tensor.wrap_array, (ours, theirs))).verdict
        == "equal"
    )
    theirs[7, 1], theirs[39, 2] = 1, np.nan
    found = comparison._compare("params", "a", *map(tensor.wrap_array, (ours, theirs)))
    assert found.verdict == "differs" and np.isnan(found.largest)
    theirs[39, 2] = -3
    assert comparison._compare("params", "a", *map(tensor.wrap_array, (ours, theirs))).largest == 3
    for recipe in (
        tensor.zeros(ours.shape, ours.dtype),
        tensor.copy_tensor(tensor.wrap_array(ours)),
    ):
        assert comparison._find_number_mismatch(recipe, tensor.wrap_array(ours)) is None
        assert "2 of 120 numbers, the first at [7, 1]" in comparison._find_number_mismatch(
            recipe, tensor.wrap_array(theirs)
        )


# verify


def test_verify_against_another_source(place, capsys):
    assert run(["depth", "--map", "2:3", "ck", "out"]) == 0
    shutil.copytree("ck", "other")
    flip("other", "params", EMBED)
    capsys.readouterr()
    assert run(["verify", "other", "out"]) == 1
    said = capsys.readouterr().err
    assert f"{EMBED!r} of params differs in 1 of " in said
    assert "out was grown from ck, whose fingerprint was another than that of other" in said


def test_verify_compares_the_configuration_and_the_count(place, capsys):
    assert run(["depth", "--map", "2:3", "hf", "out"]) == 0
    path = Path("out/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_eps": 0.5}))
    assert run(["verify", "hf", "out"]) == 1
    assert (
        "the configuration's layer_norm_eps is 0.5, growth makes it 1e-05"
        in capsys.readouterr().err
    )


def entry_changed(**change) -> None:
    path = Path("out/lineage.json")
    path.write_text(json.dumps([json.loads(path.read_text())[0] | change]))


@pytest.mark.parametrize(
    "change,code,said",
    [
        ({"maps": None}, 1, "the lineage's last entry is not a plan that can be read"),
        ({"pads": {"embed": "wide"}}, 1, "not a plan that can be read"),
        (
            {"sizes": {"before": TINY.sizes | {"layer": 7}, "after": TINY.sizes}},
            2,
            "grown from another model than hf: layer 7 there, layer 2 here",
        ),
    ],
)
def test_verify_of_a_lineage_that_is_broken(place, capsys, change, code, said):
    assert run(["depth", "--map", "2:3", "hf", "out"]) == 0
    entry_changed(**change)
    assert run(["verify", "hf", "out"]) == code
    assert said in capsys.readouterr().err
    # The sibling: an entry written again as it was.
    assert run(["depth", "--map", "2:3", "--force", "hf", "out"]) == 0
    entry_changed()
    assert run(["verify", "hf", "out"]) == 0


# Refusals


REFUSALS = {
    "width": "at least one of --embed, --heads, --mlp, --head-dim, --axis and --vocab",
    "width --embed 0": "--embed 0 is below the source's 16; growkit only grows models",
    "width --embed -4": "--embed takes a size, as 32, or a factor, as 2x; got '-4'",
    "width --heads two": "--heads takes a size, as 4, or a factor, as 2x; got 'two'",
    "width --mlp 6": "--mlp 6 is below the source's 12",
    "width --mlp 1.3x": "is not a whole number; the nearest are 15 and 16",
    "width --embed 1x": "nothing grows: every size asked for is the source's own",
    "width --embed 50 --heads 5 --head-dim 12": (
        "embed must be heads x head_dim: 5 x 12 is 60, not 50"
    ),
    "width --embed 30": "the nearest are 24 and 32",
    "width --embed 24 --method clone": "--method pad takes 24 exactly",
    "width --embed 24 --method clnoe": (
        "--method is one of clone, pad, got 'clnoe'; did you mean 'clone'?"
    ),
    "width --mlp 2x --spread 1": "--spread must lie in [0, 1)",
    "width --mlp 2x --spread much": "--spread takes a number, got 'much'",
    "width --head-dim 12 --mlp 12 --spread 0.5": "none are copied here",
    "depth --map 2:4 --moments mpa": (
        "--moments is one of map, copy, reset, nu-only, first, got 'mpa'; did you mean 'map'?"
    ),
    "depth --map 2:4 --noise 0.1": "--noise separates the copies of units in width",
    "width --mlp 2x --noise -0.1": "--noise is a number of at least 0, got -0.1",
    "width --mlp 2x --noise nan": "--noise is a number of at least 0, got nan",
    "width --mlp 2x --noise 0.5rsm": "as 0.5rms; got '0.5rsm'",
    "width --mlp 2x --noise infrms": "--noise is a number of at least 0, got inf",
    "width --mlp 2x --seed 1.5": "--seed takes a whole number, got '1.5'",
    "depth --map 0,0,1 --method stack": "--method stack goes with --map SOURCE:TARGET",
    "depth --map 2:4 --method stak": (
        "--method is one of replicate, nearest, stack, identity, got 'stak'"
    ),
    "depth --map 0-1": "nothing grows: the map gives every layer of the source once",
    "depth --map 2:4 --check --dry-run": "--check runs the output, and --dry-run writes none",
    "depth --map 2:4 --check 1": "--check takes at least 2 tokens",
    "depth --map 2:4 --check=all": "--check takes a whole number, got 'all'",
    "grow --like hf": "nothing grows: the source has every size of the target already",
    "grow --like tiny": "growth keeps vocab: the source has 40, the target 4096",
    "grow --like tinny": "no preset of that name; the presets are 1b,",
    "grow --like recipe": "--like recipe: it has no section `model`",
    "grow --like target.json tied=false": (
        "growth keeps tied: the source has True, the target False"
    ),
    "grow --like target.json vocab=41": "growth keeps vocab: the source has 40, the target 41",
    "grow --like target.json residual=false": (
        "growth keeps parallel_residual: the source has True, the target False"
    ),
    "grow --like target.json base=500.0": (
        "growth keeps rotary_base: the source has 10000.0, the target 500.0"
    ),
    "grow --like target.json layer=1": (
        "layer of the target is 1, below the source's 2; growkit only grows models"
    ),
    "grow --like target.json odd=0.25": (
        "--like target.json: the rotated part of a head must be even"
    ),
    "grow --like target.json rotary=0.5": "4, the target 6",
    "grow --like target.json kind=llama": "the source is a gpt_neox model, the target a llama one",
}
FIELDS = {
    "tied": "tie_word_embeddings",
    "vocab": "vocab_size",
    "residual": "use_parallel_residual",
    "base": "rotary_emb_base",
    "layer": "num_hidden_layers",
    "odd": "rotary_pct",
    "rotary": "rotary_pct",
    "kind": "model_type",
}


def target_changed(place: Path, words: list[str]) -> list[str]:
    """The command without its field=value words, which change target.json instead."""
    changes = dict(word.split("=") for word in words if "=" in word and not word.startswith("--"))
    config = TARGET.config() | {"rope_parameters": None, "rope_scaling": None}
    for key, value in changes.items():
        config[FIELDS[key]] = value if key == "kind" else json.loads(value)
        if key == "rotary":
            config |= {"hidden_size": 32, "num_attention_heads": 4, "rotary_pct": 0.75}
        if key == "kind":
            config |= {"attention_bias": False, "hidden_act": "silu", "tie_word_embeddings": True}
    (place / "target.json").write_text(json.dumps(config))
    return [word for word in words if word.startswith("--") or "=" not in word]


@pytest.mark.parametrize("command", REFUSALS)
def test_growing_verbs_refuse_with_one_sentence(light, capsys, command):
    words = target_changed(light, command.split())
    before = sorted(light.rglob("*"))
    assert run([*words, "hf", "out"]) == 2
    out, err = capsys.readouterr()
    said = REFUSALS[command]
    assert out == "" and err.startswith("growkit: ") and len(err.splitlines()) == 1, err
    assert said in err
    assert sorted(light.rglob("*")) == before


@pytest.mark.parametrize(
    "command,code,said",
    [
        ("diff hf nowhere", 2, "there is no such directory: nowhere"),
        (
            "diff target.json hf",
            2,
            "target.json is a file; name the directory that holds the model",
        ),
        ("diff hf empty", 1, "empty is not a model"),
        ("verify hf nowhere", 2, "there is no such directory: nowhere"),
        ("verify empty deep", 1, "empty is not a model"),
        ("verify ck hf", 2, "hf has no growth in its lineage"),
        (
            "verify hf exported",
            2,
            "the last thing that was done to exported is 'export', not growth",
        ),
    ],
)
def test_comparing_verbs_refuse_with_one_sentence(place, capsys, command, code, said):
    (place / "empty").mkdir()
    if "deep" in command or "exported" in command:
        assert run(["depth", "--map", "2:3", "hf", "deep"]) == 0
    if "exported" in command:
        assert run(["export", "deep", "exported"]) == 0
    capsys.readouterr()
    assert run(command.split()) == code
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and said in err, err
