"""Filters, order and indices, on logs small enough to see the answer."""

import numpy as np
import pytest
from data_fixtures import real_file

from fame_jax.data.dataset import Dataset
from fame_jax.data.prepare import find_file, prepare
from fame_jax.errors import UserError


@pytest.fixture
def write(tmp_path):
    def write(text, name='log.csv'):
        path = tmp_path / name
        path.write_text(text, encoding='utf-8')
        return str(path)

    return write


def histories(data):
    return dict(data.histories())


def table(actions):
    return 'user,item,rating,time\n' + ''.join(','.join(map(str, row)) + '\n' for row in actions)


def test_a_log_becomes_histories_in_time(write):
    rows = [('u', 'b', 1, 3), ('v', 'b', 1, 5), ('u', 'a', 1, 1), ('v', 'a', 1, 4)]
    rows += [('u', 'c', 1, 2), ('v', 'd', 1, 6)]
    data = prepare(write(table(rows)), k_core=0)
    assert histories(data) == {'u': ['a', 'c', 'b'], 'v': ['a', 'b', 'd']}
    assert data.item_ids == ['', 'b', 'a', 'c', 'd']  # by first appearance
    assert data.items.tolist() == [2, 3, 1, 2, 1, 4]
    assert data.card['order'] == 'by time, ties as in the file'


@pytest.mark.parametrize('kind', [int, float, lambda t: f'2020-01-{t:02}'])
def test_equal_times_keep_the_order_of_the_file(write, kind):
    rng = np.random.default_rng(0)
    times, users = rng.integers(1, 4, 3000), rng.integers(30, size=3000)
    rows = [(f'u{u}', f'i{n}', 1, kind(int(t))) for n, (u, t) in enumerate(zip(users, times))]
    got = histories(prepare(write(table(rows)), k_core=0))
    for user in set(users.tolist()):
        mine = [n for n in range(3000) if users[n] == user]
        assert got[f'u{user}'] == [f'i{n}' for n in sorted(mine, key=lambda n: times[n])]


def test_without_times_the_file_is_the_order(write):
    data = prepare(write('user,item\nv,c\nu,a\nv,b\nu,c\nu,b\nv,a\n'), k_core=0)
    assert histories(data) == {'v': ['c', 'b', 'a'], 'u': ['a', 'c', 'b']}
    assert data.card['order'] == 'as in the file: no time column'


TIMES = """
t_dat eventdate InvoiceDate utcTimestamp bought_at rated_on created_at event_time eventTime
unixReviewTime reviewTime TIMESTAMP ts TRANSACTION_DT order_date OrderDate purchaseTime click_time
check-in_time timestamp_ms datum Kaufdatum bestelldatum zeit Zeitstempel date_added when
rating_timestamp review_date viewed_at listened_at played_at server_time saledate txn_date sold_at
created_utc unix_time datetime visit_date fecha
"""


@pytest.mark.parametrize('name', TIMES.split())
def test_a_time_column_has_many_names(write, name):
    rows = f'user_id,item_id,{name}\nc,a,2020-01-03\nc,b,2020-01-02\nc,d,2020-01-01\n'
    data = prepare(write(rows), k_core=0)
    assert histories(data) == {'c': ['d', 'b', 'a']}
    assert data.card['columns']['time'] == name


def test_the_order_of_the_file_may_be_wanted(write):
    rows = 'user_id,item_id,ts\nc,a,3\nc,b,2\nc,d,1\n'
    data = prepare(write(rows), k_core=0, columns={'time': '-'})
    assert histories(data) == {'c': ['a', 'b', 'd']}
    assert Dataset.from_file(write(rows), k_core=0, time='-').card == data.card
    data = prepare(write('1 7 8 9\n', 'x.txt'), k_core=0, columns={'time': '-'})
    assert histories(data) == {'1': ['7', '8', '9']}


def test_repeated_actions_stay(write):
    data = prepare(write('user,item,time\n' + 'u,a,1\n' * 5), k_core=5)
    assert histories(data) == {'u': ['a'] * 5}


def test_integer_ids_keep_their_numeric_order(write):
    data = prepare(write('10 30 4 5\n9 4 30 11\n', 'x.txt'), k_core=0)
    assert data.user_ids == ['9', '10'] and data.item_ids == ['', '4', '5', '11', '30']
    data = prepare(write('10 x30 4 5\n9 4 30 11\n', 'x.txt'), k_core=0)
    assert data.item_ids == ['', 'x30', '4', '5', '30', '11']


def test_contiguous_ids_are_the_indices(write):
    rows = [
        [1, 3, 1, 2, 4, 5],
        [2, 5, 4, 3, 2, 1],
        [3, 1, 2, 3, 4, 5],
        [4, 2, 3, 1, 5, 4],
        [5, 4, 2, 5, 3, 1],
    ]
    data = prepare(write('\n'.join(' '.join(map(str, row)) for row in rows), 'x.txt'))
    assert data.items.reshape(5, 5).tolist() == [row[1:] for row in rows]
    assert data.item_ids == ['', *'12345'] and data.items.dtype == np.int32


