"""A file of histories: one JSON value per line."""

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fame_jax.errors import UserError, explain_os_errors
from fame_jax.serving.ids import id_text

EXAMPLE = '{"user": "ann", "items": ["7", "12"]} or ["7", "12"]'


class History(NamedTuple):
    """One user's history: the user's id, '' if none is given, and item ids, the oldest first."""

    user: str
    items: list[str]


def read(path: str | Path) -> Iterator[History]:
    """Reads a file line by line; a name that ends in .gz is gzipped. Blank lines are skipped.

    Ids may be whole numbers, which are read as strings. Blanks around an id are no part of it, as
    in a log.

    Raises:
      UserError: if the file cannot be read, or naming the first line that is not a history.
    """
    with _open(Path(path)) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _parse(line, f'{path}, line {number}')


def count(path: str | Path) -> int:
    """The number of lines, blank ones included: an upper bound of the number of histories.

    Raises:
      UserError: if the file cannot be read.
    """
    with _open(Path(path)) as file:
        return sum(1 for _ in file)


def read_ids(path: str | Path) -> list[str]:
    """Reads a file with one item id per line.

    Raises:
      UserError: if the file cannot be read, is not UTF-8, or holds no id.
    """
    with explain_os_errors(f'reading {path}', 'name a file with one item id per line'):
        try:
            # Not by `splitlines`: an id may hold one of Unicode's other ends of line.
            lines = Path(path).read_text(encoding='utf-8-sig').split('\n')
        except UnicodeDecodeError as error:
            raise UserError(f'{path} is not UTF-8 text; write one item id per line') from error
    ids = [line.strip() for line in lines if line.strip()]
    if not ids:
        raise UserError(f'{path} holds no item id; write one per line')
    return ids


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    opener = gzip.open if path.suffix == '.gz' else open
    with explain_os_errors(f'reading {path}', 'name a file with one history per line'):
        try:
            with opener(path, 'rb') as file:
                yield file
        except (EOFError, zlib.error) as error:
            raise UserError(f'{path} is damaged or cut short; write it again') from error


class _TwiceError(ValueError):
    """A key stands twice in a JSON object."""


def _parse(line: bytes, where: str) -> History:
    try:
        value = json.loads(line, object_pairs_hook=_unique)
    except _TwiceError as error:
        raise UserError(f'{where}: {error} stands twice in the line; keep one') from error
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where}: not JSON; write a line such as {EXAMPLE}') from error
    user = value.get('user', '') if isinstance(value, dict) else ''
    items = value.get('items') if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise UserError(f'{where}: no list of items; write a line such as {EXAMPLE}')
    history = History(_as_string(user, where), [_as_string(item, where) for item in items])
    try:
        ''.join([history.user, *history.items]).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise UserError(f'{where}: {half} is half a character; write the whole one') from error
    return history


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(ascii(next(name for name in names if names.count(name) > 1))[:40])
    return value


def _as_string(value: Any, where: str) -> str:
    try:
        return id_text(value)
    except TypeError as error:
        raise UserError(
            f'{where}: {json.dumps(value)[:40]} is not an id; ids are strings or whole numbers'
        ) from error
