"""How a run begins: everything that is settled before its first step, settled once.

    prepare   resolves, plans and checks what a command asks for; nothing is written yet
    begin     opens RUN and finds where to start: with a new model, a source, a checkpoint, or a
              checkpoint that is grown now

A run that grows on the way has two stages, one for each model; `begin` is called for each of
them. A stage starts in this order: the directory is locked and compared with the configuration,
the last checkpoint is found, the stage that it belongs to is chosen, and the state, the lineage,
the record and the files are taken from the checkpoint, from the source, or made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from etils import epath

from growkit.checkpoint.carried import is_carried_name
from growkit.checkpoint.location import open_source
from growkit.checkpoint.tensor import Source
from growkit.entries import Branch, Origin, Training
from growkit.errors import UsageError
from growkit.growth.plan import Plan
from growkit.lineage import Lineage
from growkit.models import require_trained
from growkit.models.architecture import Architecture
from growkit.surgery.grow import open_grown
from trainer.config.description import describe_sizes
from trainer.config.model import check_context, describe_differences
from trainer.config.rules import check_rules
from trainer.config.sections import (
    Config,
    Grow,
    Model,
    build_architecture,
    build_section,
    resolve,
    settle_sizes,
)
from trainer.data.corpus import Corpus, encode_alike, open_corpus
from trainer.devices.sharding import Layout, make_layout
from trainer.log.history import EARLIER, METRICS
from trainer.log.trace import Trace
from trainer.log.writers import Writers
from trainer.plan.memory import require_state_fit
from trainer.run.checkpoint import Snapshot, find_last_step
from trainer.run.damage import DamagedError, Trust, go_back
from trainer.run.directory import RunDirectory, open_run, read_run
from trainer.run.growth import (
    find_part,
    grow_config,
    is_growth_due,
    plan_growth,
    select_multipliers,
)
from trainer.run.soundness import take_state
from trainer.run.state import new_state
from trainer.run.tasks import TaskQuestions
from trainer.step.part import ALL, Part
from trainer.step.update import State, abstract_state, check_precision


@dataclass(frozen=True)
class Stage:
    """One model's part of a run, and the configuration it is trained by."""

    config: Config
    model: Architecture
    layout: Layout
    part: Part = ALL  # the parameters that are trained

    @classmethod
    def of(cls, config: Config, model: Architecture, part: Part = ALL) -> Stage:
        """The stage of a model. Raises UsageError where the model does not fit on the mesh."""
        return cls(config, model, make_layout(config, model), part)

    @classmethod
    def after(cls, growth: Plan, config: Config) -> Stage:
        """The stage after a growth on the way, of a run with this configuration."""
        return cls.of(grow_config(config, growth), growth.grown)

    @cached_property
    def like(self) -> State:
        """The shapes, dtypes and shardings of the training state."""
        return abstract_state(self.config, self.model, self.layout, self.part)


@dataclass(frozen=True)
class Setup:
    """A run as a command asks for it, resolved, planned and checked.

    start: --from, as given. source: the model there; None for a new model, and where RUN has a
    checkpoint already, which needs no source. growth: of the source, at the start. later_growth:
    on the way; `grown` is the stage after it. notes: what to tell of a run that begins anew.
    """

    out: epath.Path
    first: Stage
    data: Corpus
    questions: TaskQuestions
    writers: Writers
    trace: Trace
    start: str | None = None
    source: Source | None = None
    growth: Plan | None = None
    later_growth: Plan | None = None
    grown: Stage | None = None
    allow_gap: bool = False
    branch: Branch | None = None
    trust: Trust = Trust()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Beginning:
    """Where a loop begins: the only thing it is given.

    step: how many steps of the run are done. snapshot: what is trained on from there. resumed:
    whether the snapshot is a checkpoint of this run as it was saved. grows: whether a growth is
    still to come. source_record: the record of the model that this stage was made from, empty for
    a new or resumed one. notes: what to tell the user about how it was found.
    """

    setup: Setup
    stage: Stage
    directory: RunDirectory
    step: int
    snapshot: Snapshot
    resumed: bool
    grows: bool
    source_record: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def prepare(
    values: dict[str, Any],
    out: str | os.PathLike[str],
    start: str | None = None,
    allow_gap: bool = False,
    branch: Branch | None = None,
    trust: Trust | None = None,
) -> Setup:
    """Resolve a run's configuration values, plan its growths, and check all that can be checked.

    start: the source, None for a new model. allow_gap: train on where exact growth moved the
    validation loss. branch: what the lineage says of a run that began as a branch. Raises
    UsageError or GrowkitError; nothing is written.
    """
    config = resolve(values, takes_model=bool(start))
    config, source, growth = _choose_model(config, values, out, start)
    check_precision(config)
    model = build_architecture(config.model)
    first = Stage.of(config, model, find_part(config, model, source, growth, out))
    later_growth = plan_growth(config.grow, first.model) if config.grow.at else None
    # Where the grown model does not fit on the mesh, it is refused now and not at its step.
    grown = Stage.after(later_growth, config) if later_growth else None
    for stage in filter(None, (first, grown)):
        require_state_fit(stage.layout, stage.like)
    return Setup(
        out=epath.Path(out),
        first=first,
        data=open_corpus(config, source),
        questions=TaskQuestions(config.eval),
        writers=Writers(config),
        trace=Trace(config.log.profile, epath.Path(out)),
        start=start,
        source=source,
        growth=growth,
        later_growth=later_growth,
        grown=grown,
        allow_gap=allow_gap,
        branch=branch,
        trust=trust or Trust(),
        notes=describe_sizes(config, values, source.model if source else None, start or ""),
    )


