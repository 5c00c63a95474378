"""JSON lines, Python dicts on lines, and JSON arrays: objects, and columns of text or numbers."""

import ast
import contextlib
import io
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from fame_jax.data.sources import Source, fail, locate, read_text, show
from fame_jax.errors import UserError

if TYPE_CHECKING:  # item texts need no polars
    import polars as pl

    from fame_jax.data.tables import Table

# JSON may escape half of a UTF-16 pair, which UTF-8 text cannot contain.
HALF = re.compile('[\ud800-\udfff]')
BLOCK = 1024  # lines that are parsed in one call, which is faster than one by one


class Objects(NamedTuple):
    """Some of a file's objects, and for each the number of its line, or in an array its own."""

    numbers: list[int]
    records: list[dict]


def open_json(source: Source) -> 'Table':
    """Opens a log of objects; its columns are the keys of all objects.

    A column is int64 where all its values are integers of 64 bits, else text, in which numbers are
    written as Python writes them: 12.0 is '12.0'. A key that an object lacks is null there.

    Raises:
      UserError: on a line that is no object, and a name that is no text.
    """
    from fame_jax.data.tables import Table

    numbers: list[int] = []
    columns: dict[str, list[tuple[int, pl.Series]]] = {}
    faults: dict[str, tuple[int, str]] = {}
    for block in read_objects(source):
        for name in list_keys(block.records):
            if HALF.search(name):
                record = next(n for n, record in enumerate(block.records) if name in record)
                what = f'the name {show(name)} contains half a character; correct it'
                _fail(source, block.numbers[record], what)
            fault, part = _to_series([record.get(name) for record in block.records])
            if fault:
                record, what = fault
                faults.setdefault(name, (block.numbers[record], what))
            columns.setdefault(name, []).append((len(numbers), part))
        numbers += block.numbers
    if not numbers:
        raise UserError(f'{source.place}: an empty array; write or copy it again')

    def read(names: list[str]) -> list['pl.Series']:
        for name in names:
            if name in faults:
                number, what = faults[name]
                _fail(source, number, f'{show(name)} {what}; correct it or choose another column')
        return [_join(columns[name], len(numbers)) for name in names]

    def sample(names: list[str], count: int) -> list['pl.Series']:
        # Other columns than those that are read may hold lists.
        known = [columns[name] if name not in faults else [] for name in names]
        return [_join(parts, len(numbers)).head(count) for parts in known]

    def count_missing(name: str) -> tuple[int, int]:
        return _join(columns[name], len(numbers)).null_count(), len(numbers)

    return Table(
        source.place,
        list(columns),
        read,
        lambda record: locate_object(source, numbers[record]),
        lines=None if _is_array(source) else read_text(source).count(b'\n') + 1,
        sample=sample,
        count_missing=count_missing,
    )


def read_objects(source: Source) -> Iterator[Objects]:
    """Yields the objects of a file in blocks.

    Raises:
      UserError: on a line that is no object, in JSON or as Python writes a dict.
    """
    if _is_array(source):
        records = _read_array(source)
        yield Objects(list(range(1, len(records) + 1)), records)
        return
    numbers, lines = [], []
    for number, line in enumerate(io.BytesIO(read_text(source)), start=1):
        line = line.strip()
        if line:
            numbers.append(number)
            lines.append(line)
        if len(lines) == BLOCK:
            yield Objects(numbers, _parse_block(source, numbers, lines))
            numbers, lines = [], []
    if lines:
        yield Objects(numbers, _parse_block(source, numbers, lines))


def locate_object(source: Source, number: int) -> str:
    """Returns the place of an object in its file, such as 'line 12'."""
    return f'object {number}' if _is_array(source) else locate(source, number)


def list_keys(records: list[dict]) -> list[str]:
    """Returns the keys of all records, in the order in which they first appear."""
    # Most records have the same keys.
    shapes = dict.fromkeys(map(tuple, records))
    return list(dict.fromkeys(name for shape in shapes for name in shape))


def _is_array(source: Source) -> bool:
    return re.match(rb'\s*\[', read_text(source)) is not None


def _fail(source: Source, number: int, what: str) -> NoReturn:
    raise UserError(f'{source.place}, {locate_object(source, number)}: {what}')


