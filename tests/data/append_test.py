"""Appended logs against dicts of lists; ids keep their numbers."""

import dataclasses

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fame_jax.data import append
from fame_jax.data.dataset import Dataset
from fame_jax.errors import UserError

COLUMNS = ['who', 'what', 'when', 'stars']
NAMED = {'user': 'who', 'item': 'what', 'time': 'when', 'rating': 'stars'}
# Two users with three actions each, of three items.
OLD = [('u', 'a', 1, 5), ('u', 'b', 2, 5), ('u', 'c', 3, 5)]
OLD += [('v', 'b', 1, 5), ('v', 'a', 2, 5), ('v', 'c', 3, 5)]


def frame(rows):
    """Rows of user, item, time and rating as a frame."""
    return pl.DataFrame(rows, schema=COLUMNS, orient='row')


def make_data(rows, **filters):
    """A data set of rows without a k-core, which does not keep their times."""
    named = {role: name for role, name in NAMED.items() if role != 'rating'}
    data = Dataset.from_frame(frame(rows), **named, k_core=0, **filters)
    return dataclasses.replace(data, times=None) if hasattr(data, 'times') else data


def add(data, rows, waiting=append.NO_ACTIONS, **filters):
    """The data set with rows appended."""
    log = append.read_like(frame(rows), data, filters.get('min_rating', 0))
    return append.append_log(data, log, waiting, run='runs/old', **filters)


def histories(data):
    """User -> items, by their outside ids."""
    return dict(data.histories())


def waiting_histories(waiting):
    """User -> items of the actions that wait."""
    found = {}
    for user, item in zip(waiting.users, waiting.items):
        found.setdefault(user, []).append(item)
    return found


ROW = st.tuples(st.integers(0, 6), st.integers(0, 8), st.integers(0, 50))
LOGS = st.lists(st.lists(ROW, min_size=1, max_size=15), min_size=1, max_size=3)


@settings(max_examples=40)
@given(first=st.lists(ROW, max_size=20), logs=LOGS, text=st.booleans())
def test_histories_are_those_of_lists_and_ids_keep_their_numbers(first, logs, text):
    """Users 90 and 91 and items 0, 1, 2 are always in the data set, and item 0 in every log."""

    def rows(actions):
        spell = (lambda n: f'x{n}') if text else (lambda n: n)
        return [(spell(user), spell(item), time, 5) for user, item, time in actions]

    first = [(90, 0, 1), (90, 1, 2), (90, 2, 3), (91, 2, 1), (91, 1, 2), (91, 0, 3), *first]
    data, waiting = make_data(rows(first)), append.NO_ACTIONS
    expected = histories(data)
    waits = {}
    for number, actions in enumerate(logs):
        actions = [*actions, (92 + number, 0, 0)]  # logs differ
        before, known = data, list(expected)
        try:
            appended = add(data, rows(actions), waiting)
        except UserError as error:
            assert 'repeats the history' in str(error)
            return
        data, waiting = appended.data, appended.waiting
        for user, item, _ in sorted(actions, key=lambda action: action[2]):
            user, item, _, _ = rows([(user, item, 0)])[0]
            (expected if user in expected else waits).setdefault(user, []).append(item)
        expected |= {user: items for user, items in waits.items() if len(items) >= 3}
        waits = {user: items for user, items in waits.items() if len(items) < 3}
        assert histories(data) == expected
        assert waiting_histories(waiting) == {str(u): list(map(str, i)) for u, i in waits.items()}
        assert data.user_ids[: before.num_users] == before.user_ids
        assert data.item_ids[: before.num_items + 1] == before.item_ids
        assert [str(user) for user in known] == data.user_ids[: before.num_users]
        np.testing.assert_array_equal(data.items[appended.old_places], before.items)
        assert set(data.item_ids[1:]) >= {str(item) for _, item, _, _ in rows(actions)}
        assert data.find_fault() == '' and len(data.card['appended']) == number + 1


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Timed(Dataset):
    """A data set that keeps the times of its actions."""

    times: np.ndarray | None = None


