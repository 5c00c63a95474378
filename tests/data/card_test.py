"""Facts in the card of a data set, on data small enough to count by hand, and the lines shown."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from data_fixtures import make_dataset

from fame_jax.data.card import (
    describe_data,
    describe_steps,
    last_item_share,
    repeat_share,
    tie_share,
)
from fame_jax.data.prepare import prepare


def test_repeats_are_targets_that_stand_in_their_history():
    data = make_dataset([1, 2, 1], [1, 2, 3], [2, 2, 3], [3, 1, 2, 3])
    assert repeat_share(data, 'test') == 2 / 4  # users 0 and 3
    assert repeat_share(data, 'validation') == 1 / 4  # user 2


def test_cold_targets_have_no_training_action():
    # Training parts: 1; 2; 1 2. Targets: 3, 3, 2.
    data = make_dataset([1, 2, 3], [2, 1, 3], [1, 2, 3, 2])
    facts = describe_data(data)
    assert facts['cold'] == 2 / 3
    assert facts['longest'] == 4 and facts['repeats'] == 1 / 3


def test_ties_are_actions_of_one_user_at_one_time():
    users, times = np.array([0, 0, 0, 1, 1, 2, 2]), np.array([5, 5, 6, 6, 6, 1, 2])
    assert tie_share(users, times) == 4 / 7
    assert tie_share(users[:1], times[:1]) == 0


HISTORIES = st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=9), min_size=1, max_size=20)


@hypothesis.given(HISTORIES)
@hypothesis.settings(deadline=None, max_examples=100)
def test_facts_are_those_of_loops(histories):
    data = make_dataset(*histories)
    counts, training = {}, set()
    for history in histories:
        for pair in itertools.pairwise(history[:-2]):
            counts[pair] = counts.get(pair, 0) + 1
        training |= set(history[:-2])
    number = len(histories)
    facts = describe_data(data)
    assert facts['repeats'] == sum(h[-1] in h[:-1] for h in histories) / number
    assert repeat_share(data, 'validation') == sum(h[-2] in h[:-2] for h in histories) / number
    assert facts['cold'] == sum(h[-1] not in training for h in histories) / number
    # With 9 items no item has more than 10 followers.
    assert facts['last_item'] == sum((h[-2], h[-1]) in counts for h in histories) / number
    middle = [h[:-1][(len(h) - 2) // 2] for h in histories]
    expected = sum((item, h[-1]) in counts for item, h in zip(middle, histories)) / number
    assert facts['earlier_item'] == expected


def test_only_the_most_frequent_followers_count():
    """Item 1 is followed by 2 to 13; twice by each of 2 to 11."""
    pairs = [(1, follower) for follower in range(2, 14)] + [
        (1, follower) for follower in range(2, 12)
    ]
    histories = [[*pair, 14, 1, target] for pair, target in zip(pairs, [2, 12] * 11)]
    assert last_item_share(make_dataset(*histories))[0] == 1 / 2


def test_a_circle_is_known_by_its_last_item():
    histories = [[(start + n) % 30 + 1 for n in range(9)] for start in range(30)] * 2
    assert last_item_share(make_dataset(*histories)) == (1.0, 0.0)


@pytest.fixture
def log(tmp_path):
    """20 users with the same 4 items each, one with a rare item, one with two actions alone."""
    rows = ['customer,sku,bought_at,price']
    rows += [f'{user},{item},2020-01-0{item},9' for user in range(20) for item in (3, 1, 2, 4)]
    rows += ['20,1,2020-02-01,9', '20,2,2020-02-01,9', '20,9,2020-02-02,9', '21,1,2020-01-01,9']
    path = tmp_path / 'orders.csv'
    path.write_text('\n'.join(rows) + '\n')
    return str(path)


def test_prepare_says_what_it_read(log):
    data = prepare(log, columns={'item': 'sku'}, k_core=2)
    lines = describe_steps(data.card)
    assert lines[1:] == [
        'columns: user=customer (guessed), item=sku (named), time=bought_at (guessed); '
        'unused: price',
        'order: by bought_at, 2020-01-01 to 2020-02-02 (days); ties 0 %',
        'dropped: k_core=2: 1 of 22 users, 1 of 5 items, 2 of 84 actions; '
        'users with fewer than 3 actions: 1 of 21 users, 2 of 82 actions',
    ]
    assert lines[0].startswith('read: 84 records from ') and lines[0].endswith('orders.csv')


def test_without_a_time_the_order_of_the_file_is_said(tmp_path):
    path = tmp_path / 'x.csv'
    path.write_text('user,item\nu,a\nu,b\nu,c\n')
    lines = describe_steps(prepare(str(path), k_core=0).card)
    assert lines[2] == 'order: as in the file: no time column'
    path.write_text('user,item,ts\nu,a,3\nu,b,2\nu,c,1\n')
    data = prepare(str(path), k_core=0, columns={'time': '-'})
    assert dict(data.histories()) == {'u': ['a', 'b', 'c']}
    assert describe_steps(data.card)[1:3] == [
        'columns: user=user (guessed), item=item (guessed); unused: ts',
        'order: as in the file: chosen by time:-',
    ]


def test_sequence_files_and_generated_data_have_fewer_lines(tmp_path):
    path = tmp_path / 'x.txt'
    path.write_text('1 7 8 9\n2 8 7 9 7\n')
    lines = describe_steps(prepare(str(path), k_core=0).card)
    assert lines == [
        'read: 7 records from 2 lines of x.txt',
        'columns: none; each line is a user and their items, read as oldest first',
        'order: as in the file',
        'dropped: users with fewer than 3 actions: nothing',
        'warning: 50.0 % of the test targets stand in their history already: masked figures rank '
        'them last; see the unmasked ones',
    ]
    assert describe_steps(prepare('synthetic', synthetic={'users': 30, 'items': 40}).card) == []


def test_lines_about_doubtful_ids_are_warnings(tmp_path):
    path = tmp_path / 'x.csv'
    rows = ''.join(f'NA,i{n},s\n' for n in range(5)) + '7,i1,t\n'
    path.write_text('userId,itemId,sessionId\n' + rows)
    card = prepare(str(path), k_core=0).card
    (warning,) = [line for line in describe_steps(card) if line.startswith('warning')]
    assert warning.startswith("warning: 5 of 6 records have the user 'NA'")
    assert '--columns=user:sessionId' in warning


def test_many_unused_columns_are_shortened():
    card = {'columns': {'user': 'u'}, 'unused': [f'c{n}' for n in range(15)]}
    (line,) = describe_steps(card)
    assert line.endswith('c10, c11, and 3 more')
