"""Files that describe items, in whatever form they come, as records with named fields."""

import ast
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fame_jax.data.sources import Source, fail, open_source, read_text, show, unpack
from fame_jax.errors import UserError, explain_os_errors

ITEM_FILES = ('movies.dat', 'movies.csv', 'u.item')  # what MovieLens calls them, also in its zips
KINDS = ('jsonl', 'ndjson', 'json', 'csv', 'tsv', 'parquet')
# Well-known names of the id, lower case; among those a file has, the best match is taken.
ID_NAMES = (
    *('item_id', 'itemid', 'parent_asin', 'asin', 'movieid', 'movie_id', 'item', 'iid'),
    *('product_id', 'productid', 'business_id', 'book_id', 'track_id', 'article_id', 'id'),
)
# Flags 0 or 1 at the end of a line of u.item.
GENRES = (
    *('unknown', 'Action', 'Adventure', 'Animation', "Children's", 'Comedy', 'Crime'),
    *('Documentary', 'Drama', 'Fantasy', 'Film-Noir', 'Horror', 'Musical', 'Mystery'),
    *('Romance', 'Sci-Fi', 'Thriller', 'War', 'Western'),
)


class Records(NamedTuple):
    """One record an item.

    Fields:
      source: the file.
      reader: how it was read.
      fields: names of all fields, by first appearance.
      rows: the records; a field that is not there is missing or None.
      locate: number of a record, from 0, to 'line 12' for a message.
    """

    source: Source
    reader: str
    fields: list[str]
    rows: list[dict]
    locate: Callable[[int], str]


def read_records(path: str | os.PathLike) -> Records:
    """Reads JSON lines (also Python literals), CSV, TSV, Parquet, RecBole's .item or MovieLens.

    Raises:
      UserError: on whatever is wrong with the file, with its name and line.
    """
    source = _open(path)
    if source.kind == 'parquet':
        return _read_table(source, source.kind)
    if source.kind in ('jsonl', 'ndjson', 'json'):
        return _read_json(source, read_text(source))
    text = read_text(source)
    if source.kind == 'movies.dat':
        return _read_lines(source, text, _parse_movie)
    if source.kind == 'u.item':
        return _read_lines(source, text, _parse_film)
    return _read_table(source, source.kind)


def find_id(records: Records, item_ids: list[str], id_column: str = '') -> tuple[str, list[str]]:
    """Returns the id's field and each record's id.

    Several fields may look like an id (a number and an ASIN): the one taken is in the catalogue
    for the most records, the likeliest name in a tie.

    Args:
      records: the file.
      item_ids: outside ids of the catalogue, entry 0 ''.
      id_column: the field; '' means guess.

    Raises:
      UserError: if there is no such field, or a record without an id.
    """
    known = set(item_ids[1:])
    plain = {name.casefold(): name for name in reversed(records.fields)}
    names = [id_column] if id_column else [plain[name] for name in ID_NAMES if name in plain]
    if not names or names[0] not in records.fields:
        what = f'no field {show(id_column)}' if id_column else 'no field looks like the item id'
        found = ', '.join(map(show, records.fields[:20]))
        raise UserError(f'{records.source.place}: {what}; found {found}')
    best, most = [], -1
    for name in names:
        tokens = [_token(row.get(name)) for row in records.rows]
        matched = sum(token in known for token in tokens)
        if matched > most:
            field, best, most = name, tokens, matched
    if '' in best:
        at = best.index('')
        value = records.rows[at].get(field)
        what = f'{show(field)} is {"missing" if value in (None, "") else show(value)}'
        place = f'{records.source.place}, {records.locate(at)}'
        raise UserError(f'{place}: {what}, where an id belongs; mend it')
    return field, best


def _token(value: object) -> str:
    """Returns an id as text: 7.0 is 7, and what is no text or number is ''."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() if type(value) in (str, int) else ''


def _open(path: str | os.PathLike) -> Source:
    """Opens one of KINDS by open_source; .item files and MovieLens' own are not of its kinds."""
    path = Path(path)
    name = path.name.lower().removesuffix('.gz')
    kind = _kind(name)
    if kind in ('movies.dat', 'u.item', 'item', 'zip'):
        source, inner = unpack(path, _choose)
        return _to_utf8(source._replace(kind=_kind(inner.rpartition('/')[2])))
    if kind in KINDS or path.is_dir():
        return open_source(path)
    with explain_os_errors(f'reading {path}', 'check the path'):
        path.stat()
    known = ', '.join(f'.{k}' for k in (*KINDS, 'item'))
    what = f'not a kind of items file; its name must end in one of {known} (or .gz)'
    raise UserError(f'{path}: {what}, or be {", ".join(ITEM_FILES)} or a MovieLens .zip')


