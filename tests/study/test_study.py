"""Studies: budgets are met, arithmetic by hand, every run the trainer's, nothing done twice."""

from __future__ import annotations

import copy
import json
import math
import signal
from dataclasses import replace

import pytest
import yaml
from runs import NO_DROPOUT, values

import trainer.study.course
from growkit.checkpoint.location import open_source
from growkit.cli import run as run_command
from growkit.errors import GrowkitError, UsageError
from trainer.log.history import METRICS, parse_rows, render_rows
from trainer.log.report import Result
from trainer.run.stages import train
from trainer.study import picture
from trainer.study.course import Course
from trainer.study.design import SCRATCH, Task
from trainer.study.evidence import read_study
from trainer.study.outcome import Crossing, FinishedRun, Outcome, compute_spread, find_crossing
from trainer.study.report import describe_best_arm, render_markdown, write_report
from trainer.study.section import read_design

STUDY = {
    "learning_rates": [1e-3, 4e-3],
    "seeds": [0, 1],
    "best": 1,
    "budgets": [1.0, 0.6],
    "sources": {
        "half": {"share": 0.2, "model": {"layer": 1}},
        "narrow": {"share": 0.25, "model": {"embed": 8, "head": 1, "mlp": 16}},
    },
    "arms": {
        "replicate": {"from": "half", "grow": {"map": "1:2"}},
        "clone": {
            "from": "narrow",
            "grow": {"embed": "2x", "noise": "0.1rms"},
            "learning_rates": [1e-3],
        },
    },
}


def nested(root, **changed):
    """A study of a model with two layers, twelve steps from scratch.

    changed: values in its study section by path, with __ between the keys.
    """
    section = copy.deepcopy(STUDY)
    for key, value in changed.items():
        node = section
        *parents, last = key.split("__")
        for parent in parents:
            node = node[parent]
        node[last] = value
    settings = values(
        root, dropout=NO_DROPOUT, batch={"accumulation": 1}, schedule={"steps": 12, "warmup": 2}
    )
    return settings | {"study": section}


@pytest.fixture(scope="module")
def file(data, tmp_path_factory):
    """The study's file, its paths absolute."""
    path = tmp_path_factory.mktemp("design") / "study.yaml"
    path.write_text(yaml.safe_dump(nested(data), sort_keys=False))
    return path


@pytest.fixture(scope="module")
def done(file, tmp_path_factory):
    """The study, run by the command."""
    out = tmp_path_factory.mktemp("study") / "out"
    assert run_command(["study", str(file), "--out", str(out)]) == 0
    return out


def finished(name, seed=0, rate=1.0, budget=None, flops=0.0, before=0.0, loss=0.0, tried=True):
    run = f"{name}-{seed}-{rate}-{budget}"
    return FinishedRun(name, seed, rate, budget, tried, 1, 1, flops, before, loss, 1.0, run)


def test_arms_and_their_sources_together_stay_within_the_budget(data):
    study = read_design(nested(data))
    assert study.budgets == (0.6, 1.0)
    for task in study.list_tasks(list(study.arms)):
        own = study.count_steps(task) * study.count_flops_per_step(task.name)
        before = sum(
            study.count_steps(Task(name, task.seed)) * study.count_flops_per_step(name)
            for name in study.list_sources(task.name)
        )
        wanted = study.sources[task.name].share if task.name in study.sources else task.budget
        trained = (task.name, *study.list_sources(task.name))
        # Each run's length is rounded to a step.
        slack = sum(study.count_flops_per_step(name) for name in trained) / 2
        assert abs(own + before - wanted * study.flops_of_scratch) <= slack


def test_noise_is_of_the_studys_seed(data):
    study = read_design(nested(data))
    for seed in (0, 1):
        values = study.build_values(Task("clone", seed, None, 1.0), 1e-3)
        assert values["grow"]["seed"] == seed
    stated = read_design(nested(data, arms__clone__grow={"embed": "2x", "noise": 0.1, "seed": 7}))
    assert stated.build_values(Task("clone", 1, None, 1.0), 1e-3)["grow"]["seed"] == 7


