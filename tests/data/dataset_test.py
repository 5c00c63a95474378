"""Dataset: the leave-one-out split, ids, and the form on disk."""

import hashlib
import json
import shutil
import stat

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from data_fixtures import make_dataset, unflatten

from fame_jax.data.dataset import Dataset
from fame_jax.errors import UserError

SMALL = make_dataset([1, 2, 3], [2, 3, 4, 5, 1])


def test_the_last_item_is_the_test_and_the_one_before_is_the_validation():
    assert unflatten(*SMALL.training_histories()) == [[1], [2, 3, 4]]
    *before, targets = SMALL.held_out('validation')
    assert unflatten(*before) == [[1], [2, 3, 4]] and targets.tolist() == [2, 5]
    *before, targets = SMALL.held_out('test')
    assert unflatten(*before) == [[1, 2], [2, 3, 4, 5]] and targets.tolist() == [3, 1]
    assert targets.dtype == before[0].dtype == np.int32 and before[1].dtype == np.int64
    with pytest.raises(ValueError, match="no split 'train'"):
        SMALL.held_out('train')


histories = st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=8), min_size=1, max_size=6)


@hypothesis.given(histories)
@hypothesis.settings(deadline=None)
def test_history_and_target_make_the_whole(histories):
    data = make_dataset(*histories)
    for split, last in (('validation', 2), ('test', 1)):
        *before, targets = data.held_out(split)
        assert unflatten(*before) == [history[:-last] for history in histories]
        assert targets.tolist() == [history[-last] for history in histories]
    assert unflatten(*data.training_histories()) == [history[:-2] for history in histories]


def test_histories_have_the_ids_of_the_source():
    assert list(SMALL.histories()) == [
        ('u0', ['i1', 'i2', 'i3']),
        ('u1', ['i2', 'i3', 'i4', 'i5', 'i1']),
    ]
    numbers = {'user_ids': ['7', '-3'], 'item_ids': ['', '10', '20', '30', '40', '50']}
    kinds = {'user': 'int', 'item': 'int'}
    data = make_dataset(*unflatten(SMALL.items, SMALL.offsets), **numbers, card={'id_kinds': kinds})
    assert list(data.histories()) == [(7, [10, 20, 30]), (-3, [20, 30, 40, 50, 10])]


@hypothesis.given(histories, st.text(), st.booleans())
@hypothesis.settings(deadline=None, max_examples=40)
def test_save_and_load_are_inverse(tmp_path_factory, histories, text, has_facets):
    num_users, num_items = len(histories), max(map(max, histories))
    fields = {'user_ids': [f'{text}{n}' for n in range(num_users)]}
    if has_facets:
        facets = np.arange(2 * num_items + 2, dtype=np.int32).reshape(-1, 2)
        fields |= {'item_facets': facets, 'user_facets': np.zeros(num_users, np.int32)}
    data = make_dataset(*histories, **fields)
    folder = tmp_path_factory.mktemp('data') / 'set'
    data.save(folder)
    loaded = Dataset.load(folder)
    for name in ('items', 'offsets', 'item_facets', 'user_facets'):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(data, name))
    assert loaded.items.dtype == np.int32 and loaded.offsets.dtype == np.int64
    assert (loaded.user_ids, loaded.item_ids) == (data.user_ids, data.item_ids)
    assert loaded.card == data.with_counts().card


def test_save_writes_plain_files_with_the_usual_permissions(tmp_path):
    for _ in range(2):  # the second call replaces the first data set
        SMALL.save(tmp_path / 'a' / 'set')
    assert sorted(p.name for p in (tmp_path / 'a').iterdir()) == ['set']
    names = sorted(p.name for p in (tmp_path / 'a' / 'set').iterdir())
    assert names == ['dataset.json', 'ids.json', 'items.npy', 'offsets.npy']
    (tmp_path / 'plain').mkdir()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ('a/set', 'plain')]
    assert modes[0] == modes[1]


def test_save_deletes_no_other_files(tmp_path):
    (tmp_path / 'thesis.tex').write_text('years of work')
    with pytest.raises(UserError, match=r"also contains 'thesis\.tex'"):
        SMALL.save(tmp_path)
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='Not a directory'):
        SMALL.save(tmp_path / 'file')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'thesis.tex']


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def change(path, before, after):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


DAMAGES = {
    'no folder': lambda folder: shutil.rmtree(folder),
    'no card': lambda folder: (folder / 'dataset.json').unlink(),
    'no ids': lambda folder: (folder / 'ids.json').unlink(),
    'no items': lambda folder: (folder / 'items.npy').unlink(),
    'no offsets': lambda folder: (folder / 'offsets.npy').unlink(),
    'items cut': lambda folder: cut(folder / 'items.npy', 140),
    'items empty': lambda folder: cut(folder / 'items.npy', 0),
    'ids cut': lambda folder: cut(folder / 'ids.json', 20),
    'card cut': lambda folder: cut(folder / 'dataset.json', 20),
    'card a list': lambda folder: (folder / 'dataset.json').write_text('[]'),
    'ids a list': lambda folder: (folder / 'ids.json').write_text('[]'),
    'an id changed': lambda folder: change(folder / 'ids.json', 'u0', 'u9'),
    'a count changed': lambda folder: change(folder / 'dataset.json', '"users": 2', '"users": 3'),
    'ids of another kind': lambda folder: change(
        folder / 'dataset.json', '"source"', '"id_kinds": {"user": "int"}, "source"'
    ),
    'a pickle': lambda folder: np.save(
        folder / 'items.npy', np.array([{}], dtype=object), allow_pickle=True
    ),
    'an archive': lambda folder: np.savez((folder / 'items.npy').open('wb'), items=SMALL.items),
    'another type': lambda folder: np.save(folder / 'items.npy', SMALL.items.astype(np.int64)),
    'an array more': lambda folder: np.save(folder / 'user_facets.npy', np.zeros(2, np.int32)),
    'items in another order': lambda folder: np.save(folder / 'items.npy', SMALL.items[::-1]),
}

