"""The column of each role: recognised where it is certain, else refused in one line."""

from datetime import date, datetime, timedelta

import polars as pl
import pytest

from fame_jax.data.columns import choose_columns, looks_timed
from fame_jax.data.tables import Table
from fame_jax.errors import UserError

EPOCH = 1_577_836_800  # 2020-01-01
SECONDS = [EPOCH + 3, EPOCH + 1, EPOCH + 2]
DATES = ['2020-01-03', '2020-01-02', '2020-01-01']
IDS = {'user_id': ['c'] * 3, 'item_id': ['a', 'b', 'd']}


def make_table(columns, **fields):
    frame = {name: pl.Series(values, strict=False) for name, values in columns.items()}
    return Table('log', list(frame), lambda names: [frame[name] for name in names], str, **fields)


def choose(columns, needs_rating=False, **given):
    return choose_columns(make_table(columns), given, needs_rating, 'log, line 1')


def chosen_time(columns, **given):
    return choose(IDS | columns, **given).columns.get('time')


def refusal(columns, **given):
    with pytest.raises(UserError) as caught:
        choose(columns, **given)
    message = str(caught.value)
    assert message.startswith('log, line 1: ') and '\n' not in message
    return message


@pytest.mark.parametrize('name', ['t_dat', 'InvoiceDate', 'bought_at', 'eventdate', 'Kaufdatum'])
@pytest.mark.parametrize(
    'values', [DATES, SECONDS, [1000 * s for s in SECONDS], [datetime(2020, 1, n) for n in (3, 1)]]
)
def test_a_time_is_recognised_by_its_name_and_values(name, values):
    columns = {n: v[: len(values)] for n, v in IDS.items()}
    assert choose(columns | {name: values}).columns['time'] == name


@pytest.mark.parametrize('name', ['ts', 'bought_at', 'order_date', 'event_time', 'timestamp'])
def test_the_name_of_an_action_s_time_is_enough(name):
    assert chosen_time({name: [3, 1, 2]}) == name


@pytest.mark.parametrize('values', [DATES, SECONDS, [date(2020, 1, n) for n in (3, 2, 1)],
                                    ['20200103', '20200102', '20200101'],
                                    ['31/01/2020', '30/01/2020', '29/01/2020'],
                                    ['Tue Apr 03 18:00:09 +0000 2012'] * 3])  # fmt: skip
@pytest.mark.parametrize('name', ['x', 'column 7', 'expires_on', 'release_date'])
def test_values_like_times_under_another_name_are_refused_with_the_choice(name, values):
    message = refusal(IDS | {name: values})
    assert f'column {name!r} looks like a time' in message
    assert f'--columns=time:{name}' in message and 'time:-' in message
    assert chosen_time({name: values}, time='-') is None
    assert chosen_time({name: values}, time=name) == name


@pytest.mark.parametrize('name', ['day', 'date_of_it', 'eventdate'])
def test_numbers_under_a_likely_name_are_refused_with_the_choice(name):
    assert f'column {name!r} looks like a time' in refusal(IDS | {name: [3, 1, 2]})


@pytest.mark.parametrize(
    'columns',
    [
        {},
        {'price': [EPOCH, EPOCH + 9, EPOCH + 5]},
        {'order_id': SECONDS},
        {'watch_time': [30, 10, 20]},
        {'candidate': ['x', 'y', 'z']},
        {'note': ['2020 was', 'a', 'year']},
        {'count': [1, 2, 3]},
        {'share': [0.5, 0.25, 0.1]},
        {'length': [timedelta(1)] * 3},
        {'empty': [None] * 3},
        {'blank': ['', ' ', '']},
        {'code': ['1e9', 'x', 'y']},
    ],
)
def test_other_columns_leave_the_order_of_the_file(columns):
    choice = choose(IDS | columns)
    assert 'time' not in choice.columns
    assert choice.unused == list(columns)


