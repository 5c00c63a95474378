"""Histories to batches: nothing is lost, doubled or mixed up on the way."""

import collections
import itertools
import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fame_jax.batch import Batch
from fame_jax.data import epochs, pipeline


def flat(*histories):
    """Histories as the pipeline takes them: items end to end, and offsets."""
    items = np.array([item for history in histories for item in history], np.int32)
    return items, np.cumsum([0, *map(len, histories)], dtype=np.int64)


def stretches(cut):
    """The items of each window, as lists."""
    return [cut.items[s : s + n].tolist() for s, n in zip(cut.starts, cut.lengths)]


def numbered(lengths):
    """Histories of these lengths in which no item occurs twice."""
    ends = np.cumsum(lengths)
    return [list(range(end - n + 1, end + 1)) for n, end in zip(lengths, ends)]


def an_epoch(cut, **changes):
    """The batches of an epoch, and its iterator's extent."""
    options = {
        'seed': 0,
        'epoch': 0,
        'packed': True,
        'row_length': 8,
        'rows_per_step': 3,
        'loss_positions': 'all',
    }
    batches, steps = epochs.epoch(cut, **(options | changes))
    return list(batches), steps


def rows_of(batches):
    """All rows of all batches as one Batch."""
    return Batch(*(np.concatenate(field) for field in zip(*batches)))


def learned(rows):
    """How often each (prefix, target) is trained, read off the rows position by position."""
    found = collections.Counter()
    for tokens, positions, segments, targets, weights in zip(*rows):
        for i in np.flatnonzero(weights):
            start = i - positions[i]
            assert (segments[start : i + 1] == segments[i]).all() and segments[i] > 0
            assert start == 0 or segments[start - 1] != segments[i]
            found[tuple(tokens[start : i + 1].tolist()), int(targets[i])] += 1
    return found


def to_learn(cut, loss_positions='all'):
    """The same, straight from the windows."""
    found = collections.Counter()
    for items in stretches(cut):
        first = len(items) - 1 if loss_positions == 'last' else 1
        for i in range(first, len(items)):
            found[tuple(items[:i]), items[i]] += 1
    return found


def test_lay_out_writes_the_example_of_the_batch():
    cut = pipeline.windows(*flat([7, 8, 9], [4, 5]), 5, 'last')
    first, second = np.array([0, 1]), np.array([0, 2])
    rows = pipeline.lay_out(cut, first, np.array([0, 0]), second, (1, 6))
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


def test_lay_out_takes_windows_in_any_order_and_leaves_rows_empty():
    cut = pipeline.windows(*flat([7, 8, 9], [4, 5], [1, 2, 3]), 5, 'last')
    order, row, column = np.array([1, 2, 0]), np.array([2, 0, 2]), np.array([2, 1, 0])
    rows = pipeline.lay_out(cut, order, row, column, (4, 4))
    assert rows.tokens_BL.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0], [7, 8, 4, 0], [0, 0, 0, 0]]
    assert rows.targets_BL.tolist() == [[0, 2, 3, 0], [0, 0, 0, 0], [8, 9, 5, 0], [0, 0, 0, 0]]
    assert rows.segments_BL.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 2, 0], [0, 0, 0, 0]]


def test_lay_out_may_weigh_only_the_last_position():
    cut = pipeline.windows(*flat([7, 8, 9], [4, 5]), 5, 'last')
    place = np.array([0, 0]), np.array([0, 2])
    rows = pipeline.lay_out(cut, np.array([0, 1]), *place, (1, 6), 'last')
    assert rows.weights_BL.tolist() == [[0, 1, 1, 0, 0, 0]]
    assert rows.targets_BL.tolist() == [[8, 9, 5, 0, 0, 0]]


# Rows of 3 inputs: histories of 1, 2, max_length, max_length + 1 and 2 max_length + 1 items.
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
    neighbours = [90, 91], history, [92, 93]
    for how, expected in (('last', last), ('split', split)):
        found = stretches(pipeline.windows(*flat(*neighbours), 3, how))
        assert found == [[90, 91], *expected, [92, 93]], how


