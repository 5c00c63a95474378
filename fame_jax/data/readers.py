"""Logs to actions: ids to codes, times and ratings to numbers."""

import itertools
import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import polars as pl

from fame_jax.data import names
from fame_jax.data.columns import FILE_ORDER, Choice, choose_columns
from fame_jax.data.ids import encode_ids
from fame_jax.data.numbers import read_numbers
from fame_jax.data.placeholders import check_ids
from fame_jax.data.sources import Source, fail, open_source, read_text, show
from fame_jax.data.tables import Table, open_table
from fame_jax.data.times import Clock, read_times
from fame_jax.errors import UserError


class Log(NamedTuple):
    """Actions in the order of the source.

    Fields:
      place: the file or frame, for messages.
      users, items: int32 or int64 [A], indices into user_ids and item_ids.
      user_ids, item_ids: ids of the source as text, integers in ascending order, others in the
        order in which they first appear.
      times: int64 or float64 [A] in any unit; None: the order of the source is the order in time.
      ratings: float64 [A], or None.
      card: source, SHA-256, reader, columns, order, kinds of ids, and lines about doubtful ids.
      clock: reads `times`.
    """

    place: str
    users: np.ndarray
    items: np.ndarray
    user_ids: list[str]
    item_ids: list[str]
    times: np.ndarray | None
    ratings: np.ndarray | None
    card: dict
    clock: Clock = Clock()


def read_log(
    path: str | os.PathLike, columns: Mapping[str, str], needs_rating: bool = False
) -> Log:
    """Reads a sequence file (.txt) or a log with columns (any other kind).

    Args:
      path: the file; .gz and .zip are unpacked.
      columns: names of the columns, by 'user', 'item', 'time' and 'rating'; a column that is
        missing here or '' is recognised, see `columns`; the time '-' is the order of the file.
      needs_rating: whether a log without ratings is an error.

    Raises:
      UserError: on any fault of the file, with its name and line.
    """
    source = open_source(path)
    card = {'source': source.name, 'sha256': source.sha256, 'reader': source.kind}
    named = {role: name for role, name in columns.items() if name and name != FILE_ORDER}
    if source.kind == 'txt':
        if needs_rating or named:
            what = 'a sequence file (.txt) has no columns and no ratings; drop those options'
            raise UserError(f'{source.place}: {what}, or rename the log to .csv or .tsv')
        return _read_sequences(source, card | {'reader': 'sequences', 'order': 'as in the file'})
    table = open_table(source, named)
    for name in table.columns:
        if name.endswith((':token_seq', ':float_seq')):
            fail(source, 1, f'column {show(name)} contains lists; write one action per line')
    lines = source.kind not in ('jsonl', 'ndjson', 'json', 'parquet')
    with_header = lines and table.has_header
    place = f'{source.place}, line 1' if with_header else source.place
    choice = choose_columns(table, columns, needs_rating, place)
    return read_table(table, choice, card, 'file')


def read_table(table: Table, choice: Choice, card: dict, source: str) -> Log:
    """Reads the actions of a table.

    Args:
      table: one action per record.
      choice: its columns.
      card: what is known of the source; the columns, the order and the kinds of ids are added.
      source: 'file' or 'frame', for the card.

    Raises:
      UserError: if a value is missing or is not of the kind that its column needs.
    """
    columns, notes = choice.columns, list(table.notes)
    if table.read_parts:

        def read(name: str) -> pl.Series:
            return table.read([name])[0]

        # One column after the other: only one is in memory with the codes.
        read_ids = table.read_parts
    else:
        read = read_ids = dict(zip(columns.values(), table.read(list(columns.values())))).get
    codes, ids, kinds = {}, {}, {}
    for role in ('user', 'item'):
        other = next((name for name in choice.unused if names.fit(role, name)), '')
        hint = f'name another column (--columns={role}:{other}), or ' if other else ''
        hint += 'drop these records'
        values = read_ids(columns[role])
        try:
            codes[role], ids[role], kinds[role] = encode_ids(table, columns[role], values)
        except UserError as error:
            raise UserError(f'{error}; or {hint}' if other else str(error)) from error
        if not len(codes[role]):
            raise UserError(f'{table.place}: no records after the header; add some')
        notes += check_ids(table.place, role, codes[role], ids[role], hint)
    _refuse_headers(table, columns, codes, ids)
    times, ratings, clock = None, None, Clock()
    order, about = f'as in the {source}: no time column', {}
    if choice.file_order:
        order = f'as in the {source}: chosen by time:{FILE_ORDER}'
    if 'time' in columns:
        found = read_times(table, columns['time'], read(columns['time']))
        times, clock = found.values, found.clock
        order = f'by time, ties as in the {source}'
        about = {'time': {'unit': found.unit, 'first': found.span[0], 'last': found.span[1]}}
    if 'rating' in columns:
        numbers = read_numbers(table, columns['rating'], read(columns['rating']), 'a number')
        ratings = numbers.cast(pl.Float64).to_numpy()
    card = {
        **card,
        'lines': table.lines,
        'columns': dict(columns),
        'guessed': choice.guessed,
        'unused': choice.unused,
        'order': order,
        **about,
        'id_kinds': kinds,
        'notes': notes,
    }
    return Log(
        *(table.place, codes['user'], codes['item'], ids['user'], ids['item']),
        *(times, ratings, card, clock),
    )


def _refuse_headers(
    table: Table,
    columns: Mapping[str, str],
    codes: Mapping[str, np.ndarray],
    ids: Mapping[str, list[str]],
) -> None:
    """Raises a UserError if a record has the names of the columns, as in files that were joined."""
    if all(columns[role] in ids[role] for role in ('user', 'item')):
        user, item = (codes[role] == ids[role].index(columns[role]) for role in ('user', 'item'))
        if (user & item).any():
            place = f'{table.place}, {table.locate(int((user & item).argmax()))}'
            raise UserError(f'{place}: the names of the columns again; delete such lines')


def _read_sequences(source: Source, card: dict) -> Log:
    """Reads lines of `user item item ...`, separated by blanks, oldest item first."""
    lines: dict[bytes, int] = {}
    histories = []
    for number, line in enumerate(read_text(source).split(b'\n'), start=1):
        user, *items = line.split() or [b'']
        if not user:
            continue
        if not items:
            advice = (
                'rename a log with columns to .csv or .tsv' if b',' in user else 'delete the line'
            )
            fail(source, number, f'user {show(user.decode())} has no items; {advice}')
        if user in lines:
            what = f'user {show(user.decode())} is on line {lines[user]} already'
            advice = 'write one line per user, or rename a log with columns to .csv or .tsv'
            fail(source, number, f'{what}; {advice}')
        lines[user] = number
        histories.append(items)
    codes: dict[bytes, int] = {}
    flat = itertools.chain.from_iterable(histories)
    items = np.array([codes.setdefault(item, len(codes)) for item in flat], np.int64)
    users = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    user_ids, item_ids = ([token.decode() for token in tokens] for tokens in (lines, codes))
    notes = check_ids(source.place, 'item', items, item_ids, 'drop these items')
    card = card | {'id_kinds': {'user': 'str', 'item': 'str'}, 'notes': notes}
    card['lines'] = read_text(source).count(b'\n') + 1
    return Log(source.place, users, items, user_ids, item_ids, None, None, card)
