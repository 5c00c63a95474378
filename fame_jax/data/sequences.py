"""Who did what, in order: the one form every data set has on disk, and its split."""

import dataclasses
import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np

from fame_jax.errors import UserError, explain_os_errors

FILES = ('sequences.npz', 'ids.json', 'dataset.json')
SHORTEST = 3  # one item to learn from, one to validate on, one to test on


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences:
    """Every user's actions, oldest first, one user after the other.

    Fields:
      items: int32 [A], item ids 1..V; user u did `items[offsets[u]:offsets[u + 1]]`.
      offsets: int64 [U + 1].
      user_ids: U outside ids.
      item_ids: V + 1 outside ids; entry 0 is '' for the padding.
      card: what dataset.json says: source, filters, counts.
      item_facets: int32 [V + 1, M], the known value of each item on each facet; row 0 is -1.
      user_facets: int32 [U], the facet each user follows, where a generator planted one.
    """

    items: np.ndarray
    offsets: np.ndarray
    user_ids: list[str]
    item_ids: list[str]
    card: dict
    item_facets: np.ndarray | None = None
    user_facets: np.ndarray | None = None

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        """V, without the padding."""
        return len(self.item_ids) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [U], actions of each user."""
        return np.diff(self.offsets)


def seal(sequences: Sequences) -> Sequences:
    """Returns the same sequences, their card completed by counts and the content's SHA-256.

    Raises:
      ValueError: if the arrays contradict one another.
    """
    fault = find_fault(sequences)
    if fault:
        raise ValueError(fault)
    return dataclasses.replace(sequences, card=sequences.card | _summarise(sequences))


def fingerprint(sequences: Sequences) -> str:
    """Returns the SHA-256 of everything but the card."""
    digest = hashlib.sha256()
    for name, array in _arrays(sequences).items():
        digest.update(f'{name} {array.dtype} {array.shape};'.encode())
        digest.update(array.tobytes())
    digest.update(json.dumps([sequences.user_ids, sequences.item_ids]).encode())
    return digest.hexdigest()


def find_fault(sequences: Sequences) -> str:
    """Returns the first contradiction among the arrays in words, or '' if there is none."""
    items, offsets = sequences.items, sequences.offsets
    if items.dtype != np.int32 or offsets.dtype != np.int64 or items.ndim != 1 or offsets.ndim != 1:
        return 'items must be int32 [A] and offsets int64 [U + 1]'
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(items):
        return 'the offsets do not span the items'
    if sequences.lengths.min() < SHORTEST:
        return f'a user has fewer than {SHORTEST} items'
    if items.min() < 1 or items.max() > sequences.num_items or sequences.item_ids[0] != '':
        return 'the item ids do not match the items'
    if len(sequences.user_ids) != sequences.num_users:
        return 'the user ids do not match the users'
    facets, followed = sequences.item_facets, sequences.user_facets
    if facets is not None and (facets.ndim != 2 or len(facets) != sequences.num_items + 1):
        return 'the facets do not match the items'
    if followed is not None and followed.shape != (sequences.num_users,):
        return 'the followed facets do not match the users'
    return ''


def save(sequences: Sequences, folder: str | os.PathLike) -> None:
    """Writes sequences.npz, ids.json and dataset.json into the folder, all of them or none.

    Raises:
      UserError: if the folder cannot be written or holds files that are not a data set's.
    """
    folder, sequences = Path(folder), seal(sequences)
    ids = {'users': sequences.user_ids, 'items': sequences.item_ids}
    with explain_os_errors(f'writing {folder}', 'choose another folder'):
        _refuse_foreign(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{folder.name}-', dir=folder.parent) as aside:
            # A folder of its own inside: the outer one is closed to others by its maker.
            fresh = Path(aside) / 'fresh'
            fresh.mkdir()
            np.savez(fresh / 'sequences.npz', **_arrays(sequences))
            (fresh / 'ids.json').write_text(json.dumps(ids))
            (fresh / 'dataset.json').write_text(json.dumps(sequences.card, indent=2) + '\n')
            if folder.exists():
                folder.rename(Path(aside) / 'old')
            fresh.rename(folder)


def load(folder: str | os.PathLike) -> Sequences:
    """Reads what `save` wrote.

    Raises:
      UserError: if it is missing, cut short, or differs from its own counts and checksum.
    """
    folder = Path(folder)
    advice = 'delete the folder and prepare the data set again'
    if not (folder / 'dataset.json').is_file():
        raise UserError(
            f'{folder}: no prepared data set here (dataset.json is missing); prepare it'
        )
    with explain_os_errors(f'reading {folder}', advice):
        try:
            sequences = _read(folder)
            fault = find_fault(sequences)
        except (
            ValueError,
            LookupError,
            TypeError,
            EOFError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise UserError(f'{folder}: the prepared data set is damaged; {advice}') from error
    for key, value in {} if fault else _summarise(sequences).items():
        if sequences.card.get(key) != value:
            fault = f'its {key} is not what dataset.json says'
    if fault:
        raise UserError(f'{folder}: the prepared data set is damaged ({fault}); {advice}')
    return sequences


def split_training(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """Returns (items int32, offsets int64 [U + 1]): all but each user's last two items."""
    return _cut(sequences, 2)


