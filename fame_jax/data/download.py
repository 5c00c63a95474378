"""Known data sets: their places in the data folders, and their addresses for a download."""

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
ZENODO = 'https://zenodo.org/records/10995912'
KAGGLE = 'https://www.kaggle.com'
GROUPLENS = 'https://files.grouplens.org/datasets/movielens/'


class Known(NamedTuple):
    """A known data set.

    Fields:
      places: paths in a data folder, in the order in which they are tried.
      home: the place of a download.
      url: the address of the download, or ''. Only files with a known checksum are downloaded.
      sha256: checksum of the download.
      page: where to get the file by hand, or ''.
      columns: pairs of a role and a column, where those that would be recognised are others.
    """

    places: tuple[str, ...]
    home: str
    url: str = ''
    sha256: str = ''
    page: str = ''
    columns: tuple[tuple[str, str], ...] = ()


def _amazon(name: str, sha256: str) -> Known:
    places = (f'amazon/{name}.txt', f'{name}.txt', f'amazon/{name}.txt.gz', f'{name}.txt.gz')
    return Known(places, places[0], f'{ICLREC}{name}.txt', sha256)


def _movielens(name: str, sha256: str, *logs: str) -> Known:
    """The original log is tried before filtered versions, so that the counts are the usual ones."""
    places = (*(f'{name}/{log}' for log in logs), f'{name}.zip', f'{name}/{name}.zip')
    prepared = (f'{name}.inter', f'{name}.txt', f'{name}.txt.gz')
    places += tuple(f'{folder}{file}' for folder in (f'{name}/', '') for file in prepared)
    return Known(places, f'{name}.zip', f'{GROUPLENS}{name}.zip', sha256)


def _freerec(name: str, sha256: str = '') -> Known:
    """Amazon's reviews of 2014, 5-core, with times and titles; CC BY 4.0."""
    places = (f'amazon-2014/{name}.zip', f'{name}.zip', f'amazon-2014/{name}.inter')
    url = f'{ZENODO}/files/{name}.zip' if sha256 else ''
    return Known((*places, f'{name}/{name}.inter'), places[0], url, sha256, ZENODO)


def _by_hand(
    page: str, *places: str, columns: tuple[tuple[str, str], ...] = (), plain: str = ''
) -> Known:
    """A data set that is not downloaded; `plain` is a sequence file that may be gzipped."""
    plains = (f'{plain}.txt.gz', f'{plain}.txt') if plain else ()
    plains += tuple(place.rpartition('/')[2] for place in plains)
    return Known((*places, *plains), (*places, *plains)[0], page=page, columns=columns)


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
    'ml-1m-full': _by_hand('https://github.com/yueqirex/LRURec', plain='ml-1m-full/ml-1m-full'),
    'lastfm': _by_hand('https://github.com/yehjin-shin/TV-Rec', plain='lastfm/LastFM'),
    'foursquare': _by_hand('https://github.com/yehjin-shin/TV-Rec', plain='foursquare/Foursquare'),
    'beauty-2014': _freerec(
        'Amazon2014Beauty', '2895cc3f956a2844782cf2ac494da0efda578005674042ad5aa715ad9943c95f'
    ),
    'sports-2014': _freerec('Amazon2014Sports'),
    'toys-2014': _freerec('Amazon2014Toys'),
    'yelp': _by_hand(
        'https://www.yelp.com/dataset',
        'yelp/yelp_academic_dataset_review.json',
        'yelp_academic_dataset_review.json',
        plain='yelp/Yelp',
    ),
    'retailrocket': _by_hand(
        f'{KAGGLE}/datasets/retailrocket/ecommerce-dataset',
        'retailrocket/events.csv',
        'retailrocket/events.csv.gz',
    ),
    # Nearly all users are NA; `timeframe` are milliseconds since the start of the session.
    'diginetica': _by_hand(
        'https://competitions.codalab.org/competitions/11161',
        'diginetica/train-item-views.csv',
        'train-item-views.csv',
        columns=(('user', 'sessionId'), ('item', 'itemId'), ('time', 'timeframe')),
    ),
    'h-and-m': _by_hand(
        f'{KAGGLE}/competitions/h-and-m-personalized-fashion-recommendations',
        'h-and-m/transactions_train.csv',
        'transactions_train.csv',
        'h-and-m/transactions_train.csv.gz',
    ),
}