@settings(max_examples=25)
@given(actions=st.lists(ROW, min_size=1, max_size=30), cut=st.lists(st.booleans(), min_size=30))
def test_with_times_old_and_new_actions_are_sorted_together(actions, cut):
    """The same as a data set of all rows at once, ties in the order old, new."""
    first = [(90, 0, 1), (90, 1, 2), (90, 2, 3), (91, 2, 1), (91, 1, 2), (91, 0, 3)]
    olds = [row for row, old in zip(actions, cut) if old]
    news = [row for row, old in zip(actions, cut) if not old] + [(92, 0, 0)]
    data = make_data([(*row, 5) for row in first + olds])
    kept = [row for row in first + olds if row[0] in dict(data.histories())]
    times = sorted(kept, key=lambda row: (data.user_ids.index(str(row[0])), row[2]))
    fields = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
    timed = Timed(**fields | {'times': np.array([row[2] for row in times], np.int64)})
    try:
        appended = add(timed, [(*row, 5) for row in news])
    except UserError as error:
        assert 'repeats the history' in str(error)
        return
    expected = {}
    for user, item, time in sorted(kept + news, key=lambda row: row[2]):
        expected.setdefault(user, []).append((item, time))
    expected = {user: rows for user, rows in expected.items() if len(rows) >= 3}
    found = histories(appended.data)
    assert found == {user: [item for item, _ in rows] for user, rows in expected.items()}
    found_times = [expected[int(user)] for user in appended.data.user_ids]
    assert appended.data.times.tolist() == [time for rows in found_times for _, time in rows]
    np.testing.assert_array_equal(appended.data.items[appended.old_places], data.items)


def test_filters_of_the_run_are_those_of_new_actions():
    data = make_data(OLD, min_rating=0)
    rows = [('u', 'd', 4, 1), ('u', 'e', 5, 4), ('u', 'e', 5, 4), ('u', 'a', 6, 4)]
    added = add(data, rows, min_rating=3).data
    assert histories(added)['u'] == ['a', 'b', 'c', 'e', 'e', 'a'] and 'd' not in added.item_ids
    assert histories(add(data, rows, duplicates='drop').data)['u'] == [*'abcdea']
    latest = add(data, rows, max_user_actions=4)
    assert histories(latest.data)['u'] == [*'deea']
    assert latest.old_places.tolist() == [-1, -1, -1, 4, 5, 6]


def test_the_card_has_counts_and_the_span_of_times():
    data = dataclasses.replace(make_data(OLD), card=make_data(OLD).card | {'k_core': 2})
    added = add(data, [('u', 'd', 7, 5), ('w', 'a', 8, 5), ('w', 'e', 9, 5)])
    (record,) = added.data.card['appended']
    expected = {'source': 'memory', 'run': 'runs/old', 'actions': 3, 'new_users': 0}
    expected |= {'new_items': 2, 'rare_new_items': 2, 'waiting_users': 1, 'waiting_actions': 2}
    assert expected.items() <= record.items()
    assert added.data.card['time'] == {'unit': 'numbers', 'first': '1', 'last': '9'}
    assert (added.data.card['actions'], added.data.card['items']) == (7, 5)
    lines = append.describe(added, k_core=2)
    assert lines[0] == 'appended: 3 actions from memory; 0 new users, 2 new items'
    assert lines[1].startswith('k_core=2 is not applied again: 2 of the new items')
    assert lines[2].startswith('1 new users have fewer than 3 actions; their 2 actions wait')
    assert len(lines) == 3


def test_older_actions_are_named():
    added = add(make_data(OLD), [('u', 'd', 2, 5)])
    assert histories(added.data)['u'] == ['a', 'b', 'c', 'd']
    (line,) = [line for line in append.describe(added, 0) if line.startswith('warning')]
    assert 'has actions from 2 on, and those of runs/old end at 3' in line
    assert 'new actions follow the old ones' in line
    assert add(make_data(OLD), [('u', 'd', 3, 5)]).notes == []


@pytest.mark.parametrize(
    'rows, parts',
    [
        ([('x', 'y', 4, 5), ('x', 'z', 4, 5)], ['none of its 2 items', "'y'", "like 'a'"]),
        ([('u', f'{n}', 4, 5) for n in range(10)], ['none of its 10 items']),
        ([*OLD, ('u', 'd', 4, 5)], ['repeats the history', '2 of 2 users']),
        ([('u', 'a', 4, 1)], ['min_rating=3 leaves no action']),
    ],
)
def test_a_log_that_does_not_fit_is_refused(rows, parts):
    with pytest.raises(UserError) as error:
        add(make_data(OLD), rows, min_rating=3)
    assert all(part in str(error.value) for part in parts) and '\n' not in str(error.value)


