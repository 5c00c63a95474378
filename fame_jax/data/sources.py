"""Data files: one, a folder or a pattern of them; hashed, decoded; and how messages quote them."""

import dataclasses
import difflib
import functools
import glob
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from fame_jax.data.archives import is_clutter, open_packed
from fame_jax.data.forms import find_form
from fame_jax.errors import UserError, explain_os_errors

MAX_LINE = 4 * 2**20  # bytes; a longer line is a sign of a binary file
BLOCK = 2**24  # bytes that are checked or hashed at once
KINDS = (
    *('txt', 'csv', 'tsv', 'inter', 'dat', 'data', 'rating'),
    *('jsonl', 'ndjson', 'json', 'parquet'),
)
KNOWN_LOGS = ('ratings.dat', 'ratings.csv', 'u.data')  # the log's name in MovieLens' archives
UTF16 = (b'\xff\xfe', b'\xfe\xff')


@dataclasses.dataclass(frozen=True)
class Source:
    """A data file, or several files of one kind that are read one after another.

    Its content is read when it is needed: a Parquet file never is as bytes.

    Fields:
      place: the path or pattern, and the name inside an archive, for messages.
      name: the last part of the path or pattern.
      kind: the form of the content: one of KINDS, or for a table with the name of a sequence file
        (.txt) 'pairs' or 'blanks', see `forms.find_form`.
      paths: the files on the disk.
      load: returns the unpacked bytes of one file.
      parts: the sources of several files, in the order of their names; () for one file.
    """

    place: str
    name: str
    kind: str
    paths: tuple[Path, ...]
    load: Callable[[], bytes]
    parts: tuple['Source', ...] = ()

    @functools.cached_property
    def sha256(self) -> str:
        """Of the file before it was unpacked; of several files' sorted hashes, one a line."""
        hashes = sorted(map(_hash_file, self.paths))
        return hashes[0] if len(hashes) == 1 else _hash_text('\n'.join(hashes))

    @functools.cached_property
    def text(self) -> bytes:
        """See `read_text`."""
        if self.parts:
            return b'\n'.join(part.text for part in self.parts)
        return _decode(self)


def open_source(path: str | os.PathLike) -> Source:
    """Opens a file, a folder of files or a pattern such as `logs/part-*.csv.gz`.

    .gz, .bz2, .xz and the log inside a .zip are unpacked.

    Raises:
      UserError: if a file is missing, empty, cut short or of an unknown kind, or if the files are
        not of one kind.
    """
    paths = _find_parts(Path(path))
    try:
        sources = [_recognise(*open_file(one, _choose)) for one in paths]
    except UserError as error:
        if not Path(path).is_dir():
            raise
        advice = f'or give a pattern of the files that are the log, not the folder {path}'
        raise UserError(f'{error}; {advice}') from error
    if len(sources) == 1:
        return sources[0]
    first = sources[0]
    for other in sources[1:]:
        if other.kind != first.kind:
            what = f'{paths[0].name} and {other.paths[0].name} are of different kinds'
            raise UserError(f'{path}: {what}; give a pattern of the files of one kind')
    place = str(path)
    return Source(
        place,
        Path(path).name,
        first.kind,
        tuple(one for source in sources for one in source.paths),
        lambda: b'\n'.join(source.load() for source in sources),
        tuple(sources),
    )