def _choose_model(
    config: Config, values: Mapping[str, Any], out: str | os.PathLike[str], start: str | None
) -> tuple[Config, Source | None, Plan | None]:
    """The configuration with the model that is trained first, its source, its growth at the start.

    values: those that `config` was resolved from.
    """
    # `open_run` reads it again under the lock: another process may begin the run in between.
    stored = read_run(out)
    if not start:
        _require_model(values, config)
        return config, None, None
    if stored is not None and find_last_step(out) is not None:
        # The source may be gone by now. What was taken from it is in the run.
        return take_model(config, values, stored.config.model, start), None, None
    source = open_source(start)
    model = require_trained(source.model, start)
    growth = None if config.grow.at else plan_growth(config.grow, model)
    section = build_section(growth.grown if growth else model)
    return take_model(config, values, section, start), source, growth


def _require_model(values: Mapping[str, Any], config: Config) -> None:
    """Raise UsageError for a run without a source that has no model of its own, or grows none."""
    if config.grow != Grow() and not config.grow.at:
        raise UsageError(
            "the grow section grows the model of --from; give one, or say when in this run "
            "(grow.at)"
        )
    if not values.get("model"):
        raise UsageError(
            "there is no model to train: the configuration has no model section, and --from is "
            "not given"
        )


def take_model(config: Config, values: Mapping[str, Any], model: Model, origin: str) -> Config:
    """The configuration with a source's model, which the values may state too.

    values: the nested values that `config` was resolved from. Raises UsageError where they state
    another model; the context alone may differ.
    """
    stated = values.get("model") or {}
    words = describe_differences(stated, config.model, model)
    if words:
        raise UsageError(
            f"the configuration is for another model than {origin}: {words}; leave its model "
            f"section out to take the source's (the preset 'recipe' has none)"
        )
    if "context" in stated:
        check_context(build_architecture(model), config.model.context, origin)
        model = replace(model, context=config.model.context)
    check_rules(model, "model.")
    return settle_sizes(replace(config, model=model))


def begin(setup: Setup) -> Beginning:
    """Open RUN, and start where its last checkpoint says, or anew.

    Raises UsageError where RUN was begun otherwise, GrowkitError where another process trains
    into it, or a checkpoint cannot be read.
    """
    others = (setup.start, setup.source, setup.trust)
    directory = open_run(setup.out, setup.first.config, *others)
    try:
        setup.writers.connect(directory.path)
        return _begin_or_go_back(setup, directory)
    # KeyboardInterrupt too: RUN must not stay locked by a process that goes on, as a study's does.
    except BaseException:
        setup.writers.close()
        directory.unlock()
        raise


def _begin_or_go_back(setup: Setup, directory: RunDirectory) -> Beginning:
    """Start where the last checkpoint says, or the last whole one where that is asked for."""
    notes = directory.notes
    try:
        beginning = _begin_in(setup, directory)
    except DamagedError as problem:
        damaged = {problem.step: str(problem)}
        notes += tuple(go_back(setup.out, damaged, setup.trust.from_last_whole))
        directory.checkpoints.reload()
        beginning = _begin_in(setup, directory)
    return replace(beginning, notes=notes + beginning.notes)


def _begin_in(setup: Setup, directory: RunDirectory) -> Beginning:
    """Start where the last checkpoint of an open directory says. Raises DamagedError."""
    last = directory.checkpoints.last
    if last is None:
        return _begin_anew(setup, directory)
    if setup.grown is None:
        return _resume(setup, setup.first, directory, last)
    carried = directory.checkpoints.files(last).get(EARLIER, b"")
    notes = _restore_history(directory, carried, last)
    return replace(_begin_stage(setup, directory, last), notes=notes)


def _begin_stage(setup: Setup, directory: RunDirectory, last: int) -> Beginning:
    """Go on with the model that a run had before or after its growth, or grow it now."""
    assert setup.grown is not None
    # Sizes tell which stage saved it: growth changes at least one.
    if directory.checkpoints.model(last).sizes == setup.grown.model.sizes:
        return _resume(setup, setup.grown, directory, last)
    # A run that was killed after its growth and before the next checkpoint grows once more.
    directory.history.forget_growth(last)
    if is_growth_due(setup.first.config, last, directory.history):
        return _begin_grown(setup, setup.grown, directory, last)
    return _resume(setup, setup.first, directory, last)


