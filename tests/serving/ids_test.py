"""Ids of every type that a caller has: one item, or an error that names the id."""

import decimal
import warnings

import numpy as np
import pytest
from run_fixtures import make_recommender

from fame_jax.serving.ids import id_text
from fame_jax.serving.recommender import UnknownItemsWarning

SEVENS = [7, '7', 7.0, ' 7', '7\t', np.int8(7), np.uint64(7), np.float32(7), np.float64(7)]
SEVENS += [np.str_('7'), np.float16(7)]


@pytest.mark.parametrize('seven', SEVENS, ids=repr)
@pytest.mark.parametrize('id_type', ['str', 'int'])
def test_one_item_in_every_place(seven, id_type):
    recommender, *_ = make_recommender(
        item_ids=['', '7', '12', '40'], count_V=np.ones(4), id_type=id_type
    )
    kind = {'str': str, 'int': int}[id_type]
    assert recommender.recommend([seven], 9) == recommender.recommend(['7'], 9)
    assert recommender.recommend([seven]).unknown == []
    assert kind(7) not in recommender.recommend(['12'], deny=[seven]).items
    assert recommender.recommend(['12'], allow=[seven]).items == [kind(7)]
    assert recommender.similar_items(seven).items == recommender.similar_items('7').items
    np.testing.assert_array_equal(recommender.query([seven]), recommender.query(['7']))
    assert recommender.explain([seven], 2) == recommender.explain(['7'], 2)


def test_whole_numbers_that_a_float_holds_exactly():
    for value, text in (
        (-3.0, '-3'),
        (-0.0, '0'),
        (2.0**53 - 1, '9007199254740991'),
        (np.float32(2**24 - 1), '16777215'),
        (np.int64(2**63 - 1), '9223372036854775807'),
        (2**70, str(2**70)),
    ):
        assert id_text(value) == text
    rounded = (2.0**53, np.float32(2**24), np.float16(2**11), float('inf'), float('nan'))
    for wrong in (*rounded, 1.5, True, np.True_, None, b'7', ['7'], decimal.Decimal(7)):
        with pytest.raises(TypeError, match='is not an id: ids are strings or whole numbers'):
            id_text(wrong)


def test_an_id_that_the_catalogue_has_with_blanks_is_itself():
    recommender, *_ = make_recommender(item_ids=['', ' a', 'a', 'b '], count_V=np.ones(4))
    for given, index in ((' a', 1), ('a', 2), ('a ', 2), ('b ', 3)):
        assert recommender.to_indices([given])[0].tolist() == [index]
    assert recommender.to_indices(['b'])[1] == ['b']


def test_unknown_ids_of_allow_and_deny_are_named():
    recommender, *_ = make_recommender()
    for lists, named in (
        ({'deny': ['who', 'a', 8]}, "['who', 8]"),
        ({'allow': ['a', 'b', 'who']}, "['who']"),
        ({'allow': ['a', 'b'], 'deny': [*range(10, 20)]}, '[10, 11, 12, 13, 14, ...]'),
    ):
        for call in (recommender.recommend, recommender.recommend_many):
            with pytest.warns(UnknownItemsWarning) as caught:
                call(['d'], 3, **lists)
            (warning,) = caught
            assert named in str(warning.message) and warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        recommender.recommend(['d'], allow=['a'], deny=['b'])
        assert recommender.recommend(['d'], allow=[]).items == []
    for call in (recommender.recommend, recommender.recommend_many, recommender.explain):
        with pytest.raises(ValueError, match=r"allow: none of \['who', 8\] is in the catalogue"):
            call(['d'], allow=['who', 8])
