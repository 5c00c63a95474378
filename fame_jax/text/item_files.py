"""Reads files about items, in many formats, as records with named fields."""

import dataclasses
import functools
import glob
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fame_jax.data import names
from fame_jax.data.json_lines import list_keys, locate_object, read_objects
from fame_jax.data.sources import Source, fail, open_file, open_source, read_text, show
from fame_jax.errors import UserError, explain_os_errors

ITEM_FILES = ('movies.dat', 'movies.csv', 'u.item')  # MovieLens' names, also inside its zips
KINDS = ('jsonl', 'ndjson', 'json', 'csv', 'tsv', 'parquet')
SINGLE = ('movies.dat', 'u.item', 'item', 'zip')  # further kinds, of one file and no folder
PLAIN_ID = 'id'  # a name of the id field that says no item, so that a log has none of it
# A line of u.item ends with a flag, 0 or 1, for each of these.
GENRES = (
    *('unknown', 'Action', 'Adventure', 'Animation', "Children's", 'Comedy', 'Crime'),
    *('Documentary', 'Drama', 'Fantasy', 'Film-Noir', 'Horror', 'Musical', 'Mystery'),
    *('Romance', 'Sci-Fi', 'Thriller', 'War', 'Western'),
)


class Records(NamedTuple):
    """The records of a file, one for each item.

    Fields:
      source: the file.
      reader: the name of its format.
      fields: names of all fields, in order of first appearance.
      rows: the records; a field without a value is absent or None.
      locate: index of a record -> its place in a message, such as 'line 12'.
    """

    source: Source
    reader: str
    fields: list[str]
    rows: list[dict]
    locate: Callable[[int], str]


def read_records(path: str | os.PathLike) -> Records:
    """Reads JSON lines (also Python literals), CSV, TSV, Parquet, RecBole's .item or MovieLens.

    Raises:
      UserError: when the file cannot be read; the message names file and line.
    """
    source = _open(path)
    if source.kind == 'parquet':
        return _read_table(source, source.kind)
    if source.kind in ('jsonl', 'ndjson', 'json'):
        return _read_json(source)
    text = read_text(source)
    if source.kind == 'movies.dat':
        return _read_lines(source, text, _parse_movie)
    if source.kind == 'u.item':
        return _read_lines(source, text, _parse_film)
    return _read_table(source, source.kind)


def find_id(
    records: Records, item_ids: list[str], id_column: str = '', log_column: str = ''
) -> tuple[str, list[str]]:
    """Returns the name of the id field and each record's id.

    The field is the given one; else the one with the name of the log's item column; else the
    likeliest name of an item column in a log (`names.fit`), or `id`. The latter two need a record
    of the catalogue. Names are found without regard to case, blanks and signs.

    Args:
      records: the file.
      item_ids: the V + 1 ids of the interaction log; entry 0 is ''.
      id_column: the given field, or ''.
      log_column: the name of the item column in the interaction log, or ''.

    Raises:
      UserError: when there is no such field, when two may be the id, or a record has no id.
    """
    known = set(item_ids[1:])

    @functools.cache
    def found(name: str) -> list[str]:
        """Each record's item of the catalogue by one field; '' where it names none."""
        return [token if token in known else '' for token in _tokens(records, name)]

    field = _find_named(records, id_column or log_column)
    if not id_column and not (field and any(found(field))):
        field = _recognise(records, found) or field
    if not field:
        what = f'no field {show(id_column or log_column)}'
        if not id_column:
            what = f'{what}, as in the log, and none' if log_column else 'no field'
            what += ' with a known name of an item id'
        present = ', '.join(map(show, records.fields[:20]))
        raise UserError(
            f'{records.source.place}: there is {what}; its fields are {present}; name one with '
            '--columns=item_file_id:NAME'
        )
    tokens = _tokens(records, field)
    if '' in tokens:
        at = tokens.index('')
        value = records.rows[at].get(field)
        what = f'{show(field)} is {"missing" if value in (None, "") else show(value)}'
        place = f'{records.source.place}, {records.locate(at)}'
        raise UserError(f'{place}: the id {what}; write a number or a text')
    return field, tokens


def fields_named(records: Records, name: str) -> list[str]:
    """Returns the field of a name, else all that differ in case, blanks and signs alone."""
    if name in records.fields:
        return [name]
    wanted = names.join_words(name)
    return [field for field in records.fields if names.join_words(field) == wanted != '']


def _find_named(records: Records, name: str) -> str:
    """Returns the id field of a name; '' for none.

    Raises:
      UserError: when more than one fits as well.
    """
    fits = fields_named(records, name)
    if len(fits) > 1:
        raise _two(records, fits)
    return fits[0] if fits else ''


def _recognise(records: Records, found: Callable[[str], list[str]]) -> str:
    """Returns the likeliest field by its name with an item of the catalogue; '' if none is known.

    Without any such item it is the likeliest by its name alone.

    Raises:
      UserError: when an equally likely field gives other items, or a less likely one more of them.
    """
    likely = {field: _likelihood(field) for field in records.fields}
    ordered = sorted((field for field, fit in likely.items() if fit), key=likely.get)
    holding = [field for field in ordered if any(found(field))]
    if not holding:
        return ordered[0] if ordered else ''
    first, *others = holding
    for other in others:
        more = len(set(found(other)) - {''}) > len(set(found(first)) - {''})
        if more or (likely[other] == likely[first] and found(other) != found(first)):
            raise _two(records, [first, other])
    return first