@pytest.mark.parametrize(
    ('columns', 'names'),
    [
        ({'time': [30, 10, 20], 'ts': SECONDS}, ('time', 'ts')),
        ({'time': [30, 10, 20], 'x': SECONDS}, ('time', 'x')),
        ({'clicked_at': SECONDS, 'bought_at': SECONDS[::-1]}, ('clicked_at', 'bought_at')),
        ({'date': DATES, 'time': ['18:30:00'] * 3}, ('date', 'time')),
        ({'timestamp': [3, 1, 2], 'ts': SECONDS}, ('timestamp', 'ts')),
        ({'x': SECONDS, 'y': DATES[::-1]}, ('x', 'y')),
    ],
)
def test_two_times_are_refused_by_their_names(columns, names):
    message = refusal(IDS | columns)
    assert all(repr(name) in message for name in names) and '--columns=time:' in message


def test_the_usual_names_of_times_are_certain():
    assert chosen_time({'timestamp': SECONDS, 'released': DATES[::-1]}) == 'timestamp'
    assert chosen_time({'date': DATES[::-1], 'timestamp': SECONDS}) == 'timestamp'
    review = {'reviewTime': ['01 2, 2020'] * 3, 'unixReviewTime': SECONDS}
    assert chosen_time(review) == 'unixReviewTime'


def test_the_time_of_something_else_is_no_rival():
    assert chosen_time({'birth_date': DATES, 'ts': SECONDS}) == 'ts'


def test_of_two_times_with_one_order_the_finer_is_taken():
    days = ['2020-01-03', '2020-01-01', '2020-01-01']
    seconds = [EPOCH + 2 * 86_400, EPOCH + 5, EPOCH + 7]
    assert chosen_time({'date': days, 'ts': seconds}) == 'ts'
    assert chosen_time({'ts': seconds, 'date': days}) == 'ts'
    assert "'date' and 'ts'" in refusal(IDS | {'date': days, 'ts': seconds[::-1]})
    # Equal days at different seconds do not decide the order of the seconds.
    assert chosen_time({'date': days[1:] + days[1:2], 'ts': [EPOCH + 1, EPOCH + 1, EPOCH]}) == 'ts'


@pytest.mark.parametrize(
    ('names', 'user', 'item'),
    [
        (['customer', 'sku'], 'customer', 'sku'),
        (['Kundennummer', 'Artikel'], 'Kundennummer', 'Artikel'),
        (['userId', 'venueId', 'venueCategoryId'], 'userId', 'venueId'),
        (['userid', 'artist_id', 'artist_name', 'track_id'], 'userid', 'track_id'),
        (['user_id', 'asin', 'parent_asin'], 'user_id', 'parent_asin'),
        (['sessionId', 'userId', 'itemId'], 'userId', 'itemId'),
        (['sessionId', 'itemId'], 'sessionId', 'itemId'),
        (['username', 'product_id', 'user_id'], 'user_id', 'product_id'),
        (['Invoice', 'StockCode', 'Customer ID'], 'Customer ID', 'StockCode'),
        (['item_name', 'sku', 'user'], 'user', 'sku'),
        (['user_id:token', 'item_id:token'], 'user_id:token', 'item_id:token'),
        (['customer_id', 'article_id', 'price', 'sales_channel_id'], 'customer_id', 'article_id'),
    ],
)
def test_users_and_items_are_recognised(names, user, item):
    choice = choose({name: ['a', 'b', 'c'] for name in names})
    assert choice.columns == {'user': user, 'item': item}
    assert choice.guessed == ['user', 'item']
    assert choice.unused == [name for name in names if name not in (user, item)]


@pytest.mark.parametrize(
    ('names', 'shown'),
    [
        (['user', 'item', 'item_id', 'itemId'], "'item_id' and 'itemId'"),
        (['user', 'sku', 'product_id'], "'sku' and 'product_id'"),
        (['customer_id', 'visitor', 'item'], "'customer_id' and 'visitor'"),
        (['user_id', 'User ID', 'item'], "'user_id' and 'User ID'"),
    ],
)
def test_two_users_or_items_are_refused_by_their_names(names, shown):
    columns = {name: ['a', 'b', 'c'] for name in names}
    assert shown in refusal(columns)
    assert choose(columns, user=names[0], item=names[-1]).guessed == []