def test_windows_of_one_input():
    items, offsets = flat([1, 2, 3], [4], [5, 6])
    assert stretches(pipeline.windows(items, offsets, 1, 'split')) == [[1, 2], [2, 3], [5, 6]]
    assert stretches(pipeline.windows(items, offsets, 1, 'last')) == [[2, 3], [5, 6]]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(1, 5))
def test_split_windows_hold_every_next_item_pair_once(lengths, max_length):
    histories = numbered(lengths)
    cut = pipeline.windows(*flat(*histories), max_length, 'split')
    assert all(2 <= n <= max_length + 1 for n in cut.lengths)
    pairs = [pair for items in stretches(cut) for pair in itertools.pairwise(items)]
    assert pairs == [pair for items in histories for pair in itertools.pairwise(items)]


def best_fit(inputs, row_length):
    """Slowly: each stretch into the row with the least room that holds it; its room before."""
    rooms, columns = [], []
    for length in inputs:
        fitting = [room for room in rooms if room >= length]
        if fitting:
            room = min(fitting)
            rooms.remove(room)
        else:
            room = row_length
        columns.append(row_length - room)
        rooms.append(room - length)
    return columns, len(rooms)


def check_places(inputs, row, column, row_length):
    """No position is taken twice and no stretch leaves its row."""
    taken = [
        (r, i) for r, c, n in zip(row.tolist(), column.tolist(), inputs) for i in range(c, c + n)
    ]
    assert len(set(taken)) == len(taken) == sum(inputs)
    assert all(0 <= i < row_length for _, i in taken)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_assign_rows_is_best_fit(data):
    row_length = data.draw(st.integers(1, 9))
    inputs = data.draw(st.lists(st.integers(1, row_length), max_size=40))
    row, column = pipeline.assign_rows(np.array(inputs, np.int64), row_length)
    columns, rows = best_fit(inputs, row_length)
    check_places(inputs, row, column, row_length)
    assert column.tolist() == columns
    assert sorted(set(row.tolist())) == list(range(rows))


def test_assign_rows_fills_rows_with_lengths_like_the_real_ones():
    inputs = np.minimum(np.random.default_rng(0).geometric(1 / 6, 20_000), 50)
    row, column = pipeline.assign_rows(inputs, 64)
    check_places(inputs.tolist(), row, column, 64)
    assert inputs.sum() / (64 * (row.max() + 1)) > 0.97


@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize('loss_positions', ['all', 'last'])
@pytest.mark.parametrize('long_histories', ['split', 'last'])
def test_an_epoch_holds_every_pair_once(packed, loss_positions, long_histories):
    rng = np.random.default_rng(1)
    histories = [rng.integers(1, 30, rng.integers(1, 18)).tolist() for _ in range(40)]
    cut = pipeline.windows(*flat(*histories), 6, long_histories)
    row_length = 8 if packed else 6
    batches, steps = an_epoch(
        cut, packed=packed, loss_positions=loss_positions, row_length=row_length
    )
    assert len(batches) == steps
    assert all(field.shape == (3, row_length) for batch in batches for field in batch)
    rows = rows_of(batches)
    assert learned(rows) == to_learn(cut, loss_positions)
    # Every window is read whole, whichever of its positions are trained.
    assert (rows.segments_BL > 0).sum() == (cut.lengths - 1).sum()
    if not packed:
        assert rows.segments_BL.max() == 1
        assert (np.diff(rows.segments_BL, axis=1) <= 0).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), max_size=9), min_size=1, max_size=12).filter(
        lambda histories: any(len(history) > 1 for history in histories)
    ),
    st.integers(0, 99),
    st.booleans(),
)
def test_an_epoch_holds_every_pair_once_whatever_the_histories(histories, seed, packed):
    cut = pipeline.windows(*flat(*histories), 4, 'split')
    batches, _ = an_epoch(cut, seed=seed, packed=packed, row_length=4 + packed)
    assert learned(rows_of(batches)) == to_learn(cut)


