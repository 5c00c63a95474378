"""Reads a file about items: their texts, titles and facet labels, in the order of the catalogue."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fame_jax.data.sources import show
from fame_jax.errors import UserError
from fame_jax.text.facets import Facet, build_facet
from fame_jax.text.item_fields import TEXT_FIELDS, find_field, read_labels, read_texts
from fame_jax.text.item_files import Records, find_id, read_records


class ItemText(NamedTuple):
    """Texts and labels of V items, by item id.

    Fields:
      texts: V + 1 texts; '' for padding and for items without one.
      titles: V + 1 titles to show to people; '' where unknown.
      facets: the facets that were named, in that order.
      card: file, SHA-256, reader, fields and counts.
    """

    texts: list[str]
    titles: list[str]
    facets: tuple[Facet, ...]
    card: dict


def read(
    path: str | os.PathLike,
    item_ids: list[str],
    text_fields: Sequence[str] = (),
    facets: Sequence[str] = (),
    *,
    id_column: str = '',
    log_column: str = '',
    rarest: int = 2,
    commonest: float = 0.3,
) -> ItemText:
    """Reads a file about items and aligns its records with the catalogue.

    Items without a record have no text and no labels. Records of items outside the catalogue are
    ignored. The card counts both.

    Args:
      path: JSON lines, CSV, TSV, Parquet, RecBole's .item, or a MovieLens file or .zip.
      item_ids: the V + 1 ids of the interaction log; entry 0 is ''.
      text_fields: the fields of a text, in this order; empty: those of TEXT_FIELDS in the file.
      facets: names in item_fields.FACETS, or fields; 'a+b' merges the labels of two facets.
      id_column, log_column: the field with the item id, and the item column of the log, as in
        `item_files.find_id`; `id_columns` gives both.
      rarest: labels with fewer items are dropped.
      commonest: labels that a larger share of the items has are dropped.

    Raises:
      UserError: when the file cannot be read, does not fit the catalogue, has no text, or leaves a
        facet with fewer than two labels.
    """
    records = read_records(path)
    id_field, tokens = find_id(records, item_ids, id_column, log_column)
    rows = _match(records, id_field, tokens, item_ids)
    fields = _choose_fields(records, text_fields)
    used = [row for row in rows if row >= 0]
    matched = records._replace(
        rows=[records.rows[row] for row in used], locate=lambda at: records.locate(used[at])
    )
    parts = {name: read_texts(matched, name) for name in fields}
    texts = _spread(rows, [_join(part) for part in zip(*parts.values())], '')
    if not any(texts):
        what = f'{", ".join(map(show, fields))} have no text for any item; name other --text_fields'
        raise UserError(f'{records.source.place}: {what}')
    has_title = find_field(records, 'title')
    titles = _spread(rows, read_texts(matched, 'title'), '') if has_title else [''] * len(rows)
    built = [
        build_facet(name, _spread(rows, read_labels(matched, name), ()), rarest, commonest)
        for name in facets
    ]
    card = {
        'source': records.source.name,
        'sha256': records.source.sha256,
        'reader': records.reader,
        'id_field': id_field,
        'text_fields': {name: sum(map(bool, part)) for name, part in parts.items()},
        'records': len(records.rows),
        'matched': len(used),
        'items_without_record': len(rows) - 1 - len(used),
        'records_beyond': len(set(tokens).difference(item_ids)),
        'items_without_text': texts[1:].count(''),
        'facets': [facet.card for facet in built],
    }
    return ItemText(texts, titles, tuple(built), card)


def read_titles(
    path: str | os.PathLike,
    item_ids: list[str],
    *,
    id_column: str = '',
    log_column: str = '',
) -> list[str]:
    """Reads the titles of a file about items, V + 1; '' where unknown.

    Args:
      path, item_ids, id_column, log_column: as in `read`.

    Raises:
      UserError: when the file cannot be read, does not fit the catalogue, or has no titles.
    """
    records = read_records(path)
    rows = _match(records, *find_id(records, item_ids, id_column, log_column), item_ids)
    used = records._replace(rows=[records.rows[row] for row in rows if row >= 0])
    return _spread(rows, read_texts(used, 'title'), '')


def id_columns(given: Mapping[str, str], card: Mapping[str, Any]) -> dict[str, str]:
    """Returns the arguments of `read` and `read_titles` by which the item id is found.

    Args:
      given: names of columns by role, those of --columns.
      card: of the data set; its columns have the names of the log.
    """
    log_column = str(card.get('columns', {}).get('item') or given.get('item', ''))
    # The columns of a file without a header are numbers, which are no names.
    log_column = '' if log_column.isdecimal() else log_column
    return {'id_column': given.get('item_file_id', ''), 'log_column': log_column}


def _choose_fields(records: Records, wanted: Sequence[str]) -> list[str]:
    fields = list(wanted) or [name for name in TEXT_FIELDS if find_field(records, name)]
    if not fields:
        what = f'the file has none of the text fields {", ".join(TEXT_FIELDS)}'
        present = ', '.join(map(show, records.fields[:20]))
        raise UserError(
            f'{records.source.place}: {what}; its fields are {present}; name some of them with '
            '--text_fields'
        )
    return fields


def _spread(rows: list[int], values: list, empty: object) -> list:
    """Returns one value for each item: the next of `values` where it has a record, else `empty`."""
    following = iter(values)
    return [next(following) if row >= 0 else empty for row in rows]


def _match(records: Records, field: str, tokens: list[str], item_ids: list[str]) -> list[int]:
    """Returns the index of each item's record; -1 for padding and for items without one."""
    numbers = {token: item for item, token in enumerate(item_ids) if item}
    rows = [-1] * len(item_ids)
    for row, token in enumerate(tokens):
        item = numbers.get(token, 0)
        if not item:
            continue
        if rows[item] >= 0 and records.rows[rows[item]] != records.rows[row]:
            first, second = records.locate(rows[item]), records.locate(row)
            what = f'item {show(token)} has another record on {first}, with other values'
            raise UserError(f'{records.source.place}, {second}: {what}; delete one of the two')
        rows[item] = row if rows[item] < 0 else rows[item]
    if max(rows) < 0:
        what = f'the ids in {show(field)}, such as {show(tokens[0])}, are none of the data set'
        how = f'such as {show(item_ids[-1])}'
        raise UserError(
            f'{records.source.place}: {what}, {how}; name the right file with --items, or its id '
            'column with --columns=item_file_id:NAME'
        )
    return rows


def _join(parts: tuple[str, ...]) -> str:
    """Joins the fields of a text with full stops, without doubling any."""
    present = [part for part in parts if part]
    return '. '.join([*(part.removesuffix('.') for part in present[:-1]), *present[-1:]])
