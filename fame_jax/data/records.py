"""Records of a text table: where they end, and what quotes mean in them."""

import re
from collections.abc import Iterable
from typing import NamedTuple, NoReturn

import numpy as np
import polars as pl

from fame_jax.data.sources import BLOCK, Source, fail

QUOTE, NEWLINE, BLANK = b'"\n '
ENCLOSED = '^ *"((?:[^"]|"")*)" *$'  # a field in quotes; quotes inside are doubled
# Lines of a record that look like records, before its quotes are doubted.
LOOK_ALIKE, LOOK_ALIKE_WITHOUT_NUMBERS = 3, 10


class Layout(NamedTuple):
    """Records of a text. Those without any character but separators are empty.

    Fields:
      widths: the number of fields of each record, int32 [A].
      empty: bool [A].
      lines: the line, from 0, on which each record begins, [A].
      ends: position of the end of each record, int64 [A].
      blanks: positions of single blanks between a separator and a quote.
      fault: position of the first quote that neither begins nor ends a field, or -1.
    """

    widths: np.ndarray
    empty: np.ndarray
    lines: np.ndarray | range
    ends: np.ndarray
    blanks: np.ndarray
    fault: int


class Records(NamedTuple):
    """A text that is divided into records.

    Fields:
      source, text: one file, and its text where it has been simplified.
      separator: one character.
      quoted: whether quotes may enclose separators and newlines.
      layout: the records.
      notes: quotes that are read as characters.
    """

    source: Source
    text: bytes
    separator: str
    quoted: bool
    layout: Layout
    notes: tuple[str, ...] = ()


def divide(source: Source, text: bytes) -> Records:
    """Finds separator and quoting, and checks the width of every record.

    Raises:
      UserError: on a record of another width, and on quotes without a certain meaning.
    """
    text, separator = _find_separator(source, text)
    by_line = scan(text, separator, quoted=False)
    if by_line.empty[0] or not text.partition(b'\n')[0].strip():
        fail(source, 1, 'blank; put the names of the columns there')
    wrong = _find_wrong(text, by_line)
    plain = Records(source, text, separator, False, by_line)
    if source.kind == 'inter' or b'"' not in text:
        # RecBole's files have no quoting: a quote there is part of the text.
        return plain if not wrong.any() else _fail_width(plain, wrong)
    by_quotes = scan(text, separator, quoted=True)
    if by_quotes.fault < 0 and len(by_quotes.blanks):
        text = np.delete(np.frombuffer(text, np.uint8), by_quotes.blanks).tobytes()
        by_quotes = scan(text, separator, quoted=True)
    quoted = Records(source, text, separator, True, by_quotes)
    wrong_quoted = _find_wrong(text, by_quotes)
    right = by_quotes.fault < 0 and not wrong_quoted.any()
    spans = right and len(by_quotes.widths) < len(by_line.widths)
    if right and not spans:
        return quoted
    if not wrong.any():
        if spans and _fit_better(quoted, plain):
            return quoted
        return plain._replace(notes=_note_quotes(plain))
    if right:
        _check_spans(quoted, plain, wrong)
        return quoted
    if by_quotes.fault < 0 and wrong_quoted.sum() < wrong.sum():
        _fail_width(quoted, wrong_quoted)
    if by_quotes.fault >= 0 and QUOTE in _get(plain, int(np.argmax(wrong))):
        line = text.count(b'\n', 0, by_quotes.fault) + 1
        fail(
            source,
            line,
            'text after a closing quote, or a quote that never closes; correct the quotes',
        )
    return _fail_width(plain, wrong)


def scan(text: bytes, separator: str, quoted: bool) -> Layout:
    """Finds the records of a text, and the fields of each, block by block.

    Args:
      text: lines; the last has no newline.
      separator: one character.
      quoted: whether newlines and separators between quotes belong to a field.
    """
    view, comma = np.frombuffer(text, np.uint8), ord(separator)
    widths, ends, lines, blanks, fault = [], [], [0], [], -1
    fields, inside, line = 0, np.uint8(0), 0
    for start in range(0, len(view), BLOCK):
        block = view[start : start + BLOCK]
        newline, between = block == NEWLINE, block == comma
        if quoted:
            quotes = block == QUOTE
            within = np.bitwise_xor.accumulate(quotes.view(np.uint8)) ^ inside
            inside, places = within[-1], np.flatnonzero(quotes)
            around, wrong = _find_neighbours(view, places + start, within[places] == 1, comma)
            blanks.append(around)
            fault = wrong if fault < 0 else fault
            feeds = np.flatnonzero(newline)
            newline, between = newline & (within == 0), between & (within == 0)
        stops, commas = np.flatnonzero(newline), np.flatnonzero(between)
        before = np.searchsorted(commas, stops)
        found = np.diff(before, prepend=0)
        if len(stops):
            found[0] += fields
            fields = -before[-1]
        fields += len(commas)
        widths.append(found.astype(np.int32) + 1)
        ends.append(stops + start)
        if quoted:
            lines.append(np.searchsorted(feeds, stops) + 1 + line)
            line += len(feeds)
    if inside and fault < 0:
        fault = text.rfind(b'"')
    widths = np.concatenate([*widths, [fields + 1]]).astype(np.int32)
    ends = np.concatenate([*ends, [len(view)]])
    empty = np.diff(ends, prepend=-1) == widths
    starts = np.hstack(lines) if quoted else range(len(ends))
    return Layout(widths, empty, starts, ends, np.hstack([*blanks, []]).astype(int), fault)


