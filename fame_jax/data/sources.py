"""The bytes behind a file name: unpacked, hashed, and checked before anyone reads meaning in."""

import gzip
import hashlib
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from fame_jax.errors import UserError, explain_os_errors

MAX_LINE = 4 * 2**20  # bytes; nothing sane is longer, and binary files usually are
KINDS = ('txt', 'csv', 'tsv', 'inter', 'dat', 'data', 'jsonl', 'ndjson', 'json', 'parquet')
IN_ZIP = ('ratings.dat', 'ratings.csv', 'u.data')  # what MovieLens calls its log
# What the standard library raises on damaged archives; zipfile trusts its offsets: ValueError.
UNPACKING = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


class Source(NamedTuple):
    """One file in memory; `place` names it in messages, `sha256` is of the file as it lies."""

    place: str
    name: str
    kind: str
    data: bytes
    sha256: str


def open_source(path: str | os.PathLike) -> Source:
    """Reads a file and unpacks .gz and the log inside a MovieLens .zip.

    Raises:
      UserError: if it is missing, empty, a folder, cut short or of no known kind.
    """
    source, inner = unpack(path, _choose)
    return source._replace(kind=_kind(source.place, inner))


def unpack(
    path: str | os.PathLike, choose: Callable[[Source, list[str]], str]
) -> tuple[Source, str]:
    """Reads a file of any kind and unpacks .gz and .zip.

    Args:
      path: the file.
      choose: (archive, names inside) -> the name that is wanted, or a UserError.

    Returns:
      The source, its kind still open, and the lower-case name of what was inside, without .gz.

    Raises:
      UserError: if it is missing, empty, a folder or cut short.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f'{path}: a folder, where a file belongs; name the file inside it')
    with explain_os_errors(f'reading {path}', 'check the path'):
        data = path.read_bytes()
    if not data:
        raise UserError(f'{path}: empty file; check how it was made or copied')
    source = Source(str(path), path.name, '', data, hashlib.sha256(data).hexdigest())
    inner = path.name.lower()
    if inner.endswith('.zip'):
        source, inner = _unzip(source, choose)
    if inner.endswith('.gz') or source.data[:2] == b'\x1f\x8b':
        source, inner = _gunzip(source), inner.removesuffix('.gz')
    if not source.data:
        raise UserError(f'{source.place}: nothing inside; check how it was made or copied')
    return source, inner


def read_text(source: Source) -> bytes:
    """Returns the source's bytes as valid UTF-8 with plain newlines and no blank last lines.

    Line numbers stay those of the file.

    Raises:
      UserError: on another encoding, a NUL byte, or a line over 4 MB.
    """
    data = source.data.removeprefix(b'\xef\xbb\xbf')
    if data[:2] in (b'\xff\xfe', b'\xfe\xff'):
        fail(source, 1, 'UTF-16 text; save it as UTF-8')
    if b'\r' in data:
        data = data.replace(b'\r\n', b'\n')
        data = data if b'\n' in data else data.replace(b'\r', b'\n')
    _check_bytes(source, data)
    _check_lines(source, data)
    end = len(data.rstrip())
    # Only whole lines go: trailing tabs of the last record are empty fields.
    newline = data.find(b'\n', end)
    data = data if newline < 0 else data[:newline]
    if not data.strip():
        raise UserError(f'{source.place}: only blank lines; check how it was made or copied')
    return data


def fail(source: Source, line: int, what: str) -> NoReturn:
    """Raises a UserError that names the file and the line."""
    raise UserError(f'{source.place}, line {line}: {what}')


def show(value: object) -> str:
    """Returns a value as it can stand in one line of a message."""
    text = ascii(value) if not str(value).isprintable() else repr(value)
    return text if len(text) <= 60 else text[:57] + '...'


def _check_bytes(source: Source, data: bytes) -> None:
    at, what = data.find(b'\0'), 'a NUL byte; this is not a text file, or it is damaged'
    if not data.isascii():
        try:
            data.decode()
        except UnicodeDecodeError as error:
            if at < 0 or error.start < at:
                at, what = (
                    error.start,
                    f'{error.object[error.start]:#04x} is not UTF-8; save the file as UTF-8',
                )
    if at >= 0:
        line = data.count(b'\n', 0, at) + 1
        byte = at - data.rfind(b'\n', 0, at)
        raise UserError(f'{source.place}, line {line}, byte {byte}: {what}')


def _check_lines(source: Source, data: bytes) -> None:
    start = 0
    while len(data) - start > MAX_LINE:
        newline = data.rfind(b'\n', start, start + MAX_LINE + 1)
        if newline < 0:
            line = data.count(b'\n', 0, start) + 1
            fail(
                source,
                line,
                f'longer than {MAX_LINE // 2**20} MB; check that it is one record a line',
            )
        start = newline + 1


def _gunzip(source: Source) -> Source:
    try:
        return source._replace(data=gzip.decompress(source.data))
    except UNPACKING as error:
        what = 'cut short' if isinstance(error, EOFError) else 'not gzip, or damaged'
        raise UserError(f'{source.place}: {what}; copy or download it again') from error


def _unzip(source: Source, choose: Callable[[Source, list[str]], str]) -> tuple[Source, str]:
    """Returns the chosen file inside the archive and its name."""
    try:
        with zipfile.ZipFile(io.BytesIO(source.data)) as archive:
            name = choose(source, archive.namelist())
            inner = source._replace(place=f'{source.place}/{name}', data=archive.read(name))
    except UNPACKING as error:
        what = 'not a zip archive, cut short or damaged; copy or download it again'
        raise UserError(f'{source.place}: {what}') from error
    return inner, name.lower()


def _choose(source: Source, names: list[str]) -> str:
    for wanted in IN_ZIP:
        for name in names:
            if name.rpartition('/')[2] == wanted:
                return name
    readable = [
        n for n in names if n.lower().removesuffix('.gz').endswith(tuple(f'.{k}' for k in KINDS))
    ]
    if len(readable) != 1:
        raise UserError(
            f'{source.place}: {len(readable)} readable files inside; unpack it and name one'
        )
    return readable[0]


def _kind(place: str, name: str) -> str:
    kind = name.rpartition('.')[2] if '.' in name else ''
    if kind not in KINDS:
        known = ', '.join(f'.{k}' for k in KINDS)
        raise UserError(
            f'{place}: unknown kind of file; its name must end in one of {known} (or .gz, .zip)'
        )
    return kind
