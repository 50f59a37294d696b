"""Batches: every token once, nothing held out is trained on, a pure function of its arguments."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growkit.errors import UsageError
from trainer.data.corpus import check_vocabulary
from trainer.data.stream import DataSet, Mixture, Stream, validation_batches
from trainer.data.tokens import TokenFile, TokenWriter
from trainer.data.windows import JoinedWindows, Windows, join_windows, split_windows

CONTEXT = 4
RECORDED = [33392, 6032, 2868, 2328, 33120, 6520, 4408, 4736]


def token_file(directory, tokens, vocab_size=60_000, manifest=False):
    """A token file of the given ids, or of so many different ones."""
    ids = np.arange(tokens) if isinstance(tokens, int) else np.array(tokens)
    directory.mkdir()
    with TokenWriter(directory, vocab_size) as writer:
        writer.add(ids)
    if manifest:
        content = {**writer.summary(), "vocab_size": vocab_size, "end_of_text": 0}
        (directory / "manifest.json").write_text(json.dumps(content))
    return TokenFile.open(directory)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two data sets of 2000 and 1000 windows, with ids that tell them apart."""
    path = tmp_path_factory.mktemp("files")
    large = token_file(path / "large", 2000 * CONTEXT + 1)
    small = token_file(path / "small", np.arange(30_000, 30_000 + 1000 * CONTEXT + 1))
    return large, small


def mixture(files, weights=(3, 1), names=("large", "small")):
    windows = [split_windows(file, CONTEXT, 0.1)[0] for file in files]
    return mixture_of(*zip(names, weights, windows, strict=True))


def mixture_of(*parts):
    return Mixture(tuple(DataSet(*part) for part in parts))


def predicted(windows):
    """How often each token of the file is a target."""
    return Counter(token for window in windows for token in window[1:].tolist())


def windows_of(windows):
    return [windows[number] for number in range(len(windows))]


@given(st.integers(3, 200), st.integers(1, 9), st.sampled_from([0, 0.1, 0.5]))
@settings(deadline=None, max_examples=40)
def test_every_token_is_predicted_once(tmp_path_factory, tokens, context, held_out):
    if tokens < 2 * context + 1:
        return
    file = token_file(tmp_path_factory.mktemp("file") / "data", tokens)
    train, held = split_windows(file, context, held_out)
    whole = (tokens - 1) // context * context
    assert predicted([*windows_of(train), *windows_of(held)]) == dict.fromkeys(
        range(1, whole + 1), 1
    )
    assert len(held) == max(1, round((tokens - 1) // context * held_out))


def test_a_shifted_window_would_break_that(files):
    """The sibling of the test above: it sees a window that begins one token late."""
    windows = [Windows(files[0], CONTEXT, 0, 5)[number] for number in range(5)]
    windows[2] = windows[2] + 1
    counts = predicted(windows)
    assert len(counts) == 5 * CONTEXT - 1
    assert max(counts.values()) == 2


def test_windows_are_int32_of_context_and_one(files):
    window = Windows(files[0], CONTEXT, 3, 5)[1]
    assert (window.dtype, window.tolist()) == (np.int32, [16, 17, 18, 19, 20])
    for number in (-1, 2):
        with pytest.raises(IndexError):
            Windows(files[0], CONTEXT, 3, 5)[number]


def test_held_out_windows_are_never_drawn(files):
    train, held = split_windows(files[0], CONTEXT, 0.1)
    stream = Stream(mixture_of(("large", 1, train)), seed=0)
    drawn = predicted(stream.batch(0, 2 * len(train)))
    assert set(drawn.values()) == {2}
    assert not drawn.keys() & predicted(windows_of(held)).keys()


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 6)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=20)
def test_a_batch_depends_on_its_arguments_alone(files, calls):
    used = Stream(mixture(files), seed=7)
    first = [used.batch(drawn, count) for drawn, count in calls]
    for (drawn, count), batch in reversed(list(zip(calls, first, strict=True))):
        np.testing.assert_array_equal(Stream(mixture(files), seed=7).batch(drawn, count), batch)
        np.testing.assert_array_equal(used.batch(drawn, count), batch)


def test_another_batch_size_continues_the_same_stream(files):
    stream = Stream(mixture(files), seed=7)
    whole = stream.batch(0, 24)
    np.testing.assert_array_equal(np.concatenate([stream.batch(i, 8) for i in (0, 8, 16)]), whole)
    np.testing.assert_array_equal(np.concatenate([stream.batch(0, 4), stream.batch(4, 20)]), whole)
    assert not np.array_equal(stream.batch(1, 24), whole)


def test_the_order_of_a_seed_is_on_record(files):
    """A run resumes in the order it began with; a grain that shuffles otherwise breaks old runs."""
    batch = Stream(mixture(files), seed=7).batch(10**6, 8)
    assert batch[:, 0].tolist() == RECORDED