def test_a_source_is_cheaper_a_step_and_the_target_is_what_scratch_trains(data):
    study = read_design(nested(data))
    assert (
        study.count_flops_per_step("half")
        < study.count_flops_per_step("replicate")
        == study.count_flops_per_step(SCRATCH)
    )
    assert study.count_steps(Task("half", 0)) > 0.2 * study.count_steps(Task(SCRATCH, 0))
    assert study.arms["clone"].model.sizes == study.model.sizes


def test_all_runs_are_planned_before_the_first(data):
    study = read_design(nested(data))
    first = [task for task in study.list_tasks() if task.seed == 0]
    assert [t.name for t in first] == [SCRATCH] * 2 + ["half", "narrow"] + ["replicate"] * 3 + [
        "clone"
    ] * 2
    further = [t for t in study.list_tasks(["clone"]) if t.seed == 1]
    assert [t.name for t in further] == [SCRATCH, "narrow", "clone", "clone"]
    every = read_design(nested(data, best=0))
    assert {t.name for t in every.list_tasks() if t.seed == 1} == {
        SCRATCH,
        "half",
        "narrow",
        "replicate",
        "clone",
    }


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"arms__replicate__grow": {"map": "1:3"}}, "does not end in the model.*layer 3 and not 2"),
        ({"arms__replicate__grow": None}, "study.arms.replicate grows nothing"),
        ({"arms__replicate__from": "halve"}, "names a source.*did you mean 'half'"),
        (
            {"arms__replicate__grow": {"methods": "1:2"}},
            "study.arms.replicate: unknown key grow.methods",
        ),
        ({"arms__replicate__learning_rates": [1, 2, 3]}, "tries 3 learning rates and scratch 2"),
        ({"arms__replicate__optimizer": {"learning_rate": 1.0}}, "learning_rates"),
        ({"sources__half__share": 1.5}, "above 0 and below 1, got 1.5"),
        ({"sources__half__share": 0.5}, "replicate with a budget of 0.6.*sources take 0.5"),
        ({"sources__half__model": {"layers": 1}}, "half: unknown key model.layers"),
        (
            {"sources__half__model": {"layer": 1, "context": 8}},
            "unknown key study.sources.half.model.context",
        ),
        ({"sources__half__grow": {"map": "1:2"}}, "unknown key study.sources.half.grow"),
        ({"arms__replicate__batch": {"sequences": 8}}, "unknown key study.arms.replicate.batch"),
        ({"arms__replicate__model": {"layer": 4}}, "unknown key study.arms.replicate.model"),
        (
            {"arms__replicate__schedule": {"steps": 8}},
            "study.arms.replicate.schedule.steps: budgets",
        ),
        (
            {"arms__replicate__schedule": {"continued": True}},
            "study.arms.replicate.schedule.continued",
        ),
        ({"arms__replicate__grow": {"map": "1:2", "at": 3}}, "study.arms.replicate: grow.at"),
        ({"arms__replicate__from": ["half"]}, "names a source.*got .'half'"),
        ({"arms__clone__against": ["replicate"]}, "names another arm"),
        ({"sources": {50: STUDY["sources"]["half"]}}, "a name must be text"),
        ({"budgets": [math.inf]}, "budgets must be a list of different numbers above 0"),
        ({"seeds": [0, 1.5]}, "seeds must be a list of different whole numbers"),
        ({"budgets": [0.2]}, "replicate with a budget of 0.2"),
        ({"seeds": [0, 0]}, "seeds must be a list of different whole numbers"),
        ({"learning_rates": [-1.0]}, "learning_rates must be a list of different numbers above 0"),
        ({"best": "two"}, "study.best must be a number of arms"),
        ({"arms": {"scratch": STUDY["arms"]["replicate"]}}, "'scratch' is given twice"),
        ({"arms": {"a/b": STUDY["arms"]["replicate"]}}, "letters, digits"),
        ({"arms": {}}, "study.arms must be a section"),
        ({"arms__clone__against": "replicates"}, "names another arm.*did you mean 'replicate'"),
        ({"arms__clone__against": "clone"}, "names another arm, got 'clone'"),
        ({"seed": 1}, "unknown key study.seed.*did you mean 'seeds'"),
    ],
)
def test_what_cannot_be_compared_is_refused(data, changed, words):
    with pytest.raises(UsageError, match=words):
        read_design(nested(data, **changed))


