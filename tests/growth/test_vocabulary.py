"""Growth of the vocabulary: old tokens keep their logits, and their loss rises by no more than the
bound says, in transformers' own float64.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from conftest import BESIDE, SMALL, contents_of, save_checkpoint, save_directory

import growkit
from growkit.checkpoint.location import open_source
from growkit.cli import run
from growkit.errors import UsageError
from growkit.growth.depth import plan_depth
from growkit.growth.head_row import LARGEST, RESIDUAL, TARGET, find_row, solve_hidden
from growkit.growth.plan import combine_plans, set_options
from growkit.growth.vocabulary import (
    EXACT,
    MARGIN,
    bound_shift,
    describe_shift,
    parse_vocabulary,
    plan_vocabulary,
)
from growkit.growth.width import plan_width
from growkit.models import FAMILIES, find_family
from growkit.models.tables import list_shipped

HEAD, EMBEDDING = "embed_out.weight", "gpt_neox.embed_in.weight"
SLOW = pytest.mark.slow
# A head with a bias; tied with a factor and a soft cap; experts; a scaled head; a summed table.
SAMPLE = ("llama", "gptj", "gpt_neox", "gemma2", "granite")
# Rows of something else lie in the same tensor.
MIXED = ("cpmant", "moshi")


@pytest.mark.parametrize(
    "text,size",
    [("128", 128), (130, 130), ("+64", 160), ("x64", 128), ("multiple of 7", 98), ("x96", 96)],
)
def test_numbers_of_tokens_as_people_write_them(text, size):
    assert parse_vocabulary(text, 96) == size


@pytest.mark.parametrize(
    "text,said",
    [
        ("2x", "got '2x'"),
        ("x0", "as 160, or \\+64, or x128 for the next multiple of 128; got 'x0'"),
        ("90", "--vocab 90 is below the source's 96; growkit only grows models"),
        ("-4", "got '-4'"),
        ("999999999", "growkit makes at most 16777216"),
    ],
)
def test_what_is_no_number_of_tokens_is_refused(text, said):
    with pytest.raises(UsageError, match=said):
        parse_vocabulary(text, 96)


def log_sum(logits):
    top = logits.max(-1, keepdims=True)
    return (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[..., 0]


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 30.0])
def test_the_bound_holds_for_every_hidden_state(spread):
    """Also for those along or against the mean of the rows, where it is nearest."""
    random = np.random.default_rng(0)
    head = random.normal(0.3, 1.0, (50, 8))
    mean = head.mean(0)
    hidden = spread * np.concatenate([random.normal(size=(200, 8)), [mean, -mean, 20 * mean]])
    old = hidden @ head.T
    new = np.repeat((hidden @ mean)[:, None], 20, 1)
    shift = log_sum(np.concatenate([old, new], 1)) - log_sum(old)
    assert shift.max() <= math.log1p(20 / 50) * (1 + 1e-12)
    if spread == 0.0:
        assert shift.min() == pytest.approx(math.log1p(20 / 50))
    biased = new + math.log(50 / 20) + math.log(MARGIN)
    assert (log_sum(np.concatenate([old, biased], 1)) - log_sum(old)).max() <= MARGIN * (1 + 1e-6)


def plans_of(model):
    """(name, plan): the vocabulary alone, with each other growth, with all of them."""
    tokens = plan_vocabulary(model, "+3")
    yield "alone", tokens
    if "layer" not in model.family.frozen:
        method = None if model.family.no_identity else "identity"
        if method:
            deep = plan_depth(model, f"{model.layer}:{model.layer + 1}", method)
            yield "deep", combine_plans("grow", [deep, tokens], model)
    if "embed" not in model.family.frozen and not model.coupled:
        heads = model.head_count or None
        wide = plan_width(model, embed="2x", heads=heads, mlp=model.mlp or None)
        yield "wide", combine_plans("grow", [wide, tokens], model)
        if not model.family.unpadded:
            padded = plan_width(model, embed=model.embed * 3 // 2, heads=heads)
            yield "padded", combine_plans("grow", [padded, tokens], model)


def check_by_transformers(kind):
    """Old tokens' logits in float64, and their loss before and after."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import torch

    from growkit.derive import proof
    from growkit.derive.stream import TOKENS
    from growkit.derive.tiny import tiny_fields
    from growkit.derive.variant import read_variant

    torch.set_num_threads(1)
    source = proof.source_of(read_variant(kind, tiny_fields(kind)))
    model = proof.read_model(find_family(kind), source)
    before = proof.logits_of(source).numpy()
    for name, plan in plans_of(model):
        grown = proof.grow(source, plan)
        assert grown.config[model.fields["vocab"]] == model.vocab + 3
        after = proof.logits_of(grown).numpy()
        assert after.shape[-1] == model.vocab + 3, name
        old = after[..., : model.vocab]
        assert np.abs(old - before).max() <= proof.BOUND * np.abs(before).max(), name
        ids = TOKENS.numpy()[:, 1:, None]
        losses = [
            (log_sum(logits[:, :-1]) - np.take_along_axis(logits[:, :-1], ids, -1)[..., 0]).mean()
            for logits in (before, after)
        ]
        bound = bound_shift(plan)
        assert bound is not None
        assert -1e-9 <= losses[1] - losses[0] <= bound + 1e-9, name
        if bound <= EXACT:
            assert losses[1] - losses[0] <= EXACT


