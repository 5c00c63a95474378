"""Words in the names of columns, and the roles that they suggest."""

import pytest

from fame_jax.data.names import fit, split_words, time_name

TIMES = """
timestamp t_dat InvoiceDate utcTimestamp bought_at rated_on created_at event_time eventTime
unixReviewTime reviewTime TIMESTAMP ts TRANSACTION_DT order_date OrderDate purchaseTime click_time
check-in_time timestamp_ms datum Zeitstempel rating_timestamp viewed_at listened_at server_time
txn_date sold_at unix_time datetime date time timestamp:float Time when 时间 дата fecha
review/time logged_on event-ts
"""
DATED = """
eventdate saledate Kaufdatum bestelldatum date_added fecha_compra date_achat at_time created
created_utc localtime clicktime day reviewzeit
"""
NEVER = """
order_id event_no price unit_price zip
"""
USERS = """
user_id userId USER uid CustomerID customer visitorid reviewerID sessionId id_user Kundennummer
kunden_nr client_id username user_id:token household_key member User-ID
"""
ITEMS = """
item_id iid sku StockCode venueId track_id article_id parent_asin asin ProductId movieId ISBN
book_id item:token itemname artist business_id poi id_item
"""
NEITHER = """
user_session venueCategoryId category_id title stock price user_country event_id
"""


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('InvoiceDate', ['invoice', 'date']),
        ('t_dat', ['t', 'dat']),
        ('Customer ID', ['customer', 'id']),
        ('CustomerID', ['customer', 'id']),
        ('IDUser', ['id', 'user']),
        ('user_id:token', ['user', 'id']),
        ('review/time2', ['review', 'time', '2']),
        ('Straße', ['strasse']),
        ('', []),
        (7, ['7']),
    ],
)
def test_words_are_split_at_capitals_and_signs(name, words):
    assert ''.join(split_words(name)) == ''.join(words)
    if name != 'Straße':
        assert split_words(name) == words


@pytest.mark.parametrize('name', TIMES.split())
def test_names_of_times(name):
    assert time_name(name) == 'time'


@pytest.mark.parametrize('name', DATED.split())
def test_names_of_times_that_need_values_like_times(name):
    assert time_name(name) in ('maybe', 'dated')


@pytest.mark.parametrize('name', ['updated_at', 'release_date', 'birthday', 'expires_on', 'dob'])
def test_times_of_something_else(name):
    assert time_name(name) == 'other'


@pytest.mark.parametrize('name', NEVER.split())
def test_ids_and_amounts_are_no_times(name):
    assert time_name(name) == 'never'


@pytest.mark.parametrize('name', ['watch_time', 'time_spent', 'session_start', 'play', 'zone'])
def test_durations_are_times_only_by_their_values(name):
    assert time_name(name) == ''


@pytest.mark.parametrize('name', ['play_date', 'session_ts', 'travelDate'])
def test_the_day_of_what_may_be_a_duration(name):
    assert time_name(name) == 'maybe'


@pytest.mark.parametrize('name', ['is_on', 'add_on', 'timeframe', 'note', 'hour', 'country'])
def test_other_names_say_nothing(name):
    assert time_name(name) == ''


@pytest.mark.parametrize('name', [*USERS.split(), 'Customer ID', 'session id'])
def test_names_of_users(name):
    assert fit('user', name)


@pytest.mark.parametrize('name', ITEMS.split())
def test_names_of_items(name):
    assert fit('item', name)


@pytest.mark.parametrize('name', NEITHER.split())
def test_names_of_neither(name):
    assert not fit('user', name) and not fit('item', name)


def test_better_names_come_first():
    users = ['user_id', 'user', 'customer_id', 'customer', 'session_id']
    items = ['item_id', 'item', 'parent_asin', 'asin', 'sku', 'artist_id']
    for role, names in (('user', users), ('item', items)):
        fits = [fit(role, name) for name in names]
        assert [(f.rank, f.form) for f in fits] == sorted((f.rank, f.form) for f in fits)
