"""Pairs of prefixes against a list of all prefixes: right targets, even draws, no overlap."""

import collections
import itertools

import numpy as np
import pytest
from data_fixtures import window_items
from hypothesis import given, settings
from hypothesis import strategies as st

from fame_jax.data import same_target_pairs
from fame_jax.data.packing import assign_rows, pack
from fame_jax.data.windows import Windows

LENGTH = 6


def windows_of(*windows):
    """Windows of these items, with an item between them that belongs to none."""
    items, starts = [], []
    for window in windows:
        starts.append(len(items))
        items += [*window, 1000]
    lengths = [len(window) for window in windows]
    return Windows(np.array(items, np.int32), np.array(starts), np.array(lengths))


def pack_with_pairs(windows, rows_per_step, seed=0):
    """An epoch's rows with pairs, and the (window, position) of each (row, column)."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(windows.starts))
    row, column = assign_rows(windows.lengths[order] - 1, LENGTH)
    steps = -(-(row.max() + 1) // rows_per_step)
    rows = pack(windows, order, row, column, (steps * rows_per_step, LENGTH))
    pairs = same_target_pairs.draw_pairs(windows, order, row, column, rows_per_step, LENGTH, rng)
    paired = same_target_pairs.add_pairs(rows, pairs, range(steps * rows_per_step))
    assert all(a is b for a, b in zip(paired, rows))
    own = {}
    for w, r, c in zip(order.tolist(), row.tolist(), column.tolist()):
        own |= {(r, c + t): (w, t) for t in range(windows.lengths[w] - 1)}
    return paired, own


def prefixes_of(windows):
    """(window, position) -> (prefix, target) of all positions."""
    prefixes = {}
    for w, items in enumerate(window_items(windows)):
        for t in range(len(items) - 1):
            prefixes[w, t] = items[: t + 1], items[t + 1]
    return prefixes


def read_pairs(paired, own, rows_per_step):
    """The (window, position) of each anchor and the prefix paired with it, in the order of rows."""
    pairs = []
    for row, column in np.argwhere(paired.anchor_BL >= 0).tolist():
        tokens, positions = paired.pair_tokens_BL[row], paired.pair_positions_BL[row]
        segments = paired.pair_segments_BL[row]
        (inside,) = np.nonzero(segments == segments[column])
        assert segments[column] > 0 and inside[-1] == column
        assert positions[inside].tolist() == list(range(len(inside)))
        assert inside.tolist() == list(range(inside[0], column + 1))
        own_row, own_column = divmod(int(paired.anchor_BL[row, column]), LENGTH)
        assert own_row < rows_per_step
        place = row // rows_per_step * rows_per_step + own_row, own_column
        pairs.append((own[place], tokens[inside].tolist()))
    assert sum(len(set(row[row > 0])) for row in paired.pair_segments_BL) == len(pairs)
    assert not paired.pair_tokens_BL[paired.pair_segments_BL == 0].any()
    return pairs


@st.composite
def any_windows(draw):
    window = st.lists(st.integers(1, 4), min_size=2, max_size=LENGTH + 1)
    return windows_of(*draw(st.lists(window, min_size=1, max_size=12)))


@settings(max_examples=150, deadline=None)
@given(any_windows(), st.integers(1, 4), st.integers(0, 99))
def test_a_pair_is_another_prefix_with_the_same_target(windows, rows_per_step, seed):
    paired, own = pack_with_pairs(windows, rows_per_step, seed)
    prefixes = prefixes_of(windows)
    pairs = read_pairs(paired, own, rows_per_step)
    anchors = [anchor for anchor, _ in pairs]
    assert len({w for w, _ in anchors}) == len(anchors) <= len(windows.starts)
    for anchor, prefix in pairs:
        itself, target = prefixes[anchor]
        others = [p for place, (p, y) in prefixes.items() if y == target and place != anchor]
        assert prefix in others if others else prefix == itself
        assert len(prefix) <= LENGTH


@settings(max_examples=50, deadline=None)
@given(any_windows(), st.integers(0, 99))
def test_every_window_has_a_pair_where_there_is_space(windows, seed):
    paired, _ = pack_with_pairs(windows, rows_per_step=12, seed=seed)
    assert (paired.anchor_BL >= 0).sum() == len(windows.starts)


def test_written_out():
    """3 follows 1 2 and 7; 9 follows 8 alone."""
    windows = windows_of([7, 3], [8, 9], [6, 7], [5, 7])
    paired, own = pack_with_pairs(windows, rows_per_step=4)
    pairs = dict(read_pairs(paired, own, 4))
    assert pairs == {(0, 0): [7], (1, 0): [8], (2, 0): [5], (3, 0): [6]}
    assert paired.pair_tokens_BL.sum() == 7 + 8 + 5 + 6
    assert paired.anchor_BL.dtype == np.int32


def test_draws_are_uniform_over_positions_and_over_other_positions():
    """Position 0, 1 or 2 of the first window; 3 is the target of four positions."""
    windows = windows_of([1, 3, 4, 3], [2, 3], [5, 5, 3])
    counts = collections.Counter()
    number = 6000
    rng = np.random.default_rng(0)
    order = np.zeros(number, np.int64)
    position, drawn = same_target_pairs.draw_prefixes(windows, order, rng)
    for t, start, n in zip(position.tolist(), drawn.starts.tolist(), drawn.lengths.tolist()):
        counts[t, tuple(windows.items[start : start + n].tolist())] += 1
    places = [(1, 3), (1, 3, 4, 3), (2, 3), (5, 5, 3)]
    expected = {(0, place): 1 / 9 for place in places if place != (1, 3)}
    expected |= {(2, place): 1 / 9 for place in places if place != (1, 3, 4, 3)}
    expected[1, (1, 3, 4)] = 1 / 3
    assert set(counts) == set(expected)
    for outcome, share in expected.items():
        assert abs(counts[outcome] - number * share) < 5 * np.sqrt(number * share * (1 - share))


def test_the_same_rng_gives_the_same_pairs():
    windows = windows_of(*([1 + (i * j) % 3 for j in range(2 + i % 5)] for i in range(20)))
    drawn = [pack_with_pairs(windows, 3, seed)[0] for seed in (1, 1, 2)]
    assert all(map(np.array_equal, drawn[0], drawn[1]))
    assert not np.array_equal(drawn[0].anchor_BL, drawn[2].anchor_BL)


def test_pairs_without_space_are_left_out():
    """Six windows of one input fill a step; the only pair of each has five inputs."""
    short = [[n, 100 + n] for n in range(1, 7)]
    long = [[*range(10 * n, 10 * n + 5), 100 + n] for n in range(1, 7)]
    windows = windows_of(*short, *long)
    row = np.array([0] * 6 + [1, 2, 3, 4, 5, 6])
    column = np.array([0, 1, 2, 3, 4, 5] + [0] * 6)
    rows = pack(windows, np.arange(12), row, column, (7, LENGTH))
    pairs = same_target_pairs.draw_pairs(
        windows, np.arange(12), row, column, 1, LENGTH, np.random.default_rng(0)
    )
    paired = same_target_pairs.add_pairs(rows, pairs, range(7))
    assert (paired.anchor_BL >= 0).sum(axis=1).tolist() == [1] * 7
    assert paired.pair_tokens_BL[0].tolist() == [10, 11, 12, 13, 14, 0]
    assert paired.anchor_BL[0].tolist() == [-1, -1, -1, -1, 0, -1]


@pytest.mark.parametrize('rows_per_step', [1, 2, 5])
def test_segments_stay_in_their_step_and_do_not_overlap(rows_per_step):
    rng = np.random.default_rng(rows_per_step)
    inputs, step = rng.integers(1, LENGTH + 1, 60), rng.integers(0, 4, 60)
    row, column = same_target_pairs.assign_rows_per_step(inputs, step, rows_per_step, LENGTH)
    taken = collections.Counter()
    for r, c, n, s in zip(row.tolist(), column.tolist(), inputs.tolist(), step.tolist()):
        if r >= 0:
            assert r // rows_per_step == s and c + n <= LENGTH
            taken.update(itertools.product([r], range(c, c + n)))
    assert set(taken.values()) == {1}
    for s in range(4):
        rows = range(s * rows_per_step, (s + 1) * rows_per_step)
        space = max(LENGTH - sum(taken[r, c] for c in range(LENGTH)) for r in rows)
        left_out = inputs[(step == s) & (row < 0)]
        assert not len(left_out) or left_out[0] > space
