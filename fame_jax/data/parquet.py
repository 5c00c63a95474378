"""Parquet files as one log: only the wanted columns are read, when they are wanted."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import polars as pl

from fame_jax.data.sources import Source, show
from fame_jax.data.tables import Table
from fame_jax.errors import UserError

PART = 100_000  # records of a column that are worked on at once
# A damaged file can make polars panic, and PanicException is not an Exception.
FAULTS = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError)

Result = TypeVar('Result')


def open_parquet(source: Source) -> Table:
    """Opens one file, or several with the same columns, read one after the other.

    Values keep their types. The bytes of a file are never in memory as a whole.

    Raises:
      UserError: if a file is damaged, or the columns of two files differ.
    """
    paths = source.paths
    schema = _read_schema(paths[0])
    for path in paths[1:]:
        _compare(paths[0], schema, path, _read_schema(path))
    # Names with brackets and folders such as day=3 mean nothing here.
    frame = pl.scan_parquet(paths, glob=False, hive_partitioning=False)

    def read(names: list[str]) -> list[pl.Series]:
        wanted = frame.select(list(dict.fromkeys(names)))
        columns = _call(source.place, wanted.collect)
        return [columns[name] for name in names]

    def sample(names: list[str], number: int) -> list[pl.Series]:
        return _call(source.place, frame.select(names).head(number).collect).get_columns()

    def read_parts(name: str) -> Iterator[pl.Series]:
        column = frame.select(name)
        parts = _call(
            source.place,
            lambda: column.collect_batches(chunk_size=PART, lazy=True, engine='streaming'),
        )
        while (part := _call(source.place, lambda: next(parts, None))) is not None:
            yield part.to_series()

    def locate(record: int) -> str:
        for path in paths[:-1]:
            count = pl.scan_parquet(path, glob=False).select(pl.len()).collect().item()
            if record < count:
                return f'row {record + 1} of {path.name}'
            record -= count
        return f'row {record + 1}' + (f' of {paths[-1].name}' if len(paths) > 1 else '')

    return Table(source.place, list(schema), read, locate, read_parts=read_parts, sample=sample)


def _call(place: str | Path, function: Callable[[], Result]) -> Result:
    try:
        return function()
    except FAULTS as error:
        what = 'not a Parquet file, cut short or damaged; copy or download it again'
        raise UserError(f'{place}: {what}') from error


def _read_schema(path: Path) -> pl.Schema:
    return _call(path, lambda: pl.scan_parquet(path, glob=False).collect_schema())


def _compare(first: Path, schema: pl.Schema, path: Path, other: pl.Schema) -> None:
    """Raises UserError if two files do not have the same columns."""
    if list(schema) != list(other):
        names = sorted(schema.keys() ^ other.keys())
        what = (
            f'column {show(names[0])} is not in both' if names else 'the columns are in other order'
        )
        raise UserError(f'{path}: other columns than {first.name} ({what}); write them alike')
    for name, kind in schema.items():
        if other[name] != kind:
            what = f'column {show(name)} contains {other[name]}, in {first.name} {kind}'
            raise UserError(f'{path}: {what}; write them alike')
