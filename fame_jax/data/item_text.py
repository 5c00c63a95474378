"""What is written about the items of a catalogue, and the facets it tells."""

import os
from collections.abc import Sequence
from typing import NamedTuple

from fame_jax.data.facets import Facet, build_facet
from fame_jax.data.item_fields import TEXT_FIELDS, find_field, read_labels, read_texts
from fame_jax.data.item_records import Records, find_id, read_records
from fame_jax.data.sources import show
from fame_jax.errors import UserError


class ItemText(NamedTuple):
    """Texts and labels of V items, by item id.

    Fields:
      texts: V + 1 texts, '' for the padding and where there is none.
      titles: V + 1 titles for a person to read, '' where unknown.
      facets: one for each that was asked for.
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
    rarest: int = 2,
    commonest: float = 0.3,
) -> ItemText:
    """Reads a file that describes items, and lays it beside the catalogue.

    Items without a record have no text and no labels; records beyond the catalogue are left out
    and count for nothing. Both are counted in the card.

    Args:
      path: JSON lines, CSV, TSV, Parquet, RecBole's .item, or MovieLens' files or .zip.
      item_ids: V + 1 outside ids, entry 0 ''.
      text_fields: fields that make up the text, in this order; none: TEXT_FIELDS, those there are.
      facets: names in item_fields.FACETS, or fields; 'a+b' is one facet with the labels of both.
      id_column: the field with the id; empty: guess.
      rarest: labels held by fewer items are dropped.
      commonest: labels held by a larger share of the items are dropped.

    Raises:
      UserError: on whatever is wrong with the file, or if a facet has fewer than two labels.
    """
    records = read_records(path)
    id_field, tokens = find_id(records, item_ids, id_column)
    rows = _match(records, id_field, tokens, item_ids)
    fields = _choose_fields(records, text_fields)
    known = [row for row in rows if row >= 0]
    matched = records._replace(
        rows=[records.rows[row] for row in known], locate=lambda at: records.locate(known[at])
    )
    parts = {name: read_texts(matched, name) for name in fields}
    texts = _spread(rows, [_join(part) for part in zip(*parts.values())], '')
    if not any(texts):
        what = f'no text in {", ".join(map(show, fields))} of any item; name other text fields'
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
        'matched': len(known),
        'items_without_record': len(rows) - 1 - len(known),
        'records_beyond': len(set(tokens).difference(item_ids)),
        'items_without_text': texts[1:].count(''),
        'facets': [facet.card for facet in built],
    }
    return ItemText(texts, titles, tuple(built), card)


def _choose_fields(records: Records, wanted: Sequence[str]) -> list[str]:
    fields = list(wanted) or [name for name in TEXT_FIELDS if find_field(records, name)]
    if not fields:
        what = f'none of the text fields {", ".join(TEXT_FIELDS)}'
        found = ', '.join(map(show, records.fields[:20]))
        raise UserError(f'{records.source.place}: {what}; found {found}; name text fields')
    return fields


def _spread(rows: list[int], values: list, empty: object) -> list:
    """Returns each item's value, of values in the order of the items that have a record."""
    following = iter(values)
    return [next(following) if row >= 0 else empty for row in rows]


def _match(records: Records, field: str, tokens: list[str], item_ids: list[str]) -> list[int]:
    """Returns the number of each item's record, -1 for the padding and where there is none."""
    numbers = {token: item for item, token in enumerate(item_ids) if item}
    rows = [-1] * len(item_ids)
    for row, token in enumerate(tokens):
        item = numbers.get(token, 0)
        if not item:
            continue
        if rows[item] >= 0 and records.rows[rows[item]] != records.rows[row]:
            first, second = records.locate(rows[item]), records.locate(row)
            what = f'item {show(token)} is described on {first} already, and otherwise'
            raise UserError(f'{records.source.place}, {second}: {what}; delete one of them')
        rows[item] = row if rows[item] < 0 else rows[item]
    if max(rows) < 0:
        what = f'no item of the data set is here: its ids are like {show(item_ids[-1])}'
        how = f'those in {show(field)} like {show(tokens[0])}'
        raise UserError(f'{records.source.place}: {what}, {how}; name the right file or id column')
    return rows


def _join(parts: tuple[str, ...]) -> str:
    """Joins fields as sentences; a full stop that is there already is not doubled."""
    there = [part for part in parts if part]
    return '. '.join([*(part.removesuffix('.') for part in there[:-1]), *there[-1:]])
