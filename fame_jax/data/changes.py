"""Whether a log is still the one that was prepared."""

import contextlib
import glob
from pathlib import Path
from typing import Any

from fame_jax.data import download, sources
from fame_jax.data.prepare import find_file
from fame_jax.errors import UserError, explain_os_errors


def describe_files(path: Path) -> dict[str, int]:
    """Number, bytes and latest change (ns) of the files of a log: a file, a folder or a pattern.

    They are kept in the card: where they are the same later, the content is not read again.

    Raises:
      UserError: when a file cannot be read.
    """
    with explain_os_errors(f'reading {path}', 'check the path'):
        if path.is_dir():
            files = [file for file in path.iterdir() if not file.name.startswith('.')]
        elif not path.exists():
            files = list(map(Path, glob.glob(str(path))))
        else:
            files = [path]
        stats = [file.stat() for file in files]
    return {
        'count': len(stats),
        'bytes': sum(stat.st_size for stat in stats),
        'changed_ns': max((stat.st_mtime_ns for stat in stats), default=0),
    }


def find_changed_log(dataset: str, data_dir: str, card: dict[str, Any]) -> Path | None:
    """The log, where its content is not the one that was prepared; None where it is missing.

    Nothing is downloaded. The content is hashed where number, size or time of the files differ.

    Args:
      dataset: a known name or a path, as --dataset.
      data_dir: the folder of known data sets.
      card: of the prepared data, with the log's 'files' and 'sha256'.
    """
    path = _find_log(dataset, data_dir)
    if path is None or not card.get('sha256'):
        return None
    with contextlib.suppress(UserError):
        if describe_files(path) == card.get('files'):
            return None
        if sources.open_source(path).sha256 == card['sha256']:
            return None
    return path


def _find_log(dataset: str, data_dir: str) -> Path | None:
    if dataset in download.KNOWN:
        places = download.KNOWN[dataset].places
        paths = [folder / place for folder in download.list_folders(data_dir) for place in places]
        return next((path for path in paths if path.is_file()), None)
    with contextlib.suppress(UserError):
        return None if dataset == 'synthetic' else find_file(dataset, data_dir)
    return None
