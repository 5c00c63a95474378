"""Known data sets: where they lie on this machine, and where they come from if they do not."""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import pooch

from fame_jax.errors import UserError

ICLREC = (
    'https://raw.githubusercontent.com/salesforce/ICLRec/'
    '4afb54a036ebbf4166ed5858122d89c0642251a7/data/'
)
GROUPLENS = 'https://files.grouplens.org/datasets/movielens/'


class Known(NamedTuple):
    """A data set's places below a data folder, the first to be tried first, and its address."""

    places: tuple[str, ...]
    home: str  # the place a download goes to
    url: str = ''
    sha256: str = ''


def _amazon(name: str, sha256: str) -> Known:
    places = (f'amazon/{name}.txt', f'{name}.txt', f'amazon/{name}.txt.gz', f'{name}.txt.gz')
    return Known(places, places[0], f'{ICLREC}{name}.txt', sha256)


def _movielens(name: str, sha256: str, *logs: str) -> Known:
    """The original log comes before filtered versions, so that counts are the usual ones."""
    places = (*(f'{name}/{log}' for log in logs), f'{name}.zip', f'{name}/{name}.zip')
    prepared = (f'{name}.inter', f'{name}.txt', f'{name}.txt.gz')
    places += tuple(f'{folder}{file}' for folder in (f'{name}/', '') for file in prepared)
    return Known(places, f'{name}.zip', f'{GROUPLENS}{name}.zip', sha256)


KNOWN = {
    'toys': _amazon(
        'Toys_and_Games', '176c680c688d497598c4a89a03b402c0fe78d795e5db335c2e78dd5f2d778a3f'
    ),
    'beauty': _amazon('Beauty', '226cce9c3105299ca0db9615d7d3fb32b3175e90da43100ae352599f0f0107b8'),
    'sports': _amazon(
        'Sports_and_Outdoors', '2a095e0648872beb9982408958290f5d655db5be2911c3756b5446de9f0b8de2'
    ),
    'scientific': Known(
        ('amazon-scientific/Scientific.txt', 'Scientific.txt', 'Scientific.txt.gz'),
        'amazon-scientific/Scientific.txt',
    ),
    'ml-1m': _movielens(
        'ml-1m', 'a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20', 'ratings.dat'
    ),
    'ml-100k': _movielens(
        'ml-100k', '50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229', 'u.data'
    ),
    'ml-20m': _movielens(
        'ml-20m', '96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3', 'ratings.csv'
    ),
}


# What describes the items of a known data set, below a data folder, the first to be tried first.
ITEMS = {
    'toys': ('amazon/Toys_and_Games_items', 'Toys_and_Games_items'),
    'beauty': ('amazon/Beauty_items', 'Beauty_items'),
    'sports': ('amazon/Sports_and_Outdoors_items', 'Sports_and_Outdoors_items'),
    'scientific': ('amazon-scientific/Scientific_items', 'Scientific_items'),
    'ml-1m': ('ml-1m/ml-1m_items', 'ml-1m_items'),
    'ml-100k': ('ml-100k/ml-100k_items', 'ml-100k_items'),
    'ml-20m': ('ml-20m/ml-20m_items', 'ml-20m_items'),
}
ENDINGS = ('.jsonl.gz', '.jsonl', '.csv', '.csv.gz', '.tsv', '.tsv.gz')
# The original items, by the original log; a prepared .txt may number its items anew.
ORIGINAL = {'ratings.dat': 'movies.dat', 'ratings.csv': 'movies.csv', 'u.data': 'u.item'}


def locate(name: str, data_dir: str = '') -> Path:
    """Returns the file of a known data set, downloaded into the cache folder if there is none.

    A file that is there is taken as it is, whatever its checksum; a download must have the pinned
    SHA-256.

    Args:
      name: a key of KNOWN.
      data_dir: looked in first; then $FAME_JAX_DATA, then the user's cache folder.

    Raises:
      UserError: if it is nowhere and cannot be downloaded.
    """
    known, folders = KNOWN[name], list_folders(data_dir)
    for folder in folders:
        for place in known.places:
            if (folder / place).is_file():
                return folder / place
    if not known.url:
        target = folders[0] / known.home
        raise UserError(
            f"data set '{name}' has no address to download from; put its file at {target}"
        )
    return _download(name, known, folders)


def list_folders(data_dir: str = '') -> list[Path]:
    """Returns the folders to look in, the first first; the last is the user's cache folder."""
    named = [folder for folder in (data_dir, os.environ.get('FAME_JAX_DATA', '')) if folder]
    return [Path(folder).expanduser() for folder in (*named, pooch.os_cache('fame_jax'))]


def locate_items(dataset: str | os.PathLike, data_dir: str = '') -> Path:
    """Returns the file that describes a data set's items; nothing is downloaded.

    For the log X.txt it is X_items.jsonl.gz beside it (or another of ENDINGS), for X.inter also
    X.item, for MovieLens' own logs the file of films beside them or in the same zip.

    Args:
      dataset: a key of KNOWN, or the path of a log.
      data_dir: looked in first; then $FAME_JAX_DATA, then the user's cache folder.

    Raises:
      UserError: if there is none.
    """
    if dataset not in KNOWN:
        return _find_beside(Path(dataset).expanduser(), data_dir)
    folders = list_folders(data_dir)
    for folder in folders:
        for stem in ITEMS[dataset]:
            for ending in ENDINGS:
                if (folder / f'{stem}{ending}').is_file():
                    return folder / f'{stem}{ending}'
    logs = [folder / place for folder in folders for place in KNOWN[dataset].places]
    log = next((path for path in logs if path.is_file()), None)
    items = _find_original(log) if log else None
    if not items:
        target = folders[0] / f'{ITEMS[dataset][0]}{ENDINGS[0]}'
        raise UserError(
            f"no file describes the items of data set '{dataset}'; put one at {target}, "
            'or name one with --items'
        )
    return items


def _find_beside(log: Path, data_dir: str) -> Path:
    log = log if log.exists() or not data_dir else Path(data_dir).expanduser() / log
    stem = log.name.removesuffix('.gz').rpartition('.')[0] or log.name
    beside = [log.with_name(f'{stem}_items{ending}') for ending in ENDINGS]
    items = next((path for path in beside if path.is_file()), None) or _find_original(log)
    if not items:
        what = f'no file beside it describes its items; put one at {beside[0]}'
        raise UserError(f'{log}: {what}, or name one with --items')
    return items


def _find_original(log: Path) -> Path | None:
    """Returns what came with a log from its makers: MovieLens' films, RecBole's X.item."""
    name = log.name.removesuffix('.gz')
    if name.endswith('.zip'):
        return log if log.is_file() else None
    items = log.with_name(ORIGINAL.get(name, f'{name.removesuffix(".inter")}.item'))
    return items if items.is_file() else None


def _download(name: str, known: Known, folders: list[Path]) -> Path:
    target = folders[-1] / known.home
    bar = sys.stderr.isatty()
    try:
        pooch.retrieve(
            known.url,
            known_hash=f'sha256:{known.sha256}',
            fname=target.name,
            path=target.parent,
            downloader=pooch.HTTPDownloader(progressbar=bar, timeout=30),
        )
    except (OSError, ValueError) as error:
        # Pooch says by ValueError that the checksum differs; requests' errors are OSErrors.
        what = 'is not the expected file' if isinstance(error, ValueError) else 'failed'
        where = ' or '.join(map(str, folders))
        raise UserError(
            f"data set '{name}' is not in {where}, and its download {what} "
            f'({type(error).__name__}); get {known.url} and put it at {folders[0] / known.home}'
        ) from error
    return target
