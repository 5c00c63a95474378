"""Files to logs: which column is what, tokens to numbers, texts to times."""

import itertools
import math
import os
import re
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
import polars as pl

from fame_jax.data.sources import Source, fail, open_source, read_text, show
from fame_jax.data.tables import Table, open_table
from fame_jax.errors import UserError

# Well-known names, lower case, the likeliest first.
GUESSES = {
    'user': 'user_id userid user uid reviewerid reviewer_id customer_id customerid visitorid '
    'visitor_id session_id sessionid',
    'item': 'item_id itemid item iid parent_asin asin movieid movie_id product_id productid '
    'business_id book_id track_id article_id',
    'time': 'timestamp time unixreviewtime unix_time datetime date ts event_time created_at',
    'rating': 'rating overall stars score ratings',
}


class Log(NamedTuple):
    """Actions in file order.

    Fields:
      users, items: int64 [A], numbers into user_ids and item_ids, by first appearance.
      user_ids, item_ids: outside ids.
      times: int64 or float64 [A], in any unit, or None where the file's order is the order.
      ratings: float64 [A] or None.
      card: file, SHA-256, reader and columns.
    """

    users: np.ndarray
    items: np.ndarray
    user_ids: list[str]
    item_ids: list[str]
    times: np.ndarray | None
    ratings: np.ndarray | None
    card: dict


def read_log(path: str | os.PathLike, wanted: dict[str, str], rated: bool = False) -> Log:
    """Reads a sequence file (.txt) or a log with columns (any other known kind).

    Args:
      path: the file; .gz and .zip are unpacked.
      wanted: column names for 'user', 'item', 'time' and 'rating'; '' means guess.
      rated: whether ratings are needed.

    Raises:
      UserError: on whatever is wrong with the file, with its name and line.
    """
    source = open_source(path)
    card = {'source': source.name, 'sha256': source.sha256, 'reader': source.kind}
    if source.kind == 'txt':
        if rated or any(wanted.values()):
            what = 'a sequence file (.txt) has no columns and no ratings; drop those options'
            raise UserError(f'{source.place}: {what}, or name the log .csv or .tsv')
        return _read_sequences(source, card | {'reader': 'sequences', 'order': 'as in the file'})
    return _read_table(source, wanted, rated, card)


def _read_sequences(source: Source, card: dict) -> Log:
    """`user item item ...`, blank separated, oldest first."""
    lines: dict[bytes, int] = {}
    histories = []
    for number, line in enumerate(read_text(source).split(b'\n'), start=1):
        user, *items = line.split() or [b'']
        if not user:
            continue
        if not items:
            hint = '; name a log with columns .csv or .tsv' if b',' in user else '; delete the line'
            fail(source, number, f'user {show(user.decode())} has no items{hint}')
        if user in lines:
            what = f'user {show(user.decode())} is on line {lines[user]} already'
            fail(source, number, f'{what}; one line a user (name a log with columns .csv or .tsv)')
        lines[user] = number
        histories.append(items)
    numbers: dict[bytes, int] = {}
    flat = itertools.chain.from_iterable(histories)
    items = np.array([numbers.setdefault(item, len(numbers)) for item in flat], np.int64)
    users = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    user_ids, item_ids = ([token.decode() for token in tokens] for tokens in (lines, numbers))
    return Log(users, items, user_ids, item_ids, None, None, card)


def _read_table(source: Source, wanted: dict[str, str], rated: bool, card: dict) -> Log:
    table = open_table(source)
    columns = {}
    for role, name in wanted.items():
        needed = role in ('user', 'item') or (role == 'rating' and rated)
        if name or needed or role == 'time':
            columns[role] = _find_column(source, table, role, name, needed)
    columns = {role: name for role, name in columns.items() if name}
    series = dict(zip(columns, table.read(list(columns.values()))))
    if not len(series['user']):
        raise UserError(f'{source.place}: a header and no records')
    users, user_ids = _number(source, table, columns['user'], series['user'])
    items, item_ids = _number(source, table, columns['item'], series['item'])
    times, ratings = None, None
    if 'time' in columns:
        times = _to_times(source, table, columns['time'], series['time'])
    if 'rating' in columns:
        ratings = _to_numbers(source, table, columns['rating'], series['rating']).astype(float)
    order = (
        'by time, ties as in the file' if 'time' in columns else 'as in the file: no time column'
    )
    card = card | {'columns': columns, 'order': order}
    return Log(users, items, user_ids, item_ids, times, ratings, card)


