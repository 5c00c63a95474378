"""Histories in random order, on rows small enough to see the answer."""

import numpy as np
from fixtures import make_eval_batches

from fame_jax.data.eval_batches import eval_batches
from fame_jax.evaluation import histories

HISTORIES = [[1, 2, 3], [4], [5, 5], [2, 6, 2, 7]]


def arrays(rows):
    return np.concatenate(rows).astype(np.int32), np.cumsum([0, *map(len, rows)])


def one_batch(rows, max_length=8, batch_size=8):
    targets = np.ones(len(rows), np.int32)
    (batch,) = eval_batches(*arrays(rows), targets, max_length, batch_size)
    return batch


def rows_of(batch):
    """User -> the items of the row."""
    return {
        int(user): tokens[segments > 0].tolist()
        for user, tokens, segments, is_user in zip(
            batch.user_B, batch.tokens_BL, batch.segments_BL, batch.is_user_B
        )
        if is_user
    }


def test_the_last_item_stays_and_the_others_are_in_random_order():
    rows = [[9, 10], [8], *([*range(1, n + 1)] for n in (3, 6, 8, 8, 8))]
    batch = one_batch(rows)
    shuffled = histories.shuffle_all_but_last(batch)
    found = rows_of(shuffled)
    for user, row in enumerate(rows):
        assert found[user][-1] == row[-1]
        assert sorted(found[user]) == sorted(row)
    assert any(found[user] != rows[user] for user in range(3, 7))
    # Users with the same history have different orders.
    assert len({tuple(found[user]) for user in (4, 5, 6)}) > 1
    for name, field in batch._asdict().items():  # everything else is as before
        if name != 'tokens_BL':
            np.testing.assert_array_equal(getattr(shuffled, name), field)
    assert batch.tokens_BL[0, -1] != 0 and rows_of(batch)[6] == rows[6]  # no change in place


def test_the_order_is_the_same_each_time_and_in_every_batch():
    rows = [[*range(1, n + 1)] for n in (3, 6, 8, 5, 7)]
    whole = rows_of(histories.shuffle_all_but_last(one_batch(rows)))
    assert whole == rows_of(histories.shuffle_all_but_last(one_batch(rows)))
    items, offsets = arrays(rows)
    parts = {}
    for batch in eval_batches(items, offsets, np.ones(5, np.int32), 8, 2):
        parts |= rows_of(histories.shuffle_all_but_last(batch))
    assert parts == whole
    other = rows_of(histories.shuffle_all_but_last(one_batch(rows), seed=1))
    assert other != whole


def test_items_that_the_model_does_not_read_are_not_moved_into_its_sight():
    batch = one_batch([[*range(1, 31)]], max_length=5)
    (row,) = rows_of(histories.shuffle_all_but_last(batch)).values()
    assert sorted(row) == [26, 27, 28, 29, 30] and row[-1] == 30


def test_every_order_is_about_as_frequent():
    """3! orders of the items before the last, over 3000 users: 500 each."""
    batch = one_batch([[1, 2, 3, 4]] * 3000, batch_size=3000)
    found = rows_of(histories.shuffle_all_but_last(batch)).values()
    orders, counts = np.unique([row[:3] for row in found], axis=0, return_counts=True)
    assert len(orders) == 6 and counts.min() > 420 and counts.max() < 580


def test_rows_without_a_user_stay_empty():
    (batch,) = make_eval_batches([[1, 2, 3]], [4], users=3)
    shuffled = histories.shuffle_all_but_last(batch)
    assert shuffled.tokens_BL[1:].max() == 0


def test_items_of_ragged_histories_are_shuffled_as_those_of_rows():
    """Each user has one more action after the history, which stays where it is."""
    rows = [[9, 10], [8], *([*range(1, n + 1)] for n in (3, 6, 8, 8, 8))]
    items, offsets = arrays([[*row, 11] for row in rows])
    starts, ends = offsets[:-1], offsets[1:] - 1
    before = items.copy()
    shuffled = histories.shuffle_items(items, starts, ends)
    assert items.tolist() == before.tolist()  # no change in place
    expected = rows_of(histories.shuffle_all_but_last(one_batch(rows)))
    assert {u: shuffled[starts[u] : ends[u]].tolist() for u in range(len(rows))} == expected
    assert shuffled[ends].tolist() == [11] * len(rows)
