"""Histories from a data frame, and recommendations as a frame of the same library.

pandas, polars and pyarrow are not imported here: whoever has a frame has imported its library.
"""

import difflib
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from fame_jax.errors import UserError

LIBRARIES = ('pandas', 'polars', 'pyarrow')


def read(frame: Any, user: str, item: str, time: str | None) -> tuple[np.ndarray, list[list[Any]]]:
    """Groups the rows of a frame by user; see `Recommender.recommend_frame`.

    Returns:
      The first row of each user, int [U], increasing; and each user's items, the oldest first.

    Raises:
      UserError: if a column is missing or holds nulls.
      TypeError: for another kind of frame.
    """
    users = _values(_column(frame, user, 'user'))
    items = _values(_column(frame, item, 'item'))
    order = range(len(users))
    if time is not None:
        order = np.argsort(_times(frame, time), kind='stable').tolist()
    first_row: dict[Any, int] = {}
    for row, user_id in enumerate(users):
        first_row.setdefault(user_id, row)
    histories: dict[Any, list[Any]] = {user_id: [] for user_id in first_row}
    for row in order:
        histories[users[row]].append(items[row])
    return np.array(list(first_row.values()), int), list(histories.values())


def make(
    frame: Any,
    user: str,
    first_rows: np.ndarray,
    answers: Sequence[Any],
    id_type: str,
    has_titles: bool,
) -> Any:
    """A frame of the library of `frame`, one row for each recommended item.

    Its columns are user, rank, item, title (if `has_titles`), score, score_kind and count. A row
    has a score of the model, or the number of actions of one of the most popular items, and null
    for the other: the two are never in one column.

    Args:
      frame: the frame that was read.
      user: its column of user ids.
      first_rows: a row of each user, as `read` returns them.
      answers: a Recommendation for each user.
      id_type: 'str' or 'int', the type of the recommended ids.
      has_titles: whether the answers have titles.
    """
    lengths = [len(answer.items) for answer in answers]
    users = _take(_column(frame, user, 'user'), np.repeat(first_rows, lengths))
    columns = table(answers, has_titles)
    library = _library(frame)
    if library == 'polars':
        pl = sys.modules['polars']
        kinds = dict(title=pl.String, score=pl.Float32, score_kind=pl.String, count=pl.Int64)
        kinds |= {'rank': pl.Int32, 'item': pl.Int64 if id_type == 'int' else pl.String}
        made = {name: pl.Series(x, dtype=kinds[name]) for name, x in columns.items()}
        return pl.DataFrame({'user': users, **made})
    if library == 'pyarrow':
        pa = sys.modules['pyarrow']
        kinds = dict(title=pa.string(), score=pa.float32(), score_kind=pa.string())
        kinds |= {'item': pa.int64() if id_type == 'int' else pa.string()}
        kinds |= {'rank': pa.int32(), 'count': pa.int64()}
        made = {name: pa.array(x, kinds[name]) for name, x in columns.items()}
        return pa.table({'user': users, **made})
    pd = sys.modules['pandas']
    kinds = dict(title=object, score='float32', score_kind=object, count='Int64', rank='int32')
    kinds |= {'item': 'int64' if id_type == 'int' else object}
    made = {name: pd.Series(x, dtype=kinds[name]) for name, x in columns.items()}
    return pd.DataFrame({'user': users, **made})


def table(answers: Sequence[Any], has_titles: bool) -> dict[str, list[Any]]:
    """Recommendations as columns, a row for each item: rank, item, title, score, score_kind, count.

    Args:
      answers: a Recommendation for each history.
      has_titles: whether there is a column of titles.
    """
    rows = [
        (rank, item, title, *((None, kind, int(score)) if fallback else (score, kind, None)))
        for items, scores, _, fallback, kind, titles in answers
        for rank, (item, score, title) in enumerate(
            itertools.zip_longest(items, scores, titles, fillvalue=''), 1
        )
    ]
    names = ('rank', 'item', 'title', 'score', 'score_kind', 'count')
    columns = dict(zip(names, map(list, zip(*rows)))) if rows else {name: [] for name in names}
    return {name: x for name, x in columns.items() if has_titles or name != 'title'}


def _library(frame: Any) -> str:
    """The library of a frame: 'pandas', 'polars' or 'pyarrow'."""
    roots = [kind.__module__.partition('.')[0] for kind in type(frame).__mro__]
    library = next((root for root in roots if root in LIBRARIES), '')
    if not library or type(frame).__name__ == 'LazyFrame' or not hasattr(frame, 'columns'):
        raise TypeError(
            'a frame is a DataFrame of pandas or polars or a pyarrow.Table; got '
            f'{type(frame).__module__}.{type(frame).__qualname__}'
        )
    return library


def _column(frame: Any, name: str, argument: str) -> Any:
    """A column without nulls."""
    arrow = _library(frame) == 'pyarrow'
    names = list(frame.column_names if arrow else frame.columns)
    if name not in names:
        close = difflib.get_close_matches(str(name), map(str, names), 1)
        advice = (
            f'did you mean {close[0]!r}?' if close else f'there are {", ".join(map(str, names))}'
        )
        if argument == 'time':
            advice += '; time=None takes the rows in their order'
        raise UserError(f'{argument}={name!r}: there is no such column; {advice}')
    column = frame.column(name) if arrow else frame[name]
    nulls = column.isna().sum() if hasattr(column, 'isna') else column.null_count
    nulls = int(nulls() if callable(nulls) else nulls)
    if nulls:
        raise UserError(f'column {name!r} has {nulls:,} rows without a value; drop them first')
    return column


def _values(column: Any) -> list[Any]:
    return column.to_pylist() if hasattr(column, 'to_pylist') else list(column.to_list())


def _times(frame: Any, name: str) -> np.ndarray:
    """The times of the rows, as numpy sorts them."""
    time_A = np.asarray(_column(frame, name, 'time').to_numpy())
    if time_A.dtype.kind in 'fmM' and (time_A != time_A).any():
        raise UserError(f'column {name!r} has rows whose time is not a number; drop them first')
    return time_A


def _take(column: Any, rows: np.ndarray) -> Any:
    """The values of a column at these rows, with its dtype."""
    if hasattr(column, 'iloc'):
        return column.iloc[rows].reset_index(drop=True)
    return column.take(rows) if hasattr(column, 'take') else column.gather(rows)