def test_the_order_is_drawn_from_seed_and_epoch_alone():
    cut = pipeline.windows(*flat(*numbered([4, 3, 6, 2, 5, 4, 7, 3] * 4)), 6, 'split')

    def order(**changes):
        np.random.seed(changes.pop('elsewhere', 0))  # someone else's draws change nothing
        rows = rows_of(an_epoch(cut, **changes)[0])
        used = rows.segments_BL.any(axis=1)
        return rows.tokens_BL[used].tolist()

    first = order(seed=3, epoch=5)
    assert order(seed=3, epoch=5, elsewhere=1) == first
    assert order(seed=3, epoch=5, rows_per_step=5) == first
    assert order(seed=3, epoch=6) != first
    assert order(seed=4, epoch=5) != first
    assert order(seed=5, epoch=3) != first
    assert order(seed=3, epoch=5, packed=False) != order(seed=3, epoch=6, packed=False)


@pytest.mark.parametrize('layout', ['next', 'cloze', 'prefixes', 'pairs'])
def test_parts_of_an_epoch_side_by_side_are_the_epoch(layout):
    """What two processes draw is what one would have drawn."""
    histories = [[1, 2, 3], [4, 5], [2, 6, 7, 1], [3, 1], [5, 4, 6]]
    offsets = np.cumsum([0, *map(len, histories)])
    cut = pipeline.windows(np.concatenate(histories).astype(np.int32), offsets, 5, 'split')

    def draw(part):
        options = {'packed': layout != 'prefixes', 'loss_positions': 'all', 'layout': layout}
        batches, _ = epochs.epoch(
            cut, seed=1, epoch=2, row_length=6, rows_per_step=2, part=part, **options
        )
        return list(batches)

    for whole, first, second in zip(
        draw(slice(None)), draw(slice(0, 1)), draw(slice(1, 2)), strict=True
    ):
        for field, one, other in zip(whole, first, second, strict=True):
            np.testing.assert_array_equal(field, np.concatenate([one, other]))


def test_the_last_step_is_filled_with_rows_that_weigh_nothing():
    cut = pipeline.windows(*flat(*numbered([5, 5, 5, 5])), 4, 'last')
    batches, steps = an_epoch(cut, packed=False, row_length=4, rows_per_step=3)
    assert steps == 2
    assert [batch.weights_BL.any(axis=1).tolist() for batch in batches] == [
        [True, True, True],
        [True, False, False],
    ]
    for field in batches[1]:
        assert not field[1:].any()


def test_epochs_in_advance_are_those_asked_for_in_any_order():
    """The one after is made before it is asked for, and in a thread of its own."""
    made = []

    def epoch_of(epoch):
        made.append((epoch, threading.current_thread() is threading.main_thread()))
        return epoch * epoch

    wait_for = epochs.in_advance(epoch_of)
    assert [wait_for(epoch) for epoch in (0, 1, 2, 7, 3, 3)] == [0, 1, 4, 49, 9, 9]
    assert [epoch for epoch, here in made if here] == [0, 7, 3, 3]
    assert {epoch for epoch, here in made if not here} >= {1, 2}


def test_what_fails_in_advance_fails_where_it_is_asked_for():
    def epoch_of(epoch):
        if epoch == 1:
            raise ValueError('no such epoch')
        return epoch

    wait_for = epochs.in_advance(epoch_of)
    assert wait_for(0) == 0
    with pytest.raises(ValueError, match='no such epoch'):
        wait_for(1)


def test_an_epoch_without_windows_is_empty():
    cut = pipeline.windows(*flat([1], [2]), 4, 'split')
    for packed in (True, False):
        assert an_epoch(cut, packed=packed) == ([], 0)


