"""From a data set's name or a user's log to Sequences: read, filter, order, number."""

import difflib
import os
import re
from pathlib import Path

import numpy as np

from fame_jax.data import download, synthetic
from fame_jax.data.sequences import SHORTEST, Sequences, seal
from fame_jax.errors import UserError, explain_os_errors


def prepare(
    dataset: str,
    *,
    data_dir: str = '',
    user_column: str = '',
    item_column: str = '',
    time_column: str = '',
    rating_column: str = '',
    min_rating: float = 0.0,
    k_core: int = 5,
    synthetic_users: int = 4000,
    synthetic_items: int = 1000,
    synthetic_facets: int = 2,
    synthetic_values: int = 8,
    seed: int = 0,
) -> Sequences:
    """Makes the one form of any data set.

    Args:
      dataset: a known name, 'synthetic', or the path of a sequence file or log.
      data_dir: where known data sets lie; empty: $FAME_JAX_DATA, then the cache folder.
      user_column, item_column, time_column, rating_column: columns of a log; empty: guess.
      min_rating: actions rated lower are dropped; 0 keeps all.
      k_core: users and items keep at least so many actions, to a fixed point; 0 or 1 is off.
      synthetic_users, synthetic_items, synthetic_facets, synthetic_values, seed: the synthetic
        world, which is born clean: no filter is applied to it.

    Raises:
      UserError: on an unknown name, a faulty file, or where nothing is left.
    """
    if dataset == 'synthetic':
        return synthetic.generate(
            users=synthetic_users,
            items=synthetic_items,
            facets=synthetic_facets,
            values=synthetic_values,
            seed=seed,
        )
    # Polars takes a while to import; a synthetic run has no use for it.
    from fame_jax.data.readers import read_log

    columns = (user_column, item_column, time_column, rating_column)
    wanted = dict(zip(('user', 'item', 'time', 'rating'), columns))
    path = find(dataset, data_dir)
    log = read_log(path, wanted, rated=min_rating > 0)
    name = dataset if dataset in download.KNOWN else path.name
    card = {'name': name, **log.card, 'min_rating': min_rating, 'k_core': k_core}
    kept, counts = _filter(path, log.users, log.items, log.ratings, min_rating, k_core)
    times = None if log.times is None else log.times[kept]
    users, user_ids = renumber(log.users[kept], log.user_ids)
    items, item_ids = renumber(log.items[kept], log.item_ids)
    order = order_actions(users, times)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(users))]).astype(np.int64)
    items = (items[order] + 1).astype(np.int32)
    return seal(Sequences(items, offsets, user_ids, ['', *item_ids], card | counts))


def find(dataset: str, data_dir: str = '') -> Path:
    """Returns the file behind a known name (downloaded if need be) or a path.

    Raises:
      UserError: if it is neither.
    """
    if dataset in download.KNOWN:
        return download.locate(dataset, data_dir)
    with explain_os_errors(f'looking for {dataset[:80]!r}', 'check --dataset'):
        for path in (Path(dataset).expanduser(), Path(data_dir).expanduser() / dataset):
            if dataset and path.exists():
                return path
    names = [*download.KNOWN, 'synthetic']
    if os.sep in dataset or Path(dataset).suffix:
        raise UserError(f'{dataset}: no such file; check --dataset (known: {", ".join(names)})')
    close = difflib.get_close_matches(dataset.lower(), names, n=2, cutoff=0.5)
    hint = f'did you mean {" or ".join(close)}?' if close else f'known: {", ".join(names)}'
    raise UserError(f'unknown data set {dataset!r} and no such file; {hint}')


def find_core(users: np.ndarray, items: np.ndarray, user_least: int, item_least: int) -> np.ndarray:
    """Returns the largest set of actions in which every user and item has the least count.

    Args:
      users, items: int64 [A], numbers from 0.
      user_least, item_least: actions that a user and an item must have.

    Returns:
      int64, positions of the kept actions, ascending.
    """
    kept = np.arange(len(users))
    while len(kept):
        user_counts, item_counts = np.bincount(users[kept]), np.bincount(items[kept])
        good = user_counts[users[kept]] >= user_least
        good &= item_counts[items[kept]] >= item_least
        if good.all():
            break
        kept = kept[good]
    return kept


def order_actions(users: np.ndarray, times: np.ndarray | None) -> np.ndarray:
    """Returns positions by user, then by time; equal times keep the file's order."""
    import polars as pl

    keys = {'user': users} | ({} if times is None else {'time': times})
    frame = pl.DataFrame(keys).with_row_index('position')
    return frame.sort(list(keys), maintain_order=True)['position'].to_numpy()


def renumber(codes: np.ndarray, ids: list[str]) -> tuple[np.ndarray, list[str]]:
    """Returns the codes numbered from 0 without gaps, int64 [A], and their ids.

    Ids that are all integers keep their numeric order, others that of first appearance.
    """
    present = np.flatnonzero(np.bincount(codes, minlength=len(ids)))
    names = [ids[code] for code in present]
    if all(re.fullmatch('-?[0-9]{1,4000}', name) for name in names):
        order = sorted(range(len(names)), key=lambda n: int(names[n]))
        present, names = present[order], [names[n] for n in order]
    numbers = np.zeros(len(ids), np.int64)
    numbers[present] = np.arange(len(present))
    return numbers[codes], names


def _filter(
    path: Path,
    users: np.ndarray,
    items: np.ndarray,
    ratings: np.ndarray | None,
    min_rating: float,
    k_core: int,
) -> tuple[np.ndarray, dict]:
    """Returns positions of the actions that stay, and what each filter dropped."""
    kept = np.arange(len(users))
    left = _count(users, items)
    counts, story = {'read': left, 'dropped': {}}, [f'{left["actions"]:,} actions read']

    def drop(name: str, label: str, stay: np.ndarray) -> None:
        nonlocal kept, left
        kept, before = kept[stay], left
        left = _count(users[kept], items[kept])
        counts['dropped'][name] = {key: before[key] - left[key] for key in left}
        story.append(f'{left["actions"]:,} left by {label}')

    if min_rating > 0:
        drop('min_rating', f'--min_rating={min_rating:g}', ratings >= min_rating)
    if k_core > 1:
        drop('k_core', f'--k_core={k_core}', find_core(users[kept], items[kept], k_core, k_core))
    # Users go before items are counted again, so that a 2-core stays one.
    stay = find_core(users[kept], items[kept], max(k_core, SHORTEST), max(k_core, 1))
    drop('short', f'keeping users with {SHORTEST} actions or more', stay)
    if not len(kept):
        raise UserError(f'{path}: nothing is left: {", ".join(story)}; filter less or add data')
    return kept, counts


def _count(users: np.ndarray, items: np.ndarray) -> dict[str, int]:
    distinct = (np.count_nonzero(np.bincount(ids)) for ids in (users, items))
    return dict(zip(('users', 'items', 'actions'), (*map(int, distinct), len(users))))
