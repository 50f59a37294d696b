"""The picture of a run: which perplexities and ticks it shows, which events it marks."""

from __future__ import annotations

import math

import pytest
from etils import epath

from trainer.log import curves


def row(tokens: float, perplexity: float | None = None, event: str = "") -> dict[str, str]:
    loss = "" if perplexity is None else str(math.log(perplexity))
    place = str(tokens)
    return {"tokens": place, "flops": place, "loss": "", "validation_loss": loss, "event": event}


def test_the_first_fall_is_cut_and_a_jump_at_growth_is_not():
    rows = [row(0, 1000), row(10, 40), row(50, 15), row(50, 30), row(100, 12)]
    low, high = curves.choose_range(rows)
    assert (low, high) == pytest.approx((12 / curves.MARGIN, 40 * curves.MARGIN))
    assert curves.choose_range([row(0), row(1)]) is None
    short = curves.choose_range([row(0, 1000), row(10, 900)])
    assert short == pytest.approx((900 / curves.MARGIN, 1000 * curves.MARGIN))


@pytest.mark.parametrize("low,high", [(10.9, 16.5), (14, 80), (12, 1200), (1.5, 2e6), (30, 31)])
def test_ticks_are_several_and_have_room(low, high):
    ticks = curves.choose_ticks(low, high)
    assert all(low <= tick <= high for tick in ticks) and 2 <= len(ticks) <= 9
    assert ticks == sorted(ticks)
    # A label's height is a twentieth of the axis.
    steps = [math.log(b / a) for a, b in zip(ticks, ticks[1:], strict=False)]
    assert min(steps) > math.log(high / low) / 20


def test_the_best_of_several_is_named():
    assert curves.name_best({"a": 12.5, "b": 12.25}) == {"a": "a: 12.5", "b": "b: 12.25 (best)"}
    assert curves.name_best({"a": 12.5}) == {"a": "a: 12.5"} and curves.name_best({}) == {}


def test_events_are_marked_and_runs_end_with_their_compute(tmp_path, monkeypatch):
    from matplotlib import pyplot

    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    rows = [
        row(0, 1000, event="start"),
        row(10, 40),
        row(50, event="grown: layer 2 to 4"),
        row(50, 60),
        row(80, 30, event="plateau: learning rate x 0.1"),
        row(100, 25),
    ]
    out = epath.Path(tmp_path / "curves.png")
    curves.draw_curves(out, rows, "run", {"small": [row(50, 40), row(100, 26)]}, over="flops")
    monkeypatch.undo()
    (axes,) = drawn[0].axes
    words = [text.get_text() for text in axes.texts]
    assert words == [
        "grown: layer 2 to 4",
        "plateau: learning rate x 0.1",
        "starts at 1,000 (cut off)",
    ]
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["validation: 25 (best)", "small: 26"]
    assert axes.get_xlabel() == "training FLOPs" and len(out.read_bytes()) > 5_000
    assert axes.get_ylim() == pytest.approx((25 / curves.MARGIN, 60 * curves.MARGIN))
    pyplot.close(drawn[0])


def test_scores_have_a_page_of_their_own_and_data_sets_a_line_each(tmp_path, monkeypatch):
    from matplotlib import pyplot

    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    first = row(10, 40) | {"scores": '{"piqa acc": 0.5}'}
    losses = f'{{"books": {math.log(30)}, "code": {math.log(50)}}}'
    rows = [row(0, 1000, event="start, anneal: learning rate 0.001 to 0.0001"), first]
    rows += [row(50, 38) | {"validation_losses": losses}, row(60, event="another validation set")]
    curves.draw_curves(epath.Path(tmp_path / "curves.png"), rows, "run")
    curves.draw_scores(epath.Path(tmp_path / "scores.png"), rows, "run")
    monkeypatch.undo()
    (axes,) = drawn[0].axes
    assert axes.get_legend_handles_labels()[1] == ["validation: 38", "on books: 30", "on code: 50"]
    assert axes.get_ylim() == pytest.approx((30 / curves.MARGIN, 50 * curves.MARGIN))
    words = [text.get_text() for text in axes.texts]
    assert words[:2] == ["anneal: learning rate 0.001 to 0.0001", "another validation set"]
    (page,) = drawn[1].axes
    assert page.get_title() == "acc" and page.get_legend_handles_labels()[1] == ["piqa"]
    assert all((tmp_path / name).stat().st_size > 5_000 for name in ("curves.png", "scores.png"))
    for figure in drawn:
        pyplot.close(figure)


def test_ticks_without_room_for_their_labels_are_dropped():
    ticks = [20.0, 30, 40, 50, 60, 70, 80]
    kept = curves.drop_close(ticks, 14, 80)
    assert kept == [20.0, 30, 40, 50, 70]