def test_an_epoch_is_all_windows_once_and_epochs_differ(files):
    train, _ = split_windows(files[1], CONTEXT, 0.1)
    stream = Stream(mixture_of(("small", 1, train)), seed=3)
    one, two = stream.batch(0, len(train)), stream.batch(len(train), len(train))
    assert set(predicted(one).values()) == set(predicted(two).values()) == {1}
    assert not np.array_equal(one, two)
    # As many windows from the middle of an epoch on repeat some: the check above can fail.
    assert set(predicted(stream.batch(100, len(train))).values()) != {1}


def test_one_window_is_enough_to_train_on(tmp_path):
    train, _ = split_windows(token_file(tmp_path / "data", 2 * CONTEXT + 1), CONTEXT, 0.1)
    batch = Stream(mixture_of(("tiny", 1, train)), seed=0).batch(0, 3)
    assert batch.tolist() == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize("weights", [(3, 1), (0.5, 0.5), (0.7, 0.3), (1, 0.05)])
def test_realised_weights_are_the_asked_ones(files, weights):
    batch = Stream(mixture(files, weights), seed=1).batch(500, 1000)
    share = (batch[:, 0] < 30_000).mean()
    assert share == pytest.approx(weights[0] / sum(weights), rel=0.011)
    assert share != pytest.approx(weights[0] / sum(weights) * 0.97, rel=0.011)


def test_the_seed_changes_the_order(files):
    one, two = (Stream(mixture(files), seed=seed) for seed in (1, 2))
    assert not np.array_equal(one.batch(0, 20), two.batch(0, 20))
    assert one.fingerprint != two.fingerprint


def test_names_and_the_order_of_data_sets_change_nothing(files):
    one = Stream(mixture(files), seed=1)
    renamed = Stream(mixture(files, names=("x", "y")), seed=1)
    turned = Stream(mixture(files[::-1], (0.25, 0.75), ("small", "large")), seed=1)
    for other in (renamed, turned):
        assert other.fingerprint == one.fingerprint
        np.testing.assert_array_equal(other.batch(0, 40), one.batch(0, 40))


def test_data_context_weights_and_windows_change_the_fingerprint(files):
    large, small = files
    base = Stream(mixture(files), seed=1).fingerprint
    others = [
        mixture(files, (2, 1)),
        mixture_of(("large", 3, split_windows(large, CONTEXT, 0.1)[0])),
        *(
            mixture_of(
                ("large", 3, split_windows(large, *cut)[0]),
                ("small", 1, split_windows(small, *cut)[0]),
            )
            for cut in ((CONTEXT, 0.2), (5, 0.1))
        ),
    ]
    assert len({base, *(Stream(other, seed=1).fingerprint for other in others)}) == 5


@given(st.integers(0, 1000), st.sampled_from([1, 2, 3, 4]), st.integers(1, 4))
@settings(deadline=None, max_examples=20)
def test_the_parts_that_hosts_draw_are_the_batch_of_one(files, drawn, hosts, rows):
    stream = Stream(mixture(files), seed=1)
    parts = [stream.batch(drawn + host * rows, rows) for host in range(hosts)]
    np.testing.assert_array_equal(np.concatenate(parts), stream.batch(drawn, hosts * rows))


