"""The form of a text by its content: histories, pairs, a table; a header or data in line 1."""

import io
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from fame_jax.data import names

SAMPLE = 100  # lines that are looked at where a form shows in every line
MOST_TABS = 7  # a line with more tabs is a history even where all lines have as many
NUMBER = re.compile(r'\s*[-+]?(\d+[.,]?\d*|[.,]\d+)([eE][-+]?\d+)?\s*')
DATE = re.compile(r'\s*(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4})\b.*')
QUOTED = re.compile(r'"[^"]*"|\'[^\']*\'')
BLANKS = r'[ \t\r\v\f]+'
MISSING = ('', 'na', 'n/a', 'nan', 'null', 'none', '-', '?')
ADVICE = 'write each line as `user item item ...`, separated by blanks'


class Form(NamedTuple):
    """The form of a text.

    Fields:
      kind: 'txt' for histories (`user item item ...`), 'pairs' (`user item`), 'blanks' (a table
        separated by blanks), 'csv' (by commas, semicolons or bars), 'tsv', 'dat', 'jsonl'.
      line, fault: the first line that is none of these, and what it is; '' if there is none.
    """

    kind: str
    line: int = 0
    fault: str = ''


def find_form(text: bytes) -> Form:
    """Returns the form of a text whose name (.txt) does not tell it.

    A text is a table where its first line has names of columns, or where every line has the same
    separators; it is pairs where every line has two fields and a user has several lines.
    """
    sample = [line.decode() for _, line in islice(_split_lines(text), SAMPLE)]
    first = sample[0]
    if first[:1] == '{':
        return Form('jsonl')
    fault = _find_comment(sample)
    table = '' if fault else _find_table(first, sample)
    if table:
        return Form(table)
    fault = fault or _find_punctuation(sample)
    if fault:
        return Form('txt', next(_split_lines(text))[0], fault)
    return Form(_find_repeats(text))


def is_data(first: Sequence[str], others: Sequence[Sequence[str]]) -> bool:
    """Whether the first record has a number or date in a column where all others have one."""
    if names_log(first):
        return False
    columns = range(len(first))
    return any(is_number(first[c]) and all(_fits(row, c) for row in others) for c in columns)


def is_header(first: Sequence[str], others: Sequence[Sequence[str]]) -> bool:
    """Whether the first record has a usual name of a column, or words above numbers."""
    return bool(find_roles(first)) or has_words_above_numbers(first, others)


def has_words_above_numbers(first: Sequence[str], others: Sequence[Sequence[str]]) -> bool:
    """Whether the first record has a word in a column where all others have a number or date."""
    wordy = [c for c in range(len(first)) if not is_number(first[c]) and not _is_missing(first[c])]
    return bool(others) and any(all(_fits(row, c) for row in others) for c in wordy)


def is_number(text: str) -> bool:
    """Whether a field is a number or begins with a date."""
    return bool(NUMBER.fullmatch(text) or DATE.fullmatch(text))


def find_roles(fields: Sequence[str]) -> set[str]:
    """Returns the roles ('user', 'item', 'time') that have a field with a usual name."""
    words = [field.strip().strip('"') for field in fields]
    roles = {role for role in ('user', 'item') if any(names.fit(role, word) for word in words)}
    return roles | ({'time'} if any(names.time_name(word) == 'time' for word in words) else set())


def names_log(fields: Sequence[str]) -> bool:
    """Whether there are usual names of both the user and the item."""
    return {'user', 'item'} <= find_roles(fields)


def _is_missing(field: str) -> bool:
    return field.strip().strip('"').lower() in MISSING


def _fits(row: Sequence[str], column: int) -> bool:
    return column < len(row) and (is_number(row[column]) or _is_missing(row[column]))


def _split_lines(text: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields (line, its content) of the lines that are not blank."""
    for number, line in enumerate(io.BytesIO(text), start=1):
        if line.strip():
            yield number, line.strip()


def _split(line: str) -> list[str]:
    """Splits at blanks as `bytes.split` does, and not at those of Unicode."""
    return re.split(BLANKS, line)


def _find_table(first: str, sample: list[str]) -> str:
    """Returns the kind of a table, '' if the text is none."""
    for separator, kind in (('::', 'dat'), ('\t', 'tsv'), (',', 'csv'), (';', 'csv'), ('|', 'csv')):
        count = first.count(separator)
        if not count:
            continue
        if names_log(first.split(separator)):
            return kind
        counts = {line.count(separator) for line in sample}
        if separator == '\t':
            if min(counts) >= 2 and any(' ' in line for line in sample):
                return kind
            if len(sample) > 1 and counts == {count} and 2 <= count <= MOST_TABS:
                return kind
        # In histories separated by blanks no id has the same punctuation on every line.
        elif counts == {count} and all(separator in _split(line)[0][:-1] for line in sample):
            return kind
    header, *others = map(_split, sample)
    even = len(header) > 2 and all(len(row) == len(header) for row in others)
    wordy = even and not any(map(is_number, header))  # ids are among the names of no table
    if names_log(header) or (wordy and has_words_above_numbers(header, others)):
        return 'blanks'
    return ''


def _find_comment(sample: list[str]) -> str:
    marks = [line.startswith(('#', '%', '//')) for line in sample]
    return 'a comment; delete the line' if marks[0] and not all(marks) else ''


def _find_punctuation(sample: list[str]) -> str:
    """Returns a fault where every line of the sample has the punctuation of another format."""
    lines = [re.split(BLANKS, line, maxsplit=1) for line in sample]
    if len(lines) > 1 and names.fit('user', lines[0][0]) and not NUMBER.search(sample[0]):
        return 'looks like names; delete the line, as histories have no header'
    if all(QUOTED.fullmatch(field) for line in sample for field in _split(line)):
        return f'ids in quotes; {ADVICE}'
    if all(line[0][0] == '[' for line in lines):
        return f'items in brackets; {ADVICE}'
    if all(len(line) == 1 and ',' in line[0] for line in lines):
        return f'separated by commas; {ADVICE}'
    if all(line[0].endswith(':') for line in lines):
        return f'user {lines[0][0][:40]!r} ends with a colon; {ADVICE}'
    if all(line[0].endswith(',') for line in lines):
        return f'separated by commas; {ADVICE}'
    rest = [line[1] for line in lines if len(line) > 1]
    if rest and all(items[0] in '[(' and items[-1] in '])' for items in rest):
        return f'items in brackets; {ADVICE}'
    if rest and all(items.count(',') and _is_list(items) for items in rest):
        return f'items separated by commas; {ADVICE}'
    return ''


def _is_list(items: str) -> bool:
    """Whether items are `5,30,7` or `5, 30, 7`."""
    tokens = _split(items)
    return len(tokens) == 1 or all(token.endswith(',') for token in tokens[:-1])


def _find_repeats(text: bytes) -> str:
    """Returns 'pairs' or 'blanks' where all lines have as many fields and users repeat."""
    width, users, repeated = 0, set(), False
    for line in io.BytesIO(text):
        fields = line.split()
        width = width or len(fields)
        if len(fields) != width or width < 2:
            if fields:
                return 'txt'
            continue
        repeated = repeated or fields[0] in users
        users.add(fields[0])
    if not repeated:
        return 'txt'
    return 'pairs' if width == 2 else 'blanks'
