"""Growth at the start of a run: its multipliers, and the check of the first validation."""

from __future__ import annotations

import numpy as np
import pytest
from runs import TINY, recipe, rows, state_of, values

from growkit.checkpoint.location import open_source, write_output
from growkit.errors import GrowkitError, UsageError
from growkit.growth.plan import set_options
from growkit.growth.vocabulary import plan_vocabulary
from growkit.growth.width import plan_width
from growkit.lineage import Lineage
from growkit.surgery.grow import prepare_growth
from trainer.data.tokens import TokenWriter
from trainer.run.growth import compare_with_source
from trainer.run.stages import train


@pytest.fixture(scope="module")
def wide(small, tmp_path_factory):
    """The same with twice the width, on disk."""
    source = open_source(str(small))
    out = tmp_path_factory.mktemp("wide") / "grown"
    write_output(
        out, "checkpoint", prepare_growth(source, plan_width(source.model, embed="2x")), [source]
    )
    return out


@pytest.mark.parametrize(
    "section",
    [
        {"map": "2:3"},
        {"embed": "2x"},
        {"map": "2:3", "embed": 40, "seed": 3, "vocab": "x96"},
    ],
)
def test_growth_at_start_is_growth_on_disk(data, small, tmp_path, section):
    from trainer.config.sections import resolve
    from trainer.run.growth import plan_growth

    source = open_source(str(small))
    plan = plan_growth(resolve({"grow": section}).grow, source.model)
    write_output(tmp_path / "grown", "checkpoint", prepare_growth(source, plan), [source])
    train(recipe(data), tmp_path / "disk", str(tmp_path / "grown"))
    train(recipe(data, grow=section), tmp_path / "start", str(small))
    ours, theirs = state_of(tmp_path / "start"), state_of(tmp_path / "disk")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert open_source(str(tmp_path / "start")).model == plan.grown
    # The same command again finds the run finished; another growth is another run.
    assert train(recipe(data, grow=section), tmp_path / "start", str(small)).signal is None
    with pytest.raises(UsageError, match=r"grow.map \(.* then, 2:4 now\)"):
        train(recipe(data, grow=section | {"map": "2:4"}), tmp_path / "start", str(small))


def test_the_vocabulary_grows_alone_and_with_others():
    from trainer.config.sections import resolve
    from trainer.run.growth import plan_growth

    def grow(**section):
        return plan_growth(resolve({"grow": section}).grow, TINY)

    alone = grow(vocab="+16")
    assert (alone.grown.vocab, alone.pads, alone.maps) == (80, {"vocab": 80}, {})
    deep = grow(vocab="x64", map="2:3")
    assert (deep.grown.vocab, deep.grown.layer) == (64, 3)
    assert deep.notes[-1] == "the vocabulary stays: --vocab x64 is the source's 64"


def losses(out):
    return [float(row["loss"]) for row in rows(out) if row["loss"]]


def test_an_exactly_widened_model_goes_on_as_the_small_one_would(data, small, wide, tmp_path):
    schedule = {"schedule": {"steps": 24, "continued": True}}
    train(recipe(data, **schedule), tmp_path / "small", str(small))
    for setting in ("auto", "on", "off"):
        train(
            recipe(data, optimizer={"multipliers": setting}, **schedule),
            tmp_path / setting,
            str(wide),
        )
    np.testing.assert_allclose(losses(tmp_path / "auto"), losses(tmp_path / "small"), rtol=2e-4)
    assert losses(tmp_path / "on") == losses(tmp_path / "auto")
    assert np.abs(np.subtract(losses(tmp_path / "off"), losses(tmp_path / "small"))).max() > 1e-2
    assert open_source(str(tmp_path / "auto")).lineage[-1]["multipliers"] is True
    assert open_source(str(tmp_path / "off")).lineage[-1]["multipliers"] is False


def test_a_schedule_begins_again_unless_it_is_continued(data, wide, tmp_path):
    train(recipe(data), tmp_path / "again", str(wide))
    train(recipe(data, schedule={"continued": True}), tmp_path / "on", str(wide))
    assert (
        state_of(tmp_path / "again")["schedule_step"],
        state_of(tmp_path / "on")["schedule_step"],
    ) == (12, 24)


def test_multipliers_stay_when_a_run_is_trained_on(data, wide, tmp_path):
    train(recipe(data), tmp_path / "first", str(wide))
    train(recipe(data), tmp_path / "second", str(tmp_path / "first"))
    train(
        recipe(data, optimizer={"multipliers": "off"}),
        tmp_path / "without",
        str(tmp_path / "first"),
    )
    train(recipe(data), tmp_path / "later", str(tmp_path / "without"))
    applied = [
        open_source(str(tmp_path / name)).lineage[-1]["multipliers"]
        for name in ("second", "without", "later")
    ]
    assert applied == [True, False, False]


