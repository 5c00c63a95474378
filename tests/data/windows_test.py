"""Windows of histories: nothing is lost or doubled."""

import itertools

import numpy as np
import pytest
from data_fixtures import distinct_histories, flatten, window_items
from hypothesis import given, settings
from hypothesis import strategies as st

from fame_jax.data import windows as windows_module
from fame_jax.data.windows import (
    blocks_of_windows,
    items_in_windows,
    make_windows,
    places_in_windows,
)


# max_length is 3: histories up to one input, up to one window, and up to two windows and more.
@pytest.mark.parametrize(
    ('history', 'last', 'split'),
    [
        ([], [], []),
        ([1], [], []),
        ([1, 2], [[1, 2]], [[1, 2]]),
        ([1, 2, 3], [[1, 2, 3]], [[1, 2, 3]]),
        ([1, 2, 3, 4], [[1, 2, 3, 4]], [[1, 2, 3, 4]]),
        ([1, 2, 3, 4, 5], [[2, 3, 4, 5]], [[1, 2, 3, 4], [4, 5]]),
        ([1, 2, 3, 4, 5, 6, 7], [[4, 5, 6, 7]], [[1, 2, 3, 4], [4, 5, 6, 7]]),
        ([1, 2, 3, 4, 5, 6, 7, 8], [[5, 6, 7, 8]], [[1, 2, 3, 4], [4, 5, 6, 7], [7, 8]]),
    ],
)
def test_windows_of_one_history(history, last, split):
    histories = [90, 91], history, [92, 93]
    for long_histories, expected in (('last', last), ('split', split)):
        windows = make_windows(*flatten(*histories), 3, long_histories)
        assert window_items(windows) == [[90, 91], *expected, [92, 93]], long_histories


def test_windows_of_one_input():
    items, offsets = flatten([1, 2, 3], [4], [5, 6])
    split = make_windows(items, offsets, 1, 'split')
    last = make_windows(items, offsets, 1, 'last')
    assert window_items(split) == [[1, 2], [2, 3], [5, 6]]
    assert window_items(last) == [[2, 3], [5, 6]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(1, 5))
def test_split_windows_have_every_pair_of_neighbours_once(lengths, max_length):
    histories = distinct_histories(lengths)
    windows = make_windows(*flatten(*histories), max_length, 'split')
    assert all(2 <= n <= max_length + 1 for n in windows.lengths)
    pairs = [pair for items in window_items(windows) for pair in itertools.pairwise(items)]
    assert pairs == [pair for items in histories for pair in itertools.pairwise(items)]


@pytest.mark.parametrize('long_histories', ['split', 'last'])
def test_items_in_windows(long_histories):
    """The last window of 1 to 5 has no 1; the history of 6 alone has no window."""
    items, offsets = flatten([1, 2, 3, 4, 5], [6], [7, 8])
    windows = make_windows(items, offsets, 3, long_histories)
    found = np.flatnonzero(items_in_windows(windows, 9)).tolist()
    assert found == ([1] if long_histories == 'split' else []) + [2, 3, 4, 5, 7, 8]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(3, 12), min_size=1, max_size=8),
    st.integers(1, 5),
    st.sampled_from(['split', 'last']),
    st.integers(1, 30),
)
def test_held_out_items_are_in_no_window(lengths, max_length, long_histories, block):
    histories = distinct_histories(lengths)
    items, offsets = flatten(*histories)
    windows = make_windows(items, offsets, max_length, long_histories, offsets[1:] - 2)
    training = flatten(*(history[:-2] for history in histories))
    expected = make_windows(*training, max_length, long_histories)
    assert window_items(windows) == window_items(expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows_module, 'BLOCK', block)
        blocks = list(blocks_of_windows(windows))
        found = np.flatnonzero(items_in_windows(windows, sum(lengths)))
    assert {*found.tolist()} == set(itertools.chain.from_iterable(window_items(windows)))
    assert [n for part in blocks for n in range(part.start, part.stop)] == [
        *range(len(windows.starts))
    ]
    for part in blocks:
        assert part.stop - part.start == 1 or windows.lengths[part].sum() <= block
        places = [*places_in_windows(windows, part)]
        assert windows.items[places].tolist() == [
            item for items in window_items(windows)[part] for item in items
        ]