@given(
    st.sampled_from([(3, 1), (0.5, 0.5), (1, 0.05), (0.301, 0.699)]),
    st.integers(0, 3000),
    st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_counts_are_of_what_was_drawn(files, weights, drawn, turned):
    order = -1 if turned else 1
    stream = Stream(mixture(files[::order], weights, ("large", "small")[::order]), seed=1)
    small = sum(int(stream.batch(number, 1)[0, 0]) >= 30_000 for number in range(drawn))
    assert stream.counts(drawn) == {"large": drawn - small, "small": small}
    assert stream.epochs(drawn) == {"large": (drawn - small) / 1800, "small": small / 900}


def test_the_asked_shares_are_not_the_counts(files):
    """The sibling of the test above: they differ after a few sequences and for rounded weights."""
    for weights, drawn in [((3, 1), 6), ((0.301, 0.699), 5000)]:
        parts = mixture(files, weights)
        assert Stream(parts, seed=1).counts(drawn)["small"] != pytest.approx(
            parts.shares["small"] * drawn, abs=1e-6
        )


def test_counts_far_along_are_found_at_once(files):
    drawn = 10**9
    assert Stream(mixture(files, (0.99, 0.01)), seed=1).counts(drawn)["small"] == pytest.approx(
        drawn / 100, rel=0.011
    )


def test_joined_files_are_one_data_set(files):
    parts = [
        Windows(files[0], CONTEXT, 0, 5),
        Windows(files[1], CONTEXT, 2, 3),
        Windows(files[0], CONTEXT, 5, 9),
    ]
    joined = join_windows(parts)
    np.testing.assert_array_equal(
        windows_of(joined), [window for part in parts for window in windows_of(part)]
    )
    for number in (-1, len(joined)):
        with pytest.raises(IndexError):
            joined[number]
    stream = Stream(mixture_of(("both", 1, joined)), seed=0)
    assert predicted(stream.batch(0, 10)) == predicted(windows_of(joined))
    assert join_windows(parts[:1]) is parts[0]
    assert len({join_windows(some).identity for some in (parts, parts[::-1], parts[:2])}) == 3


def test_windows_joined_wrongly_would_be_seen(files, monkeypatch):
    """The sibling of the test above: bounds that are off repeat one window and lose another."""
    parts = [Windows(files[0], CONTEXT, 0, 5), Windows(files[1], CONTEXT, 2, 5)]
    monkeypatch.setattr(JoinedWindows, "_ends", [4, 7])
    windows = windows_of(join_windows(parts))
    assert not np.array_equal(
        windows, [*windows_of(parts[0]), *windows_of(parts[1])][: len(windows)]
    )


def test_a_fraction_is_of_the_first_windows(files):
    windows = Windows(files[0], CONTEXT, 10, 110)
    assert (windows.take_fraction(0.25).start, windows.take_fraction(0.25).stop) == (10, 35)
    assert windows.take_fraction(1.0).identity == windows.identity
    assert len(windows.take_fraction(1e-9)) == 1


def test_validation_is_fixed_spread_and_padded(files):
    held = [split_windows(file, CONTEXT, 0.1)[1] for file in files]
    one, two = (list(validation_batches(held, 4, 10)) for _ in range(2))
    assert [mask.tolist() for _, mask in one] == [
        [True] * 4,
        [True] * 4,
        [True, True, False, False],
    ]
    assert {(tokens.shape, tokens.dtype) for tokens, _ in one} == {
        ((4, CONTEXT + 1), np.dtype(np.int32))
    }
    for (left, _), (right, _) in zip(one, two, strict=True):
        np.testing.assert_array_equal(left, right)
    rows = np.concatenate([tokens[mask] for tokens, mask in one])
    assert (rows[:, 0] >= 30_000).sum() == 5
    assert len(np.unique(rows[:, 0])) == 10


def test_validation_takes_what_there_is(files):
    held = [Windows(files[0], CONTEXT, 0, 7), Windows(files[1], CONTEXT, 0, 2)]
    for limit in (None, 9, 100):
        batches = list(validation_batches(held, 4, limit))
        assert sum(mask.sum() for _, mask in batches) == 9
        assert len(batches) == 3
    with pytest.raises(UsageError, match="positive"):
        next(validation_batches(held, 0, None))


@pytest.mark.parametrize(
    ("tokens", "advice"), [(8, "is 3"), (3, "is 1"), (2, "no context"), (1, "no")]
)
def test_text_too_short_for_the_context(tmp_path, tokens, advice):
    file = token_file(tmp_path / "data", tokens)
    with pytest.raises(
        UsageError, match=rf"has {tokens} tokens.*context {CONTEXT}; .*{advice}"
    ) as caught:
        split_windows(file, CONTEXT, 0.1)
    assert caught.value.exit_code == 2


def test_all_windows_of_a_file_need_no_second_one(tmp_path):
    file = token_file(tmp_path / "data", CONTEXT + 1)
    assert len(Windows.all(file, CONTEXT)) == 1
    sentence = "5 tokens, too few for one window at context 5; the largest .* is 4$"
    with pytest.raises(UsageError, match=sentence):
        Windows.all(file, CONTEXT + 1)


def test_the_largest_context_that_is_advised_works(tmp_path):
    file = token_file(tmp_path / "data", 8)
    assert [len(each) for each in split_windows(file, 3, 0.5)] == [1, 1]


@pytest.mark.parametrize(
    ("context", "held_out"), [(0, 0.1), (4, -0.1), (4, 0.6), (4, float("nan"))]
)
def test_splits_that_make_no_sense(files, context, held_out):
    with pytest.raises(UsageError, match="must"):
        split_windows(files[0], context, held_out)


@pytest.mark.parametrize("manifest", [True, False])
def test_a_vocabulary_too_small_by_the_ids_that_occur(tmp_path, monkeypatch, manifest):
    monkeypatch.setattr("trainer.data.checked._BYTES_AT_ONCE", 64)
    file = token_file(tmp_path / "data", 100, vocab_size=300, manifest=manifest)
    # The tokenizer has 200 tokens more, which no text has.
    check_vocabulary(file, 100)
    with pytest.raises(UsageError, match="ids up to 99 occur, .* vocabulary of 100, .* has 99"):
        check_vocabulary(file, 99)


def test_mixtures_that_make_no_sense(files):
    windows = split_windows(files[0], CONTEXT, 0.1)[0]
    other = split_windows(files[1], 5, 0.1)[0]
    for parts, fragment in [
        ((), "at least one"),
        ((("a", 0, windows),), "weight of a"),
        ((("a", float("nan"), windows),), "weight of a"),
        ((("a", 1, Windows(files[0], CONTEXT, 2, 2)),), "no windows"),
        ((("a", 1, windows), ("b", 1, other)), "b has context 5"),
        ((("a", 1, windows), ("b", 1, windows)), "b and a are the same"),
    ]:
        with pytest.raises(UsageError, match=fragment):
            mixture_of(*parts)
