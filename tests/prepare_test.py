"""Filters, order and numbers, on logs small enough to see the answer."""

import os
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from fame_jax.data import sequences
from fame_jax.data.prepare import find, find_core, prepare, renumber
from fame_jax.errors import UserError

DATA = Path(os.environ.get('FAME_JAX_DATA', Path(__file__).parents[2] / 'shared' / 'data'))


@pytest.fixture
def write(tmp_path):
    def write(text, name='log.csv'):
        path = tmp_path / name
        path.write_text(text, encoding='utf-8')
        return str(path)

    return write


def histories(data):
    items = np.split(data.items, data.offsets[1:-1])
    return {u: [data.item_ids[i] for i in row] for u, row in zip(data.user_ids, items)}


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


def test_repeated_actions_stay(write):
    data = prepare(write('user,item,time\n' + 'u,a,1\n' * 5), k_core=5)
    assert histories(data) == {'u': ['a'] * 5}


def test_integer_ids_keep_their_numeric_order(write):
    data = prepare(write('10 30 4 5\n9 4 30 11\n', 'x.txt'), k_core=0)
    assert data.user_ids == ['9', '10'] and data.item_ids == ['', '4', '5', '11', '30']
    data = prepare(write('10 x30 4 5\n9 4 30 11\n', 'x.txt'), k_core=0)
    assert data.item_ids == ['', 'x30', '4', '5', '30', '11']


def test_contiguous_ids_are_ours(write):
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
    'options, said',
    [
        ({'k_core': 5}, '6 actions read, 0 left by --k_core=5'),
        ({'k_core': 0, 'min_rating': 6}, '0 left by --min_rating=6'),
        ({'k_core': 0, 'min_rating': 2.5}, '2 left by --min_rating=2.5, 0 left by keeping users'),
    ],
)
def test_nothing_left_is_told(write, options, said):
    log = write(table([(u, i, rating, 1) for u in 'uv' for i, rating in zip('abc', (1, 2, 3))]))
    with pytest.raises(UserError, match=f'nothing is left: .*{said}') as caught:
        prepare(log, **options)
    assert str(caught.value).startswith(log) and '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'dataset, said',
    [
        ('toy', 'did you mean toys'),
        ('ML-1m', 'did you mean ml-1m'),
        ('beuaty', 'did you mean beauty'),
        ('quite else', 'known: toys'),
        ('', 'known: toys'),
        ('logs/none.csv', 'no such file'),
        ('x' * 5000, 'File name too long'),
    ],
)
def test_unknown_names_are_told(dataset, said):
    with pytest.raises(UserError, match=said) as caught:
        prepare(dataset)
    assert '\n' not in str(caught.value)


def test_a_path_may_lie_in_the_data_folder(tmp_path, write):
    write('1 2 3 4\n', 'x.txt')
    assert find('x.txt', str(tmp_path)) == tmp_path / 'x.txt'


def test_synthetic_needs_no_file():
    data = prepare('synthetic', synthetic_users=30, synthetic_items=40, synthetic_facets=3, seed=7)
    assert data.num_users == 30 and data.item_facets.shape[1] == 3
    assert data.card['world']['seed'] == 7


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=60),
    st.integers(0, 5),
    st.integers(0, 5),
)
@hypothesis.settings(deadline=None, max_examples=150)
def test_the_core_is_the_fixed_point(pairs, user_least, item_least):
    left = list(enumerate(pairs))
    while True:  # one action at a time, in any order, ends at the same core
        users, items = [u for _, (u, _) in left], [i for _, (_, i) in left]
        bad = [n for n, (_, (u, i)) in enumerate(left)
               if users.count(u) < user_least or items.count(i) < item_least]  # fmt: skip
        if not bad:
            break
        del left[bad[-1]]
    users, items = np.array(pairs, np.int64).reshape(-1, 2).T
    assert find_core(users, items, user_least, item_least).tolist() == [n for n, _ in left]


@hypothesis.given(
    st.lists(st.integers(-50, 50) | st.text('ab1', min_size=1), unique_by=str, min_size=1)
)
@hypothesis.settings(deadline=None)
def test_numbers_have_no_gaps_and_lead_back(tokens):
    ids = [str(token) for token in tokens]
    codes = np.arange(len(ids))[::2]
    numbers, names = renumber(codes, ids)
    assert sorted(numbers) == list(range(len(codes)))
    assert [names[n] for n in numbers] == ids[::2]


COUNTS = {
    'toys': (19_412, 11_924, 167_597),
    'beauty': (22_363, 12_101, 198_502),
    'sports': (35_598, 18_357, 296_337),
    'scientific': (8_317, 4_344, 58_492),
    'ml-100k': (943, 1_349, 99_287),
}
PLACES = {
    'toys': 'amazon/Toys_and_Games.txt',
    'beauty': 'amazon/Beauty.txt',
    'sports': 'amazon/Sports_and_Outdoors.txt',
    'scientific': 'amazon-scientific/Scientific.txt',
    'ml-100k': 'ml-100k/ml-100k.inter',
}


@pytest.mark.parametrize('name', COUNTS)
def test_real_data_has_its_counts(name):
    if not (DATA / PLACES[name]).is_file():
        pytest.skip('needs the real files under FAME_JAX_DATA')
    data = prepare(name, data_dir=str(DATA))
    assert (data.num_users, data.num_items, len(data.items)) == COUNTS[name]
    if name != 'ml-100k':
        first = (DATA / PLACES[name]).open().readline().split()
        assert data.items[: data.offsets[1]].tolist() == [int(item) for item in first[1:]]
        assert data.item_ids[1:] == [str(n) for n in range(1, data.num_items + 1)]
    assert sequences.held_out(data, 'test')[2].shape == (data.num_users,)
