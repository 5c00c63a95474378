"""Columns of a log: which one is the user, the item, the time and the rating."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import polars as pl

from fame_jax.data import names
from fame_jax.data.sources import show, suggest
from fame_jax.data.tables import Table
from fame_jax.data.times import EPOCH, UNITS, is_iso, read_times
from fame_jax.errors import UserError

ROLES = ('user', 'item', 'time', 'rating')
FILE_ORDER = '-'  # --columns=time:- takes the order of the file, whatever the columns
SAMPLE = 10_000  # records by which an unused column is seen to contain times
# Dates that are not read: dd/mm/yyyy and the like, `Tue Apr 03 18:00:09 +0000 2012`, `09 13, 2009`,
# `Sep 13, 2009`, `13-Sep-2009`, `13/Sep/2009:18:00:09`, `20090913T18`, `2009-09`, `2009-W37`.
MONTHS = 'jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec'
DATES = (
    r'^\d{1,4}([-/.])\d{1,2}[-/.]\d{2,4}([T ,]|$)'
    r'|^(?i:mon|tue|wed|thu|fri|sat|sun)[a-z]*,? .*\d{4}'
    rf'|^\d\d? \d\d?, \d{{4}}$|^(?i:{MONTHS})[a-z]* \d.*\d{{4}}'
    rf'|^\d\d?[-/. ]+(?i:{MONTHS})[a-z]*[-/., ]+\d{{2,4}}'
    r'|^(?:19|20)\d{6}T\d|^(?:19|20)\d\d-(?:0[1-9]|1[0-2]|W\d\d)$'
)


class Choice(NamedTuple):
    """The columns of a log.

    Fields:
      columns: names by role, of those that are read.
      guessed: the roles whose column was recognised and not named.
      unused: names of the other columns.
      file_order: whether `time:-` was given: the order of the file is the order in time.
    """

    columns: dict[str, str]
    guessed: list[str]
    unused: list[str]
    file_order: bool


def choose_columns(
    table: Table, given: Mapping[str, str | None], needs_rating: bool, place: str
) -> Choice:
    """Chooses a column for each role: the given one, else a recognised one.

    Args:
      table: the log.
      given: names by role; a missing one, None or '' is recognised; '-' as the time is the order
        of the file.
      needs_rating: whether a log without ratings is an error.
      place: the file or its first line, for messages.

    Raises:
      UserError: if a column is missing, occurs twice, is one of several for a role, or if a column
        that looks like a time would not be used.
    """
    chosen: dict[str, str] = {}
    for role in ROLES:
        name = given.get(role)
        if name not in (None, '') and not (role == 'time' and name == FILE_ORDER):
            chosen[role] = find_column(table, role, name, place)
            _refuse_shared(chosen, role, place)
    guessed = [role for role in ('user', 'item') if role not in chosen]
    # Ratings are read on demand only, so that a faulty rating cannot stop a run without them.
    guessed += ['rating'] if needs_rating and 'rating' not in chosen else []
    for role in guessed:
        chosen[role] = _guess(table, role, chosen, place)
    file_order = given.get('time') == FILE_ORDER
    if 'time' not in chosen and not file_order:
        time = _guess_time(table, chosen, place)
        if time is not None:
            chosen['time'] = time
            guessed.append('time')
    columns = {role: chosen[role] for role in ROLES if role in chosen}
    for name in columns.values():
        if table.columns.count(name) > 1:
            places = [str(n) for n, other in enumerate(table.columns, 1) if other == name]
            what = f'columns {" and ".join(places)} are both named {show(name)}'
            raise UserError(f'{place}: {what}; rename one')
    unused = [str(name) for name in table.columns if name not in columns.values()]
    return Choice(columns, [role for role in columns if role in guessed], unused, file_order)


def find_column(table: Table, role: str, name: str, place: str) -> str:
    """Returns the column of a given name, without regard to case, signs and RecBole's types.

    Raises:
      UserError: if there is none, or more than one fits as well.
    """
    if name in table.columns:
        return name
    found = [other for other in table.columns if str(other).partition(':')[0] == str(name)]
    wanted = names.join_words(name)
    found = found or [other for other in table.columns if names.join_words(other) == wanted != '']
    if len(set(found)) > 1:
        raise _two(place, found, role)
    if found:
        return found[0]
    if not table.has_header:
        what = f'{show(name)} is not one of the {len(table.columns)} columns'
        raise UserError(f'{place}: {what} of a file without a header; give positions from 1')
    what = f'there is no column {show(name)} ({_option(role)})'
    raise UserError(f'{place}: {what}; {suggest(str(name), table.columns)}')


def _refuse_shared(chosen: dict[str, str], role: str, place: str) -> None:
    for other, name in chosen.items():
        if other != role and name == chosen[role]:
            what = f'column {show(name)} cannot be both {other} and {role}'
            raise UserError(f'{place}: {what}; name another ({_option(role)})')


def _option(role: str, name: str = 'NAME') -> str:
    return f'--columns={role}:{name}, or {role}={name!r} in Python'


def _two(place: str, found: list[str], role: str) -> UserError:
    shown = ' and '.join(map(show, found[:4]))
    what = f'{shown} may be the {role}; name one: {_option(role, found[0])}'
    order = ', or time:- for the order of the file' if role == 'time' else ''
    return UserError(f'{place}: {what}{order}')


def _guess(table: Table, role: str, chosen: Mapping[str, str], place: str) -> str:
    """Returns the column whose name fits a role best; see names.NOUNS.

    Names of things (`item_name`) come after all others. Columns with different nouns of one rank,
    or with one noun in one form, are equally likely.
    """
    fits = [
        (fit, name)
        for name in dict.fromkeys(table.columns)
        if name not in chosen.values() and (fit := names.fit(role, name))
    ]
    if not fits:
        what = f'no column looks like the {role} ({_option(role)})'
        data = place.endswith('line 1') and role == 'user'
        hint = '; if line 1 is data, give positions: --columns=user:1,item:2' if data else ''
        raise UserError(f'{place}: {what}; {suggest("", table.columns)}{hint}')
    best = min((fit.form == 2, fit.rank) for fit, _ in fits)
    fits = [(fit, name) for fit, name in fits if (fit.form == 2, fit.rank) == best]
    if len({fit.noun for fit, _ in fits}) == 1:
        form = min(fit.form for fit, _ in fits)
        fits = [(fit, name) for fit, name in fits if fit.form == form]
    if len(fits) > 1:
        raise _two(place, [name for _, name in fits], role)
    return fits[0][1]


def _guess_time(table: Table, chosen: Mapping[str, str], place: str) -> str | None:
    """Returns the column of the times, or None if no column looks like one.

    Raises:
      UserError: if more than one may be, or the only one may be something else.
    """
    others = [name for name in dict.fromkeys(table.columns) if name not in chosen.values()]
    says = {name: names.time_name(name) for name in others}
    certain = [name for name in others if names.join_words(name) in names.CERTAIN]
    if len(certain) == 1 and looks_timed(_sample(table, certain)[0]) in ('dates', 'epochs'):
        return certain[0]
    holds = dict(zip(others, map(looks_timed, _sample(table, others))))
    good, doubtful = [], []
    for name in others:
        timed = holds[name] in ('dates', 'epochs')
        if says[name] == 'time' or (timed and says[name] in ('maybe', 'dated')):
            good.append(name)
        elif (
            holds[name] == 'dates'
            or (holds[name] in ('epochs', 'foreign') and says[name] != 'never')
            or (holds[name] == 'numbers' and says[name] == 'maybe')
        ):
            doubtful.append(name)
    if good:
        # `birth_date` is no rival of a column that contains times.
        rivals = [name for name in doubtful if says[name] != 'other']
        if len(good) + len(rivals) == 1:
            return good[0]
        timed = all(holds[name] in ('dates', 'epochs') for name in good + rivals)
        finest = _find_finest(table, good + rivals) if timed else None
        if finest is None:
            raise _two(place, good + rivals, 'time')
        return finest
    if len(doubtful) > 1:
        raise _two(place, doubtful, 'time')
    if doubtful:
        what = f'column {show(doubtful[0])} looks like a time, and no column is named as one'
        option = _option('time', doubtful[0])
        raise UserError(f'{place}: {what}; name it: {option}, or time:- for the order of the file')
    return None


def _sample(table: Table, wanted: list[str]) -> list[pl.Series]:
    """Returns the first records of columns; none of a column that cannot be read."""

    def read(names: list[str]) -> list[pl.Series]:
        if table.sample:
            return table.sample(names, SAMPLE)
        return [series.head(SAMPLE) for series in table.read(names)]

    try:
        return read(wanted) if wanted else []
    except UserError:
        if len(wanted) == 1:
            return [pl.Series([], dtype=pl.String)]
        return [_sample(table, [name])[0] for name in wanted]


def looks_timed(series: pl.Series) -> Literal['dates', 'epochs', 'foreign', 'numbers', '']:
    """Returns what the values of a column look like.

    'dates': dates and times of any type, or ISO dates. 'epochs': seconds (milli-, micro-,
    nanoseconds) since 1970 of the years 1990 to 2035 that are mostly distinct, ascending or whole
    days; or yyyymmdd, yyyymmddhhmm and yyyymmddhhmmss. 'foreign': dates that are not read, such as
    dd/mm/yyyy. 'numbers': other numbers.
    """
    if series.dtype in (pl.Date, pl.Datetime):
        return 'dates'
    if series.dtype in (pl.Categorical, pl.Enum):
        series = series.cast(pl.String)
    if series.dtype == pl.String:
        texts = series.str.strip_chars()
        texts = texts.filter(texts.is_not_null() & (texts != ''))
        if len(texts) and is_iso(texts).mean() > 0.9:
            return 'dates'
        numbers = texts.cast(pl.Float64, strict=False)
        if numbers.null_count() > 0.1 * len(texts):
            return 'foreign' if texts.str.contains(DATES).mean() > 0.9 else ''
        series = numbers
    if not (series.dtype.is_numeric() or series.dtype.is_decimal()):
        return ''
    values = series.drop_nulls().cast(pl.Float64).to_numpy()
    values = values[np.isfinite(values)]
    if not len(values):
        return ''
    return 'epochs' if _are_epochs(values) or _are_days(values) else 'numbers'


def _are_epochs(values: np.ndarray) -> bool:
    for unit in UNITS.values():
        low, high = (bound * unit for bound in EPOCH)
        if low <= values.min() and values.max() < high:
            distinct = len(np.unique(values)) / len(values)
            ascending = (np.diff(values) >= 0).all()
            return distinct > 0.5 or ascending or not (values % (86_400 * unit)).any()
    return False


def _are_days(values: np.ndarray) -> bool:
    """Whether all values are yyyymmdd, yyyymmddhhmm or yyyymmddhhmmss of the years 1990 to 2035."""
    for digits in (10**4, 10**6):
        if (values >= 19900101 * digits).all() and (values < 20360101 * digits).all():
            values = values // digits
    month, day = values // 100 % 100, values % 100
    good = (values >= 19900101) & (values <= 20351231) & (month >= 1) & (month <= 12)
    return bool((good & (day >= 1) & (day <= 31) & (values % 1 == 0)).all())


def _find_finest(table: Table, candidates: list[str]) -> str | None:
    """Returns the column whose order all others agree with: `timestamp` where `date` is its day."""
    try:
        times = {
            name: read_times(table, name, series).values
            for name, series in zip(candidates, table.read(candidates))
        }
    except UserError:
        return None
    for name, fine in times.items():
        order = np.argsort(fine, kind='stable')
        steps = np.diff(fine[order])
        rises = [np.diff(times[other][order]) for other in candidates if other != name]
        if all((rise >= 0).all() and not rise[steps == 0].any() for rise in rises):
            return name
    return None
