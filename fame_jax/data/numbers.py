"""Columns of numbers, as numbers or as text."""

import polars as pl

from fame_jax.data.tables import Table
from fame_jax.data.values import blame, check_type

EXACT = 2**53  # above, float64 does not hold every whole number


def read_numbers(table: Table, name: str, series: pl.Series, wanted: str) -> pl.Series:
    """Returns a column as Int64, as Float64 or, where neither is exact, as Decimal.

    Raises:
      UserError: if a value is missing, not finite or not a number, or if it is known that digits
        were lost.
    """
    check_type(table, name, series)
    if series.dtype in (pl.Categorical, pl.Enum, pl.String):
        return _read_texts(table, name, series.cast(pl.String).str.strip_chars(), wanted)
    if series.null_count():
        blame(table, int(series.is_null().arg_max()), name, None, wanted)
    if series.dtype.is_decimal():
        return _to_whole(series)
    if series.dtype.is_float():
        # As it was written: 3.6 in 32 bits is 3.5999999 in 64.
        _check(table, name, series, series.is_finite(), wanted)
        # 32 bits hold 24 binary digits: seconds since 1970 become multiples of 128.
        limit = 2**24 if series.dtype != pl.Float64 else EXACT
        advice = f'a whole number (as {series.dtype} it has lost its last digits)'
        _check(table, name, series, series.abs() <= limit, advice)
        return (series if limit == EXACT else series.cast(pl.String)).cast(pl.Float64)
    whole = series.cast(pl.Int64, strict=False)
    _check(table, name, series, whole.is_not_null(), f'{wanted} of at most 63 bits')
    return whole


def _read_texts(table: Table, name: str, texts: pl.Series, wanted: str) -> pl.Series:
    whole = texts.cast(pl.Int64, strict=False)
    if not whole.null_count():
        return whole
    numbers = texts.cast(pl.Float64, strict=False)
    _check(table, name, texts, numbers.is_finite().fill_null(False), wanted)
    parts = texts.str.extract_groups(r'^[+-]?0*(\d*)(?:\.(\d*?)0*)?$').struct
    digits = parts.field('1').str.len_bytes() + parts.field('2').str.len_bytes().fill_null(0)
    if (digits.fill_null(0) <= 15).all() and (numbers.abs() < EXACT).all():
        return numbers
    scale = int(parts.field('2').str.len_bytes().max() or 0)
    plain = digits.is_not_null() & (parts.field('1').str.len_bytes() <= 38 - scale)
    advice = 'written in full, as other numbers have more than 15 digits'
    _check(table, name, texts, plain, advice)
    return _to_whole(texts.cast(pl.Decimal(38, scale)))


def _to_whole(decimals: pl.Series) -> pl.Series:
    """Returns decimals as Int64 if all are whole numbers of 63 bits, else unchanged."""
    whole = decimals.cast(pl.Int64, strict=False)
    exact = not whole.null_count() and (whole.cast(decimals.dtype) == decimals).all()
    return whole if exact else decimals


def _check(table: Table, name: str, series: pl.Series, good: pl.Series, wanted: str) -> None:
    if not good.all():
        record = int((~good).arg_max())
        blame(table, record, name, series[record], wanted)
