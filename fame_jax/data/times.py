"""Times of a log as numbers whose order is exact."""

import re
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import numpy as np
import polars as pl

from fame_jax.data.numbers import read_numbers
from fame_jax.data.sources import show
from fame_jax.data.tables import Table
from fame_jax.data.values import blame, check_type
from fame_jax.errors import UserError

MICROSECONDS = 10**6  # in a second
UNITS = {'seconds': 1, 'milliseconds': 10**3, 'microseconds': 10**6, 'nanoseconds': 10**9}
# Seconds since 1970.
EPOCH = (631_152_000, 2_082_758_400)  # 1990 to 2035: ranges that do not meet in any two units
LIMITS = (315_532_800, 4_133_980_800)  # 1980 to 2100: of a column that is mostly in EPOCH
YEARS = (-2_208_988_800, 4_133_980_800)  # 1900 to 2100: of dates
# The forms that polars parses; the others of ISO 8601 are parsed in Python.
ISO = (
    r'^\d{4}-\d\d-\d\d(?:[T ](?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?'
    r'(?:Z| UTC|[+-](?:[01]\d|2[0-3]):[0-5]\d)?)?$'
)
ZONE = r'[T ].*(?:Z|UTC|[+-]\d\d(?::?\d\d){0,2})$'


class Clock(NamedTuple):
    """How the values of `Times` are read as times.

    Fields:
      scale: values in a second; 0 where the unit is not known.
      numbers: float64, the number of each value, where the values are ranks from 1; else None.
    """

    scale: int = 0
    numbers: np.ndarray | None = None

    def read(self, values: np.ndarray) -> np.ndarray:
        """Returns microseconds since 1970, int64; the plain numbers where the unit is not known.

        Their order is that of the values, but values in one microsecond become equal.
        """
        values = values if self.numbers is None else self.numbers[values]
        if not self.scale:
            return values.astype(np.float64 if values.dtype.kind == 'f' else np.int64)
        if values.dtype.kind == 'f':
            return np.round(values * (MICROSECONDS / self.scale)).astype(np.int64)
        values = values.astype(np.int64)
        if self.scale > MICROSECONDS:
            return values // (self.scale // MICROSECONDS)
        return values * (MICROSECONDS // self.scale)


class Times(NamedTuple):
    """Times of all records.

    Fields:
      values: int64 or float64 [A]; their order is the order in time.
      unit: 'days', 'days and times', one of UNITS, or 'numbers'.
      span: the first and the last time as text.
      clock: reads the values as times.
    """

    values: np.ndarray
    unit: str
    span: tuple[str, str]
    clock: Clock = Clock()


def read_times(table: Table, name: str, series: pl.Series) -> Times:
    """Reads numbers in any one unit, dates, and ISO text (in UTC where it has no zone).

    Raises:
      UserError: if a value is missing or neither a number nor a date, if units are mixed, if some
        times have a zone and others none, or if a date is not of the years 1900 to 2100.
    """
    if series.dtype in (pl.Time, pl.Duration):
        what = f'column {show(name)} contains {series.dtype}; a time needs a date'
        raise UserError(f'{table.place}: {what}; choose another column')
    check_type(table, name, series)
    if series.dtype in (pl.Categorical, pl.Enum):
        series = series.cast(pl.String)
    if series.dtype.is_temporal():
        if series.null_count():
            blame(table, int(series.is_null().arg_max()), name, None, 'a time')
        fine = series.dtype == pl.Datetime and series.dtype.time_unit == 'ns'
        dates = series.cast(pl.Datetime('ns' if fine else 'us')).to_physical()
        return _check_dates(table, name, series, dates, 'nanoseconds' if fine else 'microseconds')
    if series.dtype == pl.String and _looks_dated(series):
        return _check_dates(table, name, series, _parse_dates(table, name, series), 'microseconds')
    numbers = read_numbers(table, name, series, 'a number (or an ISO date in every record)')
    if not numbers.dtype.is_decimal():
        values = numbers.to_numpy()
        unit, span = _find_unit(table, name, values)
        return Times(values, unit, span, Clock(UNITS.get(unit, 0)))
    floats = numbers.cast(pl.Float64).to_numpy()
    unit, span = _find_unit(table, name, floats)
    ranks = numbers.rank('dense').cast(pl.Int64).to_numpy()
    of_rank = np.zeros(int(ranks.max(initial=0)) + 1)
    of_rank[ranks] = floats
    return Times(ranks, unit, span, Clock(UNITS.get(unit, 0), of_rank))


def is_iso(texts: pl.Series) -> pl.Series:
    """Whether each text is an ISO date in one of the usual forms."""
    return texts.str.contains(ISO)


def _looks_dated(series: pl.Series) -> bool:
    """Whether the first value that is not empty begins like a date."""
    first = next((text for text in series.head(1000) if text and text.strip()), '')
    return bool(re.match(r'\s*\d{4}-\d', first))


def _parse_dates(table: Table, name: str, series: pl.Series) -> pl.Series:
    """Returns the microseconds since 1970 of ISO dates, Int64."""
    texts = series.str.strip_chars()
    usual = is_iso(texts).fill_null(False)
    moments = _parse_heads(texts.str.head(19), usual)
    times = moments.to_physical()
    if not usual.all():
        times = times.set(~usual, None)
    has_tails = (texts.str.len_bytes() > 19).any()
    if has_tails:
        times = times + _parse_tails(texts.str.slice(19))
    rest = np.flatnonzero(times.is_null().to_numpy())
    if len(rest):
        parsed = {text: _parse_date(text) for text in texts.gather(rest).unique().to_list()}
        if None in parsed.values():
            record = next(int(n) for n in rest if parsed[texts[int(n)]] is None)
            blame(table, record, name, series[record], 'an ISO date')
        found = [parsed[text] for text in texts.gather(rest).to_list()]
        times = times.scatter(rest, found)
    if has_tails or len(rest):
        _refuse_some_zones(table, name, texts)
    return times


def _refuse_some_zones(table: Table, name: str, texts: pl.Series) -> None:
    """Raises UserError where some times have a zone and others none: theirs is not known."""
    zoned = texts.str.contains(ZONE)
    if zoned.any() and not zoned.all():
        is_rare = 2 * zoned.sum() <= len(zoned)
        record = int((zoned if is_rare else ~zoned).arg_max())
        wanted = f'a time {"without" if is_rare else "with"} a zone as most of the others are'
        blame(table, record, name, texts[record], wanted)


def _parse_heads(heads: pl.Series, usual: pl.Series) -> pl.Series:
    """Returns dates, or dates and times up to the second, as Datetime; null where it is neither.

    One form at a time, and the form of the first record first: almost always all have it.
    """
    first = heads[int(usual.arg_max())] or ''
    forms = ['%Y-%m-%d', '%Y-%m-%dT%H:%M:%S', '%Y-%m-%d %H:%M:%S']
    forms.sort(key=lambda form: form[8:9] != first[10:11])
    moments = pl.repeat(None, len(heads), dtype=pl.Datetime('us'), eager=True)
    for form in forms:
        if (moments.is_null() & usual).any():
            if form == '%Y-%m-%d':
                parsed = heads.str.to_date(form, strict=False).cast(pl.Datetime('us'))
            else:
                parsed = heads.str.to_datetime(form, strict=False, time_unit='us', cache=False)
            moments = parsed if moments.null_count() == len(heads) else moments.fill_null(parsed)
    return moments


def _parse_tails(tails: pl.Series) -> pl.Series:
    """Returns the microseconds of fractions and zones: 500000 of '.5', -3600e6 of '+01:00'."""
    if tails.is_in(['', 'Z', ' UTC']).all():
        return pl.zeros(len(tails), dtype=pl.Int64, eager=True)
    if not tails.str.contains('[+-]').any():
        return _parse_fractions(tails.str.strip_chars('.ZUTC '))
    parts = tails.str.extract_groups(r'^(?:\.(\d+))?(?:([+-])(\d\d):(\d\d))?').struct
    minutes = parts.field('3').cast(pl.Int64) * 60 + parts.field('4').cast(pl.Int64)
    sign = (parts.field('2') == '-').cast(pl.Int64) * 2 - 1
    return _parse_fractions(parts.field('1')) + (sign * minutes * 60_000_000).fill_null(0)


def _parse_fractions(digits: pl.Series) -> pl.Series:
    return digits.str.pad_end(6, '0').cast(pl.Int64, strict=False).fill_null(0)


def _parse_date(text: str | None) -> int | None:
    """Returns the microseconds since 1970 of an ISO date, or None if it is not one."""
    text = (text or '').strip().removesuffix(' UTC')
    # fromisoformat reads a number of 13 digits as a date of the year 1577.
    if not re.match(r'\d{4}-', text):
        return None
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return (date - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def _check_dates(table: Table, name: str, series: pl.Series, dates: pl.Series, unit: str) -> Times:
    values, scale = dates.to_numpy(), UNITS[unit]
    if len(values):
        _check_range(table, name, series, values, YEARS, scale, 'a date of 1900 to 2100')
    text = series.dtype == pl.String
    days = series.dtype == pl.Date or (text and series.str.len_bytes().max() == len('2020-01-01'))
    unit = 'days' if days else 'days and times'
    return Times(values, unit, _show_span(values, scale), Clock(scale))


def _check_range(
    table: Table,
    name: str,
    shown: pl.Series | np.ndarray,
    values: np.ndarray,
    limits: tuple[int, int],
    scale: int,
    wanted: str,
) -> None:
    low, high = (limit * scale for limit in limits)
    if values.min() < low or values.max() >= high:
        record = int(np.argmax((values < low) | (values >= high)))
        value = shown[record]
        blame(table, record, name, getattr(value, 'item', lambda: value)(), wanted)


def _find_unit(table: Table, name: str, values: np.ndarray) -> tuple[str, tuple[str, str]]:
    """Returns the unit of numbers and the first and last time.

    Raises:
      UserError: if half of the values or more are times since 1970 in one unit, and one is not.
    """
    if not len(values):
        return 'numbers', ('', '')
    low, high = values.min(), values.max()
    counts = {'numbers': 0}
    for unit, scale in UNITS.items():
        start, end = EPOCH[0] * scale, EPOCH[1] * scale
        if start <= low and high < end:
            return unit, _show_span(values, scale)
        if high >= start:  # false for small numbers, which need no count then
            counts[unit] = int(np.count_nonzero((values >= start) & (values < end)))
    if sum(counts.values()) * 2 < len(values):
        return 'numbers', (str(low), str(high))
    unit = max(counts, key=counts.get)
    wanted = f'a time in {unit} of 1980 to 2100 as most of the others are'
    _check_range(table, name, values, values, LIMITS, UNITS[unit], wanted)
    return unit, _show_span(values, UNITS[unit])


def _show_span(values: np.ndarray, scale: int) -> tuple[str, str]:
    """Returns the first and the last day of times since 1970."""
    if not len(values):
        return '', ''
    start = datetime(1970, 1, 1, tzinfo=UTC)
    first, last = (
        start + timedelta(seconds=float(value) / scale) for value in (values.min(), values.max())
    )
    return f'{first:%Y-%m-%d}', f'{last:%Y-%m-%d}'