def _likelihood(field: str) -> tuple[bool, int, int] | None:
    """Returns how likely a field is the id by its name, smaller for likelier; None: not at all."""
    fit = names.fit('item', field)
    if fit:
        return fit.form == 2, fit.rank, fit.form  # names of things last, as in a log
    return (False, len(names.NOUNS['item']), 0) if names.join_words(field) == PLAIN_ID else None


def _two(records: Records, fields: list[str]) -> UserError:
    shown = ' and '.join(map(show, fields[:4]))
    return UserError(
        f'{records.source.place}: {shown} may be the item; name one: '
        f'--columns=item_file_id:{fields[0]}'
    )


def _tokens(records: Records, field: str) -> list[str]:
    return [_token(row.get(field)) for row in records.rows]


def _token(value: object) -> str:
    """Returns an id as text: '7' for 7.0; '' for a value that is neither text nor number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() if type(value) in (str, int) else ''


def check_path(path: str | os.PathLike, doing: str) -> None:
    """Checks that files about items are there, in a format that is read; it reads none of them.

    Args:
      path: as for `read_records`.
      doing: begins the message about a missing file.

    Raises:
      UserError: when there is no such file, or its name is of no known format.
    """
    path = Path(path)
    with explain_os_errors(doing, 'check the path'):
        if not (glob.has_magic(str(path)) and glob.glob(str(path))):
            path.stat()
        is_folder = path.is_dir()
    if is_folder or _kind(path.name) in (*KINDS, *SINGLE):
        return
    known = ', '.join(f'.{k}' for k in (*KINDS, 'item'))
    what = f'the format is unknown; the name must end in one of {known} (or .gz)'
    raise UserError(f'{path}: {what}, or be {", ".join(ITEM_FILES)} or a MovieLens .zip')


def _open(path: str | os.PathLike) -> Source:
    """Opens a file; `open_source` knows KINDS, but none of SINGLE."""
    path = Path(path)
    check_path(path, f'reading {path}')
    if _kind(path.name) not in SINGLE:
        return open_source(path)
    source, inner = open_file(path, _choose)
    kind = _kind(inner.rpartition('/')[2])
    return dataclasses.replace(source, kind=kind, load=lambda: _to_utf8(source.load()))


def _kind(name: str) -> str:
    name = name.lower().removesuffix('.gz')
    return name if name in ('movies.dat', 'u.item') else name.rpartition('.')[2]


def _choose(place: str, names: list[str]) -> str:
    inside = {name.rpartition('/')[2]: name for name in reversed(names)}
    for wanted in ITEM_FILES:
        if wanted in inside:
            return inside[wanted]
    what = f'the archive has none of {", ".join(ITEM_FILES)}; unpack it and name the file'
    raise UserError(f'{place}: {what}')


def _to_utf8(data: bytes) -> bytes:
    """Converts MovieLens' older files, which are Latin-1, to UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return data.decode('latin-1').encode()
    return data


def _lines(text: bytes) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(text.split(b'\n'), start=1):
        if line.strip():
            yield number, line


def _read_json(source: Source) -> Records:
    numbers, rows = [], []
    for block in read_objects(source):
        numbers += block.numbers
        rows += block.records
    fields = list_keys(rows)
    return Records(
        source, 'JSON lines', fields, rows, lambda at: locate_object(source, numbers[at])
    )


def _read_lines(source: Source, text: bytes, parse: Callable[[Source, int, str], dict]) -> Records:
    numbers, rows = [], []
    for number, line in _lines(text):
        numbers.append(number)
        rows.append(parse(source, number, line.decode()))
    return Records(source, source.kind, list(rows[0]), rows, lambda at: f'line {numbers[at]}')


def _parse_movie(source: Source, number: int, line: str) -> dict:
    """Parses `id::title::genres`; the title may contain `::` too."""
    movie, *title = line.split('::')
    if len(title) < 2:
        fail(source, number, "expected 'id::title::genres'; correct the line")
    return {'movie_id': movie, 'title': '::'.join(title[:-1]), 'genres': title[-1]}


def _parse_film(source: Source, number: int, line: str) -> dict:
    """Parses `id|title|date|video date|address`, then a flag for each of GENRES."""
    values = line.split('|')
    if len(values) != 5 + len(GENRES):
        what = f'{len(values)} fields, and u.item has {5 + len(GENRES)}; correct the line'
        fail(source, number, what)
    genres = [genre for genre, flag in zip(GENRES, values[5:]) if flag == '1']
    genres = [genre for genre in genres if genre != 'unknown']
    return {'movie_id': values[0], 'title': values[1], 'year': values[2][-4:], 'genres': genres}


def _read_table(source: Source, reader: str) -> Records:
    # Importing polars takes a while, and JSON lines do not need it.
    from fame_jax.data.tables import open_table

    # All of RecBole's files have one format.
    table = open_table(dataclasses.replace(source, kind='inter') if reader == 'item' else source)
    columns = [column.to_list() for column in table.read(table.columns)]
    if not columns or not columns[0]:
        raise UserError(f'{source.place}: there are no records after the header; add some')
    names, lists = [], set()
    for column in table.columns:
        name, _, kind = column.partition(':') if reader == 'item' else (column, '', '')
        names.append(name)
        lists |= {name} if kind == 'token_seq' else set()
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        fail(source, 1, f'two columns are called {show(repeated)}; rename one')
    rows = [dict(zip(names, values)) for values in zip(*columns)]
    for row in rows:
        for name in lists - {'title', 'movie_title'}:
            row[name] = re.split(r'\s+', row[name].strip()) if row[name] else []
    return Records(source, reader, names, rows, table.locate)