def test_the_iterator_goes_on_where_its_state_says():
    cut = pipeline.windows(*flat(*numbered([4, 3, 6, 2, 5, 4, 7, 3] * 6)), 6, 'split')
    options = {
        'seed': 7,
        'epoch': 2,
        'packed': True,
        'row_length': 8,
        'rows_per_step': 2,
        'loss_positions': 'all',
    }
    batches, steps = epochs.epoch(cut, **options)
    assert steps > 6
    for _ in range(3):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))  # as a checkpoint keeps it
    rest = list(batches)
    assert len(rest) == steps - 3

    again, _ = epochs.epoch(cut, **options)
    again.set_state(state)
    assert again.get_state() == state
    resumed = list(again)
    assert len(resumed) == len(rest)
    for a, b in zip(rest, resumed):
        for left, right in zip(a, b):
            np.testing.assert_array_equal(left, right)

    ended, _ = epochs.epoch(cut, **options)
    ended.set_state(batches.get_state())
    assert list(ended) == []


def held(histories, targets, max_length, users):
    return list(pipeline.held_rows(*flat(*histories), np.array(targets), max_length, users))


def test_held_rows_written_out():
    histories = [5, 6, 7], [1], [2, 2, 2, 4]
    (chunk,) = held(histories, [8, 9, 3], 4, 4)
    # Shortest first, then a row that only fills up.
    assert chunk.user_B.tolist() == [1, 0, 2, 0]
    assert chunk.target_B.tolist() == [9, 8, 3, 0]
    assert chunk.tokens_BL.tolist() == [[0, 0, 0, 1], [0, 5, 6, 7], [2, 2, 2, 4], [0, 0, 0, 0]]
    assert chunk.positions_BL.tolist() == [[0, 0, 0, 0], [0, 0, 1, 2], [0, 1, 2, 3], [0, 0, 0, 0]]
    assert chunk.segments_BL.tolist() == [[0, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert [sorted(set(row) - {0}) for row in chunk.seen_BS.tolist()] == [
        [1],
        [5, 6, 7],
        [2, 4],
        [],
    ]
    for name, field in chunk._asdict().items():
        assert field.dtype == (np.int64 if name == 'user_B' else np.int32), name


def test_a_long_history_is_seen_whole_and_read_at_its_end():
    """The window's positions are counted from its own start, as in training on split windows."""
    history = list(range(1, 13))
    (chunk,) = held([history], [13], 3, 1)
    assert chunk.tokens_BL.tolist() == [[10, 11, 12]]
    assert chunk.positions_BL.tolist() == [[0, 1, 2]]
    assert chunk.segments_BL.tolist() == [[1, 1, 1]]
    assert sorted(set(chunk.seen_BS[0].tolist()) - {0}) == history


def test_a_history_without_items():
    chunk, _ = held([[], [4, 5]], [6, 7], 5, 1)
    assert not chunk.tokens_BL.any() and not chunk.segments_BL.any() and not chunk.seen_BS.any()
    assert chunk.target_B.tolist() == [6]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=40), min_size=1, max_size=12),
    st.integers(1, 20),
    st.integers(1, 5),
)
def test_held_rows_hold_every_user_once(histories, max_length, users):
    targets = [1 + i % 9 for i in range(len(histories))]
    judged = []
    for chunk in held(histories, targets, max_length, users):
        assert all(len(field) == users for field in chunk)
        for tokens, positions, segments, seen, target, user in zip(*chunk):
            if target == 0:
                assert not tokens.any() and not segments.any() and not seen.any()
                continue
            judged.append(user)
            expected = histories[user][-max_length:]
            n = len(expected)
            assert target == targets[user]
            assert tokens.tolist() == [0] * (len(tokens) - n) + expected
            assert positions.tolist() == [0] * (len(tokens) - n) + list(range(n))
            assert segments.tolist() == [0] * (len(tokens) - n) + [1] * n
            items = seen[seen > 0].tolist()
            assert sorted(items) == sorted(set(histories[user]))
    assert sorted(judged) == list(range(len(histories)))


