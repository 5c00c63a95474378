"""Checks of a column's type, and the error that names a faulty value and its record."""

import math
from typing import NoReturn

import polars as pl

from fame_jax.data.sources import show
from fame_jax.data.tables import Table
from fame_jax.errors import UserError


def check_type(table: Table, name: str, series: pl.Series) -> None:
    """Raises UserError if a column contains neither text nor numbers nor times."""
    if series.dtype.is_nested() or series.dtype in (pl.Binary, pl.Boolean, pl.Object):
        what = f'column {show(name)} contains {series.dtype}, not text or numbers'
        raise UserError(f'{table.place}: {what}; choose another column')


def blame(table: Table, record: int, name: str, value: object, wanted: str) -> NoReturn:
    """Raises a UserError that names the column, the value and the place of a record."""
    missing = value is None or value == '' or (isinstance(value, float) and math.isnan(value))
    what = f'{show(name)} is empty' if missing else f'{show(name)} is {show(value)}'
    place = f'{table.place}, {table.locate(record)}'
    if value is None and table.count_missing:
        count, total = table.count_missing(name)
        what += f' or missing, as in {count:,} of {total:,} objects'
        raise UserError(f'{place}: {what}; correct them or choose another column')
    raise UserError(f'{place}: {what}, not {wanted}; correct it')
