"""Recommendations for the users of a data frame, in the frame's own library."""

import datetime

import numpy as np
import polars as pl
import pytest
from run_fixtures import ITEM_IDS, make_recommender

from fame_jax.errors import UserError

# The first user's actions are out of order; the second user's last two have equal times.
USERS, ITEMS, TIMES = [5, 2, 5, 2, 2], ['7', '12', '40', '7', '-3'], [3, 4, 2, 9, 9]
HISTORIES = {5: ['40', '7'], 2: ['12', '7', '-3']}
INT_IDS = ['', '7', '12', '40', '-3', '8']


def pandas_frame(columns):
    return pytest.importorskip('pandas').DataFrame(columns)


def arrow_table(columns):
    return pytest.importorskip('pyarrow').table(columns)


def arrow_batch(columns):
    return pytest.importorskip('pyarrow').record_batch(columns)


LIBRARIES = [pl.DataFrame, pandas_frame, arrow_table, arrow_batch]


def rows_of(frame):
    """The rows of a frame of any library, as tuples."""
    if hasattr(frame, 'to_pydict'):
        return list(zip(*frame.to_pydict().values()))
    return (
        frame.rows() if hasattr(frame, 'rows') else list(frame.itertuples(index=False, name=None))
    )


@pytest.mark.parametrize('id_type', ['str', 'int'])
@pytest.mark.parametrize('kind', [str, int])
@pytest.mark.parametrize('library', LIBRARIES)
def test_each_user_gets_a_list(library, kind, id_type):
    """Users in the order of their first rows and of their own type; items of the data's type."""
    recommender, *_ = make_recommender(item_ids=INT_IDS, count_V=np.ones(6), id_type=id_type)
    frame = library({'u': [*map(kind, USERS)], 'i': [*map(kind, ITEMS)], 't': TIMES})
    lists = recommender.recommend_frame(frame, 2, user='u', item='i', time='t', deny=['8'])
    names = lists.column_names if hasattr(lists, 'column_names') else list(lists.columns)
    assert names == ['user', 'rank', 'item', 'score', 'score_kind', 'count']
    expected = []
    for user, history in HISTORIES.items():
        answer = recommender.recommend(history, 2, deny=[8])
        for rank, (item, score) in enumerate(zip(answer.items, answer.scores), 1):
            expected.append((kind(user), rank, item, pytest.approx(score), 'dot product'))
    assert len(expected) == 3  # the user of three items has one left
    assert [row[:-1] for row in rows_of(lists)] == expected
    assert type(lists).__module__.partition('.')[0] == type(frame).__module__.partition('.')[0]


@pytest.mark.filterwarnings('ignore::fame_jax.serving.recommender.UnknownItemsWarning')
@pytest.mark.parametrize('library', LIBRARIES)
def test_titles_and_scores_and_counts_in_columns_of_their_own(library):
    """A stranger gets the most popular items; an item column with floats has whole ids."""
    titles = ['', *(f'title {item}' for item in INT_IDS[1:])]
    recommender, *_ = make_recommender(
        item_ids=INT_IDS, count_V=np.array([0, 1, 2, 3, 4, 5]), id_type='int', titles=titles
    )
    frame = library({'user': ['known', 'stranger'], 'item': [7.0, 99.0], 'time': [1, 1]})
    lists = recommender.recommend_frame(frame, 2)
    columns = lists.to_pydict() if hasattr(lists, 'to_pydict') else None
    columns = columns or {name: list(lists[name]) for name in lists.columns}
    names = ['user', 'rank', 'item', 'title', 'score', 'score_kind', 'count']
    assert list(columns) == names
    answer = recommender.recommend([7], 2)
    assert columns['item'] == [*answer.items, 8, -3]
    assert columns['title'] == [f'title {item}' for item in columns['item']]
    assert columns['score_kind'] == ['dot product'] * 2 + ['number of actions'] * 2
    assert columns['score'][:2] == pytest.approx(answer.scores)
    assert [is_null(x) for x in columns['score']] == [False, False, True, True]
    assert [is_null(x) for x in columns['count']] == [True, True, False, False]
    assert columns['count'][2:] == [5, 4]


def is_null(value):
    return value is None or repr(value) in ('<NA>', 'nan', 'np.float32(nan)')


def test_the_order_of_rows_and_of_dates():
    recommender, *_ = make_recommender()
    day = datetime.date(2020, 2, 1)
    frame = pl.DataFrame({'user': [1, 1], 'item': ['a', 'b'], 'time': [day, day.replace(month=1)]})
    by_date = recommender.recommend_frame(frame, 3)
    assert by_date['item'].to_list() == recommender.recommend(['b', 'a'], 3).items
    by_row = recommender.recommend_frame(frame.drop('time'), 3, time=None)
    assert by_row['item'].to_list() == recommender.recommend(['a', 'b'], 3).items
    assert by_row['item'].to_list() != by_date['item'].to_list()


@pytest.mark.parametrize('library', LIBRARIES)
def test_an_empty_frame(library):
    recommender, *_ = make_recommender(item_ids=ITEM_IDS)
    frame = pl.DataFrame({'user': [1], 'item': ['a'], 'time': [1]}).clear()
    frame = library({name: frame[name].to_numpy() for name in frame.columns})
    assert rows_of(recommender.recommend_frame(frame)) == []


@pytest.mark.parametrize('library', LIBRARIES)
def test_mistakes_name_the_column(library):
    recommender, *_ = make_recommender()
    columns = {'customer': [1, 2], 'item': ['a', None], 'when': [1.0, 2.0]}
    frame = library(columns)
    for arguments, words in (
        ({'user': 'costumer'}, "user='costumer': there is no such column; did you mean 'customer'"),
        (
            {'user': 'customer', 'item': 'x'},
            "item='x': there is no such column; there are customer,",
        ),
        ({'user': 'customer'}, "column 'item' has 1 rows without a value"),
    ):
        with pytest.raises(UserError, match=words):
            recommender.recommend_frame(frame, **arguments)
    frame = library({**columns, 'item': ['a', 'b'], 'nan': np.array([1.0, np.nan])})
    with pytest.raises(UserError, match='time=None takes the rows in their order'):
        recommender.recommend_frame(frame, user='customer')
    with pytest.raises(UserError, match="column 'nan' has"):
        recommender.recommend_frame(frame, user='customer', time='nan')


@pytest.mark.parametrize('wrong', [{'user': [1]}, [1], pl.LazyFrame({'user': [1]})])
def test_what_is_not_a_frame(wrong):
    with pytest.raises(TypeError, match='a frame is a DataFrame'):
        make_recommender()[0].recommend_frame(wrong)