def test_held_rows_have_few_shapes():
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / 9, 3000) + 2, 300)
    chunks = held(numbered(lengths), np.ones(3000, np.int64), 50, 128)
    shapes = {(chunk.tokens_BL.shape, chunk.seen_BS.shape) for chunk in chunks}
    assert len(shapes) <= 6
    assert max(chunk.tokens_BL.shape[1] for chunk in chunks) == 50
    # And they are no wall of padding: rows of 50 for everyone would be .22 full.
    used = sum((chunk.segments_BL > 0).sum() for chunk in chunks)
    assert used / sum(chunk.segments_BL.size for chunk in chunks) > 0.4


@pytest.mark.parametrize('long_histories', ['split', 'last'])
def test_seen_are_the_items_of_windows(long_histories):
    """Histories 1 to 5, 6 alone, 7 8; a last window of three inputs leaves 1 out; 6 has none."""
    items, offsets = np.array([1, 2, 3, 4, 5, 6, 7, 8], np.int32), np.array([0, 5, 6, 8])
    cut = pipeline.windows(items, offsets, 3, long_histories)
    found = np.flatnonzero(pipeline.seen(cut, 9)).tolist()
    assert found == ([1] if long_histories == 'split' else []) + [2, 3, 4, 5, 7, 8]


@pytest.mark.parametrize('packed', [True, False])
def test_a_cloze_epoch_holds_every_item_of_every_window(packed):
    rng = np.random.default_rng(1)
    histories = [rng.integers(1, 30, rng.integers(1, 18)).tolist() for _ in range(40)]
    cut = pipeline.windows(*flat(*histories), 6, 'split')
    batches, _ = an_epoch(cut, packed=packed, layout='cloze', row_length=8 if packed else 7)
    found = []
    for tokens, positions, segments, targets, weights in zip(*rows_of(batches)):
        np.testing.assert_array_equal(tokens, targets)
        np.testing.assert_array_equal(weights > 0, segments > 0)
        for segment in range(1, segments.max() + 1):
            (column,) = np.nonzero(segments == segment)
            assert positions[column].tolist() == list(range(len(column)))
            found.append(tokens[column].tolist())
    assert sorted(found) == sorted(stretches(cut))


def test_prefixes_of_like_length_share_a_batch():
    """Histories 1..6 and 7..9: prefixes of 1 to 4 in rows of four, the one of 5 in a row of six."""
    cut = pipeline.windows(*flat(*numbered([6, 3])), 6, 'last')
    batches, steps = an_epoch(cut, layout='prefixes', row_length=6, rows_per_step=4)
    assert steps == len(batches) == 3
    assert sorted(batch.tokens_BL.shape for batch in batches) == [(4, 4), (4, 4), (4, 6)]
    (long,) = (batch for batch in batches if batch.tokens_BL.shape[1] == 6)
    row = long.tokens_BL[:, -1].argmax()
    assert long.tokens_BL[row].tolist() == [0, 1, 2, 3, 4, 5]
    assert long.positions_BL[row].tolist() == [0, 0, 1, 2, 3, 4]
    assert long.segments_BL[row].tolist() == [0, 1, 1, 1, 1, 1]
    assert long.targets_BL[row].tolist() == [0, 0, 0, 0, 0, 6]
    assert long.weights_BL[row].tolist() == [0, 0, 0, 0, 0, 1]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), max_size=12), min_size=1, max_size=9), st.integers(0, 9)
)
def test_an_epoch_of_prefixes_holds_every_pair_once(histories, seed):
    cut = pipeline.windows(*flat(*histories), 10, 'split')
    batches, _ = an_epoch(cut, seed=seed, layout='prefixes', row_length=10)
    found = collections.Counter()
    for batch in batches:
        assert batch.tokens_BL.shape[1] in (4, 8, 10)
        for tokens, positions, segments, targets, weights in zip(*batch):
            real = segments > 0
            assert positions[real].tolist() == list(range(real.sum()))
            assert not tokens[~real].any() and not targets[:-1].any() and not weights[:-1].any()
            if real.any():
                found[tuple(tokens[real].tolist()), int(targets[-1])] += 1
    assert found == to_learn(cut)
