"""Ids of a log to codes."""

import itertools
from collections.abc import Iterable

import numpy as np
import polars as pl

from fame_jax.data.tables import Table
from fame_jax.data.values import blame, check_type

# A column of texts such as 12.0 and 7 contains whole numbers.
WHOLE = r'^-?(?:0|[1-9]\d*)(?:\.0+)?$'
TABLE = 4  # a range of at most this many integers per record is numbered by a table


def encode_ids(
    table: Table, name: str, values: pl.Series | Iterable[pl.Series]
) -> tuple[np.ndarray, list[str], str]:
    """Numbers the ids of a column: integers in ascending order, texts by first appearance.

    Blanks around an id are no part of it. 12.0 is 12 where the whole column is whole numbers.

    Args:
      table: of the column, for messages.
      name: of the column.
      values: the column, whole or in parts one after the other. Of texts in parts, memory holds one
        part, the distinct ids and the codes.

    Returns:
      The code of each record, int32 [A], the ids as text, and their kind: 'int' for a column of
      numbers that are all whole, else 'str'.

    Raises:
      UserError: if an id is missing or empty.
    """
    parts = iter([values] if isinstance(values, pl.Series) else values)
    first = next(parts, pl.Series(dtype=pl.String))
    check_type(table, name, first)
    if first.dtype.is_numeric():
        whole = _to_integers(pl.concat([first, *parts]) if values is not first else first)
        if whole.null_count():
            blame(table, int(whole.is_null().arg_max()), name, None, 'an id')
        if whole.dtype.is_integer():
            codes, distinct = _encode_integers(whole)
            return codes, distinct.cast(pl.String).to_list(), 'int'
        first, parts = whole, iter(())
    codes, ids = _encode_texts(first, parts)
    clean = _clean(ids)
    if (clean == '').any():
        empty = np.isin(codes, np.flatnonzero((clean == '').to_numpy()))
        blame(table, int(empty.argmax()), name, None, 'an id')
    if not (clean == ids).all():
        ids = clean.unique(maintain_order=True)
        codes = clean.cast(pl.Enum(ids)).to_physical().to_numpy().astype(np.int32)[codes]
    return codes, ids.to_list(), 'str'


def _to_integers(series: pl.Series) -> pl.Series:
    """Returns numbers as integers if all are whole, else unchanged; NaN is a missing value."""
    if series.dtype.is_integer():
        return series
    if series.dtype.is_float():
        # Tools without missing integers turn a column of integers into floats.
        series = series.fill_nan(None)
    integers = series.cast(pl.Int64, strict=False)
    same = integers.cast(series.dtype) == series
    return integers if same.all() and integers.null_count() == series.null_count() else series


def _encode_integers(series: pl.Series) -> tuple[np.ndarray, pl.Series]:
    """Returns the rank of each integer among the distinct ones, int32, and these, ascending."""
    if not len(series):
        return np.zeros(0, np.int32), series
    low, high = int(series.min()), int(series.max())
    if high - low >= TABLE * len(series):
        return (series.rank('dense') - 1).to_numpy().astype(np.int32), series.unique().sort()
    wide = series if series.dtype == pl.UInt64 else series.cast(pl.Int64)
    place = (wide - low).to_numpy().astype(np.int64)
    present = np.zeros(high - low + 1, bool)
    present[place] = True
    codes = (np.cumsum(present, dtype=np.int32) - 1)[place]
    return codes, pl.Series(np.flatnonzero(present)).cast(wide.dtype) + low


def _encode_texts(first: pl.Series, parts: Iterable[pl.Series]) -> tuple[np.ndarray, pl.Series]:
    """Returns the code of each record by first appearance, int32, and the texts; null is ''."""
    kind = pl.Categorical(pl.Categories.random())
    codes = []
    for part in itertools.chain([first], parts):
        coded = part.cast(pl.String).fill_null('').cast(kind)
        codes.append(coded.to_physical().to_numpy().astype(np.int32))
    return np.concatenate(codes), coded.dtype.categories.to_series()


def _clean(ids: pl.Series) -> pl.Series:
    clean = ids.str.strip_chars()
    if clean.str.contains('.', literal=True).any() and clean.str.contains(WHOLE).all():
        clean = clean.str.replace(r'\.0+$', '')
    return clean
