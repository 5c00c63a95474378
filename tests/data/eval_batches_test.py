"""Histories to right-aligned rows."""

import tracemalloc

import numpy as np
import pytest
from data_fixtures import distinct_histories, flatten, make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fame_jax.data import eval_batches as module
from fame_jax.data.eval_batches import EvalBatches, bucket, eval_batches, row_lengths


def batches_of(histories, targets, max_length, batch_size):
    return list(eval_batches(*flatten(*histories), targets, max_length, batch_size))


def test_a_batch_written_out():
    histories = [5, 6, 7], [1], [2, 2, 2, 4]
    (batch,) = batches_of(histories, np.array([8, 9, 3]), 4, 4)
    # Shortest history first, then a row without a user.
    assert batch.user_B.tolist() == [1, 0, 2, 0]
    assert batch.is_user_B.tolist() == [True, True, True, False]
    assert batch.target_B.tolist() == [9, 8, 3, 0]
    assert batch.tokens_BL.tolist() == [[0, 0, 0, 1], [0, 5, 6, 7], [2, 2, 2, 4], [0, 0, 0, 0]]
    assert batch.positions_BL.tolist() == [[0, 0, 0, 0], [0, 0, 1, 2], [0, 1, 2, 3], [0, 0, 0, 0]]
    assert batch.segments_BL.tolist() == [[0, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]
    seen = [sorted(set(row) - {0}) for row in batch.seen_BS.tolist()]
    assert seen == [[1], [5, 6, 7], [2, 4], []]
    dtypes = {'user_B': np.int64, 'is_user_B': bool}
    for name, field in batch._asdict().items():
        assert field.dtype == dtypes.get(name, np.int32), name


def test_without_targets_all_else_is_the_same():
    histories = [5, 6, 7], [1], [2, 2, 2, 4]
    (batch,) = batches_of(histories, np.array([8, 9, 3]), 4, 4)
    (without,) = batches_of(histories, None, 4, 4)
    assert not without.target_B.any() and without.target_B.dtype == np.int32
    for name in set(batch._fields) - {'target_B'}:
        np.testing.assert_array_equal(getattr(batch, name), getattr(without, name))


def test_a_long_history_is_cut_at_its_start_and_seen_whole():
    """Positions count from the first item in the row, as in training on windows."""
    history = list(range(1, 13))
    (batch,) = batches_of([history], np.array([13]), 3, 1)
    assert batch.tokens_BL.tolist() == [[10, 11, 12]]
    assert batch.positions_BL.tolist() == [[0, 1, 2]]
    assert batch.segments_BL.tolist() == [[1, 1, 1]]
    assert sorted(set(batch.seen_BS[0].tolist()) - {0}) == history


def test_a_history_without_items():
    batch, _ = batches_of([[], [4, 5]], np.array([6, 7]), 5, 1)
    assert not batch.tokens_BL.any() and not batch.segments_BL.any() and not batch.seen_BS.any()
    assert batch.target_B.tolist() == [6] and batch.is_user_B.tolist() == [True]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=40), min_size=1, max_size=12),
    st.integers(1, 20),
    st.integers(1, 5),
    st.sampled_from([1, 20, 64, 150, module.SEEN_PLACES]),
)
def test_every_user_has_one_row(histories, max_length, batch_size, places):
    targets = np.array([1 + i % 9 for i in range(len(histories))])
    users = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'SEEN_PLACES', places)
        batches = batches_of(histories, targets, max_length, batch_size)
    for batch in batches:
        rows, seen = batch.seen_BS.shape
        assert all(len(field) == rows for field in batch)
        assert rows == min(batch_size, max(1, places // seen)) or rows * seen <= places
        assert batch.tokens_BL.shape[1] in row_lengths(max_length)
        for tokens, positions, segments, seen, target, user, is_user in zip(*batch):
            if not is_user:
                assert not any(x.any() for x in (tokens, positions, segments, seen, target))
                continue
            users.append(user)
            expected = histories[user][-max_length:]
            padding, n = [0] * (len(tokens) - len(expected)), len(expected)
            assert target == targets[user]
            assert tokens.tolist() == padding + expected
            assert positions.tolist() == padding + list(range(n))
            assert segments.tolist() == padding + [1] * n
            assert sorted(seen[seen > 0].tolist()) == sorted(set(histories[user]))
    assert sorted(users) == list(range(len(histories)))


@pytest.mark.parametrize(
    ('length', 'rounded'), [(0, 16), (1, 16), (16, 16), (17, 64), (64, 64), (65, 256), (257, 1024)]
)
def test_lengths_are_rounded_up_to_powers_of_four(length, rounded):
    assert bucket(length) == rounded


def test_row_lengths_end_with_the_largest():
    assert row_lengths(10) == [10]
    assert row_lengths(50) == [16, 50]
    assert row_lengths(200) == [16, 64, 200]


def test_there_are_few_shapes_and_little_padding():
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / 9, 3000) + 2, 300)
    batches = batches_of(distinct_histories(lengths), np.ones(3000, np.int64), 50, 128)
    shapes = {(batch.tokens_BL.shape, batch.seen_BS.shape) for batch in batches}
    assert len(shapes) <= 6
    assert max(batch.tokens_BL.shape[1] for batch in batches) == 50
    # Rows of 50 for all users would be filled to .22.
    used = sum((batch.segments_BL > 0).sum() for batch in batches)
    assert used / sum(batch.segments_BL.size for batch in batches) > 0.4


