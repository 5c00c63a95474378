"""The form on disk survives the trip, refuses what is not whole, and splits as told."""

import json
import shutil
import stat

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from fame_jax.data import sequences
from fame_jax.data.sequences import Sequences
from fame_jax.errors import UserError


def make(rows, **fields):
    num_items = max(map(max, rows))
    ids = {
        'user_ids': [f'u{n}' for n in range(len(rows))],
        'item_ids': ['', *(f'i{n}' for n in range(1, num_items + 1))],
        'card': {'name': 'small', 'source': 'x.txt'},
    }
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    return Sequences(np.concatenate(rows).astype(np.int32), offsets, **(ids | fields))


SMALL = make([[1, 2, 3], [2, 3, 4, 5, 1]])


def rows_of(items, offsets):
    return [row.tolist() for row in np.split(items, offsets[1:-1])]


def test_the_last_two_are_held_out():
    assert rows_of(*sequences.split_training(SMALL)) == [[1], [2, 3, 4]]
    *before, targets = sequences.held_out(SMALL, 'validation')
    assert rows_of(*before) == [[1], [2, 3, 4]] and targets.tolist() == [2, 5]
    *before, targets = sequences.held_out(SMALL, 'test')
    assert rows_of(*before) == [[1, 2], [2, 3, 4, 5]] and targets.tolist() == [3, 1]
    assert targets.dtype == before[0].dtype == np.int32 and before[1].dtype == np.int64
    with pytest.raises(ValueError, match='no such split'):
        sequences.held_out(SMALL, 'train')


rows = st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=8), min_size=1, max_size=6)


@hypothesis.given(rows)
@hypothesis.settings(deadline=None)
def test_history_and_targets_make_the_whole(rows):
    data = make(rows)
    for split, last in (('validation', 2), ('test', 1)):
        *before, targets = sequences.held_out(data, split)
        assert rows_of(*before) == [row[:-last] for row in rows]
        assert targets.tolist() == [row[-last] for row in rows]


@hypothesis.given(rows, st.text(), st.booleans())
@hypothesis.settings(deadline=None, max_examples=40)
def test_save_and_load_are_a_round_trip(tmp_path_factory, rows, text, faceted):
    data = make(rows)
    names = [f'{text}{n}' for n in range(len(rows))]
    facets = np.arange(2 * data.num_items + 2, dtype=np.int32).reshape(-1, 2) if faceted else None
    followed = np.zeros(len(rows), np.int32) if faceted else None
    data = make(rows, user_ids=names, item_facets=facets, user_facets=followed)
    folder = tmp_path_factory.mktemp('data') / 'set'
    sequences.save(data, folder)
    back = sequences.load(folder)
    for name in ('items', 'offsets', 'item_facets', 'user_facets'):
        np.testing.assert_array_equal(getattr(back, name), getattr(data, name))
    assert back.items.dtype == np.int32 and back.offsets.dtype == np.int64
    assert (back.user_ids, back.item_ids) == (data.user_ids, data.item_ids)
    assert back.card == sequences.seal(data).card


def test_save_leaves_three_files_that_others_may_read(tmp_path):
    for _ in range(2):  # the second replaces the first
        sequences.save(SMALL, tmp_path / 'a' / 'set')
    assert sorted(p.name for p in (tmp_path / 'a').iterdir()) == ['set']
    found = sorted(p.name for p in (tmp_path / 'a' / 'set').iterdir())
    assert found == ['dataset.json', 'ids.json', 'sequences.npz']
    (tmp_path / 'plain').mkdir()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ('a/set', 'plain')]
    assert modes[0] == modes[1]


def test_save_deletes_nothing_of_others(tmp_path):
    (tmp_path / 'thesis.tex').write_text('years of work')
    with pytest.raises(UserError, match=r"also holds 'thesis\.tex'"):
        sequences.save(SMALL, tmp_path)
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='Not a directory'):
        sequences.save(SMALL, tmp_path / 'file')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'thesis.tex']


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def change(path, before, after):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def pickled(path):
    np.savez(path, items=np.array([{}], dtype=object), allow_pickle=True)


DAMAGES = {
    'gone': lambda folder: shutil.rmtree(folder),
    'no card': lambda folder: (folder / 'dataset.json').unlink(),
    'no ids': lambda folder: (folder / 'ids.json').unlink(),
    'no arrays': lambda folder: (folder / 'sequences.npz').unlink(),
    'arrays cut': lambda folder: cut(folder / 'sequences.npz', 300),
    'arrays empty': lambda folder: cut(folder / 'sequences.npz', 0),
    'ids cut': lambda folder: cut(folder / 'ids.json', 20),
    'card cut': lambda folder: cut(folder / 'dataset.json', 20),
    'card a list': lambda folder: (folder / 'dataset.json').write_text('[]'),
    'ids a list': lambda folder: (folder / 'ids.json').write_text('[]'),
    'an id changed': lambda folder: change(folder / 'ids.json', 'u0', 'u9'),
    'a count changed': lambda folder: change(folder / 'dataset.json', '"users": 2', '"users": 3'),
    'a pickle': lambda folder: pickled(folder / 'sequences.npz'),
    'not an archive': lambda folder: np.save((folder / 'sequences.npz').open('wb'), np.ones(3)),
    'other arrays': lambda folder: np.savez(folder / 'sequences.npz', a=np.ones(3)),
    'an array too few': lambda folder: np.savez(folder / 'sequences.npz', items=SMALL.items),
    'others in place': lambda folder: np.savez(
        folder / 'sequences.npz', items=SMALL.items[::-1], offsets=SMALL.offsets
    ),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damage_is_told_in_one_line(damage, tmp_path):
    folder = tmp_path / 'set'
    sequences.save(SMALL, folder)
    DAMAGES[damage](folder)
    with pytest.raises(UserError) as caught:
        sequences.load(folder)
    assert str(folder) in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'fields',
    [
        {'items': np.array([1, 2, 3], np.int32)},
        {'items': SMALL.items + 1},
        {'items': SMALL.items.astype(np.int64)},
        {'offsets': np.array([0, 2, 8])},
        {'user_ids': ['u']},
        {'item_facets': np.zeros((3, 2), np.int32)},
        {'user_facets': np.zeros(3, np.int32)},
    ],
)
def test_arrays_that_contradict_are_a_fault_of_the_program(fields):
    with pytest.raises(ValueError):
        sequences.seal(Sequences(**(vars(SMALL) | fields)))


def test_the_card_is_plain_json_with_counts(tmp_path):
    sequences.save(SMALL, tmp_path / 'set')
    card = json.loads((tmp_path / 'set' / 'dataset.json').read_text())
    assert (card['users'], card['items'], card['actions']) == (2, 5, 8)


def test_describe_is_one_line():
    said = sequences.describe(SMALL)
    assert said.startswith('small: 2 users, 5 items, 8 actions; 4.00 a user (3 to 5, median 4)')
    assert said.endswith('from x.txt') and '\n' not in said