def open_file(
    path: str | os.PathLike, choose: Callable[[str, list[str]], str]
) -> tuple[Source, str]:
    """Opens one file of any kind, also inside an archive.

    Args:
      path: the file.
      choose: (archive, names inside) -> the name to read; may raise UserError.

    Returns:
      The source with an empty kind, and the name of the innermost file in lower case, without the
      ending of a packing such as .gz.

    Raises:
      UserError: if it is missing, empty, a folder, or a damaged archive.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f'{path}: this is a folder; give the path of a file in it')
    packed = open_packed(path, choose)
    if packed.packed and packed.inner.endswith('.parquet'):
        raise UserError(f'{packed.place}: a packed Parquet file; unpack it')
    return Source(packed.place, path.name, '', (path,), packed.load), packed.inner


def read_text(source: Source) -> bytes:
    """Returns the bytes of a text file as valid UTF-8 with Unix newlines, without blank last lines.

    Line numbers are still those of the file; several files follow one another.

    Raises:
      UserError: on another encoding, a NUL byte, or a line of more than 4 MB.
    """
    return source.text


def locate(source: Source, line: int) -> str:
    """Returns 'line 12', or 'line 3 of part-2.csv', for a line of `read_text`, counted from 1."""
    for part in source.parts:
        count = part.text.count(b'\n') + 1
        if line <= count:
            return f'line {line} of {part.name}'
        line -= count
    return f'line {line}'


def fail(source: Source, line: int, what: str) -> NoReturn:
    """Raises a UserError that names the file and the line."""
    raise UserError(f'{source.place}, {locate(source, line)}: {what}')


def show(value: object) -> str:
    """Returns a value in quotes, in one line of at most 60 characters, for a message."""
    text = ascii(value) if not str(value).isprintable() else repr(value)
    return text if len(text) <= 60 else text[:57] + '...'


def suggest(name: str, known: Iterable[object]) -> str:
    """Returns the end of a message about an unknown name: the known names close to it, or all."""
    known = list(map(str, known))
    lower = {other.lower(): other for other in reversed(known)}
    close = difflib.get_close_matches(name.lower(), lower, n=2, cutoff=0.6)
    if close:
        return f'did you mean {" or ".join(show(lower[other]) for other in close)}?'
    return f'choose one of {", ".join(map(show, known[:20]))}' + ', ...' * (len(known) > 20)


def _find_parts(path: Path) -> list[Path]:
    """Returns the files of a folder or of a pattern, by name; the path itself where it is neither.

    A folder that has the log of MovieLens stands for that log.
    """
    with explain_os_errors(f'reading {path}', 'check the path'):
        if path.is_dir():
            files = [file for file in path.iterdir() if not is_clutter(file.name)]
            logs = [file for name in KNOWN_LOGS for file in files if file.name == name]
            files = logs[:1] or [file for file in files if _find_kind(file.name)]
            if not files:
                raise UserError(f'{path}: this is a folder without a log; give the path of a file')
        elif glob.has_magic(str(path)) and not path.exists():
            files = [Path(file) for file in glob.glob(str(path))]
            files = [file for file in files if file.is_file() and not is_clutter(file.name)]
            if not files:
                raise UserError(f'{path}: no file has such a name; check the pattern')
        else:
            files = [path]
    return sorted(files)


def _recognise(source: Source, inner: str) -> Source:
    """Returns the source with its kind, by the ending of its name, for .txt by its content too."""
    kind = _find_kind(inner)
    if not kind:
        known = ', '.join(f'.{k}' for k in KINDS)
        what = f'unknown kind of file; save it as, or rename it to, one of {known} (or .gz, .zip)'
        raise UserError(f'{source.place}: {what}')
    if kind == 'txt':
        form = find_form(read_text(source))
        if form.fault:
            fail(source, form.line, form.fault)
        # The text is kept: it has been decoded and checked.
        text, source = source.text, dataclasses.replace(source, kind=form.kind)
        source.__dict__['text'] = text
        return source
    return dataclasses.replace(source, kind=kind)


def _find_kind(name: str) -> str:
    name = name.lower()
    for ending in ('.gz', '.bz2', '.xz'):
        name = name.removesuffix(ending)
    kind = name.rpartition('.')[2] if '.' in name else ''
    return kind if kind in KINDS else ''


def _choose(place: str, names: list[str]) -> str:
    for wanted in KNOWN_LOGS:
        for name in names:
            if name.rpartition('/')[2] == wanted:
                return name
    readable = [name for name in names if _find_kind(name)]
    if len(readable) != 1:
        what = f'{len(readable)} readable files in the archive'
        raise UserError(f'{place}: {what}; unpack it and give the path of one, or of their folder')
    return readable[0]


def _hash_file(path: Path) -> str:
    with explain_os_errors(f'reading {path}', 'check the path'), open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _decode(source: Source) -> bytes:
    """Returns the text of one file, see `read_text`."""
    data = source.load().removeprefix(b'\xef\xbb\xbf')
    if data.startswith(UTF16):
        try:
            data = data.decode('utf-16').encode()
        except UnicodeError as error:
            raise UserError(
                f'{source.place}: UTF-16 text, cut short or damaged; save it as UTF-8'
            ) from error
    if b'\r' in data:
        data = data.replace(b'\r\n', b'\n')
        data = data if b'\n' in data else data.replace(b'\r', b'\n')
    _check_bytes(source, data)
    end = len(data.rstrip())
    # Only whole lines are removed: tabs at the end of the last record are empty fields.
    newline = data.find(b'\n', end)
    data = data if newline < 0 else data[:newline]
    if not data.strip():
        raise UserError(f'{source.place}: only blank lines; write or copy it again')
    return data


def _check_bytes(source: Source, data: bytes) -> None:
    """Checks that the lines are UTF-8 without NUL bytes, and not too long; block by block."""
    start, line = 0, 1
    while start < len(data):
        end = data.rfind(b'\n', start, start + BLOCK) + 1 or start + BLOCK
        block = data[start:end]
        if len(block) > MAX_LINE:
            _check_lines(source, block, line)
        at, what = block.find(b'\0'), 'a NUL byte: binary, UTF-16 or damaged; save it as UTF-8 text'
        try:
            block.decode()
        except UnicodeDecodeError as error:
            if at < 0 or error.start < at:
                at, byte = error.start, error.object[error.start]
                # Bytes from 0xa0 are letters and signs in Latin-1.
                latin = f' (in Latin-1 it is {show(chr(byte))})' if byte >= 0xA0 else ''
                what = f'{byte:#04x} is not UTF-8{latin}; save the file as UTF-8'
        if at >= 0:
            line += block.count(b'\n', 0, at)
            byte = at - block.rfind(b'\n', 0, at)
            raise UserError(f'{source.place}, line {line}, byte {byte}: {what}')
        line += block.count(b'\n')
        start = end


def _check_lines(source: Source, block: bytes, first: int) -> None:
    start = 0
    while len(block) - start > MAX_LINE:
        newline = block.rfind(b'\n', start, start + MAX_LINE + 1)
        if newline < 0:
            line = first + block.count(b'\n', 0, start)
            what = f'longer than {MAX_LINE // 2**20} MB; write one record per line'
            raise UserError(f'{source.place}, line {line}: {what}')
        start = newline + 1