@pytest.mark.parametrize('keeps_times', [True, False])
def test_the_same_items_at_later_times_are_new_actions(keeps_times):
    """A weekly basket is bought again; a full export also begins with the old times."""
    data = make_data(OLD)
    if keeps_times:
        fields = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
        times = {(user, item): time for user, item, time, _ in OLD}
        kept = [times[user, item] for user, items in data.histories() for item in items]
        data = Timed(**fields | {'times': np.array(kept, np.int64)})
    before = histories(data)
    later = [(user, item, time + 10, rating) for user, item, time, rating in OLD]
    after = histories(add(data, later).data)
    assert after == {user: [*items, *items] for user, items in before.items()}
    again = [*OLD, *later]
    with pytest.raises(UserError, match='repeats the history that runs/old has, for 2 of 2 users'):
        add(data, again)


def test_the_same_actions_are_refused_in_any_file(tmp_path):
    new = [('u', 'd', 4, 5), ('v', 'd', 4, 5)]
    data = add(make_data(OLD), new).data
    for name, separator in (('again.csv', ','), ('again.tsv', '\t')):
        frame(new).write_csv(tmp_path / name, separator=separator)
        log = append.read_like(tmp_path / name, data, 0)
        with pytest.raises(UserError, match='appended before, as memory'):
            append.append_log(data, log, run='runs/old')
    # The log that the data set itself was made of.
    frame(OLD).write_csv(tmp_path / 'old.csv')
    data = Dataset.from_file(tmp_path / 'old.csv', user='who', item='what', time='when', k_core=0)
    log = append.read_like(tmp_path / 'old.csv', data, 0)
    with pytest.raises(UserError, match='is the log that runs/old was prepared from'):
        append.append_log(data, log, run='runs/old')


INTEGERS = [(1, 7, 10, 5), (1, 8, 11, 5), (1, 9, 12, 5)]
SECONDS = [(1, 7, 1_700_000_000, 5), (1, 8, 1_700_000_001, 5), (1, 9, 1_700_000_002, 5)]


@pytest.mark.parametrize(
    'old, new, parts',
    [
        (OLD, frame(OLD).rename({'when': 'day'}), ["no column 'when'", "time 'when'"]),
        (INTEGERS, frame([('x1', '7', 13, 5)]), ["the user 'x1' is no whole number"]),
        (
            SECONDS,
            frame([(1, 7, 1_700_000_003_000, 5), (1, 8, 1_700_000_004_000, 5)]),
            ['times are in milliseconds', 'in seconds'],
        ),
    ],
)
def test_a_log_of_another_form_is_refused(old, new, parts):
    with pytest.raises(UserError) as error:
        append.read_like(new, make_data(old), 0)
    assert all(part in str(error.value) for part in parts), error.value


def test_sequences_follow_sequences(tmp_path):
    (tmp_path / 'old.txt').write_text('1 5 6 7\n2 7 6 5\n')
    (tmp_path / 'new.txt').write_text('2 8\n3 5 8 6\n')
    data = Dataset.from_file(tmp_path / 'old.txt', k_core=0)
    added = append.append_log(data, append.read_like(tmp_path / 'new.txt', data, 0), run='r')
    assert histories(added.data) == {'1': [*'567'], '2': [*'7658'], '3': [*'586']}
    with pytest.raises(UserError, match='a table of actions, and the log of the run was user item'):
        append.read_like(frame(OLD), data, 0)


def test_generated_data_have_no_log():
    data = Dataset.from_file('synthetic')
    with pytest.raises(UserError, match='synthetic has no log'):
        append.read_like(frame(OLD), data, 0)


def test_rounds_of_neighbours():
    """Item 4 is next to 1 and 2 (twice), 5 next to 4 alone, 6 to 7 alone, and 7 to 6."""
    lefts, rights = np.array([1, 4, 2, 4, 6, 4]), np.array([4, 2, 4, 5, 7, 4])
    known_V = np.array([False, True, True, True, False, False, False, False])
    rounds = append.find_rounds(lefts, rights, known_V)
    found = [{item: others.tolist() for item, others in one.items()} for one in rounds]
    assert found == [{4: [1, 2, 2]}, {5: [4]}]
    assert not known_V[4]  # the argument is as it was


def test_nothing_new_has_no_rounds():
    pairs = np.array([1, 2]), np.array([2, 1])
    assert append.find_rounds(*pairs, np.array([False, True, True])) == []