def test_a_part_is_checked_with_the_values_that_it_lies_over(data):
    settings = nested(
        data, arms__replicate__dropout={"hidden": 0.1}, arms__replicate__schedule={"warmup": 1}
    )
    arm = read_design(settings | {"batch": {"sequences": 48, "accumulation": 3}}).build_values(
        Task("replicate", 0, None, 1.0), 1e-3
    )
    assert (
        arm["dropout"]["hidden"] == 0.1
        and arm["schedule"]["warmup"] == 1
        and arm["batch"]["sequences"] == 48
    )


def test_growth_in_stages_counts_all_its_sources(data):
    settings = nested(data)
    settings["model"]["layer"] = 4
    section = settings["study"]
    section["sources"] = {
        "first": {"share": 0.1, "model": {"layer": 1}},
        "second": {"from": "first", "share": 0.15, "grow": {"map": "1:2"}},
    }
    section["arms"] = {"twice": {"from": "second", "grow": {"map": "2:4"}}}
    study = read_design(settings | {"schedule": {"steps": 40, "warmup": 2}})
    assert study.list_sources("twice") == ["first", "second"]
    assert study.sum_shares("twice") == pytest.approx(0.25)
    names = [task.name for task in study.list_tasks() if task.seed == 0]
    assert names == [SCRATCH] * 2 + ["first", "second"] + ["twice"] * 3
    end = Task("twice", 0, None, 1.0)
    steps = 0.75 * study.flops_of_scratch / study.count_flops_per_step("twice")
    assert study.count_steps(end) == round(steps)


def test_a_study_needs_its_section_and_a_model(data):
    settings = nested(data)
    with pytest.raises(UsageError, match="has no study section"):
        read_design({key: value for key, value in settings.items() if key != "study"})
    with pytest.raises(UsageError, match="needs a model section"):
        read_design({key: value for key, value in settings.items() if key != "model"})
    with pytest.raises(UsageError, match="no grow section of its own"):
        read_design(settings | {"grow": {"map": "1:2"}})


def test_compute_to_a_loss_by_hand():
    points = [(400.0, 3.0), (100.0, 4.0), (200.0, 3.5)]
    assert find_crossing(points, 4.5) == Crossing(100.0, at_most=True)
    assert find_crossing(points, 3.75).flops == pytest.approx(100 * math.sqrt(2))
    longest = find_crossing(points, 3.0)
    assert longest.flops == pytest.approx(400.0)
    assert not longest.at_most
    assert find_crossing(points, 2.9) is None and find_crossing([], 1.0) is None
    assert find_crossing([(1.0, math.inf), (2.0, 4.0), (4.0, 3.0)], 3.0) == Crossing(
        pytest.approx(4.0), at_most=False
    )


def test_spread_by_hand():
    assert compute_spread([1.0, 3.0]).mean == 2.0
    assert compute_spread([1.0, 3.0]).std == pytest.approx(math.sqrt(2))
    assert compute_spread([1.0]).std is None
    assert compute_spread([1.0, None]).mean is None and compute_spread([]).mean is None


def test_a_report_can_be_made_after_the_first_run(data, tmp_path):
    known = Outcome(read_design(nested(data)), [finished(SCRATCH, 0, 1e-3, 1.0, 100.0, loss=3.2)])
    write_report(known, tmp_path, picture=False)
    table = (tmp_path / "report.md").read_text()
    assert "| scratch |" in table and "| replicate |" not in table and "No arm reached" in table
    assert read_study(str(tmp_path)).arms[0].saved.mean is None