# Long histories.


def test_a_batch_of_long_histories_has_fewer_rows(monkeypatch):
    """Rows of 16 places go four to a batch, rows of 64 one."""
    monkeypatch.setattr(module, 'SEEN_PLACES', 64)
    histories = distinct_histories([3, 40, 16, 1, 2, 17, 5])
    batches = batches_of(histories, np.ones(7, np.int64), 8, 4)
    assert [batch.user_B[batch.is_user_B].tolist() for batch in batches] == [
        [3, 4, 0, 6],
        [2],
        [5],
        [1],
    ]
    assert [batch.seen_BS.shape for batch in batches] == [(4, 16), (4, 16), (1, 64), (1, 64)]


@pytest.mark.parametrize('multiple', [1, 2, 4])
def test_devices_share_every_batch_evenly(multiple, monkeypatch):
    monkeypatch.setattr(module, 'SEEN_PLACES', 64)
    items, offsets = flatten(*distinct_histories([3, 40, 16, 1, 300]))
    batches = EvalBatches(items, offsets[:-1], offsets[1:], None, 8, 4, multiple)
    rows = [len(batch.user_B) for batch in batches]
    assert rows == {1: [4, 1, 1], 2: [4, 2], 4: [4, 4]}[multiple]


@pytest.mark.parametrize(
    'places, widths', [(4 * 256, [16, 256, 256]), (4 * 256 - 1, [16, 64, 256])]
)
def test_few_batches_of_one_length_have_one_width(places, widths, monkeypatch):
    """Two batches of 2 rows and 20 positions, with 64 and 256 places; both with 256 are 1,024."""
    monkeypatch.setattr(module, 'SEEN_PLACES', places)
    lengths = [5, 6, 30, 40, 70, 80]
    batches = batches_of(distinct_histories(lengths), np.ones(6, np.int64), 20, 2)
    assert [batch.user_B.tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5]]
    assert [batch.tokens_BL.shape for batch in batches] == [(2, 16), (2, 20), (2, 20)]
    assert [batch.seen_BS.shape[1] for batch in batches] == widths
    assert [np.count_nonzero(row) for batch in batches for row in batch.seen_BS] == lengths


def test_histories_of_any_length_have_few_shapes():
    """Of 50,000 users, some with millions of actions; batches of up to 4,096 places stay whole."""
    lengths = np.concatenate([np.full(50_000, 10), np.arange(1, 5000), 4 ** np.arange(2, 12)])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = np.broadcast_to(np.int32(1), offsets[-1:])  # takes no memory
    batches = EvalBatches(items, offsets[:-1], offsets[1:], None, 50, 1024)
    shapes = [(*b.tokens_BL.shape, b.seen_BS.shape[1]) for b in batches.one_of_each_shape()]
    for rows, length, seen in shapes:
        assert (rows, length) == (min(1024, 4**11 // seen), min(50, seen))
    assert {seen for _, _, seen in shapes} <= {4**n for n in range(2, 12)}
    assert [shape[0] for shape in shapes if shape[0] < 1024] == [256, 64, 16, 4, 1]
    assert len(shapes) == len(set(shapes))


def test_memory_does_not_grow_with_the_longest_history():
    """A history of a million items and a thousand of ten; as one batch it would take 16 GB."""
    items = np.random.default_rng(0).integers(1, 1000, 1_010_000).astype(np.int32)
    offsets = np.array([0, *(10 * np.arange(1, 1001)), len(items)])
    bounds = offsets[:-1], offsets[1:] - 1
    tracemalloc.start()
    users = 0
    for batch in EvalBatches(items, *bounds, items[bounds[1]], 50, 1024):
        users += batch.is_user_B.sum()
        seen = batch.seen_BS[np.flatnonzero(batch.user_B == 1000)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert users == 1001
    assert sorted(seen[seen > 0].tolist()) == sorted(set(items[10_000:-1].tolist()))
    assert peak < 100 * 2**20


def test_many_batches_are_made_anew_and_few_are_kept(monkeypatch):
    data = make_dataset(*distinct_histories([4, 9, 3, 20]))
    args = *data.history_bounds('test'), None, 8, 2
    kept = EvalBatches(data.items, *args)
    assert all(one is other for one, other in zip(kept, kept))
    # Two batches of two rows, of 3 * 8 + 16 and 3 * 8 + 64 places.
    monkeypatch.setattr(module, 'KEPT_BYTES', 2 * (40 + 88) * 4 - 1)
    anew = EvalBatches(data.items, *args)
    assert not any(one is other for one, other in zip(anew, anew))
    for one, other in zip(kept, anew, strict=True):
        for field, same in zip(one, other):
            np.testing.assert_array_equal(field, same)


@pytest.mark.parametrize('split', ['validation', 'test'])
def test_histories_are_read_where_the_data_set_has_them(split):
    """Without a copy, the same batches as from the histories that held_out copies."""
    data = make_dataset(*distinct_histories([4, 9, 3, 20, 70]), [1, 2, 1, 2, 1])
    starts, ends = data.history_bounds(split)
    batches = EvalBatches(data.items, starts, ends, data.items[ends], 8, 2)
    assert (batches.num_users, len(batches)) == (6, 3)
    copied = eval_batches(*data.held_out(split), 8, 2)
    for one, other in zip(batches, copied, strict=True):
        for field, same in zip(one, other):
            np.testing.assert_array_equal(field, same)