@pytest.mark.parametrize("kind", SAMPLE)
def test_old_tokens_keep_logits_and_loss(kind):
    check_by_transformers(kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({*FAMILIES, *list_shipped()} - {*SAMPLE, *MIXED}))
def test_old_tokens_keep_logits_and_loss_in_every_type(kind):
    check_by_transformers(kind)


@pytest.mark.parametrize("kind", MIXED)
def test_rows_of_other_things_are_no_tokens(kind):
    family = find_family(kind)
    from growkit.models.architecture import Architecture
    from growkit.models.fields import Frozen

    sizes = dict.fromkeys(family.fields, 4) | dict(family.constants)
    model = Architecture(family, Frozen(sizes), Frozen({"tied": False, "rope": {}}))
    with pytest.raises(UsageError, match="holds other rows beside those of tokens"):
        plan_vocabulary(model, "+1")


def test_a_bias_makes_it_exact_and_rows_of_zeros_promise_nothing():
    tied = FAMILIES["llama"].model(
        layer=1, embed=8, kv=1, group=1, head_dim=8, mlp=8, vocab=100, tied=True
    )
    assert describe_shift(plan_vocabulary(tied, "+64")) == (
        "not exact: new tokens raise the loss of old ones by up to 4.9e-01 nats"
    )
    assert bound_shift(plan_vocabulary(tied, "+64", "zero")) is None
    assert "nothing bounds" in describe_shift(plan_vocabulary(tied, "+64", "zero"))
    # The head is not the embedding: only the embedding's rows are zero.
    untied = tied.change(tied=False)
    assert bound_shift(plan_vocabulary(untied, "+64", "zero")) == math.log1p(0.64)
    with pytest.raises(UsageError, match="--vocab-fill is one of mean, zero, got 'men'; did you"):
        plan_vocabulary(tied, "+64", "men")
    with pytest.raises(UsageError, match="nothing grows: --vocab x10 is the 100 tokens"):
        plan_vocabulary(tied, "x10")


@pytest.mark.parametrize("fill", ["mean", "zero"])
def test_rows_and_moments_of_new_tokens(tmp_path, fill):
    source = open_source(str(save_checkpoint(tmp_path / "ck")))
    out = tmp_path / "out"
    words = ["width", "--vocab", "+4", "--vocab-fill", fill, "--check", "64"]
    assert run([*words, str(tmp_path / "ck"), str(out)]) == 0
    grown = open_source(str(out))
    assert grown.model == source.model.change(vocab=SMALL.vocab + 4)
    for name in (HEAD, EMBEDDING):
        for slot in ("params", "mu", "nu"):
            old = source.tensors[slot][name].read()
            new = grown.tensors[slot][name].read()
            assert np.array_equal(new[:-4], old)
            zero = slot == "mu" or (slot == "params" and fill == "zero" and name == EMBEDDING)
            wanted = np.zeros(old.shape[1]) if zero else old.mean(0)
            np.testing.assert_allclose(new[-4:], np.tile(wanted, (4, 1)), atol=1e-6)
    assert grown.record == source.record
    assert run(["verify", str(tmp_path / "ck"), str(out)]) == 0