@pytest.fixture
def outcome(data):
    """Scratch reaches 3.0 with 100 FLOPs; replicate with 60, of which its source takes 20."""
    runs = [
        finished(SCRATCH, 0, 1e-3, 1.0, 100.0, loss=3.2),
        finished(SCRATCH, 0, 4e-3, 1.0, 100.0, loss=3.0),
        finished("half", 0, 4e-3, None, 20.0, loss=4.0, tried=False),
        finished("narrow", 0, 4e-3, None, 25.0, loss=4.0, tried=False),
        finished("replicate", 0, 1e-3, 0.6, 40.0, 20.0, loss=3.0),
        finished("replicate", 0, 4e-3, 0.6, 40.0, 20.0, loss=3.1),
        finished("replicate", 0, 1e-3, 1.0, 80.0, 20.0, loss=2.9, tried=False),
        finished("clone", 0, 1e-3, 0.6, 35.0, 25.0, loss=3.3),
        finished("clone", 0, 1e-3, 1.0, 75.0, 25.0, loss=3.1, tried=False),
    ]
    return Outcome(read_design(nested(data)), runs)


def test_saving_by_hand_counted_both_ways(outcome):
    assert outcome.find_best_rate(SCRATCH) == 4e-3 and outcome.find_best_rate("replicate") == 1e-3
    assert outcome.compute_saving("replicate", 0) == pytest.approx(0.4)
    assert outcome.compute_saving("replicate", 0, sources=False) == pytest.approx(0.6)
    assert outcome.compute_saving("clone", 0) is None
    assert outcome.choose_best_arms() == ["replicate"]
    report = outcome.summarize()
    replicate, clone = report["arms"]
    assert (
        replicate["saved"] == {"mean": pytest.approx(0.4), "std": None, "runs": 1}
        and replicate["at_least"]
    )
    assert replicate["ahead"]["mean"] == pytest.approx(0.1) and not clone["reached"]
    assert clone["saved"]["mean"] is None and "not reached" in render_markdown(outcome, report)
    assert "replicate, saves at least 40.0 % (1) of" in describe_best_arm(report)


def test_the_picture_names_the_best_arm_and_begins_after_the_fall(outcome, tmp_path, monkeypatch):
    from matplotlib import pyplot

    assert picture.label_arms(outcome) == {
        "replicate": "replicate: 2.9000 (best: saves at least 40%)",
        "clone": "clone: 3.1000",
    }
    assert len(set(map(str, picture.choose_colours(30)))) == 30
    columns = "step,tokens,flops,loss,validation_loss,event\n"
    way = "".join(f"{n},{n},{n}.0,,{6 - n / 33},\n" for n in (0, 1, 50, 90, 100))
    run = outcome.select_runs(SCRATCH)[-1].run
    (tmp_path / "runs" / run).mkdir(parents=True)
    (tmp_path / "runs" / run / "metrics.csv").write_text(columns + way)
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    picture.draw_study(outcome, tmp_path)
    monkeypatch.undo()
    left, right = drawn[0].axes
    assert (tmp_path / "study.png").stat().st_size > 5_000
    # The loss at 1 FLOP is far above all that runs end with.
    assert left.get_xlim()[0] > 30 and left.get_ylim()[1] < 3.5
    ticks = [tick for tick in left.xaxis.get_major_locator().tick_values(0, 1)]
    low, high = left.get_xlim()
    gaps = [math.log(b / a) for a, b in zip(ticks, ticks[1:], strict=False)]
    assert len(ticks) > 1 and min(gaps) >= math.log(high / low) / 9 - 1e-9
    assert "replicate: 2.9000 (best: saves at least 40%)" in right.get_legend_handles_labels()[1]
    pyplot.close(drawn[0])
    # Where no arm reaches the loss from scratch, the one with the lowest loss is named.
    outcome.runs = [replace(r, loss=r.loss + (r.name == "replicate")) for r in outcome.runs]
    assert picture.label_arms(outcome)["clone"] == "clone: 3.1000 (lowest loss)"