def held_out(
    sequences: Sequences, split: Literal['validation', 'test']
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the histories before the held-out item, and the item.

    The target of 'test' is the last item and its history includes the validation item; the target
    of 'validation' is the one before, and its history is the training part.

    Returns:
      (items int32, offsets int64 [U + 1], targets int32 [U]).

    Raises:
      ValueError: if the split is neither.
    """
    if split not in ('validation', 'test'):
        raise ValueError(f'no such split: {split!r}')
    last = 1 if split == 'test' else 2
    items, offsets = _cut(sequences, last)
    return items, offsets, sequences.items[sequences.offsets[1:] - last]


def describe(sequences: Sequences) -> str:
    """Returns one line for the screen: counts, lengths, density, source."""
    lengths, card = sequences.lengths, sequences.card
    users, items, actions = sequences.num_users, sequences.num_items, len(sequences.items)
    return (
        f'{card.get("name", "data set")}: {users:,} users, {items:,} items, {actions:,} actions; '
        f'{lengths.mean():.2f} a user ({lengths.min()} to {lengths.max():,}, '
        f'median {np.median(lengths):g}), density {100 * actions / (users * items):.3g} %; '
        f'from {card.get("source", "memory")}'
    )


def _cut(sequences: Sequences, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns items and offsets without each user's `last` items."""
    kept = np.ones(len(sequences.items), bool)
    for back in range(1, last + 1):
        kept[sequences.offsets[1:] - back] = False
    return sequences.items[kept], sequences.offsets - last * np.arange(len(sequences.offsets))


def _summarise(sequences: Sequences) -> dict:
    return {
        'users': sequences.num_users,
        'items': sequences.num_items,
        'actions': len(sequences.items),
        'fingerprint': fingerprint(sequences),
    }


def _arrays(sequences: Sequences) -> dict[str, np.ndarray]:
    names = ('items', 'offsets', 'item_facets', 'user_facets')
    arrays = {name: getattr(sequences, name) for name in names}
    return {name: array for name, array in arrays.items() if array is not None}


def _read(folder: Path) -> Sequences:
    card = json.loads((folder / 'dataset.json').read_text())
    ids = json.loads((folder / 'ids.json').read_text())
    with np.load(folder / 'sequences.npz', allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    if not isinstance(card, dict):
        raise TypeError('dataset.json must hold an object')
    return Sequences(user_ids=ids['users'], item_ids=ids['items'], card=card, **arrays)


def _refuse_foreign(folder: Path) -> None:
    """Raises UserError where replacing the folder would delete something that is not ours."""
    foreign = (
        sorted(p.name for p in folder.iterdir() if p.name not in FILES) if folder.exists() else []
    )
    if foreign:
        raise UserError(
            f'{folder}: also holds {foreign[0]!r}; choose a folder for the data set alone'
        )