def test_the_card_counts_what_each_filter_drops(write):
    rows = [(u, i, 5, n) for u in 'uvw' for n, i in enumerate('abc')]  # stays
    rows += [('x', 'a', 5, 0), ('x', 'b', 5, 0), ('x', 'q', 5, 1), ('y', 'a', 5, 1)]
    rows += [('u', 'z', 1, 9), ('t', 'a', 2, 9)]  # rated low
    data = prepare(write(table(rows)), min_rating=3, k_core=2)
    assert histories(data) == {user: ['a', 'b', 'c'] for user in 'uvw'}
    card = data.card
    assert card['read'] == {'users': 6, 'items': 5, 'actions': 15}
    assert card['dropped'] == {
        'min_rating': {'users': 1, 'items': 1, 'actions': 2},
        'k_core': {'users': 1, 'items': 1, 'actions': 2},
        'short': {'users': 1, 'items': 0, 'actions': 2},
    }
    assert (card['users'], card['items'], card['actions']) == (3, 3, 9)
    assert (card['name'], card['source'], card['min_rating'], card['k_core']) == (
        'log.csv',
        'log.csv',
        3,
        2,
    )
    assert len(card['sha256']) == len(card['fingerprint']) == 64
    assert card['columns']['rating'] == 'rating' and '/' not in str(card['source'])


def test_short_users_are_dropped_and_items_renumbered(write):
    data = prepare(write('1 9 8 7\n2 5 6\n3 7 8 9\n', 'x.txt'), k_core=1)
    assert data.item_ids == ['', '7', '8', '9'] and data.user_ids == ['1', '3']
    assert data.card['dropped']['short'] == {'users': 1, 'items': 2, 'actions': 2}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'k_core': 5}, '6 actions read, 0 left by k_core=5'),
        ({'k_core': 0, 'min_rating': 6}, '0 left by min_rating=6'),
        ({'k_core': 0, 'min_rating': 2.5}, '2 left by min_rating=2.5, 0 left by keeping users'),
    ],
)
def test_nothing_left_is_an_error_with_counts(write, options, message):
    log = write(table([(u, i, rating, 1) for u in 'uv' for i, rating in zip('abc', (1, 2, 3))]))
    with pytest.raises(UserError, match=f'nothing is left: .*{message}') as caught:
        prepare(log, **options)
    assert str(caught.value).startswith(log) and '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('dataset', 'message'),
    [
        ('toy', "did you mean 'toys'"),
        ('ML-1m', "did you mean 'ml-1m'"),
        ('beuaty', "did you mean 'beauty'"),
        ('quite else', "choose one of 'toys'"),
        ('', "choose one of 'toys'"),
        ('logs/none.csv', 'no such file'),
        ('x' * 5000, 'File name too long'),
    ],
)
def test_an_unknown_name_is_an_error(dataset, message):
    with pytest.raises(UserError, match=message) as caught:
        prepare(dataset)
    assert '\n' not in str(caught.value)


def test_a_path_may_be_relative_to_the_data_folder(tmp_path, write):
    write('1 2 3 4\n', 'x.txt')
    assert find_file('x.txt', str(tmp_path)) == tmp_path / 'x.txt'


def test_synthetic_needs_no_file():
    data = prepare('synthetic', synthetic={'users': 30, 'items': 40, 'facets': 3, 'seed': 7})
    assert data.num_users == 30 and data.item_facets.shape[1] == 3
    assert data.card['world']['seed'] == 7


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'columns': {'usr': 'u'}}, "--columns: there is no 'usr'; did you mean 'user'?"),
        ({'synthetic': {'user': 9}}, "--synthetic: there is no 'user'; did you mean 'users'?"),
        ({'columns': {'user': 'u'}}, '--columns: synthetic data has no columns'),
        ({'synthetic': {'items': 3}}, 'synthetic data: items=3; choose 10 or more'),
    ],
)
def test_wrong_options_of_synthetic_data_are_errors(options, message):
    with pytest.raises(UserError) as caught:
        prepare('synthetic', **options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize('options', [{'k_core': -1}, {'min_rating': -1.0}, {'min_rating': np.nan}])
def test_wrong_filters_are_errors(write, options):
    with pytest.raises(UserError, match=f'{next(iter(options))}=.*choose 0'):
        prepare(write(table([('u', item, 1, 1) for item in 'abc'])), **options)


def test_from_file_is_prepare(write):
    rows = [(user, item, 5 - n, n) for user in 'uv' for n, item in enumerate('abcd')]
    path = write(table(rows).replace('user', 'who').replace('time', 'when'))
    columns = {'user': 'who', 'time': 'when', 'rating': 'rating'}
    data = Dataset.from_file(path, **columns, k_core=2, min_rating=3)
    expected = prepare(path, columns=columns, k_core=2, min_rating=3)
    assert data.card == expected.card
    assert dict(data.histories()) == {user: ['a', 'b', 'c'] for user in 'uv'}
    assert Dataset.from_file('synthetic').card == prepare('synthetic').card


COUNTS = {
    'toys': (19_412, 11_924, 167_597),
    'beauty': (22_363, 12_101, 198_502),
    'sports': (35_598, 18_357, 296_337),
    'scientific': (8_317, 4_344, 58_492),
    'ml-100k': (943, 1_349, 99_287),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', COUNTS)
def test_real_data_has_its_counts(name):
    path = real_file(name)
    data = prepare(name, data_dir=str(path.parents[1]))
    assert (data.num_users, data.num_items, len(data.items)) == COUNTS[name]
    if name != 'ml-100k':
        first = path.open().readline().split()
        assert data.items[: data.offsets[1]].tolist() == [int(item) for item in first[1:]]
        assert data.item_ids[1:] == [str(n) for n in range(1, data.num_items + 1)]
    assert data.held_out('test')[2].shape == (data.num_users,)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['t_dat', 'InvoiceDate:float', 'rated_on', 'utcTimestamp'])
def test_real_data_is_the_same_under_another_name_of_its_time(name, write):
    path = real_file('ml-100k')
    text = path.read_text()
    expected = prepare(str(path)).card
    card = prepare(write(text.replace('timestamp:float', name, 1), 'x.inter')).card
    assert card['fingerprint'] == expected['fingerprint']
    assert card['columns']['time'] == name and card['time'] == expected['time']
