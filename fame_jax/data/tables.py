"""Logs with columns (CSV and kin, JSON lines, Parquet) as columns, each record still traceable."""

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

import polars as pl

from fame_jax.data.sources import MAX_LINE, Source, fail, read_text, show
from fame_jax.errors import UserError

MOVIELENS = b'userId\tmovieId\trating\ttimestamp\n'


class Table(NamedTuple):
    """A log whose columns are read when they are known.

    Fields:
      columns: the names found in the file.
      read: names to their series, one record each, in file order.
      locate: number of a record, from 0, to 'line 12' for a message.
    """

    columns: list[str]
    read: Callable[[list[str]], list[pl.Series]]
    locate: Callable[[int], str]


def open_table(source: Source) -> Table:
    """Opens a log by its kind: csv, tsv, inter, dat, data, jsonl, ndjson, json or parquet.

    Raises:
      UserError: if the file is not what its name says.
    """
    if source.kind == 'parquet':
        return _open_parquet(source)
    text = read_text(source)
    if source.kind in ('jsonl', 'ndjson', 'json'):
        return _open_json(source, text)
    if source.kind in ('dat', 'data'):
        return _open_movielens(source, text)
    return _open_delimited(source, text)


def _open_movielens(source: Source, text: bytes) -> Table:
    """ratings.dat (`user::item::rating::time`) and u.data (the same with tabs): no header."""
    text = text.replace(b'::', b'\t') if '::' in _first_line(text) else text
    if _first_line(text).count('\t') != 3:
        fail(
            source, 1, "expected 'user::item::rating::time', or tabs; name other logs .csv or .tsv"
        )
    # The header is ours, so the file's lines count from 0 here.
    return _delimited(source, MOVIELENS + text, '\t', quoted=False, first_line=0)


def _open_delimited(source: Source, text: bytes) -> Table:
    first = _first_line(text)
    separator = ',' if source.kind == 'csv' else '\t'
    if separator not in first and source.kind != 'inter':
        separator = max(',\t;|', key=first.count) if source.kind == 'csv' else separator
    # RecBole never quotes; a title may hold a lone quote there.
    return _delimited(source, text, separator, quoted=source.kind != 'inter' and b'"' in text)


def _first_line(text: bytes) -> str:
    end = text.find(b'\n')
    return (text if end < 0 else text[:end]).decode()


def _delimited(
    source: Source, text: bytes, separator: str, quoted: bool, first_line: int = 1
) -> Table:
    def records() -> Iterator[tuple[int, list[str]]]:
        return _records(source, text, separator, quoted, first_line)

    line, header = next(records(), (first_line - 1, []))
    header = [name.strip() for name in header]
    if line != first_line:
        fail(source, 1, 'blank, where the names of the columns belong')

    def read(names: list[str]) -> list[pl.Series]:
        columns = [header.index(name) for name in names]
        if quoted:
            return _from_records(source, records(), columns, len(header))
        frame = _from_polars(source, text, separator, records, len(header))
        return [frame.to_series(column) for column in columns]

    def locate(record: int) -> str:
        # The header is a record too.
        for number, (line, _) in enumerate(records(), start=-1):
            if number == record:
                return f'line {line}'
        return f'record {record + 1}'

    return Table(header, read, locate)


def _records(
    source: Source, text: bytes, separator: str, quoted: bool, first_line: int
) -> Iterator[tuple[int, list[str]]]:
    """Yields (line, fields) of every record that is not blank: slow, but it knows where it is."""
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    stream = io.TextIOWrapper(io.BytesIO(text), encoding='utf-8', newline='\n')
    reader = csv.reader(stream, delimiter=separator, quoting=quoting, strict=True)
    with _field_limit(MAX_LINE):
        line = first_line
        try:
            for fields in reader:
                if any(fields):
                    yield line, fields
                line = reader.line_num + first_line
        except csv.Error as error:
            fail(
                source,
                line,
                f'a quoted field goes on after its quote, or never closes ({error}); mend it',
            )


@contextlib.contextmanager
def _field_limit(limit: int) -> Iterator[None]:
    before = csv.field_size_limit(limit)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _from_records(
    source: Source, records: Iterator[tuple[int, list[str]]], columns: list[int], width: int
) -> list[pl.Series]:
    next(records)
    values: list[list[str]] = [[] for _ in columns]
    for line, fields in records:
        _check_width(source, line, fields, width)
        for column, into in zip(columns, values):
            into.append(fields[column])
    return [pl.Series(column, dtype=pl.String) for column in values]


def _from_polars(
    source: Source,
    text: bytes,
    separator: str,
    records: Callable[[], Iterator[tuple[int, list[str]]]],
    width: int,
) -> pl.DataFrame:
    # Every column is read: with fewer, polars would not notice a record with too many fields.
    try:
        frame = pl.read_csv(text, separator=separator, quote_char=None, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        for line, fields in records():
            _check_width(source, line, fields, width)
        what = str(error).partition('\n')[0]
        raise UserError(f'{source.place}: not readable as a table: {what}') from error
    blank = frame.select(pl.all_horizontal(pl.all().is_null())).to_series()
    last = frame.to_series(frame.width - 1)
    if last.null_count() > blank.sum():
        # Polars fills short records up; only a look at the text tells them from empty fields.
        for line, fields in records():
            _check_width(source, line, fields, width)
    return frame.filter(~blank) if blank.any() else frame


def _check_width(source: Source, line: int, fields: list[str], width: int) -> None:
    if len(fields) != width:
        fail(source, line, f'{len(fields)} fields where the header has {width}; mend the line')


def _open_json(source: Source, text: bytes) -> Table:
    lines = [(n, line) for n, line in enumerate(text.split(b'\n'), start=1) if line.strip()]
    if lines[0][1].lstrip()[:1] == b'[':
        fail(source, lines[0][0], 'a JSON array; write one object a line')

    def read(names: list[str]) -> list[pl.Series]:
        values: list[list[str | None]] = [[] for _ in names]
        for number, line in lines:
            record = _parse(source, number, line)
            for name, into in zip(names, values):
                into.append(_token(source, number, name, record.get(name)))
        return [pl.Series(column, dtype=pl.String) for column in values]

    return Table(list(_parse(source, *lines[0])), read, lambda record: f'line {lines[record][0]}')


def _parse(source: Source, number: int, line: bytes) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        fail(source, number, f'not JSON: {show(line[:40].decode(errors="replace"))}; mend the line')
    if not isinstance(record, dict):
        fail(source, number, 'not a JSON object; each line must be {"user": ..., "item": ..., ...}')
    return record


def _token(source: Source, number: int, name: str, value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        fail(source, number, f'{show(name)} is {show(value)}, not text or a number; mend it')
    text = str(value)
    if not text.isascii() and any('\ud800' <= letter <= '\udfff' for letter in text):
        fail(source, number, f'{show(name)} holds half a character: {show(value)}; mend it')
    return text


def _open_parquet(source: Source) -> Table:
    def call(function: Callable, **options: object) -> object:
        # A damaged file makes polars panic, and a panic is no Exception.
        faults = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError)
        try:
            return function(io.BytesIO(source.data), **options)
        except faults as error:
            what = 'not Parquet, cut short or damaged; copy or download it again'
            raise UserError(f'{source.place}: {what}') from error

    def read(names: list[str]) -> list[pl.Series]:
        frame = call(pl.read_parquet, columns=list(dict.fromkeys(names)))
        return [frame[name] for name in names]

    return Table(list(call(pl.read_parquet_schema)), read, lambda record: f'row {record + 1}')
