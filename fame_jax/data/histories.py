"""Histories to recommend to: one JSON value a line, in outside ids."""

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fame_jax.errors import UserError, explain_os_errors

FORM = '{"user": "ann", "items": ["7", "12"]} or ["7", "12"]'


class History(NamedTuple):
    """One line: whose it is ('' if it does not say) and what was done, the oldest first."""

    user: str
    items: list[str]


def read(path: str | Path) -> Iterator[History]:
    """Reads a file of histories line by line, gzipped if it ends in .gz; blank lines are none.

    Numbers that are whole are taken for the ids they print as.

    Raises:
      UserError: when it cannot be read, or names the first line that is no history.
    """
    with _open(Path(path)) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _parse(line, f'{path}, line {number}')


def count(path: str | Path) -> int:
    """How many histories a file has, about: its lines.

    Raises:
      UserError: when it cannot be read.
    """
    with _open(Path(path)) as file:
        return sum(1 for _ in file)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    opener = gzip.open if path.suffix == '.gz' else open
    with explain_os_errors(f'reading {path}', 'name a file with a history a line'):
        try:
            with opener(path, 'rb') as file:
                yield file
        except (EOFError, zlib.error) as error:
            raise UserError(f'{path} is damaged or cut short; make it again') from error


def read_ids(path: str | Path) -> list[str]:
    """Reads a file with an outside id a line.

    Raises:
      UserError: when it cannot be read, is not UTF-8, or holds none.
    """
    with explain_os_errors(f'reading {path}', 'name a file with an item a line'):
        try:
            lines = Path(path).read_text(encoding='utf-8-sig').splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f'{path} is not text in UTF-8; write an item a line') from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f'{path} names no item; write an item a line')
    return found


def _parse(line: bytes, where: str) -> History:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where}: not JSON; write a line such as {FORM}') from error
    user = value.get('user', '') if isinstance(value, dict) else ''
    items = value.get('items') if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise UserError(f'{where}: no list of items; write a line such as {FORM}')
    return History(_id(user, where), [_id(item, where) for item in items])


def _id(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    told = json.dumps(value)[:40]
    raise UserError(f'{where}: {told} is no id; ids are strings or whole numbers')
