"""Splits: by time as a loop over a log has it, nothing later in training, and leave one out."""

import dataclasses
import datetime
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import polars as pl
import pytest
from data_fixtures import distinct_histories, flatten, make_dataset, real_file, unflatten

from fame_jax.data import card, epochs
from fame_jax.data.dataset import Dataset
from fame_jax.data.prepare import prepare
from fame_jax.data.split import show_moment
from fame_jax.data.times import Clock
from fame_jax.data.windows import make_windows, places_in_windows
from fame_jax.errors import UserError

DAY = 86_400 * 10**6  # microseconds
DATED = {'time': {'unit': 'seconds'}}


def make_log(seed, users=9, items=8, days=40):
    """A data set of random histories with times, many of which are equal."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(3, 9, users)
    histories = [draw.integers(1, items + 1, length).tolist() for length in lengths]
    histories[0][0] = items  # so that V is the same
    times = [np.sort(draw.integers(0, days, length)) * DAY for length in lengths]
    return make_dataset(*histories, times=np.concatenate(times), card={'name': 'log', **DATED})


def split_loop(data, at, targets):
    """The split as loops over one action after another: training, targets, and the moments."""
    histories = unflatten(data.items, data.offsets)
    clocks = unflatten(data.times, data.offsets)
    ordered = sorted(itertools.chain.from_iterable(clocks))
    moment = ordered[int(at * len(ordered))]
    before = [time for time in ordered if time < moment]
    earlier = before[int(at * len(before))]
    training = [
        [item for item, time in zip(history, clock) if time < earlier]
        for history, clock in zip(histories, clocks)
    ]
    found = {'validation': [], 'test': []}
    for part, low, high in (
        ('validation', earlier, moment),
        ('test', moment, float('inf')),
    ):
        for user, (history, clock) in enumerate(zip(histories, clocks)):
            places = [place for place, time in enumerate(clock) if low <= time < high]
            for place in places if targets == 'successive' else places[-1:]:
                if place:
                    found[part].append((user, history[:place], history[place]))
    return training, found, (moment, earlier)


def rows_of(data, part):
    """(user, history, target) of each target."""
    items, offsets, targets = data.held_out(part)
    users = data.split.parts[part].users.tolist()
    return list(zip(users, unflatten(items, offsets), targets.tolist(), strict=True))


@pytest.mark.parametrize('targets', ['last', 'successive'])
def test_a_split_by_time_is_that_of_a_loop(targets):
    compared = 0
    for seed in range(60):
        at = (0.9, 0.8, 0.5)[seed % 3]
        data = make_log(seed)
        training, found, moments = split_loop(data, at, targets)
        if not (found['validation'] and found['test']):
            with pytest.raises(UserError, match='target'):
                data.split_by_time(at, targets)
            continue
        split = data.split_by_time(at, targets)
        assert unflatten(*split.training_histories()) == training
        for part, expected in found.items():
            assert rows_of(split, part) == expected
            _check_counts(split.split.card[part], expected, training)
        names = ('moment', 'validation_moment')
        assert [split.split.card[name] for name in names] == list(map(show_moment, moments))
        seen = {*itertools.chain.from_iterable(training)}
        counts = {'users': sum(map(bool, training)), 'items': len(seen)}
        counts['actions'] = sum(map(len, training))
        assert split.split.card['training'] == counts
        compared += 1
    assert compared > 50


def _check_counts(counts, rows, training):
    """The counts of a part in the card, by loops."""
    seen = {*itertools.chain.from_iterable(training)}
    assert (counts['targets'], counts['users']) == (len(rows), len({row[0] for row in rows}))
    new_users = {user for user, _, _ in rows if not training[user]}
    assert counts['users_without_training'] == len(new_users)
    new = [target for _, _, target in rows if target not in seen]
    assert counts['targets_without_training'] == len(new)
    assert counts['items_without_training'] == len({*new})


@pytest.mark.parametrize('long_histories', ['split', 'last'])
@pytest.mark.parametrize('row_layout', ['next', 'masked', 'pairs', 'prefixes'])
def test_no_batch_has_an_item_of_the_validation_moment_or_later(row_layout, long_histories):
    """In place of items the places of actions: their times are looked up."""
    for seed in range(10):
        data = make_log(seed).split_by_time(0.8)
        late = data.split.card['validation_moment']
        places = np.arange(len(data.items), dtype=np.int32) + 1
        windows = make_windows(places, data.offsets, 4, long_histories, data.split.train_ends)
        batches, _ = epochs.epoch_batches(
            windows, seed=0, epoch=0, row_length=8, rows_per_step=2, row_layout=row_layout
        )
        trained = set()
        for batch in batches:
            for name in ('tokens_BL', 'targets_BL', 'pair_tokens_BL'):
                trained |= {*np.unique(getattr(batch, name, 0)).tolist()}
        trained -= {0}
        assert trained
        assert max(show_moment(data.times[place - 1]) for place in trained) < late


def test_nothing_of_real_data_is_trained_on_at_the_moment_or_later():
    folder = real_file('ml-100k').parents[1]
    data = prepare('ml-100k', data_dir=str(folder))
    frame = pl.read_csv(folder / 'ml-100k' / 'ml-100k.inter', separator='\t')
    frame.columns = ['user', 'item', 'rating', 'time']
    for at in (0.9, '1998-03-01'):
        split = data.split_by_time(at, 'successive')
        show = datetime.datetime.fromisoformat
        late, moment = (
            int(show(split.split.card[name]).timestamp())
            for name in ('validation_moment', 'moment')
        )
        windows = make_windows(data.items, data.offsets, 200, 'split', split.split.train_ends)
        places = places_in_windows(windows, slice(None))
        assert data.times[places].max() < late * 10**6 < moment * 10**6
        # The times are those of the file, not only in order.
        assert {*(data.times // 10**6).tolist()} <= {*frame['time'].to_list()}
        users = np.repeat(np.arange(data.num_users), data.lengths)
        log = frame.select('user', 'item', pl.col('time').cast(pl.Int64))
        rows = {*map(tuple, log.rows())}
        for place in np.random.default_rng(0).choice(places, 2000):
            user, item = data.user_ids[users[place]], data.item_ids[data.items[place]]
            assert (int(user), int(item), data.times[place] // 10**6) in rows
        starts, ends = split.history_bounds('test')
        assert data.times[ends].min() >= moment * 10**6 and (ends > starts).all()
        # Every action from the moment on is a target, but for those without a history.
        after = np.count_nonzero(data.times >= moment * 10**6)
        assert len(ends) + split.split.card['test']['left_out_without_history'] == after
    assert split.split.card['moment'] == '1998-03-01T00:00:00Z'


def test_a_share_is_of_all_actions_and_a_date_splits_before_it_alike():
    """Ten days, an action each: .8 is day 8; of the eight before, .8 is day 6."""
    times = np.arange(10) * DAY
    data = make_dataset([1, 2, 3, 1, 2, 3, 1, 2, 3, 1], times=times, card={'name': 'log', **DATED})
    for at in (0.8, '0.8', '1970-01-09', datetime.date(1970, 1, 9), '1970-01-09T02:00:00+02:00'):
        found = data.split_by_time(at).split.card
        assert found['moment'] == '1970-01-09T00:00:00Z'
        assert found['validation_moment'] == '1970-01-07T00:00:00Z'
        assert found['training'] == {'users': 1, 'items': 3, 'actions': 6}
    assert rows_of(data.split_by_time(0.8), 'validation') == [(0, [1, 2, 3, 1, 2, 3, 1], 2)]
    assert rows_of(data.split_by_time(0.8), 'test') == [(0, [1, 2, 3, 1, 2, 3, 1, 2, 3], 1)]


def test_actions_at_the_moment_itself_are_after_it():
    """Four actions at the moment of .5: none of them is trained on, though half of all would be."""
    times = np.array([0, 1, 2, 2, 2, 2, 3, 3]) * DAY
    data = make_dataset([1, 2, 3, 4, 5, 6, 7, 8], times=times, card={'name': 'log', **DATED})
    split = data.split_by_time(0.5, 'successive')
    assert unflatten(*split.training_histories()) == [[1]]
    assert split.held_out('validation')[2].tolist() == [2]
    assert split.held_out('test')[2].tolist() == [3, 4, 5, 6, 7, 8]


def test_times_without_a_unit_are_split_by_a_share_alone():
    card = {'name': 'log', 'time': {'unit': 'numbers'}}
    for times in (np.arange(10), np.arange(10) / 4):
        data = make_dataset(*distinct_histories([10]), times=times, card=card)
        assert data.split_by_time(0.8).split.card['moment'] == str(times[8])
        with pytest.raises(UserError, match='plain numbers'):
            data.split_by_time('1998-03-01')


MISTAKES = {
    'no times': (dict(times=None), 0.9, 'needs the times'),
    'an earlier version': (dict(times=None, card={'name': 'x', **DATED}), 0.9, 'earlier version'),
    'a share of 1': ({}, 1, 'between 0 and 1'),
    'a share of 0': ({}, 0.0, 'between 0 and 1'),
    'no number': ({}, 'nan', 'between 0 and 1'),
    'a year': ({}, '1998', 'between 0 and 1'),
    'a word': ({}, 'yesterday', 'between 0 and 1'),
    'a wrong date': ({}, '1998-02-30', 'between 0 and 1'),
    'too early': ({}, '1970-01-01', 'training part would be empty'),
    'early': ({}, '1970-01-02', 'training part would be empty'),
    'too late': ({}, '1999-01-01', 'test part would be empty'),
    'all at once': (dict(times=np.zeros(9, np.int64)), 0.9, 'training part would be empty'),
}


@pytest.mark.parametrize('case', MISTAKES)
def test_what_cannot_be_split_is_one_line(case):
    fields, at, words = MISTAKES[case]
    times = np.arange(9) * DAY
    known = {} if 'times' in fields else DATED
    fields = {'times': times, 'card': {'name': 'log', **known}, **fields}
    data = make_dataset([1, 2, 3], [2, 3, 4], [4, 5, 6], **fields)
    with pytest.raises(UserError, match=words) as caught:
        data.split_by_time(at)
    assert '\n' not in str(caught.value)


def test_other_targets_are_a_mistake():
    with pytest.raises(UserError, match='choose one of last, successive'):
        make_log(0).split_by_time(targets='first')


def test_sequence_files_have_no_times(tmp_path):
    (tmp_path / 'log.txt').write_text('a 1 2 3 4\nb 2 3 1\n')
    data = Dataset.from_file(tmp_path / 'log.txt', k_core=0)
    with pytest.raises(UserError, match=r'log\.txt: a split by time needs the times'):
        data.split_by_time()


# Leave one out.

histories = st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=8), min_size=1, max_size=6)


@hypothesis.given(histories)
@hypothesis.settings(deadline=None)
def test_times_change_nothing_in_leave_one_out(histories):
    """Fingerprint, training windows and targets are those of the data without times."""
    plain = make_dataset(*histories)
    timed = dataclasses.replace(plain, times=np.arange(len(plain.items)))
    assert timed.fingerprint() == plain.fingerprint()
    assert unflatten(*timed.training_histories()) == [history[:-2] for history in histories]
    for part, last in (('validation', 2), ('test', 1)):
        expected = [(u, row[:-last], row[-last]) for u, row in enumerate(histories)]
        assert rows_of(timed, part) == expected
        assert timed.split.count_users(part) == len(histories)
    assert not timed.split.is_by_time and card.describe_split(timed) == []
    assert timed.split.describe().startswith('leave one out: last item test')
    windows = make_windows(plain.items, plain.offsets, 3, 'split', timed.split.train_ends)
    before = make_windows(*flatten(*(row[:-2] for row in histories)), 3, 'split')
    found = plain.items[places_in_windows(windows, slice(None))]
    assert found.tolist() == before.items[places_in_windows(before, slice(None))].tolist()


# Identity, and the form on disk.


def test_another_split_is_other_data():
    data = make_log(3)
    splits = [
        data.split_by_time(0.8),
        data.split_by_time(0.5),
        data.split_by_time(0.8, 'successive'),
    ]
    later = dataclasses.replace(data, times=data.times + DAY)
    found = [data.fingerprint(), later.split_by_time(0.8).fingerprint()]
    found += [split.fingerprint() for split in splits]
    assert len({*found}) == 5
    for split in splits:
        assert split.card['fingerprint'] == split.fingerprint()
        assert split.split.card['data_sha256'] == data.fingerprint()
    again = splits[0].split_by_time(0.5)
    assert again.fingerprint() == splits[1].fingerprint()


def test_times_and_the_split_are_saved(tmp_path):
    data = make_log(3)
    for saved in (data, data.split_by_time(0.8, 'successive'), data.split_by_time('1970-02-01')):
        saved.save(tmp_path)
        loaded = Dataset.load(tmp_path)
        np.testing.assert_array_equal(loaded.times, data.times)
        assert loaded.fingerprint() == loaded.card['fingerprint'] == saved.fingerprint()
        assert loaded.split.card == saved.split.card
    np.save(tmp_path / 'times.npy', data.times + 1)
    with pytest.raises(UserError, match='times_sha256'):
        Dataset.load(tmp_path)
    (tmp_path / 'times.npy').unlink()
    with pytest.raises(UserError, match='prepare the data set again'):
        Dataset.load(tmp_path)


def test_times_that_do_not_fit_are_an_error():
    data = make_log(3)
    split = data.split_by_time(0.8)
    for fields in (
        {'times': data.times[:-1]},
        {'times': data.times[::-1]},
        {'times': data.times.astype(np.int32)},
    ):
        with pytest.raises(ValueError, match='times'):
            dataclasses.replace(data, **fields).with_counts()
    shorter = {name: getattr(make_dataset([1, 2, 3]), name) for name in ('items', 'offsets')}
    with pytest.raises(ValueError, match='split again'):
        dataclasses.replace(
            split, **shorter, times=None, user_ids=['u0'], item_ids=split.item_ids
        ).with_counts()


# Times.

EPOCH = 893_286_638  # seconds; 1998-04-22T22:10:38Z


@pytest.mark.parametrize(
    'values',
    [
        [EPOCH, EPOCH + 1],
        [EPOCH * 1000 + 1, EPOCH * 1000 + 1999],
        [EPOCH * 10**6, EPOCH * 10**6 + 1],
        [EPOCH * 10**9, EPOCH * 10**9 + 10**6],
        [EPOCH + 0.25, EPOCH + 0.5],
        [f'{EPOCH}.000000001', f'{EPOCH}.000000002'],
        ['1998-04-22T22:10:38Z', '1998-04-22T22:10:39Z'],
        [datetime.date(1998, 4, 22), datetime.date(1998, 4, 23)],
        [datetime.datetime(1998, 4, 22, 22), datetime.datetime(1998, 4, 22, 23)],
    ],
    ids=str,
)
def test_times_of_all_units_are_microseconds(values):
    frame = pl.DataFrame({'user': ['u'] * 4, 'item': [1, 2, 3, 4], 'time': [*values, *values]})
    data = Dataset.from_frame(frame, user='user', item='item', time='time', k_core=0)
    assert data.times.dtype == np.int64 and (np.diff(data.times) >= 0).all()
    days = {show_moment(time)[:10] for time in data.times}
    assert days <= {'1998-04-22', '1998-04-23'} and '1998-04-22' in days


def test_the_clock_keeps_microseconds():
    assert Clock(1).read(np.array([1.5])).tolist() == [1_500_000]
    assert Clock(1000).read(np.array([7])).tolist() == [7_000]
    assert Clock(10**9).read(np.array([7_999])).tolist() == [7]
    assert Clock(1, np.array([0, 0.5, 2.0])).read(np.array([2, 1])).tolist() == [2_000_000, 500_000]
    assert Clock().read(np.array([3, 1])).tolist() == [3, 1]


def test_frames_without_a_time_have_none():
    frame = pl.DataFrame({'user': ['u'] * 3, 'item': [1, 2, 3]})
    assert Dataset.from_frame(frame, user='user', item='item', k_core=0).times is None


# Repeats.


@pytest.mark.parametrize('block', [1, 5, 1000])
def test_repeats_are_counted_over_all_blocks(block, monkeypatch):
    monkeypatch.setattr(card, 'BLOCK', block)
    for data in (make_log(5), make_log(5).split_by_time(0.6, 'successive')):
        for part in ('validation', 'test'):
            rows = rows_of(data, part)
            expected = np.mean([target in history for _, history, target in rows])
            assert card.repeat_share(data, part) == pytest.approx(expected)


def test_the_lines_have_the_moments_and_the_counts():
    split = make_log(3).split_by_time(0.8, 'successive')
    found, lines = split.split.card, card.describe_split(split)
    assert found['moment'] in lines[0] and found['validation_moment'] in lines[0]
    for part, line in zip(('validation', 'test'), lines[1:]):
        assert f'{found[part]["targets"]} {part} targets of {found[part]["users"]} users' in line
        assert f'{found[part]["items_without_training"]} items' in line
