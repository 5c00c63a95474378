"""A frame in memory (pandas, polars, Arrow) to a Dataset."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import polars as pl

from fame_jax.data.build import build_dataset
from fame_jax.data.columns import choose_columns
from fame_jax.data.dataset import Dataset
from fame_jax.data.readers import Log, read_table
from fame_jax.data.sources import show
from fame_jax.data.tables import Table
from fame_jax.errors import UserError

PLACE = 'the frame'  # in messages, where a file would have its path
NUMERIC = 'iufb'  # numpy's kinds: integers, unsigned, floats, booleans


def from_frame(
    frame: Any,
    *,
    user: str | None,
    item: str | None,
    time: str | None,
    rating: str | None,
    k_core: int,
    min_rating: float,
    max_user_actions: int,
    duplicates: Literal['keep', 'drop'],
) -> Dataset:
    """Makes a Dataset of a frame with one action per row; see `Dataset.from_frame`."""
    columns = {'user': user, 'item': item, 'time': time, 'rating': rating}
    return build_dataset(
        read_frame(frame, columns, min_rating > 0),
        'frame',
        k_core=k_core,
        min_rating=min_rating,
        max_user_actions=max_user_actions,
        duplicates=duplicates,
    )


def read_frame(frame: Any, columns: Mapping[str, str | None], needs_rating: bool) -> Log:
    """Reads the actions of a frame; see `readers.read_log`."""
    table = open_frame(frame)
    choice = choose_columns(table, columns, needs_rating, PLACE)
    return read_table(table, choice, {'source': 'memory', 'reader': 'frame'}, 'frame')


def open_frame(frame: Any) -> Table:
    """Makes a Table of a frame; see `Dataset.from_frame`.

    Raises:
      UserError: if a column that is read mixes types.
      TypeError: if `frame` is not a frame.
    """
    names, read, cut = _open(frame)
    return Table(
        PLACE,
        names,
        read=lambda wanted: [read(cut(name, None)) for name in wanted],
        locate=lambda record: f'row {record} (the first is row 0)',
        sample=lambda wanted, number: [read(cut(name, number)) for name in wanted],
    )


def _open(
    frame: Any,
) -> tuple[list[str], Callable[[Any], pl.Series], Callable[[str, int | None], Any]]:
    """Returns the names of all columns, a reader of a column, and (name, rows) -> a column."""
    if hasattr(frame, 'iloc') and hasattr(frame, 'columns'):
        # Not by the Arrow interface, which pandas has only where pyarrow is installed.
        names = list(frame.columns)
        return names, _from_pandas, lambda name, rows: frame.iloc[:rows, names.index(name)]
    if isinstance(frame, pl.LazyFrame):
        frame = frame.collect()
    elif hasattr(frame, '__arrow_c_stream__') or hasattr(frame, '__arrow_c_array__'):
        try:
            frame = pl.DataFrame(frame)
        except pl.exceptions.DuplicateError as error:
            raise UserError(f'{PLACE}: {error}; rename one') from error
    if not isinstance(frame, pl.DataFrame):
        hint = '; Dataset.from_file reads a file' if isinstance(frame, str) else ''
        kind = type(frame).__name__
        raise TypeError(f'from_frame takes a pandas, polars or Arrow frame, not {kind}{hint}')
    return frame.columns, lambda column: column, lambda name, rows: frame[name][:rows]


def _from_pandas(column: Any) -> pl.Series:
    """Returns a column of a pandas frame as a series, missing values as null."""
    if getattr(column.dtype, 'tz', None) is not None:
        column = column.dt.tz_convert('UTC').dt.tz_localize(None)
    values = column.to_numpy()
    if values.dtype.kind == 'M':
        fine = values.dtype == 'datetime64[ns]'
        return pl.Series(values if fine else values.astype('datetime64[us]'))
    if values.dtype.kind in NUMERIC:
        return pl.Series(values)
    missing = column.isna().to_numpy()
    values = [None if absent else value for value, absent in zip(values.tolist(), missing)]
    try:
        return pl.Series(values)
    except (TypeError, ValueError, pl.exceptions.PolarsError):
        return _to_text(column.name, values)


def _to_text(name: str, values: list[Any]) -> pl.Series:
    """Returns a column of texts and numbers as text: ids such as 7 and 'a' in one column."""
    texts = []
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, str | int | float | None):
            what = f'{show(name)} is {show(value)}, not text or a number; correct it'
            raise UserError(f'{PLACE}, row {row} (the first is row 0): {what}')
        texts.append(None if value is None else str(value))
    try:
        return pl.Series(texts, dtype=pl.String)
    except ValueError as error:  # half of a UTF-16 pair
        raise UserError(f'{PLACE}: {show(name)} contains half a character; correct it') from error
