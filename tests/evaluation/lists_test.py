"""Metrics of recommended lists: by hand, by loops, and by RecTools on the same lists."""

from math import log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fame_jax.evaluation import lists

# Three users and five items: item 1 has three training actions of two users, 2 has one, 3 has two,
# 4 and 5 have none.
TRAINED = [[1, 1, 2], [1, 3], [3]]
ITEMS = np.concatenate(TRAINED).astype(np.int32)
OFFSETS = np.cumsum([0, *map(len, TRAINED)])
# The last user's list has one item only.
LISTS = np.array([[1, 3, 4], [1, 2, 3], [1, 0, 0]])


def by_loops(item_lists, trained, num_items):
    """All metrics, user by user and item by item."""
    item_lists = [[item for item in items if item] for items in item_lists]
    item_lists = [items for items in item_lists if items]
    count = {v: sum(t.count(v) for t in trained) for v in range(1, num_items + 1)}
    users = {v: max(sum(v in t for t in trained), 1) for v in count}
    active = sum(bool(t) for t in trained)
    given_V = [sum(v in items for items in item_lists) for v in count]
    differences = sum(abs(one - other) for one in given_V for other in given_V)
    # The count of the last item of the first fifth, at least 1.
    least = max(sorted(count.values(), reverse=True)[-(-num_items // 5) - 1], 1)

    def mean(value):
        return np.mean([np.mean([value(v) for v in items]) for items in item_lists])

    return {
        'coverage@10': len({v for items in item_lists for v in items}) / num_items,
        'gini@10': differences / (2 * num_items * sum(given_V)),
        'novelty@10': mean(lambda v: -log2(users[v] / active)),
        'arp@10': mean(lambda v: count[v]),
        'popular@10': mean(lambda v: count[v] >= least),
    }


def test_by_hand():
    found = lists.list_metrics(LISTS, ITEMS, OFFSETS, 5)
    assert found == pytest.approx(
        {
            'coverage@10': 4 / 5,
            # Lists by item, sorted: 0 1 1 2 3 with weights -4 -2 0 2 4.
            'gini@10': (-2 + 4 + 12) / (5 * 7),
            # Users by item: 2 1 2 1 1 of 3.
            'novelty@10': (log2(3 / 2) * (2 / 3 + 2 / 3 + 1) + log2(3) * 2 / 3) / 3,
            'arp@10': ((3 + 2 + 0) / 3 + (3 + 1 + 2) / 3 + 3) / 3,
            'popular@10': (1 / 3 + 1 / 3 + 1) / 3,  # item 1 alone
        }
    )
    assert found == pytest.approx(by_loops(LISTS.tolist(), TRAINED, 5))
    assert tuple(found) == lists.COLUMNS


@st.composite
def worlds(draw):
    """Lists of distinct items, some shorter, and training actions; not all lists are empty."""
    num_items = draw(st.integers(1, 12))
    item = st.integers(1, num_items)
    trained = draw(st.lists(st.lists(item, max_size=6), min_size=1, max_size=6))
    trained[0] = trained[0] or [1]
    width = min(3, num_items)
    short = st.lists(item, unique=True, max_size=width)
    item_lists = [draw(short) for _ in trained]
    item_lists[0] = item_lists[0] or [num_items]
    return [one + [0] * (width - len(one)) for one in item_lists], trained, num_items


@given(worlds())
@settings(max_examples=200, deadline=None)
def test_by_loops(world):
    item_lists, trained, num_items = world
    items = np.concatenate([np.array(t, np.int32) for t in trained])
    offsets = np.cumsum([0, *map(len, trained)])
    found = lists.list_metrics(np.array(item_lists), items, offsets, num_items)
    assert found == pytest.approx(by_loops(*world))


def test_extremes_of_the_gini_index():
    assert lists.gini(np.full(8, 3)) == 0
    assert lists.gini(np.array([0, 0, 0, 9])) == 1 - 1 / 4


def test_items_that_tie_with_the_last_popular_one_are_popular():
    """A fifth of ten items is two; the order of ids decides nothing."""
    for count_V in ([0, 9, 4, 4, 4, 1, 1, 1, 1, 0, 0], [0, 0, 4, 1, 4, 1, 9, 1, 4, 1, 0]):
        assert lists.popular_items(np.array(count_V)).tolist() == [n >= 4 for n in count_V]
    # Items without actions are never popular.
    is_popular_V = lists.popular_items(np.array([7, 2, 0, 0, 0, 0, 0]))
    assert np.flatnonzero(is_popular_V).tolist() == [1]


def test_lists_without_an_item_are_a_mistake():
    with pytest.raises(ValueError, match='no list'):
        lists.list_metrics(np.zeros((2, 3), int), ITEMS, OFFSETS, 5)


def random_world():
    """40 lists of ten of 50 items, and the training actions of 40 users."""
    draw = np.random.default_rng(0)
    lists_UK = np.stack([draw.permutation(30)[:10] + 1 + draw.integers(21) for _ in range(40)])
    length_U = draw.integers(1, 20, 40)
    items = np.minimum(draw.geometric(0.1, length_U.sum()), 48).astype(np.int32)
    return lists_UK, items, np.cumsum([0, *length_U])


def test_values_of_rectools():
    """Printed by RecTools 0.19.0 for the same lists; items 49 and 50 have no action."""
    found = lists.list_metrics(*random_world(), 50)
    expected = {'coverage@10': 0.96, 'novelty@10': 4.027979242039966, 'arp@10': 4.3175}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_metrics_are_those_of_rectools():
    """Where RecTools is installed, which needs numpy below 2 before Python 3.13."""
    rectools = pytest.importorskip('rectools.metrics')
    pandas = pytest.importorskip('pandas')
    lists_UK, items, offsets = random_world()
    num_users, k = lists_UK.shape
    reco = pandas.DataFrame(
        {
            'user_id': np.repeat(np.arange(num_users), k),
            'item_id': lists_UK.ravel(),
            'rank': np.tile(np.arange(1, k + 1), num_users),
        }
    )
    user_A = np.repeat(np.arange(num_users), np.diff(offsets))
    actions = pandas.DataFrame({'user_id': user_A, 'item_id': items})
    found = lists.list_metrics(lists_UK, items, offsets, 50)
    expected = {
        'coverage@10': rectools.CatalogCoverage(k, normalize=True).calc(reco, range(1, 51)),
        'novelty@10': rectools.MeanInvUserFreq(k).calc(reco, actions),
        'arp@10': rectools.AvgRecPopularity(k).calc(reco, actions),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)
