"""Windows to packed rows."""

import numpy as np
from data_fixtures import flatten
from hypothesis import given, settings
from hypothesis import strategies as st

from fame_jax.data.packing import assign_rows, pack
from fame_jax.data.windows import make_windows


def test_pack_writes_the_example_of_batch():
    windows = make_windows(*flatten([7, 8, 9], [4, 5]), 5, 'last')
    rows = pack(windows, np.array([0, 1]), np.array([0, 0]), np.array([0, 2]), (1, 6))
    expected = {
        'tokens_BL': [[7, 8, 4, 0, 0, 0]],
        'positions_BL': [[0, 1, 0, 0, 0, 0]],
        'segments_BL': [[1, 1, 2, 0, 0, 0]],
        'targets_BL': [[8, 9, 5, 0, 0, 0]],
        'weights_BL': [[1, 1, 1, 0, 0, 0]],
    }
    for name, values in expected.items():
        field = getattr(rows, name)
        assert field.tolist() == values, name
        assert field.dtype == (np.float32 if name == 'weights_BL' else np.int32)


def test_pack_takes_windows_in_any_order_and_leaves_rows_empty():
    windows = make_windows(*flatten([7, 8, 9], [4, 5], [1, 2, 3]), 5, 'last')
    order, row, column = np.array([1, 2, 0]), np.array([2, 0, 2]), np.array([2, 1, 0])
    rows = pack(windows, order, row, column, (4, 4))
    assert rows.tokens_BL.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0], [7, 8, 4, 0], [0, 0, 0, 0]]
    assert rows.targets_BL.tolist() == [[0, 2, 3, 0], [0, 0, 0, 0], [8, 9, 5, 0], [0, 0, 0, 0]]
    assert rows.segments_BL.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 2, 0], [0, 0, 0, 0]]


def test_pack_with_items_as_their_own_targets():
    windows = make_windows(*flatten([7, 8, 9], [4, 5]), 5, 'last')
    order, row, column = np.array([0, 1]), np.array([0, 0]), np.array([0, 3])
    rows = pack(windows, order, row, column, (1, 6), own_targets=True)
    assert rows.tokens_BL.tolist() == rows.targets_BL.tolist() == [[7, 8, 9, 4, 5, 0]]
    assert rows.weights_BL.tolist() == [[1, 1, 1, 1, 1, 0]]


def best_fit(lengths, row_length):
    """A list of free spaces, searched for each segment: the columns, and the number of rows."""
    spaces, columns = [], []
    for length in lengths:
        fitting = [space for space in spaces if space >= length]
        if fitting:
            space = min(fitting)
            spaces.remove(space)
        else:
            space = row_length
        columns.append(row_length - space)
        spaces.append(space - length)
    return columns, len(spaces)


def assert_no_overlap(lengths, row, column, row_length):
    """No two segments share a position, and none leaves its row."""
    places = zip(row.tolist(), column.tolist(), lengths)
    taken = [(r, i) for r, c, n in places for i in range(c, c + n)]
    assert len(set(taken)) == len(taken) == sum(lengths)
    assert all(0 <= i < row_length for _, i in taken)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_assign_rows_is_best_fit(data):
    row_length = data.draw(st.integers(1, 9))
    lengths = data.draw(st.lists(st.integers(1, row_length), max_size=40))
    row, column = assign_rows(np.array(lengths, np.int64), row_length)
    columns, num_rows = best_fit(lengths, row_length)
    assert_no_overlap(lengths, row, column, row_length)
    assert column.tolist() == columns
    assert sorted(set(row.tolist())) == list(range(num_rows))


def test_rows_are_full_with_lengths_like_those_of_real_data():
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / 6, 20_000), 50)
    row, column = assign_rows(lengths, 64)
    assert_no_overlap(lengths.tolist(), row, column, 64)
    assert lengths.sum() / (64 * (row.max() + 1)) > 0.97
