"""Times of all types and units keep their order exactly; mixed and lost ones are refused."""

from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal

import hypothesis
import hypothesis.strategies as st
import numpy as np
import polars as pl
import pytest

from fame_jax.data.numbers import read_numbers
from fame_jax.data.tables import Table
from fame_jax.data.times import read_times
from fame_jax.errors import UserError

EPOCH = 1_577_836_800  # 2020-01-01
NS = EPOCH * 10**9
TABLE = Table('log', [], lambda names: [], lambda record: f'line {record + 2}')


def read(values, dtype=None):
    return read_times(TABLE, 'when', pl.Series(values, dtype=dtype))


def ranks(values):
    return np.unique(values, return_inverse=True)[1].tolist()


def order(values, dtype=None):
    """The rank of each time among all of them."""
    return ranks(read(values, dtype).values)


def refusal(values, dtype=None):
    with pytest.raises(UserError) as caught:
        read(values, dtype)
    assert '\n' not in str(caught.value)
    return str(caught.value)


# Three times, of which the first is the latest and the second the earliest.
EXACT = {
    'decimals': ([Decimal('2.9'), Decimal('2.1'), Decimal('2.5')], None),
    'decimals of 30 digits': ([Decimal(f'{10**29}.{n}') for n in (9, 1, 5)], None),
    'whole decimals': ([Decimal(9), Decimal(1), Decimal(5)], None),
    'uint64': ([2**53 + 3, 2**53 + 1, 2**53 + 2], pl.UInt64),
    'int64': ([NS + 3, NS + 1, NS + 2], pl.Int64),
    'int8': ([3, -1, 2], pl.Int8),
    'text of nanoseconds': ([f'{NS + 3}', f'{NS + 1}', f'{NS + 2}'], None),
    'text of nanoseconds and a fraction': ([f'{NS + 3}', f'{NS + 1}', f'{NS + 1}.5'], None),
    'text of seconds with nanoseconds': ([f'{EPOCH}.00000000{n}' for n in (3, 1, 2)], None),
    'text with exponents': (['3e3', '1e3', '2000'], None),
    'text of numbers': (['10', '9', '9.5'], None),
    'categories of dates': (['2020-01-03', '2020-01-01', '2020-01-02'], pl.Categorical),
    'categories of numbers': (['10', '8', '9'], pl.Categorical),
    'days': ([date(2020, 1, n) for n in (3, 1, 2)], None),
    'datetimes in ms': ([datetime(2020, 1, n) for n in (3, 1, 2)], pl.Datetime('ms')),
    'datetimes in ns': ([NS + 3, NS + 1, NS + 2], pl.Datetime('ns')),
    'datetimes with a zone': (
        [datetime(2020, 1, 1, n, tzinfo=UTC) for n in (3, 1, 2)], pl.Datetime('us', 'Asia/Tokyo'),
    ),
    'dates before and after 1970': (['1970-01-02', '1969-12-31', '1970-01-01'], None),
}  # fmt: skip


@pytest.mark.parametrize('case', EXACT)
def test_times_of_any_type_keep_their_order(case):
    assert order(*EXACT[case]) == [2, 0, 1]


@pytest.mark.parametrize(
    ('values', 'unit', 'span'),
    [
        ([EPOCH, EPOCH + 86_400], 'seconds', ('2020-01-01', '2020-01-02')),
        ([1000 * EPOCH, 1000 * EPOCH + 1], 'milliseconds', ('2020-01-01', '2020-01-01')),
        ([EPOCH * 10**6] * 2, 'microseconds', ('2020-01-01', '2020-01-01')),
        ([NS, NS + 1], 'nanoseconds', ('2020-01-01', '2020-01-01')),
        ([f'{EPOCH}.5', f'{EPOCH}'], 'seconds', ('2020-01-01', '2020-01-01')),
        ([EPOCH, 320_000_000, EPOCH], 'seconds', ('1980-02-21', '2020-01-01')),
        ([1, 5000], 'numbers', ('1', '5000')),
        ([EPOCH, 1, 2], 'numbers', ('1', '1577836800')),
        (['2020-01-05', '2020-01-01T05:00:00'], 'days and times', ('2020-01-01', '2020-01-05')),
        (['2020-01-01T05:00:00', '2020-01-05'], 'days and times', ('2020-01-01', '2020-01-05')),
        (['2020-01-05', '2020-01-01'], 'days', ('2020-01-01', '2020-01-05')),
        ([date(1999, 12, 31)], 'days', ('1999-12-31', '1999-12-31')),
        ([20240102, 20240101], 'numbers', ('20240101', '20240102')),
        ([2.5, 0.5], 'numbers', ('0.5', '2.5')),
    ],
)
def test_the_unit_and_the_span_are_known(values, unit, span):
    assert read(values)[1:3] == (unit, span)