def _kind(name: str) -> str:
    return name if name in ('movies.dat', 'u.item') else name.rpartition('.')[2]


def _choose(source: Source, names: list[str]) -> str:
    inside = {name.rpartition('/')[2]: name for name in reversed(names)}
    for wanted in ITEM_FILES:
        if wanted in inside:
            return inside[wanted]
    what = f'none of {", ".join(ITEM_FILES)} inside; unpack it and name the file'
    raise UserError(f'{source.place}: {what}')


def _to_utf8(source: Source) -> Source:
    """MovieLens' older files are Latin-1, in which any bytes are text."""
    try:
        source.data.decode()
    except UnicodeDecodeError:
        return source._replace(data=source.data.decode('latin-1').encode())
    return source


def _lines(text: bytes) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(text.split(b'\n'), start=1):
        if line.strip():
            yield number, line


def _read_json(source: Source, text: bytes) -> Records:
    lines, rows, fields, reader = [], [], {}, 'JSON lines'
    for number, line in _lines(text):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row, reader = _parse_literal(source, number, line), 'Python literals'
        if not isinstance(row, dict):
            fail(source, number, 'not a JSON object; write one object a line, {"item_id": ...}')
        lines.append(number)
        rows.append(row)
        fields.update(row)
    return Records(source, reader, list(fields), rows, lambda at: f'line {lines[at]}')


def _parse_literal(source: Source, number: int, line: bytes) -> object:
    """The Amazon metadata of 2014 are Python dicts, not JSON."""
    try:
        with warnings.catch_warnings():
            # Descriptions hold backslashes that are no escapes.
            warnings.simplefilter('ignore')
            return ast.literal_eval(line.decode().strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        shown = show(line[:40].decode(errors='replace'))
        fail(source, number, f'not JSON: {shown}; mend or delete the line')


def _read_lines(source: Source, text: bytes, parse: Callable[[Source, int, str], dict]) -> Records:
    numbers, rows = [], []
    for number, line in _lines(text):
        numbers.append(number)
        rows.append(parse(source, number, line.decode()))
    return Records(source, source.kind, list(rows[0]), rows, lambda at: f'line {numbers[at]}')


def _parse_movie(source: Source, number: int, line: str) -> dict:
    """`id::title::genres`; a title may hold `::` too."""
    movie, *title = line.split('::')
    if len(title) < 2:
        fail(source, number, "expected 'id::title::genres'; mend the line")
    return {'movie_id': movie, 'title': '::'.join(title[:-1]), 'genres': title[-1]}


def _parse_film(source: Source, number: int, line: str) -> dict:
    """`id|title|date|video date|address`, then a flag for each of GENRES."""
    values = line.split('|')
    if len(values) != 5 + len(GENRES):
        what = f'{len(values)} fields where u.item has {5 + len(GENRES)}; mend the line'
        fail(source, number, what)
    genres = [genre for genre, flag in zip(GENRES, values[5:]) if flag == '1']
    genres = [genre for genre in genres if genre != 'unknown']
    return {'movie_id': values[0], 'title': values[1], 'year': values[2][-4:], 'genres': genres}


def _read_table(source: Source, reader: str) -> Records:
    # Polars takes a while to import; JSON lines have no use for it.
    from fame_jax.data.tables import open_table

    # RecBole's files are all of one form, whatever they hold.
    table = open_table(source._replace(kind='inter') if reader == 'item' else source)
    columns = [column.to_list() for column in table.read(table.columns)]
    if not columns or not columns[0]:
        raise UserError(f'{source.place}: a header and no records')
    names, lists = [], set()
    for column in table.columns:
        name, _, kind = column.partition(':') if reader == 'item' else (column, '', '')
        names.append(name)
        lists |= {name} if kind == 'token_seq' else set()
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        fail(source, 1, f'two columns {show(twice)}; rename one')
    rows = [dict(zip(names, values)) for values in zip(*columns)]
    for row in rows:
        for name in lists - {'title', 'movie_title'}:
            row[name] = re.split(r'\s+', row[name].strip()) if row[name] else []
    return Records(source, reader, names, rows, table.locate)
