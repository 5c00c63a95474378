"""Facets: which labels remain, against an explicit loop; merging, and which head gets which."""

import collections
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fame_jax.errors import UserError
from fame_jax.text import facets
from fame_jax.text.facets import build_facet

NAMED = [(), ('red', 'Blue'), ('blue',), ('BLUE', 'red'), ('green',), (), ('  dark   green ',)]


def test_by_hand():
    facet = build_facet('colour', NAMED, rarest=2, commonest=0.5)
    assert facet.name == 'colour' and facet.labels == ['BLUE', 'red']
    assert facet.label_VS.tolist() == [
        [-1, -1], [0, 1], [0, -1], [0, 1], [-1, -1], [-1, -1], [-1, -1]
    ]  # fmt: skip
    assert facet.label_VS.dtype == np.int32
    assert facet.card == {
        'name': 'colour',
        'labels_found': 4,
        'labels': 2,
        'items_found': 5,
        'items': 3,
        'rare': {'labels': 2, 'pairs': 2},
        'common': {'labels': 0, 'pairs': 0},
        'most': 2,
        'median': 2,
    }


def test_a_label_is_named_by_its_most_frequent_spelling():
    named = [(), ('LEGO',), ('Lego',), ('LEGO ',), ('duplo',), ('Duplo',)]
    assert build_facet('brand', named, commonest=1).labels == ['Duplo', 'LEGO']


def test_a_label_counts_once_for_an_item():
    named = [(), ('a', 'A', ' a'), ('b',), ('b',)]
    assert build_facet('x', named, rarest=1, commonest=1).labels == ['a', 'b']
    with pytest.raises(UserError, match='1 of 2 labels left'):
        build_facet('x', named, rarest=2, commonest=1)


@pytest.mark.parametrize(
    'named, message',
    [
        ([(), (), ()], "facet 'x': 0 of 0 labels left.* 0 of 2 items have a label"),
        ([(), ('a',), ('a',)], '0 of 1 labels left.* 1 labels have more than 30%'),
        ([(), ('a',), ('b',)], '2 labels have fewer than 2 items'),
    ],
)
def test_fewer_than_two_labels_are_refused(named, message):
    with pytest.raises(UserError, match=message) as error:
        build_facet('x', named)
    assert '\n' not in str(error.value) and 'name another facet' in str(error.value)


@given(
    st.lists(
        st.lists(st.sampled_from(['a', 'A ', 'b', 'c', 'C', 'd', 'e f', 'E  F', ''])), min_size=1
    ),
    st.integers(1, 4),
    st.floats(0.05, 1),
)
def test_against_an_explicit_loop(items, rarest, commonest):
    keys = [{' '.join(name.split()).casefold() for name in names} - {''} for names in items]
    counts = collections.Counter(key for item_keys in keys for key in item_keys)
    rare = [key for key in counts if counts[key] < rarest]
    left = {k for k in counts if counts[k] >= rarest and counts[k] / len(items) <= commonest}
    # A share exactly at the limit may be rounded either way.
    if any(abs(count - commonest * len(items)) < 1e-9 for count in counts.values()):
        return
    if len(left) < 2:
        with pytest.raises(UserError):
            build_facet('x', [(), *items], rarest, commonest)
        return
    facet = build_facet('x', [(), *items], rarest, commonest)
    assert {label.casefold() for label in facet.labels} == left
    assert facet.labels == sorted(facet.labels) and len(facet.labels) == len(left)
    assert (facet.label_VS[0] == -1).all()
    for row, key in zip(facet.label_VS[1:], keys):
        numbers = [n for n in row if n >= 0]
        assert {facet.labels[n].casefold() for n in numbers} == key & left
        assert row.tolist() == sorted(set(numbers)) + [-1] * (len(row) - len(numbers))
    many = [len(key & left) for key in keys if key & left]
    assert facet.label_VS.shape == (len(items) + 1, max(many))
    assert facet.card['most'] == max(many) and facet.card['median'] == statistics.median(many)
    assert facet.card['items'] == len(many) and facet.card['labels_found'] == len(counts)
    assert facet.card['rare'] == {'labels': len(rare), 'pairs': sum(counts[k] for k in rare)}
    common = set(counts) - left - set(rare)
    assert facet.card['common']['pairs'] == sum(counts[key] for key in common)


@pytest.mark.parametrize(
    ('names', 'num_heads', 'heads'),
    [
        (['a', 'b'], 2, ['a', 'b']),
        (['a'], 3, ['a', 'instance', 'instance']),
        (['a', 'b', 'c'], 2, ['a+b', 'c']),
        (['a', 'b', 'c'], 1, ['a+b+c']),
        (['a', 'b', 'instance'], 2, ['a+b', 'instance']),
        ([], 1, ['instance']),
    ],
)
def test_every_head_gets_a_facet(names, num_heads, heads):
    assert facets.assign(names, num_heads) == heads


def test_instance_is_not_merged():
    with pytest.raises(UserError, match='name it last, or use more heads'):
        facets.assign(['instance', 'a', 'b'], 2)


def test_facets_are_selected_by_name_and_merged():
    colour = build_facet('colour', [(), ('red',), ('blue',), ('red',)], 1, 1)
    size = build_facet('size', [(), ('big',), (), ('red',)], 1, 1)
    assert facets.select(['size', 'colour'], [colour, size]) == (size, colour)
    (merged,) = facets.select(['colour+size'], [colour, size])
    assert merged.name == 'colour+size'
    assert merged.by_item() == [
        *([], ['colour: red', 'size: big'], ['colour: blue'], ['colour: red', 'size: red'])
    ]
    with pytest.raises(UserError, match=r'there is no facet price; choose from colour, size'):
        facets.select(['colour+price'], [colour, size])


def test_shuffling_permutes_label_sets_among_items():
    label_VS = np.concatenate([[[-1, -1]], np.random.default_rng(0).integers(0, 5, (40, 2))])
    shuffled_VS = facets.shuffle_labels(label_VS, seed=1)
    assert np.array_equal(shuffled_VS[0], [-1, -1])
    assert sorted(map(tuple, shuffled_VS)) == sorted(map(tuple, label_VS))
    assert np.mean(shuffled_VS == label_VS) < 0.5