def test_a_directory_keeps_ids_and_tokenizer_and_says_what_is_not_exact(tmp_path, capsys):
    save_directory(tmp_path / "hf")
    out = tmp_path / "out"
    words = ["depth", "--map", "3:4", "--method", "identity", "--vocab", "x64", "--check", "64"]
    assert run([*words, "--json", str(tmp_path / "hf"), str(out)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["pads"] == {"vocab": 128} and said["sizes"]["after"]["layer"] == 4
    bound = math.log1p(32 / 96)
    assert said["vocabulary"] == {
        "embedding": "mean",
        "head": "mean",
        "bias": False,
        "loss": bound,
    }
    assert said["function"] == (
        f"not exact: new tokens raise the loss of old ones by up to {bound:.1e} nats"
    )
    assert 0 < said["check"]["shift"]["measured"] <= said["check"]["shift"]["bound"] == bound
    files = contents_of(out)
    assert all(files[name] == content for name, content in BESIDE.items())
    assert json.loads(files["config.json"])["vocab_size"] == 128
    assert run(["inspect", str(out)]) == 0
    assert "vocab 96 -> 128" in capsys.readouterr().out
    assert run(["verify", str(tmp_path / "hf"), str(out)]) == 0
    assert run(["diff", str(tmp_path / "hf"), str(out)]) == 1
    # The same rows again from the lineage, and other ones are noticed.
    capsys.readouterr()
    entry = json.loads(files["lineage.json"])
    entry[0]["vocabulary"]["embedding"] = "zero"
    (out / "lineage.json").write_text(json.dumps(entry))
    assert run(["verify", str(tmp_path / "hf"), str(out)]) == 1
    assert "embed_in.weight' of params differs" in capsys.readouterr().err


def test_a_plan_is_shown_and_nothing_written(tmp_path, capsys):
    save_directory(tmp_path / "hf")
    words = ["width", "--embed", "2x", "--vocab", "+32", "--dry-run"]
    assert run([*words, str(tmp_path / "hf"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "embed 32 -> 64" in said and "vocab 96 -> 128" in said
    assert "function    logits of old tokens preserved; not exact: new tokens raise" in said
    assert not (tmp_path / "out").exists()
    words = ["width", "--mlp", "2x", "--vocab", "x96", "--dry-run"]
    assert run([*words, str(tmp_path / "hf"), str(tmp_path / "out")]) == 0
    assert "the vocabulary stays: --vocab x96 is the source's 96" in capsys.readouterr().out


def test_grow_like_takes_the_vocabulary_by_its_option(tmp_path, capsys):
    save_directory(tmp_path / "hf")
    save_directory(tmp_path / "like", SMALL.change(vocab=128, mlp=96))
    words = [str(tmp_path / "hf"), str(tmp_path / "out")]
    assert run(["grow", "--like", str(tmp_path / "like"), *words]) == 2
    assert "the source has 96, the target 128; --vocab 128 grows it" in capsys.readouterr().err
    assert run(["grow", "--like", str(tmp_path / "like"), "--vocab", "128", *words]) == 0
    assert open_source(str(tmp_path / "out")).model.sizes["mlp"] == 96
    assert open_source(str(tmp_path / "out")).model.vocab == 128
    # Where nothing but the vocabulary differs, it grows alone.
    words = [str(tmp_path / "out"), str(tmp_path / "more")]
    assert run(["grow", "--like", str(tmp_path / "like"), "--vocab", "x100", *words]) == 0
    assert open_source(str(tmp_path / "more")).model.vocab == 200


def test_growth_in_memory_is_growth_on_disk(tmp_path):
    source = open_source(str(save_checkpoint(tmp_path / "ck")))
    plan = set_options(plan_vocabulary(source.model, "+5"))
    growkit.write_grown(source, plan, tmp_path / "out")
    disk = open_source(str(tmp_path / "out"))
    for slot in ("params", "mu", "nu"):
        tree = {"params": source.stack(slot)} if slot == "params" else {slot: source.stack(slot)}
        (grown,) = growkit.grow(tree, plan).values()
        assert np.array_equal(grown["embed_in"]["weight"], disk.stack(slot)["embed_in"]["weight"])


def test_a_measured_row_stays_below_on_text_that_did_not_find_it():
    """Hidden states with a common part, as trained models have, and others with none."""
    random = np.random.default_rng(0)
    head = random.normal(size=(100, 16))
    states = random.normal(size=(4000, 16))
    for common, reached in ((6.0, True), (0.0, False)):
        hidden = states + common * np.eye(16)[0]
        measured = solve_hidden(iter([hidden @ head.T]), head)
        assert measured.residual < 1e-5
        np.testing.assert_allclose(measured.hidden, hidden, atol=1e-4)
        row, loss = find_row(measured, head, 5)
        assert (loss <= TARGET) == reached
        assert np.linalg.norm(row) <= LARGEST * np.linalg.norm(head, axis=1).max()
        assert loss == pytest.approx(
            np.log1p(5 * np.exp((hidden @ row - log_sum(hidden @ head.T))[1::2])).mean(), rel=1e-3
        )
    # A cap bends logits, and no hidden state makes them.
    capped = 5 * np.tanh(hidden @ head.T / 5)
    assert solve_hidden(iter([capped]), head).residual > RESIDUAL


def test_a_measured_row_is_in_the_lineage_and_grows_in_width(tmp_path, capsys):
    save_directory(tmp_path / "hf")
    words = ["width", "--vocab", "+4", "--vocab-head", "measured", "--check", "64", "--json"]
    shifts = []
    for more in ([], ["--embed", "40", "--heads", "5"]):
        out = tmp_path / f"out{len(shifts)}"
        assert run([*words, *more, str(tmp_path / "hf"), str(out)]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["function"].startswith("measured: new tokens raise the loss of old ones by")
        assert said["vocabulary"]["head"] == "measured" and said["vocabulary"]["loss"] is None
        assert len(said["vocabulary"]["row"]["numbers"]) == SMALL.embed
        assert said["check"]["shift"]["bound"] is None
        shifts.append(said["check"]["shift"]["measured"])
        assert run(["verify", str(tmp_path / "hf"), str(out)]) == 0
        capsys.readouterr()
    assert shifts[1] == pytest.approx(shifts[0], rel=1e-3)
    entry = json.loads((out / "lineage.json").read_text())
    del entry[0]["vocabulary"]["row"]["numbers"][3]
    (out / "lineage.json").write_text(json.dumps(entry))
    assert run(["verify", str(tmp_path / "hf"), str(out)]) == 1
    assert "the row of new tokens has 31 numbers, not 32" in capsys.readouterr().err


def test_a_measured_row_is_refused_where_it_is_of_no_use(tmp_path, capsys):
    place = str(save_directory(tmp_path / "hf"))
    words = ["--vocab-head", "measured", "--dry-run", place, str(tmp_path / "out")]
    assert run(["width", "--mlp", "2x", *words]) == 2
    assert "goes with --vocab" in capsys.readouterr().err
    assert run(["width", "--vocab", "+1", "--vocab-head", "mesured", place, "out"]) == 2
    assert "did you mean 'measured'?" in capsys.readouterr().err


def test_jax_makes_the_rows_that_numpy_makes():
    """Under jit, with a bias in the head, and with embed padded."""
    import jax

    sizes = {"vocab": 20, "embed": 8}
    model = growkit.describe_model(
        """
        embed.kernel  vocab embed   normal  embedding
        norm.scale    embed         ones    norm
        head.kernel   vocab /embed  normal  head
        head.bias     vocab         zeros   bias
        """,
        sizes,
    )
    plans = [plan_width(model, embed=12), plan_vocabulary(model, "+6")]
    plan = combine_plans("grow", plans, model)
    tree = {
        "embed": {"kernel": np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)},
        "norm": {"scale": np.ones(8, np.float32)},
        "head": {
            "kernel": np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32),
            "bias": np.random.default_rng(2).normal(size=20).astype(np.float32),
        },
    }
    ours = growkit.grow(tree, plan)
    theirs = jax.jit(lambda tree: growkit.grow(tree, plan))(tree)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
    bias = ours["head"]["bias"]
    lower = math.log(20 / 6) + math.log(MARGIN)
    np.testing.assert_allclose(bias[20:], tree["head"]["bias"].mean() + lower, rtol=1e-5)


def test_copies_of_units_are_told_apart_by_other_pads_alone():
    """New tokens separate no copies, so the warning of tied copies stays."""
    wide = plan_width(SMALL, mlp="2x")
    both = combine_plans("width", [wide, plan_vocabulary(SMALL, "+8")], SMALL)
    assert both.tied_copies == wide.tied_copies == ("mlp",)
    assert not both.continues