# Item files of known data sets: paths in a data folder without their ending.
ITEMS = {
    'toys': ('amazon/Toys_and_Games_items', 'Toys_and_Games_items'),
    'beauty': ('amazon/Beauty_items', 'Beauty_items'),
    'sports': ('amazon/Sports_and_Outdoors_items', 'Sports_and_Outdoors_items'),
    'scientific': ('amazon-scientific/Scientific_items', 'Scientific_items'),
    'ml-1m': ('ml-1m/ml-1m_items', 'ml-1m_items'),
    'ml-100k': ('ml-100k/ml-100k_items', 'ml-100k_items'),
    'ml-20m': ('ml-20m/ml-20m_items', 'ml-20m_items'),
    'ml-1m-full': ('ml-1m-full/ml-1m-full_items', 'ml-1m-full_items'),
    **{
        name: (f'{folder}/{stem}_items', f'{stem}_items')
        for name, folder, stem in (
            ('lastfm', 'lastfm', 'LastFM'),
            ('foursquare', 'foursquare', 'Foursquare'),
            ('beauty-2014', 'amazon-2014', 'Amazon2014Beauty'),
            ('sports-2014', 'amazon-2014', 'Amazon2014Sports'),
            ('toys-2014', 'amazon-2014', 'Amazon2014Toys'),
            ('yelp', 'yelp', 'Yelp'),
            ('retailrocket', 'retailrocket', 'retailrocket'),
            ('diginetica', 'diginetica', 'diginetica'),
            ('h-and-m', 'h-and-m', 'articles'),
        )
    },
}
ENDINGS = ('.jsonl.gz', '.jsonl', '.csv', '.csv.gz', '.tsv', '.tsv.gz')
# The item file that was published with a log. (A prepared .txt may have other item ids.)
PUBLISHED = {'ratings.dat': 'movies.dat', 'ratings.csv': 'movies.csv', 'u.data': 'u.item'}


def locate(name: str, data_dir: str = '') -> Path:
    """Returns the file of a known data set, and downloads it to the cache folder if need be.

    A file that exists already is taken whatever its checksum; a download must have the SHA-256 of
    KNOWN.

    Args:
      name: a key of KNOWN.
      data_dir: the first folder to look in; then $FAME_JAX_DATA, then the user's cache folder.

    Raises:
      UserError: if there is no file and the download fails.
    """
    known, folders = KNOWN[name], list_folders(data_dir)
    for folder in folders:
        for place in known.places:
            if (folder / place).is_file():
                return folder / place
    if not known.url:
        target = folders[0] / known.home
        if known.page:
            what = f"data set '{name}' is not in {' or '.join(map(str, folders))}"
            advice = f'get {target.name} from {known.page} and put it at {target}'
            raise UserError(f'{what}, and is not downloaded; {advice}')
        what = f"data set '{name}' has no known address to download from"
        raise UserError(f'{what}; put its file at {target}')
    return _download(name, known, folders)


def list_folders(data_dir: str = '') -> list[Path]:
    """Returns the data folders in the order of search; the last is the user's cache folder."""
    named = [folder for folder in (data_dir, os.environ.get('FAME_JAX_DATA', '')) if folder]
    return [Path(folder).expanduser() for folder in (*named, pooch.os_cache('fame_jax'))]


def locate_items(dataset: str | os.PathLike, data_dir: str = '') -> Path:
    """Returns the item file of a data set; nothing is downloaded.

    For a log X.txt it is X_items.jsonl.gz in the same folder (or another of ENDINGS), for X.inter
    also X.item, for MovieLens' logs the file of movies in the same folder or archive.

    Args:
      dataset: a key of KNOWN, or the path of a log.
      data_dir: the first folder to look in; then $FAME_JAX_DATA, then the user's cache folder.

    Raises:
      UserError: if there is none.
    """
    if dataset not in KNOWN:
        return _find_in_folder(Path(dataset).expanduser(), data_dir)
    folders = list_folders(data_dir)
    for folder in folders:
        for stem in ITEMS[dataset]:
            for ending in ENDINGS:
                if (folder / f'{stem}{ending}').is_file():
                    return folder / f'{stem}{ending}'
    logs = [folder / place for folder in folders for place in KNOWN[dataset].places]
    log = next((path for path in logs if path.is_file()), None)
    items = _find_published(log) if log else None
    if not items:
        target = folders[0] / f'{ITEMS[dataset][0]}{ENDINGS[0]}'
        raise UserError(
            f"data set '{dataset}' has no item file; put one at {target}, or give one by --items"
        )
    return items


def _find_in_folder(log: Path, data_dir: str) -> Path:
    log = log if log.exists() or not data_dir else Path(data_dir).expanduser() / log
    stem = log.name.removesuffix('.gz').rpartition('.')[0] or log.name
    places = [log.with_name(f'{stem}_items{ending}') for ending in ENDINGS]
    items = next((path for path in places if path.is_file()), None) or _find_published(log)
    if not items:
        raise UserError(f'{log}: no item file; put one at {places[0]}, or give one by --items')
    return items


def _find_published(log: Path) -> Path | None:
    """Returns the item file that was published with a log: MovieLens' movies, RecBole's X.item."""
    name = log.name.removesuffix('.gz')
    if name.endswith('.zip'):
        return log if log.is_file() else None
    items = log.with_name(PUBLISHED.get(name, f'{name.removesuffix(".inter")}.item'))
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
        # pooch raises ValueError for a wrong checksum; the errors of requests are OSErrors.
        what = 'has a wrong checksum' if isinstance(error, ValueError) else 'failed'
        where = ' or '.join(map(str, folders))
        raise UserError(
            f"data set '{name}' is not in {where}, and its download {what} "
            f'({type(error).__name__}); get {known.url} and put it at {folders[0] / known.home}'
        ) from error
    return target