def _resume(setup: Setup, stage: Stage, directory: RunDirectory, last: int) -> Beginning:
    """Go on from a checkpoint of this run."""
    snapshot = directory.checkpoints.restore(last, stage.like, setup.trust.verify)
    files = {name: content for name, content in snapshot.files.items() if name != EARLIER}
    _require_same_tokenizer(setup.data, files, f"{directory.path}@{last}")
    notes = _restore_history(directory, snapshot.files.get(EARLIER, b""), last)
    return Beginning(
        setup=setup,
        stage=stage,
        directory=directory,
        step=last,
        snapshot=replace(snapshot, files=files),
        resumed=True,
        grows=setup.grown is not None and stage is setup.first,
        notes=notes,
    )


def _require_same_tokenizer(data: Corpus, files: Mapping[str, bytes], where: str) -> None:
    """Raise UsageError when the tokens now come from another tokenizer than a checkpoint's."""
    theirs = files.get("tokenizer.json")
    ours = data.tokenizer.get("tokenizer.json")
    if theirs is None or ours is None or encode_alike(ours, theirs):
        return
    name = data.mixture.parts[0].name
    raise UsageError(
        f"{name} was tokenized with another tokenizer than the one {where} was trained with; "
        f"tokenize the text with --tokenizer from there, or name another --out"
    )


def _restore_history(directory: RunDirectory, carried: bytes, last: int) -> tuple[str, ...]:
    """Bring the metrics to a checkpoint's step, lost rows made again; what was done, in words."""
    history = directory.history
    lost = history.restore(carried, last)
    history.keep_until(last)
    if not lost:
        return ()
    rows = "1 row" if lost == 1 else f"{lost:,} rows"
    return (f"{rows} of {METRICS} had been lost: made again from the checkpoint",)


def _begin_anew(setup: Setup, directory: RunDirectory) -> Beginning:
    """Begin with the source, grown first where the configuration says so, or with a new model."""
    source = setup.source
    stage = setup.first
    if source is None:
        snapshot = _create_snapshot(stage, setup.data, setup.branch)
        earlier = b""
    else:
        snapshot = _take_snapshot(setup, stage, source, setup.growth)
        earlier = source.files.get(EARLIER, b"")
    directory.history.begin(earlier)
    return Beginning(
        setup=setup,
        stage=stage,
        directory=directory,
        step=0,
        snapshot=snapshot,
        resumed=False,
        grows=setup.grown is not None,
        source_record=source.record if source else {},
        notes=setup.notes + (source.notes if source else ()),
    )


def _begin_grown(setup: Setup, stage: Stage, directory: RunDirectory, last: int) -> Beginning:
    """Grow the run's last checkpoint, and go on with the grown model at the same step."""
    source = open_source(f"{directory.path}@{last}")
    _require_same_tokenizer(setup.data, source.files, str(source.path))
    return Beginning(
        setup=setup,
        stage=stage,
        directory=directory,
        step=last,
        snapshot=_take_snapshot(setup, stage, source, setup.later_growth, last),
        resumed=False,
        grows=False,
        source_record=source.record,
    )


def _create_snapshot(stage: Stage, data: Corpus, branch: Branch | None) -> Snapshot:
    """What a new model starts from."""
    special = {"bos_token_id": data.end_of_text, "eos_token_id": data.end_of_text}
    training = Training(multipliers=False, config=stage.config.to_dict(), branch=branch)
    return Snapshot(
        state=new_state(stage.config, stage.model, stage.like),
        model_config=stage.model.config(special),
        lineage=Lineage((training,)),
        record={},
        files=data.tokenizer,
    )


def _take_snapshot(
    setup: Setup, stage: Stage, source: Source, growth: Plan | None, step: int = 0
) -> Snapshot:
    """What a model on disk starts from, grown first where there is a growth.

    step: the run's, 0 unless it grows on the way.
    """
    taken = open_grown(source, growth) if growth else source
    config = stage.config
    before = Lineage.read(taken.lineage)
    applied = select_multipliers(config.optimizer.multipliers, before, stage.model) is not None
    training = Training(
        source=Origin.of(source),
        multipliers=applied,
        config=config.to_dict(),
        branch=None if step else setup.branch,
    )
    check = partial(setup.trust.require_whole, source)
    files = {name: content for name, content in taken.files.items() if is_carried_name(name)}
    # The source's own tokenizer goes with the model; the data's is for models that carry none.
    tokenizer = {} if "tokenizer.json" in files else setup.data.tokenizer
    return Snapshot(
        state=take_state(taken, stage.like, config.schedule.continued, step, check, stage.part),
        model_config=stage.model.config(taken.config),
        lineage=before.followed_by(training),
        record=taken.record,
        files=files | tokenizer,
    )