MIXED = {
    'seconds and milliseconds': ([EPOCH, EPOCH + 1, 1000 * EPOCH], None, 'line 4', 1000 * EPOCH),
    'milliseconds and seconds': ([1000 * EPOCH, EPOCH, 1000 * EPOCH], None, 'line 3', EPOCH),
    'two units as text': ([f'{EPOCH}', f'{NS}'], None, 'line 3', NS),
    'floats of two units': ([EPOCH + 0.5, EPOCH * 1e3], None, 'line 3', EPOCH * 1e3),
    'seconds and zero': ([EPOCH, 0, EPOCH], None, 'line 3', 0),
    'seconds and -1': ([EPOCH, EPOCH, -1], None, 'line 4', -1),
    'seconds and a day': ([EPOCH, 20200101], None, 'line 3', 20200101),
    'a date and a number': (['2020-01-03', '1577836800000'], None, 'line 3', "'1577836800000'"),
    'a date and eight digits': (['2020-01-03', '20200104'], None, 'line 3', "'20200104'"),
    'a number and a date': (['1577836800', '2020-01-03'], None, 'line 3', "'2020-01-03'"),
    'a zone and none': (
        ['2020-01-01T00:00:00Z', '2020-01-02T00:00:00+01:00', '2020-01-03T00:00:00'],
        *(None, 'line 4', "'2020-01-03T00:00:00'"),
    ),
    'none and a zone': (
        ['2020-01-01 00:00:00', '2020-01-02 00:00:00', '2020-01-03 00:00:00.5+01:00'],
        *(None, 'line 4', "'2020-01-03 00:00:00.5+01:00'"),
    ),
    'a day among zones': (
        ['2020-01-01T00:00:00 UTC', '2020-01-02', '2020-01-03T00Z'],
        *(None, 'line 3', "'2020-01-02'"),
    ),
    'a year too early': (['2020-01-03', '1512-01-01'], None, 'line 3', "'1512-01-01'"),
    'a year too late': ([date(2020, 1, 1), date(9999, 12, 31)], None, 'line 3', 'datetime.date'),
    'year 0001': (['0001-01-01T00:00:00', '2020-01-03'], None, 'line 2', "'0001-01-01T00"),
    'lost digits': ([1.0, float(NS)], None, 'line 3', '1.5778368e+18'),
    'lost digits of 32 bits': ([float(EPOCH), 2.0], pl.Float32, 'line 2', '1577836800.0'),
    'digits and an exponent': ([f'{NS}', '1.5e18', '1.5'], None, 'line 3', "'1.5e18'"),
    'more than 63 bits': ([1, 2**63], pl.UInt64, 'line 3', 2**63),
    'a comma': (['3.5', '3,5'], None, 'line 3', "'3,5'"),
    'dd/mm': (['31/12/2020', '30/12/2020'], None, 'line 2', "'31/12/2020'"),
    'infinity': ([1.0, float('inf')], None, 'line 3', 'inf'),
    'nothing': (['2020-01-03', ' '], None, 'line 3', ''),
    'nothing at first': ([None, '2020-01-03'], None, 'line 2', ''),
    'no number': ([3, None], None, 'line 3', ''),
    'no decimal': ([Decimal('3.5'), None], None, 'line 3', ''),
    'a leap second': (['2020-01-03 00:00:00', '2016-12-31 23:59:60'], None, 'line 3', "'2016"),
    'no such day': (['2020-02-28', '2020-02-30'], None, 'line 3', "'2020-02-30'"),
    'digits of other alphabets': (['2020-01-03', '2020-01-0٣'], None, 'line 3', "'2020-01-0"),
}  # fmt: skip


