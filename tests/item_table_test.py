"""What an item table starts from: which rows, at which scale, and what is refused."""

import numpy as np
import pytest

from fame_jax import item_table, records
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


def test_a_table_that_scores_apart_starts_alike():
    params = {'item_table': FRESH, 'output_table': FRESH * 2}
    filled = item_table.fill(params, item_table.Start(ITEMS), 0.1, 'trained')
    np.testing.assert_array_equal(filled['output_table'][1::2], filled['item_table'][1::2])
    np.testing.assert_array_equal(filled['output_table'][::2], FRESH[::2] * 2)


def test_facet_matrices_for_other_heads_are_refused():
    params = {'facet_block': {'facet': np.zeros((4, 4, 1), np.float32)}}
    with pytest.raises(UserError, match='a W_f for 2 heads; use as many with --num_heads'):
        item_table.align(params, item_table.Start(ITEMS, np.zeros((2, 4, 2))))


def test_the_facet_matrices_come_along_if_there_are_any():
    params = {'facet_block': {'facet': np.zeros((2, 4, 2), np.float32), 'gate': np.ones(1)}}
    assert item_table.align(params, item_table.Start(ITEMS)) == params
    facet_HDK = np.arange(16, dtype=np.float32).reshape(2, 4, 2)
    aligned = item_table.align(params, item_table.Start(ITEMS, facet_HDK))
    np.testing.assert_array_equal(aligned['facet_block']['facet'], facet_HDK)
    assert aligned['facet_block']['gate'] is params['facet_block']['gate']


def test_an_array_is_read_and_a_run_without_a_text_stage_refused(tmp_path):
    path = tmp_path / 'mine.npy'
    np.save(path, ITEMS)
    start = item_table.read(str(path), tmp_path / 'text', num_items=3, width=4, data_sha256='x')
    np.testing.assert_array_equal(start.items_VD, ITEMS)
    assert start.facet_HDK is None
    with pytest.raises(UserError, match='run --stages=text first'):
        item_table.read('text', tmp_path / 'text', 3, 4, 'x')


@pytest.mark.parametrize(
    ('array', 'message'),
    [(ITEMS[1:], '4 rows are wanted'), (ITEMS[:, :3], 'has 3 columns, and the item table')],
)
def test_an_array_that_does_not_fit_is_refused(tmp_path, array, message):
    path = tmp_path / 'mine.npy'
    np.save(path, array)
    with pytest.raises(UserError, match=message):
        item_table.read(str(path), tmp_path, 3, 4, 'x')


@pytest.fixture
def made(tmp_path):
    """A text/ folder of three items, its facet matrices beside."""
    np.save(tmp_path / 'items.npy', ITEMS)
    np.save(tmp_path / 'facet.npy', np.ones((2, 4, 2), np.float32))
    names = {'kind/items': np.array([[-1], [0], [1], [0]]), 'kind/names': np.array(['a', 'b'])}
    np.savez(tmp_path / 'labels.npz', **names)
    records.write_json(tmp_path / 'text.json', {'data_sha256': 'x'})
    return tmp_path


def test_a_folder_is_made_when_all_of_it_is_there_and_of_this_data(made):
    assert item_table.is_made(made, 'x')
    with pytest.raises(UserError, match='was made of other data'):
        item_table.is_made(made, 'y')
    with pytest.raises(UserError, match='was made of other data'):
        item_table.read('text', made, 3, 4, 'y')
    (made / 'labels.npz').unlink()
    assert not item_table.is_made(made, 'x')


def test_vectors_named_by_their_path_bring_the_facet_matrices_beside_them(made):
    for source in ('text', str(made / 'items.npy')):
        assert item_table.read(source, made, 3, 4, 'x').facet_HDK.shape == (2, 4, 2)


@pytest.mark.parametrize('name', ['facet.npy', 'labels.npz'])
@pytest.mark.parametrize('left', [0, 20, 100])
def test_what_is_cut_short_is_one_line(made, name, left):
    (made / name).write_bytes((made / name).read_bytes()[:left])
    with pytest.raises(UserError, match=f'{name} is damaged; remove its folder and run'):
        item_table.read('text', made, 3, 4, 'x')
        item_table.read_labels(made, 3)


def test_labels_are_read_with_their_names_and_held_to_the_catalogue(made):
    label_VS, names = item_table.read_labels(made, 3)['kind']
    assert label_VS.tolist() == [[-1], [0], [1], [0]]
    assert names.tolist() == ['a', 'b']
    assert item_table.read_labels(made / 'nowhere', 3) == {}
    with pytest.raises(UserError, match=r'labels\.npz is damaged'):
        item_table.read_labels(made, 4)
