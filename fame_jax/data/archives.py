"""Packed files: .gz, .bz2, .xz, and one file inside a .zip."""

import bz2
import contextlib
import errno
import gzip
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fame_jax.errors import UserError, explain_os_errors


class Packing(NamedTuple):
    """A way to pack one file: the ending of its name, its first bytes, and the inverse."""

    ending: str
    name: str
    magic: bytes
    unpack: Callable[[bytes], bytes]


PACKINGS = (
    Packing('.gz', 'gzip', b'\x1f\x8b', gzip.decompress),
    Packing('.bz2', 'bzip2', b'BZh', bz2.decompress),
    Packing('.xz', 'xz', b'\xfd7zXZ\0', lzma.decompress),
)
ZSTD = b'\x28\xb5\x2f\xfd'
# Errors of the standard library on damaged archives. zipfile does not check offsets: ValueError.
DAMAGE = (
    OSError,
    EOFError,
    LookupError,
    ValueError,
    RuntimeError,
    lzma.LZMAError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


class Packed(NamedTuple):
    """One file as it lies on the disk, perhaps packed.

    Fields:
      place: its path, and the name inside an archive, for messages.
      inner: the name of the innermost file in lower case, without the ending of a packing.
      packed: whether the bytes on the disk are not those of the file.
      load: reads and unpacks it; raises UserError where that fails.
    """

    place: str
    inner: str
    packed: bool
    load: Callable[[], bytes]


def open_packed(path: Path, choose: Callable[[str, list[str]], str]) -> Packed:
    """Opens a file, and an archive's directory; nothing else is read before `load`.

    Args:
      path: the file.
      choose: (path of a .zip, names inside) -> the name to read; may raise UserError. Files that
        macOS and other systems add to archives are not among the names.

    Raises:
      UserError: if the file is missing or empty, or an archive is damaged.
    """
    place, inner = str(path), path.name.lower()
    with explain_os_errors(f'reading {path}', 'check the path'):
        if not path.stat().st_size and path.is_file():
            raise UserError(f'{path}: empty file; write or copy it again')
        if not path.is_file():
            raise UserError(f'{path}: not a plain file; copy its content to one')
        start = _read_start(path)
    read = path.read_bytes
    if inner.endswith('.zip'):
        with _explain_damage(place), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        member = choose(place, [name for name in names if not is_clutter(name)])
        place, inner = f'{path}/{member}', member.lower()

        def read() -> bytes:
            with _explain_damage(str(path)), zipfile.ZipFile(path) as archive:
                return archive.read(member)

    packing = _find_packing(inner, start)
    packed = packing is not None or inner != path.name.lower()
    inner = inner.removesuffix(packing.ending) if packing else inner

    def load() -> bytes:
        with explain_os_errors(f'reading {path}', 'check the path'):
            data = read()
        data = _unpack(place, packing or _find_packing('', data), data)
        if not data:
            raise UserError(f'{place}: nothing inside; write or copy it again')
        return data

    return Packed(place, inner, packed, load)


def is_clutter(name: str) -> bool:
    """Whether a path in a folder or archive is a folder, hidden, or added by a system."""
    folders = name.split('/')
    # ._log.csv, .DS_Store, .part-0.crc, _SUCCESS
    return folders[-1][:1] in ('', '.', '_') or '__MACOSX' in folders


def _read_start(path: Path) -> bytes:
    with open(path, 'rb') as file:
        return file.read(8)


def _find_packing(name: str, start: bytes) -> Packing | None:
    for packing in PACKINGS:
        if name.endswith(packing.ending) or start.startswith(packing.magic):
            return packing
    return None


def _unpack(place: str, packing: Packing | None, data: bytes) -> bytes:
    if data.startswith(ZSTD):
        raise UserError(f'{place}: packed by zstd; unpack it with `zstd -d`')
    if packing is None:
        return data
    try:
        return packing.unpack(data)
    except DAMAGE as error:
        short = isinstance(error, EOFError) or 'end-of-stream' in str(error)
        what = 'cut short' if short else f'not {packing.name}, or damaged'
        raise UserError(f'{place}: {what}; copy or download it again') from error


@contextlib.contextmanager
def _explain_damage(place: str) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        # A wrong offset inside the archive: EINVAL.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        what = 'not a zip archive, cut short, damaged or with a password; copy or download it again'
        raise UserError(f'{place}: {what}') from error
