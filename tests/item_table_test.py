"""What an item table starts from: which rows, at which scale, and what is refused."""

import numpy as np
import pytest

from fame_jax import item_table
from fame_jax.errors import UserError

# Three items of width 4; of the second nothing is known.
ITEMS = np.array([[0, 0, 0, 0], [3, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 2]], np.float32)
FRESH = np.full((4, 4), 0.5, np.float32)


def fill(training, scale=0.1):
    params = {'item_table': FRESH, 'frozen_table': FRESH, 'other': np.ones(2)}
    return item_table.fill(params, item_table.Start(ITEMS), scale, training)


def test_known_rows_get_the_scale_and_others_stay():
    filled = fill('trained')
    # A row of length 5 becomes one whose coordinates' root mean square is the scale.
    np.testing.assert_allclose(filled['item_table'][1], [0.2 * 3 / 5, 0.2 * 4 / 5, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(filled['item_table'][3], [0, 0, 0, 0.2], rtol=1e-6)
    np.testing.assert_array_equal(filled['item_table'][::2], FRESH[::2])
    for name in ('frozen_table', 'other'):
        assert np.array_equal(filled[name], {'frozen_table': FRESH, 'other': np.ones(2)}[name])


def test_a_frozen_table_is_filled_and_what_is_added_to_it_is_not():
    frozen, added = fill('frozen'), fill('added')
    np.testing.assert_array_equal(frozen['frozen_table'], fill('trained')['item_table'])
    np.testing.assert_array_equal(added['frozen_table'][1::2], frozen['frozen_table'][1::2])
    np.testing.assert_array_equal(added['frozen_table'][::2], np.zeros((2, 4)))
    np.testing.assert_array_equal(added['item_table'], FRESH)


def test_the_facet_matrices_come_along_if_there_are_any():
    params = {'facet_block': {'facet': np.zeros((2, 4, 2)), 'gate': np.ones(1)}}
    assert item_table.align(params, item_table.Start(ITEMS)) == params
    facet_HDK = np.arange(16.0).reshape(2, 4, 2)
    aligned = item_table.align(params, item_table.Start(ITEMS, facet_HDK))
    np.testing.assert_array_equal(aligned['facet_block']['facet'], facet_HDK)
    assert aligned['facet_block']['gate'] is params['facet_block']['gate']


def test_an_array_is_read_and_a_run_without_a_text_stage_refused(tmp_path):
    path = tmp_path / 'mine.npy'
    np.save(path, ITEMS)
    start = item_table.read(str(path), tmp_path / 'text', num_items=3, width=4)
    np.testing.assert_array_equal(start.items_VD, ITEMS)
    assert start.facet_HDK is None
    with pytest.raises(UserError, match='run --stages=text first'):
        item_table.read('text', tmp_path / 'text', 3, 4)


@pytest.mark.parametrize(
    ('array', 'message'),
    [(ITEMS[1:], '4 rows are wanted'), (ITEMS[:, :3], 'has 3 columns, and the item table')],
)
def test_an_array_that_does_not_fit_is_refused(tmp_path, array, message):
    path = tmp_path / 'mine.npy'
    np.save(path, array)
    with pytest.raises(UserError, match=message):
        item_table.read(str(path), tmp_path, 3, 4)
