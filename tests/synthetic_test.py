"""The planted world: clean, repeatable, and with the facets that were planted."""

import time

import numpy as np
import pytest

from fame_jax.data import sequences
from fame_jax.data.synthetic import describe_items, generate
from fame_jax.errors import UserError


@pytest.fixture(scope='module')
def world():
    return generate(users=1500, items=600, facets=3, values=12, seed=1)


def owners(world):
    return np.repeat(np.arange(world.num_users), world.lengths)


def test_a_seed_is_a_world(world):
    again = generate(users=1500, items=600, facets=3, values=12, seed=1)
    other = generate(users=1500, items=600, facets=3, values=12, seed=2)
    assert again.card == world.card
    assert other.card['fingerprint'] != world.card['fingerprint']


def test_it_is_born_clean(world):
    assert sequences.find_fault(world) == ''
    assert world.lengths.min() >= 5 and world.lengths.max() <= 40
    assert 9 < world.lengths.mean() < 11 and np.median(world.lengths) < world.lengths.mean()
    assert np.array_equal(np.unique(world.items), np.arange(1, world.num_items + 1))
    pairs = owners(world) * 10_000 + world.items
    assert len(np.unique(pairs)) == len(pairs)


def test_facets_have_their_shapes(world):
    assert world.item_facets.shape == (world.num_items + 1, 3)
    assert (world.item_facets[0] == -1).all() and world.item_facets[1:].min() == 0
    assert world.item_facets.max() == 11 and world.item_facets.dtype == np.int32
    assert world.user_facets.shape == (1500,) and set(world.user_facets) == {0, 1, 2}


def test_users_follow_their_facet(world):
    def share(facet):
        """Part of each user's actions that has one of the user's three commonest values."""
        counts = np.zeros((world.num_users, 12))
        np.add.at(counts, (owners(world), world.item_facets[world.items, facet]), 1)
        return np.sort(counts, axis=1)[:, -3:].sum(axis=1) / world.lengths

    for facet in range(3):
        mine = world.user_facets == facet
        assert share(facet)[mine].mean() > 0.9
        assert share(facet)[~mine].mean() < 0.75


def test_order_carries_signal(world):
    value = world.item_facets[world.items, world.user_facets[owners(world)]]
    inside = owners(world)[1:] == owners(world)[:-1]
    stays = (value[1:] == value[:-1])[inside].mean()
    shuffled = np.random.default_rng(0).permutation(len(value))
    shuffled = shuffled[np.argsort(owners(world)[shuffled], kind='stable')]
    by_chance = (value[shuffled][1:] == value[shuffled][:-1])[inside].mean()
    assert stays > by_chance + 0.05


def test_items_differ_in_popularity(world):
    counts = np.sort(np.bincount(world.items)[1:])
    assert counts[-1] > 8 * np.median(counts)


@pytest.mark.parametrize(
    'shape',
    [{'items': 10}, {'users': 1}, {'values': 1}, {'facets': 1}, {'items': 12, 'values': 50}],
)
def test_small_worlds_end(shape):
    assert (
        generate(**({'users': 40, 'items': 30, 'facets': 2, 'values': 4} | shape)).num_items <= 30
    )


@pytest.mark.parametrize('name, number', [('users', 0), ('items', 9), ('facets', 0), ('values', 0)])
def test_impossible_worlds_are_told(name, number):
    with pytest.raises(UserError, match=f'{name} is {number}; it must be at least'):
        generate(**{name: number})


def test_twenty_thousand_users_take_seconds():
    began = time.perf_counter()
    world = generate(users=20_000, items=5000)
    assert world.num_users == 20_000
    assert time.perf_counter() - began < 10


def test_texts_are_drawn_from_their_seed(world):
    first, again = (describe_items(world.item_facets, seed=4) for _ in range(2))
    assert first.texts == again.texts and first.titles == again.titles
    assert describe_items(world.item_facets, seed=5).texts != first.texts


def test_labels_are_the_planted_values(world):
    items = describe_items(world.item_facets)
    assert [facet.name for facet in items.facets] == ['facet_1', 'facet_2', 'facet_3']
    for facet, values in zip(items.facets, world.item_facets.T):
        assert np.array_equal(facet.label_VS, values[:, None])
        assert len(facet.labels) == 12 and facet.labels == sorted(facet.labels)
    assert len(items.texts) == len(items.titles) == world.num_items + 1
    assert items.texts[0] == items.titles[0] == '' and all(items.texts[1:])


def test_texts_tell_the_facets_but_not_always(world):
    """Words that only one value's items have: most items hold some, a few hold none."""
    items = describe_items(world.item_facets)
    texts = [set(text.split()) for text in items.texts]
    everywhere = set().union(*texts)
    for values in world.item_facets.T:
        spoken = {word: set() for word in everywhere}
        for value, text in zip(values, texts):
            for word in text:
                spoken[word].add(value)
        own = {word for word, said in spoken.items() if len(said) == 1}
        assert all(len([w for w in own if spoken[w] == {value}]) >= 4 for value in range(12))
        told = np.mean([any(word in own for word in text) for text in texts[1:]])
        assert 0.9 < told < 1


def test_an_unknown_value_is_not_written_of():
    facets = np.array([[-1, -1], [0, 0], [1, 0], [0, 1], [-1, -1]], np.int32)
    items = describe_items(facets)
    assert items.facets[0].label_VS.tolist() == [[-1], [0], [1], [0], [-1]]
    assert items.facets[1].card['items'] == 3
    # Words of no meaning are left.
    assert len(items.texts[4].split()) == 6