def test_the_first_validation_is_the_sources(data, small, wide, tmp_path, capsys):
    train(recipe(data), tmp_path / "run", str(wide))
    assert "growth was exact: the source's validation loss was" in capsys.readouterr().err
    source = open_source(str(small))
    plan = plan_width(source.model, embed="2x")
    contents = prepare_growth(source, plan)
    contents.config["layer_norm_eps"] = 10.0
    write_output(tmp_path / "broken", "checkpoint", contents, [source])
    with pytest.raises(
        GrowkitError, match="growth was exact, but the validation loss went from .* --allow-gap"
    ):
        train(recipe(data), tmp_path / "refused", str(tmp_path / "broken"))
    train(recipe(data), tmp_path / "refused", str(tmp_path / "broken"), allow_gap=True)
    # Of another number of windows the source's are taken for the comparison.
    others = recipe(data, eval={"windows": 5})
    train(others, tmp_path / "others", str(wide))
    words = capsys.readouterr().err
    count = recipe(data)["eval"]["windows"]
    assert "this one's is " in words and f", on its {count} windows" in words
    with pytest.raises(GrowkitError, match="growth was exact, but the validation loss went from"):
        train(others, tmp_path / "others_refused", str(tmp_path / "broken"))
    train(recipe(data, data={"held_out": 0.4}), tmp_path / "other_data", str(wide))
    assert "no validation loss on these windows" in capsys.readouterr().err
    lineage = Lineage.read(open_source(str(wide)).lineage)
    words = compare_with_source(lineage, 1.0, {}, "", 0.0)
    assert words == "growth was exact; the source has no validation loss to compare with"


def test_new_tokens_are_trained(small, tmp_path, capsys):
    """Text with ids that only the grown model has; its first loss is not held to the source's."""
    source = open_source(str(small))
    plan = plan_vocabulary(source.model, "+16")
    write_output(tmp_path / "grown", "checkpoint", prepare_growth(source, plan), [source])
    ids = np.random.default_rng(3).integers(0, plan.grown.vocab, 4000)
    for name in ("text", "code"):
        (tmp_path / name).mkdir()
        with TokenWriter(tmp_path / name, plan.grown.vocab) as writer:
            writer.add(ids)
    with pytest.raises(UsageError, match="ids up to 79 occur, which need a vocabulary of 80"):
        train(recipe(tmp_path), tmp_path / "small", str(small))
    train(recipe(tmp_path), tmp_path / "run", str(tmp_path / "grown"))
    assert "growth was exact" not in capsys.readouterr().err
    trained = open_source(str(tmp_path / "run"))
    assert trained.model == plan.grown
    before = open_source(str(tmp_path / "grown")).tensors["params"]
    for name in ("embed_out.weight", "gpt_neox.embed_in.weight"):
        if name in before:
            new = trained.tensors["params"][name].read()[-16:]
            assert np.abs(new - before[name].read()[-16:]).max() > 1e-4
            # Rows that began alike are told apart by their tokens.
            assert len(np.unique(new, axis=0)) == 16


def test_copies_that_stay_equal_are_told_of(data, small, wide, tmp_path, capsys):
    train(recipe(data), tmp_path / "tied", str(wide))
    assert (
        "the copies of embed, head, mlp have equal gradients and dropout is 0"
        in capsys.readouterr().err
    )
    train(recipe(data, dropout={"hidden": 0.1}), tmp_path / "dropout", str(wide))
    grow = {"embed": "2x", "noise": "0.1rms", "rates": "mup"}
    train(recipe(data, grow=grow), tmp_path / "noise", str(small))
    said = capsys.readouterr().err
    assert "equal gradients" not in said
    assert "growth with rates=mup, which is approximate: learning rates, eps and clip" in said


def test_noise_is_not_exact_continuation(small):
    source = open_source(str(small))
    plan = set_options(plan_width(source.model, embed="2x"), noise=0.1)
    assert plan.preserved and not plan.continues


@pytest.mark.parametrize(
    "section,said",
    [
        ({"noise": 0.1}, "has options but no growth"),
        ({"embed": "2x", "noise": "0.5rsm"}, "as 0.5rms; got '0.5rsm'"),
        ({"map": "3:4"}, "the source has 2"),
        ({"embed": "1x"}, "nothing grows"),
        ({"vocab": "x64"}, "nothing grows: --vocab x64 is the 64 tokens"),
        ({"vocab": 60}, "--vocab 60 is below the source's 64"),
        ({"vocab": "2x"}, "--vocab takes a number of tokens"),
        ({"depth_method": "stack"}, "has options but no growth"),
    ],
)
def test_growth_that_cannot_be_meant(data, small, tmp_path, section, said):
    with pytest.raises(UsageError, match=said):
        train(recipe(data, grow=section), tmp_path / "run", str(small))
    assert not (tmp_path / "run").exists()


def test_growth_needs_a_source(data, tmp_path):
    with pytest.raises(UsageError, match="--from"):
        train(values(data, grow={"map": "2:3"}), tmp_path / "run")
