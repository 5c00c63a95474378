"""Generated data: its shape, its repeatability, and the facets that decide it."""

import time

import numpy as np
import pytest

from fame_jax.data.synthetic import generate
from fame_jax.errors import UserError


@pytest.fixture(scope='module')
def data():
    return generate(users=1500, items=600, facets=3, values=12, seed=1)


def user_of_action(data):
    return np.repeat(np.arange(data.num_users), data.lengths)


def test_the_seed_decides_all(data):
    again = generate(users=1500, items=600, facets=3, values=12, seed=1)
    other = generate(users=1500, items=600, facets=3, values=12, seed=2)
    assert again.card == data.card
    assert other.card['fingerprint'] != data.card['fingerprint']


def test_no_filter_would_remove_anything(data):
    assert data.find_fault() == ''
    assert data.lengths.min() >= 5 and data.lengths.max() <= 40
    assert 9 < data.lengths.mean() < 11 and np.median(data.lengths) < data.lengths.mean()
    assert np.array_equal(np.unique(data.items), np.arange(1, data.num_items + 1))
    pairs = user_of_action(data) * 10_000 + data.items
    assert len(np.unique(pairs)) == len(pairs)


def test_shapes_of_facets(data):
    assert data.item_facets.shape == (data.num_items + 1, 3)
    assert (data.item_facets[0] == -1).all() and data.item_facets[1:].min() == 0
    assert data.item_facets.max() == 11 and data.item_facets.dtype == np.int32
    assert data.user_facets.shape == (1500,) and set(data.user_facets) == {0, 1, 2}


def test_users_follow_their_facet(data):
    def share(facet):
        """Share of each user's actions that have one of the user's three commonest values."""
        counts = np.zeros((data.num_users, 12))
        np.add.at(counts, (user_of_action(data), data.item_facets[data.items, facet]), 1)
        return np.sort(counts, axis=1)[:, -3:].sum(axis=1) / data.lengths

    for facet in range(3):
        mine = data.user_facets == facet
        assert share(facet)[mine].mean() > 0.9
        assert share(facet)[~mine].mean() < 0.75


def test_order_carries_signal(data):
    value = data.item_facets[data.items, data.user_facets[user_of_action(data)]]
    inside = user_of_action(data)[1:] == user_of_action(data)[:-1]
    stays = (value[1:] == value[:-1])[inside].mean()
    shuffled = np.random.default_rng(0).permutation(len(value))
    shuffled = shuffled[np.argsort(user_of_action(data)[shuffled], kind='stable')]
    by_chance = (value[shuffled][1:] == value[shuffled][:-1])[inside].mean()
    assert stays > by_chance + 0.05


def test_items_differ_in_popularity(data):
    counts = np.sort(np.bincount(data.items)[1:])
    assert counts[-1] > 8 * np.median(counts)


@pytest.mark.parametrize(
    'shape',
    [{'items': 10}, {'users': 1}, {'values': 1}, {'facets': 1}, {'items': 12, 'values': 50}],
)
def test_small_data_sets_end(shape):
    assert (
        generate(**({'users': 40, 'items': 30, 'facets': 2, 'values': 4} | shape)).num_items <= 30
    )


@pytest.mark.parametrize('name, number', [('users', 0), ('items', 9), ('facets', 0), ('values', 0)])
def test_impossible_numbers_are_errors(name, number):
    with pytest.raises(UserError, match=f'{name}={number}; choose'):
        generate(**{name: number})


def test_twenty_thousand_users_take_seconds():
    began = time.perf_counter()
    data = generate(users=20_000, items=5000)
    assert data.num_users == 20_000
    assert time.perf_counter() - began < 10