def _find_neighbours(
    view: np.ndarray, quotes: np.ndarray, opens: np.ndarray, comma: int
) -> tuple[np.ndarray, int]:
    """Returns the blanks between a separator and a quote, and the first quote out of place, or -1.

    A quote that opens stands at the start of a field, one that closes at its end; or next to
    another quote, in a pair that stands for one.
    """
    step = np.where(opens, -1, 1)

    def ends_field(places: np.ndarray) -> np.ndarray:
        byte = view[np.clip(places, 0, len(view) - 1)]
        return (places < 0) | (places >= len(view)) | (byte == comma) | (byte == NEWLINE)

    near = quotes + step
    byte = view[np.clip(near, 0, len(view) - 1)]
    blank = (byte == BLANK) & ~ends_field(near) & ends_field(near + step)
    good = ends_field(near) | (byte == QUOTE) | blank
    return near[blank], -1 if good.all() else int(quotes[np.argmin(good)])


def _find_separator(source: Source, text: bytes) -> tuple[bytes, str]:
    """Returns the separator, and the text with one character in place of '::' and of blanks."""
    first = re.sub('"[^"]*"', '', text.partition(b'\n')[0].decode())
    by_name = ',' if source.kind == 'csv' else '\t'
    if source.kind == 'inter' or (source.kind != 'csv' and by_name in first):
        return text, by_name
    if source.kind not in ('blanks', 'pairs'):
        if '::' in first and b'\t' not in text:
            return text.replace(b'::', b'\t'), '\t'
        found = max(by_name + ',\t;|', key=first.count)
        if found in first or source.kind in ('csv', 'tsv'):
            return text, found
    for blank, other in ((b' ', b'\t'), (b'\t', b' ')):
        uneven = (other, blank * 2, blank + b'\n', b'\n' + blank, b'\r', b'\v', b'\f')
        if text == text.strip() and not any(sign in text for sign in uneven):
            return text, blank.decode()
    return re.sub(rb'(?m)^\t|\t$', b'', re.sub(rb'[ \t\r\v\f]+', b'\t', text)), '\t'


def _find_wrong(text: bytes, layout: Layout) -> np.ndarray:
    """Returns whether each record has another width than the first, bool [A].

    Records of blanks alone are marked as empty.
    """
    wrong = (layout.widths != layout.widths[0]) & ~layout.empty
    view = np.frombuffer(text, np.uint8)
    records = np.flatnonzero(wrong)
    records = records[np.isin(view[layout.ends[records] - 1], list(b' \t'))]
    for record in records:
        if not text[layout.ends[record - 1] + 1 : layout.ends[record]].strip(b' \t'):
            wrong[record], layout.empty[record] = False, True
    wrong |= layout.empty & (layout.widths > layout.widths[0])
    return wrong


def _get(records: Records, record: int) -> bytes:
    ends = records.layout.ends
    return records.text[ends[record - 1] + 1 if record else 0 : ends[record]]


def _fail_width(records: Records, wrong: np.ndarray) -> NoReturn:
    record = int(np.argmax(wrong))
    width, expected = records.layout.widths[record], records.layout.widths[0]
    fields = 'field' if width == 1 else 'fields'
    what = f'{width} {fields} where line 1 has {expected}; correct the line'
    fail(records.source, int(records.layout.lines[record]) + 1, what)


def _fit_better(quoted: Records, plain: Records) -> bool:
    """Whether records with quoted newlines are certain where lines have the right width too.

    Columns of numbers decide: in a wrong reading, a part of a text stands in such a column, or a
    number in a text.

    Raises:
      UserError: if there are no such columns.
    """
    by_line, by_quotes = _find_numbers(plain), _find_numbers(quoted)
    if by_quotes - by_line:
        return True
    if by_line:
        return False
    return _fail_span(quoted, int(np.argmax(_count_lines(quoted) > 1)))