@pytest.mark.parametrize(
    ("third", "words"), [(3.1, "better"), (3.05, "within the spread"), (None, "too few seeds")]
)
def test_arms_are_told_apart_by_their_spread(data, third, words):
    """By hand: three times -0.3; then -0.3, -0.3, -0.05: mean -0.217, standard deviation 0.144."""
    study = read_design(
        nested(data, budgets=[1.0], seeds=[0, 1, 2], best=0, arms__clone__against="replicate")
    )
    runs = []
    for seed, (one, other) in enumerate(
        ((3.0, 3.3), (3.1, 3.4), (third, 3.4 if third == 3.1 else 3.1))
    ):
        if one is None:
            continue
        runs += [
            finished(SCRATCH, seed, 1e-3, 1.0, 100.0, loss=3.0, tried=seed == 0),
            finished("replicate", seed, 1e-3, 1.0, 80.0, 20.0, loss=other, tried=seed == 0),
            finished("clone", seed, 1e-3, 1.0, 75.0, 25.0, loss=one, tried=seed == 0),
        ]
    outcome = Outcome(study, runs)
    assert outcome.compare_arms("replicate") is None
    assert words in render_markdown(outcome, outcome.summarize())


def test_the_sources_compute_makes_the_difference(outcome):
    """The sibling: with sources that cost nothing, both savings are equal."""
    outcome.runs = [replace(run, flops_before=0.0) for run in outcome.runs]
    assert (
        outcome.compute_saving("replicate", 0)
        == outcome.compute_saving("replicate", 0, sources=False)
        != pytest.approx(0.4)
    )


def test_a_source_beyond_the_share_is_not_in_the_headline(data, outcome):
    outcome.study = read_design(nested(data, sources__half__share=0.3))
    report = outcome.summarize()
    assert not report["arms"][0]["within_share"] and outcome.choose_best_arms() == ["clone"]
    outcome.study = read_design(nested(data, sources__half__share=0.3, best=0))
    assert outcome.choose_best_arms() == ["replicate", "clone"]
    assert describe_best_arm(report).startswith("No arm")
    assert "not in the headline" in render_markdown(outcome, report)


def test_a_study_from_end_to_end(done):
    results = json.loads((done / "results.json").read_text())
    runs = results["runs"]
    counts = {
        name: sum(run["name"] == name for run in runs)
        for name in (SCRATCH, "half", "narrow", "replicate", "clone")
    }
    best = max(results["arms"], key=lambda arm: arm["loss"]["runs"])
    assert (
        best["loss"]["runs"] == 2
        and counts[SCRATCH] == 3
        and counts["half"] + counts["narrow"] == 3
    )
    assert all(math.isfinite(run["loss"]) for run in runs)
    for file in ("report.md", "runs.csv", "study.png"):
        assert (done / file).stat().st_size
    assert len((done / "runs.csv").read_text().splitlines()) == 1 + len(runs)
    study = read_study(str(done))
    assert [arm.name for arm in study.arms] == [
        "replicate",
        "clone",
    ] and study.source_tokens < study.tokens


def test_the_ledger_is_the_trainers_own(done):
    """FLOPs and losses as each run's own metrics have them, its sources' included."""
    for run in json.loads((done / "results.json").read_text())["runs"]:
        last = [
            row
            for row in parse_rows((done / "runs" / run["run"] / "metrics.csv").read_text())
            if row["validation_loss"]
        ][-1]
        assert float(last["flops"]) == pytest.approx(run["flops"] + run["flops_before"], rel=1e-12)
        assert float(last["validation_loss"]) == run["loss"]


