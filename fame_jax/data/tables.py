"""Logs with named columns, whatever the form of their files; errors name the line of a record."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import polars as pl

from fame_jax.data.sources import Source, show
from fame_jax.errors import UserError


class Table(NamedTuple):
    """A log with columns. Its values are read when the wanted columns are known.

    Fields:
      place: the file, folder or pattern, for messages.
      columns: the names of all columns; of a table without a header '1', '2', ...
      read: (names of columns) -> one series per name, records in the order of the file, text or
        of the type that the file says. Raises UserError where a column cannot be read.
      locate: (index of a record, from 0) -> its place for a message, such as 'line 12'.
      has_header: whether the names are those of the file or of its kind, not positions.
      lines: the number of lines of the files, with the header; None where they have no lines.
      notes: readings that are certain and worth a line on the screen.
      sample: (names of columns, number) -> their first records; None where `read` costs little.
      read_parts: (name of a column) -> the column in parts, so that it is never in memory as a
        whole; None where `read` costs little.
      count_missing: (name of a column) -> in how many objects the key is missing or null, and the
        number of objects; None for other files.
    """

    place: str
    columns: list[str]
    read: Callable[[list[str]], list[pl.Series]]
    locate: Callable[[int], str]
    has_header: bool = True
    lines: int | None = None
    notes: tuple[str, ...] = ()
    sample: Callable[[list[str], int], list[pl.Series]] | None = None
    read_parts: Callable[[str], Iterator[pl.Series]] | None = None
    count_missing: Callable[[str], tuple[int, int]] | None = None


def open_table(source: Source, columns: Mapping[str, str] | None = None) -> Table:
    """Opens a log of any kind but a sequence file.

    Args:
      source: the file or files.
      columns: names of the wanted columns by role, '' or missing where unknown. Where all are whole
        numbers from 1, they are the positions of the columns of a table without a header. None:
        a text table has a header.

    Raises:
      UserError: if the content does not have the form that the file's name says.
    """
    # These modules make tables.
    from fame_jax.data.delimited import open_delimited
    from fame_jax.data.json_lines import open_json
    from fame_jax.data.parquet import open_parquet

    if source.kind == 'parquet':
        return open_parquet(source)
    if source.kind in ('jsonl', 'ndjson', 'json'):
        return open_json(source)
    return join_tables(source, [open_delimited(part, columns) for part in source.parts or [source]])


def join_tables(source: Source, tables: list[Table]) -> Table:
    """Returns one table of several with the same columns, one after another.

    Raises:
      UserError: if their columns differ.
    """
    first = tables[0]
    if len(tables) == 1:
        return first
    for table in tables[1:]:
        if table.columns != first.columns:
            mine, theirs = (_show_header(t.columns) for t in (first, table))
            what = f'{table.place} has other columns: {theirs}, not {mine} as {first.place}'
            raise UserError(f'{source.place}: {what}; give a pattern of files with the same')
    counts: list[int] = []

    def read(names: list[str]) -> list[pl.Series]:
        parts = [table.read(names) for table in tables]
        counts[:] = [len(part[0]) for part in parts] if names else counts
        return [pl.concat(column) for column in zip(*parts)]

    def locate(record: int) -> str:
        for count, part, table in zip(counts, source.parts, tables):
            if record < count:
                return f'{table.locate(record)} of {part.name}'
            record -= count
        return f'record {record + 1}'

    noted = [(part.name, note) for part, table in zip(source.parts, tables) for note in table.notes]
    return Table(
        source.place,
        first.columns,
        read,
        locate,
        has_header=first.has_header,
        lines=sum(table.lines or 0 for table in tables),
        notes=tuple(f'{name}: {note}' for name, note in noted),
        sample=first.sample,
    )


def _show_header(columns: list[str]) -> str:
    return show(', '.join(columns))