def _find_numbers(records: Records) -> set[int]:
    """Returns the columns that have numbers in all records after the first."""
    width = int(records.layout.widths[0])
    frame = parse(records, range(width)).filter(pl.Series(~records.layout.empty)).slice(1)
    numbers = frame.select(_to_number(pl.all()))
    return {place for place, column in enumerate(numbers) if len(column) > column.null_count() == 0}


def _to_number(text: pl.Expr) -> pl.Expr:
    return text.str.strip_chars().cast(pl.Float64, strict=False)


def _check_spans(quoted: Records, plain: Records, wrong: np.ndarray) -> None:
    """Raises a UserError if quoted fields with newlines enclose lines that look like records.

    A line looks like a record if it has as many fields, and numbers in the columns where all
    records have numbers.

    Args:
      quoted: records by RFC 4180, all of one width.
      plain: the lines.
      wrong: whether each line has another width, bool [lines].
    """
    numbers = _find_numbers(quoted)
    if numbers:
        fields = _read_frame(plain, numbers).select(_to_number(pl.all()).is_not_null())
        wrong = wrong | ~fields.select(pl.all_horizontal(pl.all())).to_series().to_numpy()
    counts = _count_lines(quoted)
    begins = np.asarray(quoted.layout.lines)
    before = np.concatenate([[0], np.cumsum(wrong)])
    # Of the lines of a record after its first.
    wrongs = before[begins + counts] - before[begins + 1]
    rights = counts - 1 - wrongs
    least = LOOK_ALIKE if numbers else LOOK_ALIKE_WITHOUT_NUMBERS
    doubtful = (rights >= least) & (rights > wrongs)
    if rights.sum() > wrongs.sum() + wrong[begins[1:]].sum():
        doubtful = rights > 0
    if doubtful.any():
        _fail_span(quoted, int(np.argmax(doubtful)))


def _count_lines(records: Records) -> np.ndarray:
    """Returns the number of lines of each record, int64 [A]."""
    lines = records.text.count(b'\n') + 1
    return np.diff(np.asarray(records.layout.lines), append=lines)


def _fail_span(records: Records, record: int) -> NoReturn:
    begin = int(records.layout.lines[record]) + 1
    end = begin + int(_count_lines(records)[record]) - 1
    what = f'a quote opens here and closes on line {end}, over lines that may be records'
    fail(records.source, begin, f'{what}; double lone quotes, or remove them')


def _note_quotes(records: Records) -> tuple[str, ...]:
    """Says how many fields hold a lone quote that is read as a character.

    Raises:
      UserError: on such a field in a column in which most fields are enclosed in quotes.
    """
    frame = _read_frame(records, range(int(records.layout.widths[0])))
    texts = pl.all().fill_null('').str
    enclosed = frame.select(texts.contains(ENCLOSED))
    lone = frame.select(texts.contains('"', literal=True) & ~texts.contains(ENCLOSED))
    count, first = 0, frame.height
    for place, (fields, others) in enumerate(zip(lone, enclosed), start=1):
        if not fields.any():
            continue
        record = int(fields.arg_max())
        if 2 * others.sum() >= frame.height:  # line 1 may be a header
            line = int(records.layout.lines[record]) + 1
            what = f'a lone quote in column {place}, where most fields are enclosed in quotes'
            fail(records.source, line, f'{what}; correct the quotes')
        count, first = count + fields.sum(), min(first, record)
    if not count:
        return ()
    line = int(records.layout.lines[first]) + 1
    return (f'fields with a lone quote, read as a character: {count:,}, the first on line {line}',)


def _read_frame(records: Records, places: Iterable[int], rows: int | None = None) -> pl.DataFrame:
    width = int(records.layout.widths[0])
    return pl.read_csv(
        records.text,
        has_header=False,
        separator=records.separator,
        quote_char='"' if records.quoted else None,
        schema={f'column_{place + 1}': pl.String for place in range(width)},
        columns=sorted(set(places)),
        n_rows=rows,
        truncate_ragged_lines=True,  # `divide` has checked the widths
    )


def parse(records: Records, places: Iterable[int], rows: int | None = None) -> pl.DataFrame:
    """Returns text columns named column_1, column_2, ..., a row for every record.

    Args:
      records: the text.
      places: indices of the wanted columns.
      rows: the number of records from the first, None for all.
    """
    frame = _read_frame(records, places, rows)
    if records.quoted or records.source.kind == 'inter' or b'"' not in records.text:
        return frame
    inside = {
        name: pl.col(name).str.extract(ENCLOSED).str.replace_all('""', '"', literal=True)
        for name in frame.columns
    }
    return frame.with_columns(pl.coalesce(text, name).alias(name) for name, text in inside.items())