def _find_column(source: Source, table: Table, role: str, name: str, needed: bool) -> str:
    """Returns the file's name of a column; RecBole's `user_id:token` answers to `user_id`."""
    plain = {}
    for column in table.columns:
        bare, _, kind = column.partition(':')
        plain.setdefault(bare.lower(), column)
        if kind.endswith('_seq') and source.kind == 'inter':
            what = f'column {show(column)} holds whole lists; one action a line is needed'
            fail(source, 1, what)
    for guess in (name,) if name else GUESSES[role].split():
        found = guess if guess in table.columns else plain.get(guess.lower())
        if found:
            return found
    if not name and not needed:
        return ''
    what = f'no column {show(name)}' if name else f'no column looks like the {role}'
    found = ', '.join(show(column) for column in table.columns[:20])
    raise UserError(f'{source.place}, line 1: {what}; found {found}; set --{role}_column')


def _number(source: Source, table: Table, name: str, series: pl.Series) -> tuple[np.ndarray, list]:
    """Returns each record's number by first appearance, int64 [A], and the tokens."""
    _check_flat(source, name, series)
    if series.dtype.is_float():
        # A column of whole numbers turns to floats where a tool knows no missing integers.
        series = series.fill_nan(None)
        whole = series.cast(pl.Int64, strict=False)
        series = whole if (whole.cast(pl.Float64) == series.cast(pl.Float64)).all() else series
    tokens = series.cast(pl.String).str.strip_chars()
    empty = tokens.is_null() | (tokens == '').fill_null(False)
    if empty.any():
        _blame(source, table, int(empty.arg_max()), name, None, 'an id')
    ids = tokens.unique(maintain_order=True)
    codes = tokens.cast(pl.Enum(ids)).to_physical()
    return codes.to_numpy().astype(np.int64), ids.to_list()


def _to_numbers(
    source: Source, table: Table, name: str, series: pl.Series, wanted: str = 'a number'
) -> np.ndarray:
    """Returns int64 [A] where all are integers, else float64 [A], all finite."""
    _check_flat(source, name, series)
    if series.dtype.is_numeric():
        texts = series
    else:
        texts = series.cast(pl.String, strict=False).str.strip_chars()
    integers = texts.cast(pl.Int64, strict=False) if not series.dtype.is_float() else None
    if integers is not None and not integers.null_count():
        return integers.to_numpy()
    numbers = texts.cast(pl.Float64, strict=False)
    wrong = ~numbers.is_finite().fill_null(False)
    if wrong.any():
        record = int(wrong.arg_max())
        _blame(source, table, record, name, series[record], wanted)
    return numbers.to_numpy()


def _to_times(source: Source, table: Table, name: str, series: pl.Series) -> np.ndarray:
    """Numbers stay as they are; dates become microseconds, int64 [A], UTC where none is told."""
    if series.dtype.is_temporal():
        if series.null_count():
            _blame(source, table, int(series.is_null().arg_max()), name, None, 'a time')
        return series.cast(pl.Datetime('us')).to_physical().to_numpy()
    if series.dtype != pl.String or not _looks_dated(series):
        wanted = 'a number (or in every record an ISO date)'
        return _to_numbers(source, table, name, series, wanted)
    distinct = series.unique(maintain_order=True)
    stamps = [_parse_date(text) for text in distinct]
    if None in stamps:
        text = distinct[stamps.index(None)]
        record = int(series.is_null().arg_max() if text is None else (series == text).arg_max())
        _blame(source, table, record, name, text, 'an ISO date')
    codes = series.cast(pl.Enum(distinct)).to_physical().to_numpy()
    return np.array(stamps, np.int64)[codes]


def _looks_dated(series: pl.Series) -> bool:
    """Whether the first value that is there is a date rather than a number."""
    first = next((text for text in series.head(1000) if text), '')
    return bool(re.match(r'\s*\d{4}-\d', first))


def _parse_date(text: str | None) -> int | None:
    """Returns microseconds since 1970 of an ISO date, or None."""
    try:
        date = datetime.fromisoformat((text or '').strip().removesuffix(' UTC'))
    except ValueError:
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    since = date - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _check_flat(source: Source, name: str, series: pl.Series) -> None:
    if series.dtype.is_nested() or series.dtype in (pl.Binary, pl.Boolean, pl.Object):
        what = f'column {show(name)} holds {series.dtype}, not text or numbers'
        raise UserError(f'{source.place}: {what}')


def _blame(
    source: Source, table: Table, record: int, name: str, value: object, wanted: str
) -> None:
    missing = value is None or value == '' or (isinstance(value, float) and math.isnan(value))
    what = f'{show(name)} is empty' if missing else f'{show(name)} is {show(value)}'
    place = f'{source.place}, {table.locate(record)}'
    raise UserError(f'{place}: {what}, where {wanted} belongs; mend it')