def test_models_worth_evaluating_are_kept_and_the_others_are_not(done):
    results = json.loads((done / "results.json").read_text())
    kept = {path.parent.name for path in done.glob("runs/*/checkpoints")}
    rates = {arm["name"]: arm["learning_rate"] for arm in results["arms"]} | {
        SCRATCH: results["scratch"]["learning_rate"]
    }
    last = [run for run in results["runs"] if (run["seed"], run["budget"]) == (0, 1.0)]
    ends = {run["run"] for run in last if run["learning_rate"] == rates[run["name"]]}
    sources = {run["run"] for run in results["runs"] if run["budget"] is None}
    assert kept == ends | sources
    assert open_source(str(done / "runs" / min(ends))).model.layer == 2


def test_an_arms_run_is_what_the_train_verb_does(done, data, tmp_path):
    """And another learning rate is another run."""
    run = next(
        r for r in json.loads((done / "results.json").read_text())["runs"] if r["name"] == "clone"
    )
    kept = json.loads((done / "runs" / run["run"] / "result.json").read_text())
    result = train(kept["values"], tmp_path / "run", str(done / "runs" / kept["from"]))
    assert result.validation_loss == run["loss"]
    other = train(
        kept["values"] | {"optimizer": {"learning_rate": 2e-3}},
        tmp_path / "other",
        str(done / "runs" / kept["from"]),
    )
    assert other.validation_loss != run["loss"]


class Stopping:
    """train that is stopped by a signal in one run, halfway, and counts its calls."""

    def __init__(self, monkeypatch, at):
        self.calls, self.at = 0, at
        self.monkeypatch = monkeypatch

    def __call__(self, values, out, start=None, show=None):
        self.calls += 1
        if self.calls == self.at:
            row = trainer.study.course.RunProgress.show_row

            def stop(display, step, *metrics):
                signal.raise_signal(signal.SIGTERM)
                row(display, step, *metrics)

            with self.monkeypatch.context() as patch:
                patch.setattr(trainer.study.course.RunProgress, "show_row", stop)
                return train(values, out, start, show=show)
        return train(values, out, start, show=show)


def test_a_study_that_was_stopped_goes_on_and_gives_the_same(
    done,
    file,
    data,
    tmp_path,
    monkeypatch,
):
    study = read_design(nested(data) | {"log": {"every": 1}})
    whole = json.loads((done / "results.json").read_text())
    stopping, known = Stopping(monkeypatch, at=5), []
    course = Course(study, tmp_path / "out", stopping, known.append)
    assert course.go() == signal.SIGTERM and stopping.calls == 5
    resumed = Course(study, tmp_path / "out", Stopping(monkeypatch, at=0), known.append)
    assert resumed.go() is None
    assert resumed.train.calls == len(whole["runs"]) - 4 and len(known) == 4 + len(whole["runs"])
    losses = [(run.name, run.seed, run.loss) for run in resumed.outcome.runs]
    assert losses == [(run["name"], run["seed"], run["loss"]) for run in whole["runs"]]


def test_by_the_command_a_study_that_exists_needs_resume(done, file, capsys):
    assert run_command(["study", str(file), "--out", str(done)]) == 2
    assert "--resume continues" in capsys.readouterr().err
    before = (done / "results.json").read_bytes()
    assert run_command(["study", str(file), "--out", str(done), "--resume"]) == 0
    assert (done / "results.json").read_bytes() == before
    assert (
        run_command(["study", str(file), "batch.sequences=2", "--out", str(done), "--resume"]) == 2
    )
    assert "other values" in capsys.readouterr().err


class Pretended:
    """train without training, which does not stay finite where it is told so."""

    def __init__(self, diverges):
        self.diverges = diverges

    def __call__(self, values, out, start=None, show=None):
        out.mkdir(parents=True, exist_ok=True)
        (out / METRICS).write_text(render_rows([]))
        if self.diverges(out.name):
            raise trainer.study.course.DivergenceError("step 3 is not finite")
        return Result(12, None, 3.0 + len(out.name) / 1e4)


def course_of(data, out, diverges):
    return Course(
        read_design(nested(data)),
        out,
        Pretended(diverges),
        lambda known: write_report(known, out, picture=False),
    )