def test_a_given_column_is_found_without_regard_to_case_signs_and_types():
    columns = IDS | {'Bought At': SECONDS, 'star:float': [1, 2, 3]}
    for name in ('Bought At', 'bought_at', 'BoughtAt', 'BOUGHT AT'):
        assert chosen_time(columns, time=name) == 'Bought At'
    assert choose(columns, rating='star').columns['rating'] == 'star:float'
    columns = IDS | {'Time': SECONDS, 'TIME': SECONDS[::-1]}
    assert "'Time' and 'TIME'" in refusal(columns, time='time')
    assert chosen_time(columns, time='TIME') == 'TIME'


def test_a_column_that_occurs_twice_is_refused():
    table = make_table(IDS)._replace(columns=['user_id', 'item_id', 'note', 'note', 'user_id'])
    with pytest.raises(UserError, match=r"columns 1 and 5 are both named 'user_id'; rename one"):
        choose_columns(table, {'time': '-'}, False, 'log')
    table = table._replace(columns=['user_id', 'item_id', 'note', 'note'])
    assert choose_columns(table, {'time': '-'}, False, 'log').unused == ['note', 'note']


def test_one_column_cannot_have_two_roles():
    assert 'cannot be both user and item' in refusal(IDS, user='item_id', item='item_id')
    assert choose(IDS, user='item_id', item='user_id').columns['item'] == 'user_id'


def test_positions_are_the_names_of_a_file_without_a_header():
    table = make_table({'1': ['c'] * 3, '2': ['a', 'b', 'd'], '3': SECONDS}, has_header=False)
    given = {'user': '1', 'item': '2'}
    assert choose_columns(table, given | {'time': '3'}, False, 'log').unused == []
    with pytest.raises(UserError, match="column '3' looks like a time"):
        choose_columns(table, given, False, 'log')
    with pytest.raises(UserError, match="'4' is not one of the 3 columns of a file without"):
        choose_columns(table, given | {'time': '4'}, False, 'log')


def test_ratings_are_recognised_only_where_they_are_needed():
    columns = IDS | {'stars': [1, 2, 3], 'Book-Rating': [3, 2, 1]}
    assert 'rating' not in choose(columns).columns
    assert choose(columns, needs_rating=True).columns['rating'] == 'Book-Rating'
    assert 'no column looks like the rating' in refusal(IDS, needs_rating=True)


@pytest.mark.parametrize(
    ('values', 'kind'),
    [
        ([EPOCH * 10**6, EPOCH * 10**6 + 1], 'epochs'),
        ([EPOCH * 10**9, EPOCH * 10**9 + 1], 'epochs'),
        ([EPOCH + 0.5, EPOCH + 1.5], 'epochs'),
        ([str(EPOCH), str(EPOCH + 1)], 'epochs'),
        ([EPOCH] * 40 + [EPOCH + 86_400] * 40 + [EPOCH] * 40, 'epochs'),  # whole days
        ([EPOCH + 1] * 60 + [EPOCH + 7] * 60, 'epochs'),  # ascending
        ([EPOCH + 1, EPOCH + 7] * 60, 'numbers'),  # few values, in no order
        ([EPOCH, 1000 * EPOCH], 'numbers'),
        ([20200101, 20201231], 'epochs'),
        ([20200101, 20201301], 'numbers'),
        (['2020-01-01T00:00:00Z', '2020-01-01 00:00:00.5+01:00'], 'dates'),
        (['01.02.2020', '3.4.20'], 'foreign'),
        (['Jan 5, 2020', 'Dec 31, 2020'], 'foreign'),
        (['5/2', '1.2.3'], ''),
        ([True, False], ''),
    ],
)
def test_values_look_like_times_or_not(values, kind):
    assert looks_timed(pl.Series(values)) == kind