# Damages of a data set in the form of 2026, with all arrays in sequences.npz.
OLD_DAMAGES = {
    'no arrays': lambda path: path.unlink(),
    'arrays cut': lambda path: cut(path, 300),
    'arrays empty': lambda path: cut(path, 0),
    'a pickle': lambda path: np.savez(path, items=np.array([{}], dtype=object), allow_pickle=True),
    'not an archive': lambda path: np.save(path.open('wb'), np.ones(3)),
    'other arrays': lambda path: np.savez(path, a=np.ones(3)),
    'an array missing': lambda path: np.savez(path, items=SMALL.items),
    'items in another order': lambda path: np.savez(
        path, items=SMALL.items[::-1], offsets=SMALL.offsets
    ),
}


def save_old(data, folder):
    """Writes a data set in the form of 2026; returns the path of its arrays."""
    data.save(folder)
    np.savez(
        folder / 'sequences.npz', **{path.stem: np.load(path) for path in folder.glob('*.npy')}
    )
    for path in folder.glob('*.npy'):
        path.unlink()
    return folder / 'sequences.npz'


@pytest.mark.parametrize('damage', OLD_DAMAGES)
def test_damage_to_an_old_form_is_one_line(damage, tmp_path):
    OLD_DAMAGES[damage](save_old(SMALL, tmp_path / 'set'))
    with pytest.raises(UserError) as caught:
        Dataset.load(tmp_path / 'set')
    assert str(tmp_path) in str(caught.value) and '\n' not in str(caught.value)


def test_the_old_form_is_read_and_replaced(tmp_path):
    facets = {'item_facets': np.ones((6, 2), np.int32), 'user_facets': np.zeros(2, np.int32)}
    for data in (SMALL, make_dataset([1, 2, 3], [2, 3, 4, 5, 1], **facets)):
        folder = tmp_path / f'set{len(data._arrays())}'
        save_old(data, folder)
        old = Dataset.load(folder)
        assert list(old.histories()) == list(data.histories())
        assert old.card == data.with_counts().card
        assert (old.item_facets is None) == (data.item_facets is None)
        old.save(folder)
        assert not (folder / 'sequences.npz').exists()
        assert Dataset.load(folder).card == old.card


def test_arrays_are_mapped_from_the_disk(tmp_path):
    SMALL.save(tmp_path)
    loaded = Dataset.load(tmp_path)
    for array in (loaded.items, loaded.offsets):
        assert type(array) is np.ndarray and isinstance(array.base, np.memmap)
        assert not array.flags.writeable
    # A later save makes new files: the mapped ones keep their content.
    make_dataset([3, 2, 1], [1, 5, 4, 3, 2]).save(tmp_path)
    assert list(loaded.histories()) == list(SMALL.histories())


def test_the_fingerprint_is_that_of_earlier_versions(monkeypatch):
    """Checkpoints have it."""
    value = 'b835a849b6f9c396318290d315dcc64832ab05e5ac1bbbfc929c3110b723b734'
    assert SMALL.fingerprint() == value
    ids = {'user_ids': ['\u20ac', '"', 'x'], 'item_ids': ['', *map(str, range(7))]}
    data = make_dataset([1, 2, 7], [3, 4, 5], [6, 1, 1], **ids)
    digest = hashlib.sha256()
    for name, array in data._arrays().items():
        digest.update(f'{name} {array.dtype} {array.shape};'.encode() + array.tobytes())
    digest.update(json.dumps([data.user_ids, data.item_ids]).encode())
    for block in (1, 2, 3, 100):
        monkeypatch.setattr('fame_jax.data.dataset.BLOCK', block)
        assert data.fingerprint() == digest.hexdigest()


@pytest.mark.parametrize('damage', DAMAGES)
def test_damage_is_one_line(damage, tmp_path):
    folder = tmp_path / 'set'
    SMALL.save(folder)
    DAMAGES[damage](folder)
    with pytest.raises(UserError) as caught:
        Dataset.load(folder)
    assert str(folder) in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'fields',
    [
        {'items': np.array([1, 2, 3], np.int32)},
        {'items': SMALL.items + 1},
        {'items': SMALL.items.astype(np.int64)},
        {'offsets': np.array([0, 2, 8])},
        {'user_ids': ['u']},
        {'card': {'id_kinds': {'item': 'int'}}},
        {'card': {'id_kinds': {'item': 'float'}}},
        {'item_facets': np.zeros((3, 2), np.int32)},
        {'user_facets': np.zeros(3, np.int32)},
    ],
)
def test_fields_that_contradict_one_another_are_an_error(fields):
    with pytest.raises(ValueError):
        Dataset(**(vars(SMALL) | fields)).with_counts()


def test_the_card_is_json_with_counts(tmp_path):
    SMALL.save(tmp_path / 'set')
    card = json.loads((tmp_path / 'set' / 'dataset.json').read_text())
    assert (card['users'], card['items'], card['actions']) == (2, 5, 8)


def test_describe_is_one_line():
    line = SMALL.describe()
    assert line.startswith('small: 2 users, 5 items, 8 actions; 4.00 a user (3 to 5, median 4)')
    assert line.endswith('from x.txt') and '\n' not in line and line in repr(SMALL)