@pytest.mark.parametrize("what", ["lr0.004", "clone-seed1", "scratch-seed1", "clone"])
def test_a_run_that_diverges_is_a_run_and_not_the_end(data, tmp_path, what):
    course = course_of(data, tmp_path, lambda name: what in name)
    assert course.go() is None
    write_report(course.outcome, tmp_path)
    lost = [run for run in course.outcome.runs if math.isinf(run.loss)]
    assert lost and course.outcome.find_best_rate(SCRATCH) == 1e-3
    assert all(
        run["loss"] is None or run["loss"] > 0
        for run in json.loads((tmp_path / "results.json").read_text())["runs"]
    )
    again = course_of(data, tmp_path, lambda name: pytest.fail("nothing is done again"))
    assert again.go() is None and again.outcome.runs == course.outcome.runs
    assert all(again._is_done(task) for task in again.tasks) and again.progress.left == 0


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("scratch-seed0", "no run from scratch stayed finite at any learning rate .0.001, 0.004.;"),
        ("half", "a source needs"),
    ],
)
def test_a_study_without_a_baseline_or_a_source_ends_with_a_sentence(data, tmp_path, what, words):
    with pytest.raises(GrowkitError, match=words):
        course_of(data, tmp_path, lambda name: what in name).go()


def test_a_signal_at_the_end_of_a_run_ends_the_study_after_it(data, tmp_path):
    class Told(Pretended):
        def __call__(self, values, out, start=None, show=None):
            return replace(super().__call__(values, out, start, show), heard=signal.SIGTERM)

    told = Told(lambda name: False)
    course = Course(read_design(nested(data)), tmp_path, told, lambda known: None)
    assert course.go() == signal.SIGTERM and len(course.outcome.runs) == 1
    assert course_of(data, tmp_path, lambda name: name == "scratch-seed0-lr0.001").go() is None


def test_ties_at_the_shortest_run_are_broken_by_its_loss(outcome):
    """Both reach it there, replicate by a step less; clone is the lower."""
    at = {"replicate": (40.0, 2.99), "clone": (35.2, 2.5)}
    outcome.runs = [
        replace(run, flops=at[run.name][0], loss=at[run.name][1]) if run.budget == 0.6 else run
        for run in outcome.runs
    ]
    assert outcome.compute_saving("replicate", 0) > outcome.compute_saving("clone", 0)
    assert outcome.choose_best_arms() == ["clone"]


def late(data, **changed):
    """A study whose only arm goes on at its source's rate, held against two ways from scratch."""
    sources = {"one": {"steps": 0.5, "model": {"layer": 1}, "schedule": {"kind": "constant"}}}
    arm = {
        "from": "one",
        "learning_rates": "source",
        "grow": {"map": "1:2"},
        "schedule": {"warmup": 0},
    }
    ways = {"cosine": None, "wsd": {"schedule": {"kind": "wsd", "decay": 0.5}}}
    stated = {"scratch": ways, "sources": sources, "arms": {"late": arm}}
    return nested(data, **stated, best=0, **changed)


class Remembered(Pretended):
    """train without training that remembers the configuration of every run."""

    def __init__(self):
        super().__init__(lambda name: False)
        self.seen = {}

    def __call__(self, values, out, start=None, show=None):
        self.seen[out.name] = values
        result = super().__call__(values, out, start, show)
        # The other way at the higher rate is the best of four tries.
        best = "wsd" in out.name and "lr0.004" in out.name
        return replace(result, validation_loss=2.0) if best else result


