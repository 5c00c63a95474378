"""The text/ folder and the initial item table: which rows, at which scale, and refusals."""

import jax.numpy as jnp
import numpy as np
import pytest

from fame_jax.errors import UserError
from fame_jax.text import item_init
from fame_jax.text.facets import build_facet

# Three items of width 4; the second has no text.
ITEMS = np.array([[0, 0, 0, 0], [3, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 2]], np.float32)
RANDOM = np.full((4, 4), 0.5, np.float32)
KIND = build_facet('kind', [(), ('a',), ('b',), ('a',)], rarest=1, commonest=1)


def test_rows_with_a_vector_get_the_scale_and_others_stay():
    params = {'item_table': jnp.asarray(RANDOM), 'other': np.ones(2)}
    filled = item_init.fill(params, ITEMS, scale=0.1)
    # [3, 4, 0, 0] has root mean square 2.5.
    np.testing.assert_allclose(filled['item_table'][1], ITEMS[1] * 0.1 / 2.5, rtol=1e-6)
    np.testing.assert_allclose(filled['item_table'][3], ITEMS[3] * 0.1 / 1.0, rtol=1e-6)
    np.testing.assert_array_equal(filled['item_table'][::2], RANDOM[::2])
    assert filled['other'] is params['other']
    np.testing.assert_array_equal(params['item_table'], RANDOM)


def test_padding_rows_of_a_shared_table_stay():
    table = np.full((6, 4), 0.5, np.float32)
    filled = item_init.fill({'item_table': table}, ITEMS, 0.1)['item_table']
    assert filled.shape == (6, 4)
    np.testing.assert_array_equal(filled[4:], table[4:])


def test_an_array_is_read_without_its_padding_row(tmp_path):
    path = tmp_path / 'mine.npy'
    np.save(path, ITEMS + 1)
    items_VD = item_init.read(str(path), tmp_path / 'text', num_items=3, width=4, data_sha256='x')
    np.testing.assert_array_equal(items_VD[1:], ITEMS[1:] + 1)
    assert not items_VD[0].any()
    with pytest.raises(UserError, match='run --stages=text first'):
        item_init.read('text', tmp_path / 'text', 3, 4, 'x')


@pytest.mark.parametrize(
    ('array', 'message'),
    [(ITEMS[1:], '4 rows are needed'), (ITEMS[:, :3], 'has 3 columns, and the item table')],
)
def test_an_array_of_another_shape_is_refused(tmp_path, array, message):
    path = tmp_path / 'mine.npy'
    np.save(path, array)
    with pytest.raises(UserError, match=message):
        item_init.read(str(path), tmp_path, 3, 4, 'x')


@pytest.fixture
def folder(tmp_path):
    """A text/ folder of three items."""
    item_init.save(tmp_path / 'text', ITEMS, [KIND], {'data_sha256': 'x'})
    return tmp_path / 'text'


def test_what_is_saved_is_read(folder):
    np.testing.assert_array_equal(item_init.read('text', folder, 3, 4, 'x'), ITEMS)
    label_VS, names = item_init.read_labels(folder, 3)['kind']
    np.testing.assert_array_equal(label_VS, KIND.label_VS)
    assert names.tolist() == KIND.labels == ['a', 'b']
    assert item_init.read_labels(folder / 'nowhere', 3) == {}


def test_a_folder_is_complete_with_all_files_of_the_same_data(folder):
    assert item_init.is_complete(folder, 'x')
    with pytest.raises(UserError, match='was made from data other than'):
        item_init.is_complete(folder, 'y')
    with pytest.raises(UserError, match='was made from data other than'):
        item_init.read('text', folder, 3, 4, 'y')
    (folder / 'labels.npz').unlink()
    assert not item_init.is_complete(folder, 'x')


@pytest.mark.parametrize('left', [0, 20, 100])
def test_damaged_labels_are_refused(folder, left):
    path = folder / 'labels.npz'
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match=r'labels\.npz is damaged; remove its folder and run'):
        item_init.read_labels(folder, 3)


def test_labels_of_another_catalogue_are_refused(folder):
    with pytest.raises(UserError, match=r'labels\.npz is damaged'):
        item_init.read_labels(folder, 4)
