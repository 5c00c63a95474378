"""Rows for new items in a small tree of parameters."""

import functools

import jax
import numpy as np
import pytest

from fame_jax.models import registry
from fame_jax.models.growth import grow_params

OLD = {'item_table': np.array([[9, 9], [1, 2], [3, 4]], np.float32), 'layer': {'w': np.ones(3)}}
OLD |= {'item_bias': np.array([0, 1, 2], np.float32)}
FRESH = {'item_table': np.full((6, 2), 7, np.float32), 'layer': {'w': np.zeros(3)}}
FRESH |= {'item_bias': np.full(6, 7, np.float32)}


def test_old_rows_stay_and_new_ones_are_means():
    """V grows from 2 to 4, and the last row is padding of a mesh; item 4 has no neighbour."""
    rounds = [{3: np.array([1, 2, 2])}]
    grown = grow_params(OLD, FRESH, 2, rounds)
    mean = [(1 + 3 + 3) / 3, (2 + 4 + 4) / 3]
    expected = [[9, 9], [1, 2], [3, 4], mean, [7, 7], [7, 7]]
    np.testing.assert_allclose(grown['item_table'], expected, rtol=1e-6)
    np.testing.assert_allclose(grown['item_bias'], [0, 1, 2, 5 / 3, 7, 7], rtol=1e-6)
    np.testing.assert_array_equal(grown['layer']['w'], np.ones(3))
    assert (FRESH['item_table'] == 7).all() and OLD['item_table'].shape == (3, 2)


def test_a_later_round_reads_the_rows_of_an_earlier_one_and_no_row_of_its_own():
    rounds = [{3: np.array([1])}, {4: np.array([2, 3])}]
    table = grow_params(OLD, FRESH, 2, rounds)['item_table']
    np.testing.assert_array_equal(table[3:5], [[1, 2], [2, 3]])
    together = grow_params(OLD, FRESH, 2, [{3: np.array([4]), 4: np.array([1])}])['item_table']
    np.testing.assert_array_equal(together[3:5], [[7, 7], [1, 2]])


def test_padding_rows_of_the_old_table_are_not_items():
    old = OLD | {'item_table': np.concatenate([OLD['item_table'], [[5, 5]]])}
    table = grow_params(old, FRESH, 2, [])['item_table']
    np.testing.assert_array_equal(table[3], [7, 7])


@pytest.mark.parametrize(
    'fresh, part',
    [
        (FRESH | {'layer': {'w': np.zeros(4)}}, 'layer/w has shape'),
        ({'item_table': FRESH['item_table']}, 'other parameters'),
        (FRESH | {'item_table': np.zeros((6, 3), np.float32)}, 'item_table has shape'),
    ],
)
def test_what_cannot_grow_is_refused(fresh, part):
    if part.startswith('layer'):
        fresh = fresh | {'layer': {'w': np.zeros((3, 2))}}
    with pytest.raises(ValueError, match=part):
        grow_params(OLD, fresh, 2, [])


@pytest.mark.parametrize('name', registry.MODELS)
def test_every_model_can_grow(name):
    """All parameters but those with a row for each item have one shape for every catalogue."""
    known = registry.options(registry.find(name))
    small = {'width': 8, 'num_heads': 2, 'num_blocks': 1, 'num_experts': 2, 'max_length': 6}
    small |= {'branches': 2}
    options = {option: value for option, value in small.items() if option in known}

    def zeros(num_items):
        module = registry.make(name, options, num_items=num_items)
        init = functools.partial(registry.init_params, module)
        shapes = jax.eval_shape(init, jax.random.key(0))
        return jax.tree.map(lambda leaf: np.full(leaf.shape, num_items, np.float32), shapes)

    grown = grow_params(zeros(5), zeros(8), 5, [])
    assert grown['item_table'][:, 0].tolist() == [5] * 6 + [8] * 3
    assert all(leaf.min() == 5 for leaf in jax.tree.leaves(grown))
