"""Label sets: which labels count, against an explicit loop, and how they are numbered and shown."""

import collections
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fame_jax.data.facets import build_facet
from fame_jax.errors import UserError

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


def test_the_commonest_is_dropped():
    # Blue is held by three of six items.
    named = [*NAMED[:-1], ('green',)]
    assert build_facet('colour', named, commonest=0.49).labels == ['green', 'red']
    facet = build_facet('colour', named, commonest=0.5)
    assert facet.labels == ['BLUE', 'green', 'red'] and facet.card['common']['labels'] == 0
    card = build_facet('colour', named, commonest=0.49).card
    assert card['common'] == {'labels': 1, 'pairs': 3} and card['items'] == 4


def test_a_label_is_shown_as_most_often_written():
    named = [(), ('LEGO',), ('Lego',), ('LEGO ',), ('duplo',), ('Duplo',)]
    assert build_facet('brand', named, commonest=1).labels == ['Duplo', 'LEGO']


def test_twice_in_one_item_counts_once():
    named = [(), ('a', 'A', ' a'), ('b',), ('b',)]
    assert build_facet('x', named, rarest=1, commonest=1).labels == ['a', 'b']
    with pytest.raises(UserError, match='1 of 2 labels left'):
        build_facet('x', named, rarest=2, commonest=1)


@pytest.mark.parametrize(
    'named, said',
    [
        ([(), (), ()], "facet 'x': 0 of 0 labels left.* 0 of 2 items have one"),
        ([(), ('a',), ('a',)], '0 of 1 labels left.* 0 labels are held by fewer.* 1 by more'),
        ([(), ('a',), ('b',)], '2 labels are held by fewer than 2 items'),
    ],
)
def test_fewer_than_two_labels_are_told(named, said):
    with pytest.raises(UserError, match=said) as caught:
        build_facet('x', named)
    assert '\n' not in str(caught.value) and 'name another facet' in str(caught.value)


@pytest.mark.parametrize('limits', [{'rarest': 0}, {'commonest': 0.0}, {'commonest': 1.1}])
def test_limits_without_sense_are_told(limits):
    with pytest.raises(UserError, match='must be'):
        build_facet('x', [(), ('a',), ('b',)], **limits)


@given(
    st.lists(
        st.lists(st.sampled_from(['a', 'A ', 'b', 'c', 'C', 'd', 'e f', 'E  F', ''])), min_size=1
    ),
    st.integers(1, 4),
    st.floats(0.05, 1),
)
def test_against_an_explicit_loop(items, rarest, commonest):
    keys = [{' '.join(name.split()).casefold() for name in names} - {''} for names in items]
    held = collections.Counter(key for one in keys for key in one)
    rare = [key for key in held if held[key] < rarest]
    left = {key for key in held if held[key] >= rarest and held[key] / len(items) <= commonest}
    # A share on the very limit may fall either way by rounding.
    if any(abs(count - commonest * len(items)) < 1e-9 for count in held.values()):
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
    assert facet.card['items'] == len(many) and facet.card['labels_found'] == len(held)
    assert facet.card['rare'] == {'labels': len(rare), 'pairs': sum(held[key] for key in rare)}
    common = set(held) - left - set(rare)
    assert facet.card['common']['pairs'] == sum(held[key] for key in common)