@pytest.mark.parametrize('case', MIXED)
def test_a_time_unlike_the_others_is_refused_with_its_line(case):
    values, dtype, line, value = MIXED[case]
    message = refusal(values, dtype)
    assert message.startswith(f"log, {line}: 'when' is {value}"), message


@pytest.mark.parametrize('dtype', [pl.Time, pl.Duration])
def test_times_of_the_day_and_durations_are_refused(dtype):
    assert 'a time needs a date; choose another column' in refusal([1, 2], dtype)


ZONE = st.integers(-1439, 1439).map(lambda m: timezone(timedelta(minutes=m)))


def moments(zones, endings):
    """Moments, each with its separator, precision and ending, in one list with or without zones."""
    moment = st.datetimes(datetime(1901, 1, 1), datetime(2099, 1, 1), timezones=zones)
    separator, precision = st.sampled_from(['T', ' ']), st.sampled_from(['auto', 'seconds'])
    case = st.tuples(moment, separator, precision, st.sampled_from(endings))
    return st.lists(case, min_size=1)


@hypothesis.given(moments(st.none() | ZONE, ['Z', ' UTC']) | moments(st.none(), ['', 'day']))
@hypothesis.settings(deadline=None, max_examples=200)
def test_iso_dates_are_those_of_python(cases):
    texts, expected = [], []
    for moment, separator, precision, ending in cases:
        text = moment.isoformat(separator, precision)
        text = text[:10] if ending == 'day' else text + ('' if moment.tzinfo else ending)
        texts.append(text)
        parsed = datetime.fromisoformat(text.removesuffix(' UTC'))
        parsed = parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)
        expected.append((parsed - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1))
    assert read(texts).values.tolist() == expected


@pytest.mark.parametrize('zone', ['', 'Z', ' UTC', '+00:00'])
def test_digits_after_the_point_are_decimals_of_a_second(zone):
    digits = ['5', '25', '125', '0625', '03125', '000001']
    seconds = [0.5, 0.25, 0.125, 0.0625, 0.03125, 1e-6]
    times = read([f'2020-01-01T00:00:00.{fraction}{zone}' for fraction in digits])
    assert times.values.tolist() == [round((EPOCH + second) * 10**6) for second in seconds]


@hypothesis.given(st.text('0123456789-T: .+Z', max_size=30) | st.datetimes().map(str))
@hypothesis.settings(deadline=None, max_examples=300)
def test_a_text_is_a_date_where_python_says_so(text):
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        moment = None
    if moment and 1901 < moment.year < 2099 and text.strip()[4:5] == '-':
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        since = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
        assert read(['2020-01-03', text]).values[1] == since
    else:
        refusal(['2020-01-03', text])


@hypothesis.given(
    st.lists(st.decimals(-(10**12), 10**12, places=6) | st.integers(-(2**62), 2**62), min_size=1)
)
@hypothesis.settings(deadline=None, max_examples=200)
def test_texts_of_numbers_keep_their_order(values):
    texts = [f'{value:f}' if isinstance(value, Decimal) else str(value) for value in values]
    numbers = read_numbers(TABLE, 'when', pl.Series(texts), 'a number')
    assert ranks(numbers.rank('dense').to_numpy()) == ranks(np.array(values, object))


def test_ratings_are_exact():
    for values in ([Decimal('3.5'), Decimal('3.9')], ['3.5', '3.90'], [3.5, 3.9]):
        numbers = read_numbers(TABLE, 'stars', pl.Series(values), 'a number').cast(pl.Float64)
        assert numbers.to_list() == [3.5, 3.9]
    with pytest.raises(UserError, match="line 3: 'stars' is '3,5', not a number"):
        read_numbers(TABLE, 'stars', pl.Series(['3', '3,5']), 'a number')
