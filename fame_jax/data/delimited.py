"""Tables of lines: fields between separators, with or without a header."""

import re
from collections.abc import Mapping

import numpy as np
import polars as pl

from fame_jax.data import forms
from fame_jax.data.records import Records, divide, parse
from fame_jax.data.sources import Source, fail, read_text, show
from fame_jax.data.tables import Table

MOVIELENS = ['userId', 'movieId', 'rating', 'timestamp']
NUMBER_THEM = '--columns=user:1,item:2,time:4'


def open_delimited(source: Source, columns: Mapping[str, str] | None) -> Table:
    """Opens csv, tsv, inter, dat, data, rating, and a table under the name of a sequence file.

    Quotes are read by evidence. Where every line has as many fields as the first, a line is a
    record, and a quote that does not enclose a whole field is a character. Where lines do not, but
    records by RFC 4180 do, a quoted field may hold separators and newlines.

    Args:
      source: one file.
      columns: names, or positions from 1, of the wanted columns by role; None: line 1 is a header.

    Raises:
      UserError: on a record of another width, on quotes or a first line without a certain reading.
    """
    records = divide(source, read_text(source))
    first, *others = ([field or '' for field in row] for row in _head(records).rows())
    names, begin = _find_names(records, first, others, columns)
    kept = ~records.layout.empty
    kept[:begin] = False

    def read(wanted: list[str], number: int | None = None) -> list[pl.Series]:
        places = [_find_place(source, names, name) for name in wanted]
        frame = parse(records, places, None if number is None else begin + number)
        taken = kept[: frame.height]
        frame = frame.slice(begin) if taken[begin:].all() else frame.filter(pl.Series(taken))
        return [frame[f'column_{place + 1}'] for place in places]

    def sample(wanted: list[str], count: int) -> list[pl.Series]:
        places = [names.index(name) for name in wanted]
        frame = parse(records, places, count + begin)
        frame = frame.filter(pl.Series(kept[: frame.height]))
        return [frame[f'column_{place + 1}'] for place in places]

    def locate_record(record: int) -> str:
        line = records.layout.lines[int(np.flatnonzero(kept)[record])]
        return f'line {line + 1}'

    return Table(
        source.place,
        names,
        read,
        locate_record,
        has_header=begin > 0 or names[0] != '1',
        lines=records.text.count(b'\n') + 1,
        notes=records.notes,
        sample=sample,
    )


def _head(records: Records) -> pl.DataFrame:
    """Returns the first records that are not empty."""
    count = forms.SAMPLE + 1
    frame = parse(records, range(int(records.layout.widths[0])), count)
    return frame.filter(pl.Series(~records.layout.empty[:count]))


def _find_names(
    records: Records,
    first: list[str],
    others: list[list[str]],
    columns: Mapping[str, str] | None,
) -> tuple[list[str], int]:
    """Returns the names of the columns, and the number of records before the first action."""
    source, header = records.source, [name.strip() for name in first]
    given = [name for name in (columns or {}).values() if name not in ('', '-')]
    if columns is None:
        return header, 1
    if given and all(re.fullmatch('[1-9][0-9]{0,5}', name) for name in given):
        _check_positions(source, header, others, given)
        return [str(place + 1) for place in range(len(first))], 0
    if source.kind == 'pairs':
        return ['user', 'item'], 0
    # Files of these kinds mostly have no header, even where no column has numbers.
    bare = source.kind in ('dat', 'data', 'rating', 'blanks')
    bare &= not (forms.names_log(header) or forms.has_words_above_numbers(header, others))
    data = bare or forms.is_data(header, others)
    if not data or _are_names(given, header):
        return header, 1
    movielens = source.kind in ('dat', 'data', 'rating') and records.separator in '\t '
    if movielens and len(first) == len(MOVIELENS):
        return MOVIELENS, 0
    what = 'looks like data, not like names of columns'
    if '0' in given:
        fail(source, 1, f'{what}; columns are numbered from 1: {NUMBER_THEM}')
    advice = f'number the columns ({NUMBER_THEM}), or name them in line 1'
    histories = ', or write each user on one line' if source.kind == 'blanks' else ''
    return fail(source, 1, f'{what}; {advice}{histories}')


def _are_names(given: list[str], header: list[str]) -> bool:
    """Whether the wanted names are in line 1, and are no numbers but those that pandas writes."""
    names = set(given) <= set(header) and bool(given)
    return names and (not any(map(forms.is_number, given)) or _is_count(header, 0))


def _is_count(header: list[str], begin: int) -> bool:
    return header == [str(begin + place) for place in range(len(header))]


def _check_positions(
    source: Source, first: list[str], others: list[list[str]], given: list[str]
) -> None:
    """Raises a UserError if the first line may be a header, or has not that many fields."""
    if not forms.is_data(first, others) and forms.is_header(first, others):
        what = 'looks like names of columns; use them: --columns=user:NAME,item:NAME'
        fail(source, 1, f'{what}; they are {", ".join(map(show, first[:20]))}')
    if _is_count(first, 0) or (_is_count(first, 1) and len(first) > 2):
        fail(source, 1, 'numbers that may be data or names; name the columns in line 1')
    beyond = max(map(int, given))
    if beyond > len(first):
        fail(
            source,
            1,
            f'there is no column {beyond} among {len(first)}; count from 1: {NUMBER_THEM}',
        )


def _find_place(source: Source, names: list[str], name: str) -> int:
    places = [place for place, other in enumerate(names) if other == name]
    if len(places) > 1:
        which = ' and '.join(str(place + 1) for place in places)
        fail(source, 1, f'two columns are called {show(name)}, numbers {which}; rename one')
    return places[0]