def test_growth_goes_on_at_the_sources_rate_against_the_best_way_from_scratch(data, tmp_path):
    remembered = Remembered()
    study = read_design(late(data))
    course = Course(study, tmp_path, remembered, lambda known: None)
    assert course.go() is None
    names = list(remembered.seen)
    assert names[:4] == [
        f"scratch-{way}-seed0-lr{rate:g}" for way in ("cosine", "wsd") for rate in (1e-3, 4e-3)
    ]
    # Further seeds train the best way at its rate alone; a source takes the rate of that way.
    assert [name for name in names if name.startswith("scratch") and "seed1" in name] == [
        "scratch-wsd-seed1-lr0.004"
    ]
    for seed in (0, 1):
        arm = remembered.seen[f"late-seed{seed}-lr0.004-budget1"]
        assert arm["optimizer"]["learning_rate"] == 4e-3
        assert remembered.seen[f"one-seed{seed}-lr0.004"]["schedule"]["steps"] == 6
        wsd = remembered.seen["scratch-wsd-seed0-lr0.004"]["schedule"]
        assert (wsd["kind"], wsd["decay"]) == ("wsd", 0.5)
    assert remembered.seen["scratch-cosine-seed0-lr0.004"]["schedule"].get("kind") is None
    outcome = course.outcome
    assert outcome.select_runs(SCRATCH)[0].way == "wsd"
    assert [outcome.compute_saving("late", seed) for seed in (0, 1)] == [None, None]
    time = study.find_growth_time("late", 1.0)
    assert time == 6 / (6 + study.count_steps(Task("late", 0, None, 1.0)))
    report = render_markdown(outcome, outcome.summarize())
    assert "cosine 0.001, 0.004; wsd 0.001, **0.004**" in report
    assert "0.004, its source's" in report and f"to {time:.2f}" not in report
    assert f"{time:.2f} to" in report


def test_a_late_study_that_was_stopped_repeats_nothing(data, tmp_path):
    study = read_design(late(data))
    assert Course(study, tmp_path, Remembered(), lambda known: None).go() is None
    again = Course(study, tmp_path, pytest.fail, lambda known: None)
    assert again.go() is None and again.progress.left == 0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sources__one__share": 0.2}, "one has a share and steps; give one of them"),
        ({"sources__one__steps": 1.5}, "share of the from-scratch steps.*got 1.5"),
        ({"scratch__wsd__schedule": {"steps": 3}}, "study.scratch.wsd.schedule.steps"),
        ({"scratch__wsd__model": {"layer": 3}}, "unknown key study.scratch.wsd.model"),
        ({"scratch__wsd__optimizer": {"learning_rate": 1.0}}, "every way tries the rates of"),
        ({"scratch__a/b": {"schedule": {"kind": "wsd"}}}, "study.scratch: a name must be text"),
        ({"arms__late__learning_rates": "sources"}, "learning_rates must be a list"),
    ],
)
def test_a_late_study_that_cannot_be(data, changed, words):
    settings = late(data)
    for key, value in changed.items():
        node = settings["study"]
        *parents, last = key.split("__")
        for parent in parents:
            node = node[parent]
        node[last] = value
    with pytest.raises(UsageError, match=words):
        read_design(settings)


def test_a_control_is_its_source_trained_on_for_the_same_compute(data, tmp_path):
    control = {"from": "half", "control": True, "learning_rates": [1e-3]}
    study = read_design(nested(data, arms__small=control))
    remembered = Remembered()
    course = Course(study, tmp_path, remembered, lambda known: None)
    assert course.go() is None
    small = remembered.seen["small-seed1-lr0.001-budget1"]
    assert small["model"]["layer"] == 1 and "grow" not in small
    for name in ("small", "replicate"):
        spent = study.count_flops(Task(name, 0, None, 1.0)) + study.count_flops(Task("half", 0))
        assert abs(spent - study.flops_of_scratch) <= study.count_flops_per_step(SCRATCH)
    # It takes all seeds, is not one of the `best` arms, and is no candidate for the headline.
    assert course.outcome.choose_best_arms()[1:] == ["small"]
    results = course.outcome.summarize()
    assert "small, saves" not in describe_best_arm(results)
    assert "| small | half, 20% | not grown |" in render_markdown(course.outcome, results)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"arms__replicate__control": True}, "replicate is a control, which does not grow"),
        ({"arms__replicate__control": "yes"}, "control must be true or false, got 'yes'"),
    ],
)
def test_a_control_that_cannot_be(data, changed, words):
    with pytest.raises(UsageError, match=words):
        read_design(nested(data, **changed))
