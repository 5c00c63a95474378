"""Texts of the synthetic items, and the labels that they hide."""

import numpy as np
import pytest

from fame_jax.data.synthetic import generate
from fame_jax.text.synthetic_items import describe_items


@pytest.fixture(scope='module')
def data():
    return generate(users=1500, items=600, facets=3, values=12, seed=1)


def test_the_seed_decides_the_texts(data):
    first, again = (describe_items(data.item_facets, seed=4) for _ in range(2))
    assert first.texts == again.texts and first.titles == again.titles
    assert describe_items(data.item_facets, seed=5).texts != first.texts


def test_labels_are_the_values_of_the_data(data):
    items = describe_items(data.item_facets)
    assert [facet.name for facet in items.facets] == ['facet_1', 'facet_2', 'facet_3']
    for facet, values in zip(items.facets, data.item_facets.T):
        assert np.array_equal(facet.label_VS, values[:, None])
        assert len(facet.labels) == 12 and facet.labels == sorted(facet.labels)
    assert len(items.texts) == len(items.titles) == data.num_items + 1
    assert items.texts[0] == items.titles[0] == '' and all(items.texts[1:])


def test_most_texts_have_words_of_their_values(data):
    """Most texts have a word that only items of their value have; a few have none."""
    items = describe_items(data.item_facets)
    texts = [set(text.split()) for text in items.texts]
    everywhere = set().union(*texts)
    for values in data.item_facets.T:
        values_of = {word: set() for word in everywhere}
        for value, text in zip(values, texts):
            for word in text:
                values_of[word].add(value)
        own = {word for word, found in values_of.items() if len(found) == 1}
        assert all(len([w for w in own if values_of[w] == {value}]) >= 4 for value in range(12))
        with_word = np.mean([any(word in own for word in text) for text in texts[1:]])
        assert 0.9 < with_word < 1


def test_an_unknown_value_has_no_words():
    facets = np.array([[-1, -1], [0, 0], [1, 0], [0, 1], [-1, -1]], np.int32)
    items = describe_items(facets)
    assert items.facets[0].label_VS.tolist() == [[-1], [0], [1], [0], [-1]]
    assert items.facets[1].card['items'] == 3
    # Only the six words without a meaning are left.
    assert len(items.texts[4].split()) == 6