def _read_array(source: Source) -> list[dict]:
    try:
        text = read_text(source)
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, 'lineno', 1)
        fail(source, line, 'not JSON; correct it, or write one object per line without brackets')
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            what = f'{show(record)} is not a JSON object'
            _fail(source, number, f'{what}; write [{{"user": ..., "item": ..., ...}}, ...]')
    if not _has_each_key_once(text, records):
        for number, pairs in enumerate(json.loads(text, object_pairs_hook=tuple), start=1):
            _refuse_two_values(source, number, pairs)
    return records


def _parse_block(source: Source, numbers: list[int], lines: list[bytes]) -> list[dict]:
    # Zeros and newlines stand between the lines, so that no object can begin on one line and end
    # on another.
    text = b'[' + b',\n0,\n'.join(lines) + b']'
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = []
    records, zeros = values[::2], values[1::2]
    if len(records) != len(lines) or any(zeros) or set(map(type, records)) != {dict}:
        records = [_parse(source, number, line) for number, line in zip(numbers, lines)]
    if not _has_each_key_once(text, records):
        for number, line in zip(numbers, lines):
            with contextlib.suppress(ValueError):  # a dict of Python, see `_parse_literal`
                _refuse_two_values(source, number, json.loads(line, object_pairs_hook=tuple))
    return records


def _has_each_key_once(text: bytes, records: list[dict]) -> bool:
    """Whether a text has no more keys than its objects; may be false where objects are nested."""
    spaced = any(sign in text for sign in (b'" ', b'"\t', b'"\n', b'"\r'))
    found = len(re.findall(rb'"\s*:', text)) if spaced else text.count(b'":')
    return found == sum(map(len, records))


def _refuse_two_values(source: Source, number: int, pairs: Iterable[tuple[object, object]]) -> None:
    first: dict[object, object] = {}
    for name, value in pairs:
        if first.setdefault(name, value) != value:
            _fail(source, number, f'{show(name)} occurs twice with different values; delete one')


def _parse(source: Source, number: int, line: bytes) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = _parse_literal(source, number, line)
    if record is None:
        shown = show(line[:40].decode(errors='replace'))
        fail(source, number, f'not JSON: {shown}; correct or delete the line')
    if not isinstance(record, dict) or not all(isinstance(name, str) for name in record):
        what = 'not a JSON object'
        fail(source, number, f'{what}; write each line as {{"user": ..., "item": ..., ...}}')
    return record


def _parse_literal(source: Source, number: int, line: bytes) -> object:
    """Returns a dict as Python writes it, as in data of Steam and of Amazon in 2014, or None."""
    if re.search(rb'\b0[xXoObB]\w{3000}', line):
        return None  # Python reads such an integer, but does not write it
    try:
        with warnings.catch_warnings():
            # Texts have backslashes that do not begin an escape sequence.
            warnings.simplefilter('ignore')
            tree = ast.parse(line.decode(), mode='eval').body
            value = ast.literal_eval(tree)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if isinstance(tree, ast.Dict) and len(tree.keys) > len(value):
        names = map(ast.literal_eval, tree.keys)
        _refuse_two_values(source, number, zip(names, map(ast.literal_eval, tree.values)))
    return value


def _to_series(values: list) -> tuple[tuple[int, str] | None, 'pl.Series']:
    """Returns int64 or text, and the index of the first value that is neither, and what it is."""
    import polars as pl

    kinds = set(map(type, values))
    if kinds <= {int, type(None)}:
        integers = [value for value in values if value is not None] or [0]
        if min(integers) >= -(2**63) and max(integers) < 2**63:
            return None, pl.Series(values, dtype=pl.Int64)
    if kinds <= {str, int, float, type(None)}:
        try:
            texts = [v if v is None or type(v) is str else str(v) for v in values]
            return None, pl.Series(texts, dtype=pl.String)
        except UnicodeEncodeError:
            pass
    for record, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, str | int | float | None):
            return (record, f'is {show(value)}, not text or a number'), pl.Series()
        if isinstance(value, str) and HALF.search(value):
            return (record, f'contains half a character: {show(value)}'), pl.Series()
    raise AssertionError('a value that is no fault')


def _join(parts: list[tuple[int, 'pl.Series']], count: int) -> 'pl.Series':
    """Returns a column of parts that begin at these records, null between them."""
    import polars as pl

    dtype = pl.Int64 if all(part.dtype == pl.Int64 for _, part in parts) else pl.String
    joined, end = [], 0
    for begin, part in [*parts, (count, pl.Series(dtype=dtype))]:
        if begin > end:
            joined.append(pl.repeat(None, begin - end, dtype=dtype, eager=True))
        joined.append(part.cast(dtype))
        end = begin + len(part)
    return pl.concat(joined)
