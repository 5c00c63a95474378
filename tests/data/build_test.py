"""Filters, order and indices against plain loops."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import polars as pl
import pytest

from fame_jax.data.build import (
    build_dataset,
    find_core,
    find_duplicates,
    find_latest,
    renumber,
    sort_actions,
)
from fame_jax.data.dataset import Dataset
from fame_jax.data.readers import Log
from fame_jax.errors import UserError


def make_log(actions, with_times=True):
    """A Log of (user, item, time, rating)."""
    users, items, times, ratings = zip(*actions)
    user_ids, item_ids = (list(dict.fromkeys(ids)) for ids in (users, items))
    return Log(
        'log.csv',
        np.array([user_ids.index(user) for user in users]),
        np.array([item_ids.index(item) for item in items]),
        user_ids,
        item_ids,
        np.array(times) if with_times else None,
        np.array(ratings, float),
        {'source': 'log.csv'},
    )


def build(actions, with_times=True, **options):
    options = {'k_core': 0, 'min_rating': 0.0} | options
    return build_dataset(make_log(actions, with_times), 'log', **options)


def build_slowly(actions, k_core, min_rating, max_user_actions, duplicates):
    """Histories by user, and the actions that each filter drops; one action at a time."""
    left, dropped = list(actions), {}

    def keep(name, kept):
        nonlocal left
        dropped[name] = len(left) - len(kept)
        left = kept

    if min_rating:
        keep('min_rating', [action for action in left if action[3] >= min_rating])
    if duplicates == 'drop':
        keep(
            'duplicates', [a for n, a in enumerate(left) if a[:3] not in [b[:3] for b in left[:n]]]
        )
    if max_user_actions:
        latest = []
        for user in {action[0] for action in left}:
            mine = [n for n, action in enumerate(left) if action[0] == user]
            latest += sorted(mine, key=lambda n: left[n][2])[-max_user_actions:]
        keep('max_user_actions', [left[n] for n in sorted(latest)])

    def core(actions, user_least, item_least):
        while True:
            users, items = [a[0] for a in actions], [a[1] for a in actions]
            enough = [
                a
                for a in actions
                if users.count(a[0]) >= user_least and items.count(a[1]) >= item_least
            ]
            if len(enough) == len(actions):
                return actions
            actions = enough

    if k_core > 1:
        keep('k_core', core(left, k_core, k_core))
    keep('short', core(left, max(k_core, 3), k_core))
    histories = {}
    for user, item, *_ in sorted(left, key=lambda action: action[2]):
        histories.setdefault(user, []).append(item)
    return histories, dropped, len(left) - len({action[:3] for action in left})


actions = st.lists(
    st.tuples(
        st.sampled_from(['u', '7', '07', 'v']),
        st.sampled_from(['a', 'b', 'c', '1']),
        st.integers(0, 3),
        st.integers(1, 2),
    ),
    min_size=1,
    max_size=40,
)


@hypothesis.given(
    actions,
    st.integers(0, 4),
    st.sampled_from([0, 2]),
    st.sampled_from([0, 3, 5]),
    st.sampled_from(['keep', 'drop']),
)
@hypothesis.settings(deadline=None, max_examples=200)
def test_a_data_set_is_that_of_plain_loops(actions, k_core, min_rating, most, duplicates):
    options = {'k_core': k_core, 'min_rating': float(min_rating)}
    options |= {'max_user_actions': most, 'duplicates': duplicates}
    expected, dropped, repeated = build_slowly(actions, k_core, min_rating, most, duplicates)
    if not expected:
        with pytest.raises(UserError, match='nothing is left'):
            build(actions, **options)
        return
    data = build(actions, **options)
    assert dict(data.histories()) == expected
    assert {name: count['actions'] for name, count in data.card['dropped'].items()} == dropped
    assert data.card['duplicates'] == repeated
    assert data.items.dtype == np.int32 and data.offsets.dtype == np.int64


def test_each_user_keeps_the_latest_actions():
    """Of equal times the later ones of the file; the card counts the others."""
    actions = [('u', item, time, 1) for item, time in zip('abcde', (1, 9, 2, 2, 2))]
    data = build([*actions, *(('v', item, 1, 1) for item in 'abc')], max_user_actions=3)
    assert dict(data.histories()) == {'u': ['d', 'e', 'b'], 'v': ['a', 'b', 'c']}
    assert data.card['dropped']['max_user_actions'] == {'users': 0, 'items': 0, 'actions': 2}
    assert data.card['max_user_actions'] == 3
    without = build(actions, with_times=False, max_user_actions=4)
    assert dict(without.histories()) == {'u': ['b', 'c', 'd', 'e']}


def test_duplicates_are_counted_and_dropped_on_demand():
    """The same user, item and time; not the same item at another time."""
    actions = [('u', item, time, 1) for item, time in zip('abacaab', (1, 1, 1, 2, 3, 1, 2))]
    kept = build(actions)
    assert dict(kept.histories()) == {'u': ['a', 'b', 'a', 'a', 'c', 'b', 'a']}
    assert kept.card['duplicates'] == 2 and 'duplicates' not in kept.card['dropped']
    left = build(actions, duplicates='drop')
    assert dict(left.histories()) == {'u': ['a', 'b', 'c', 'b', 'a']}
    assert left.card['dropped']['duplicates'] == {'users': 0, 'items': 0, 'actions': 2}
    assert left.card['duplicates'] == 0


def test_without_times_nothing_is_called_a_duplicate():
    actions = [('u', 'a', 0, 1)] * 4
    assert 'duplicates' not in build(actions, with_times=False).card
    with pytest.raises(UserError, match=r'^log.csv: duplicates=drop needs times'):
        build(actions, with_times=False, duplicates='drop')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'max_user_actions': 2}, r'max_user_actions=2: choose 0 \(all actions\) or 3 or more'),
        ({'max_user_actions': -1}, 'max_user_actions=-1: choose 0'),
        ({'duplicates': 'no'}, 'duplicates=no: choose one of keep, drop'),
    ],
)
def test_wrong_filters_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        build([('u', 'a', 0, 1)] * 4, **options)


def test_the_filters_are_options_of_every_way_in(tmp_path):
    rows = [('u', item, time) for item, time in zip('abbcd', (1, 2, 2, 3, 4))]
    columns = {
        'user': [row[0] for row in rows],
        'item': [row[1] for row in rows],
        'time': [row[2] for row in rows],
    }
    path = tmp_path / 'log.csv'
    path.write_text('user,item,time\n' + ''.join(','.join(map(str, row)) + '\n' for row in rows))
    for data in (
        Dataset.from_file(path, k_core=0, max_user_actions=3, duplicates='drop'),
        Dataset.from_frame(pl.DataFrame(columns), k_core=0, max_user_actions=3, duplicates='drop'),
    ):
        assert dict(data.histories()) == {'u': ['b', 'c', 'd']}


codes = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(-2, 2)), min_size=1, max_size=30
)


@hypothesis.given(codes, st.sampled_from([np.int64, np.float64]))
@hypothesis.settings(deadline=None, max_examples=100)
def test_the_order_is_by_user_then_time_then_place(rows, kind):
    users, items, times = np.array(rows).T
    times = times.astype(kind)
    order = sort_actions(users.astype(np.int32), times).tolist()
    assert order == sorted(range(len(rows)), key=lambda n: (rows[n][0], rows[n][2]))
    by_user = sort_actions(users, None).tolist()
    assert by_user == sorted(range(len(rows)), key=lambda n: rows[n][0])
    ordered = [rows[n] for n in order]
    found = find_duplicates(*(column[order] for column in (users, items, times)))
    assert found.tolist() == [row in ordered[:n] for n, row in enumerate(ordered)]
    for number in (1, 2, 5):
        mine = [row[0] for row in ordered]
        latest = find_latest(users[order], number).tolist()
        assert latest == [mine[n + 1 :].count(user) < number for n, user in enumerate(mine)]


def test_the_core_is_found_in_several_rounds():
    """User 2 has one action. Round by round, item 1, user 1, item 2 and user 3 have one left."""
    users, items = np.array([0, 0, 0, 1, 1, 2, 3, 3]), np.array([5, 6, 7, 2, 1, 1, 2, 5])
    users, items = np.append(users, [4, 4, 4]), np.append(items, [5, 6, 7])
    assert np.flatnonzero(find_core(users, items, 2, 2)).tolist() == [0, 1, 2, 8, 9, 10]


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=60),
    st.integers(0, 5),
    st.integers(0, 5),
)
@hypothesis.settings(deadline=None, max_examples=150)
def test_the_core_is_the_fixed_point(pairs, user_least, item_least):
    left = list(enumerate(pairs))
    while True:  # any order of removal, one action at a time, ends at the same core
        users, items = [u for _, (u, _) in left], [i for _, (_, i) in left]
        bad = [n for n, (_, (u, i)) in enumerate(left)
               if users.count(u) < user_least or items.count(i) < item_least]  # fmt: skip
        if not bad:
            break
        del left[bad[-1]]
    users, items = np.array(pairs, np.int64).reshape(-1, 2).T
    kept = np.flatnonzero(find_core(users, items, user_least, item_least))
    assert kept.tolist() == [n for n, _ in left]


@hypothesis.given(
    st.lists(st.integers(-50, 50) | st.text('ab1', min_size=1), unique_by=str, min_size=1)
)
@hypothesis.settings(deadline=None)
def test_indices_have_no_gaps_and_lead_to_their_ids(tokens):
    ids = [str(token) for token in tokens]
    codes = np.arange(len(ids))[::2]
    numbers, names = renumber(codes, ids)
    assert sorted(numbers) == list(range(len(codes)))
    assert [names[n] for n in numbers] == ids[::2]
