"""A prepared data set: the items of each user in order, its form on disk, and its split."""

import dataclasses
import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from fame_jax.errors import UserError, explain_os_errors

ARRAYS = ('items', 'offsets', 'item_facets', 'user_facets')
# sequences.npz has all arrays; data sets were saved so until November 2026.
FILES = (*(f'{name}.npy' for name in ARRAYS), 'sequences.npz', 'ids.json', 'dataset.json')
MIN_LENGTH = 3  # items of a user: one to train on, one for validation, one for the test
K_CORE, MIN_RATING = 5, 0.0  # default filters
ID_KINDS = ('int', 'str')
DUPLICATES = ('keep', 'drop')

BLOCK = 100_000  # ids that are turned into text at once
# The place of each split's target, counted from the end of a user's items.
TARGET_PLACES = {'validation': 2, 'test': 1}

ItemId = int | str


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """The items of every user, oldest first, one user after the other.

    `from_frame` and `from_file` make a data set; `load` reads one that was saved.

    Fields:
      items: int32 [A], item indices 1..V of all actions. The items of user u are
        `items[offsets[u]:offsets[u + 1]]`.
      offsets: int64 [U + 1], the first action of each user, and A.
      user_ids: U ids of the source, as text.
      item_ids: V + 1 ids of the source, as text; entry 0 is '' for the padding.
      card: the content of dataset.json: source, columns, filters, counts. `id_kinds` says whether
        the ids of users and items were 'int' or 'str' in the source.
      item_facets: int32 [V + 1, M], the known value of each item on each facet, -1 in row 0; None
        where no facets are known.
      user_facets: int32 [U], the facet that decides each user's choices; synthetic data only.
    """

    items: np.ndarray
    offsets: np.ndarray
    user_ids: list[str]
    item_ids: list[str]
    card: dict
    item_facets: np.ndarray | None = None
    user_facets: np.ndarray | None = None

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        *,
        user: str | None = None,
        item: str | None = None,
        time: str | None = None,
        rating: str | None = None,
        k_core: int = K_CORE,
        min_rating: float = MIN_RATING,
        max_user_actions: int = 0,
        duplicates: Literal['keep', 'drop'] = 'keep',
    ) -> 'Dataset':
        """Makes a data set of a frame with one action per row.

        Args:
          frame: a pandas or polars frame, anything with the Arrow PyCapsule interface (pyarrow
            tables, DuckDB relations, ...).
          user, item: the columns of the ids, integers or text. 7 and '7' are the same id. None:
            the column is chosen by its name.
          time: the column of the times: numbers in one unit, dates, or ISO text. Rows of one user
            with the same time keep their order. None: the column is chosen by its name; if no
            column looks like a time, the order of the rows is the order in time. '-': the order
            of the rows, whatever the columns.
          rating: the column of the ratings, which only `min_rating` needs. None: by its name.
          k_core: users and items with fewer actions are removed until none is left; 0 or 1 keeps
            all. Users with fewer than 3 actions are always removed.
          min_rating: rows with a lower rating are removed; 0 keeps all.
          max_user_actions: earlier actions of a user with more of them are removed; 0 keeps all.
          duplicates: 'drop' removes rows whose user, item and time are those of an earlier row.

        Raises:
          UserError: if a column is missing or in doubt, a value is missing or has the wrong type,
            or the filters leave nothing.
          TypeError: if `frame` is not a frame.
        """
        # polars takes a while to import, and reading a saved data set does not need it.
        from fame_jax.data.from_frame import from_frame

        return from_frame(
            frame,
            user=user,
            item=item,
            time=time,
            rating=rating,
            k_core=k_core,
            min_rating=min_rating,
            max_user_actions=max_user_actions,
            duplicates=duplicates,
        )

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike,
        *,
        user: str | None = None,
        item: str | None = None,
        time: str | None = None,
        rating: str | None = None,
        k_core: int = K_CORE,
        min_rating: float = MIN_RATING,
        max_user_actions: int = 0,
        duplicates: Literal['keep', 'drop'] = 'keep',
        data_dir: str | os.PathLike = '',
    ) -> 'Dataset':
        """Makes a data set of a file, or of a known data set.

        Args:
          path: a log or sequence file (see `prepare`), a known name such as 'toys', or 'synthetic'.
          user, item, time, rating: columns of a log, as in `from_frame`.
          k_core, min_rating, max_user_actions, duplicates: filters, as in `from_frame`.
          data_dir: the folder of known data sets; empty: $FAME_JAX_DATA, then the cache folder.

        Raises:
          UserError: on an unknown name, a faulty file, or where the filters leave nothing.
        """
        from fame_jax.data.prepare import prepare

        columns = {'user': user, 'item': item, 'time': time, 'rating': rating}
        return prepare(
            os.fspath(path),
            data_dir=os.fspath(data_dir),
            columns={role: name for role, name in columns.items() if name},
            k_core=k_core,
            min_rating=min_rating,
            max_user_actions=max_user_actions,
            duplicates=duplicates,
        )

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
        """The number of actions of each user, int64 [U]."""
        return np.diff(self.offsets)

    def __repr__(self) -> str:
        return f'Dataset({self.describe()})'

    def describe(self) -> str:
        """Returns one line for the screen: counts, lengths, density, source."""
        lengths, card = self.lengths, self.card
        users, items, actions = self.num_users, self.num_items, len(self.items)
        name, source = card.get('name', 'data set'), card.get('source', 'memory')
        return (
            f'{name}: {users:,} users, {items:,} items, {actions:,} '
            f'actions; {lengths.mean():.2f} a user ({lengths.min()} to {lengths.max():,}, '
            f'median {np.median(lengths):g}), density {100 * actions / (users * items):.3g} %'
            + (f'; from {source}' if source != name else '')
        )

    def histories(self) -> Iterator[tuple[ItemId, list[ItemId]]]:
        """Yields (user id, item ids, oldest first) of each user, ids as they were in the source."""
        kinds = self.card.get('id_kinds', {})
        users = restore_ids(self.user_ids, kinds.get('user', 'str'))
        items = ['', *restore_ids(self.item_ids[1:], kinds.get('item', 'str'))]
        for user, start, end in zip(users, self.offsets, self.offsets[1:]):
            yield user, [items[index] for index in self.items[start:end].tolist()]

    def training_histories(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (items int32, offsets int64 [U + 1]) without the last two items of each user."""
        return self._without_last(2)

    def leave_one_out(
        self, split: Literal['validation', 'test']
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns each user's target and the history before it.

        The target of 'test' is the last item; its history includes the validation target. The
        target of 'validation' is the item before the last; its history is the training part.

        Returns:
          (items int32, offsets int64 [U + 1], targets int32 [U]).

        Raises:
          ValueError: if there is no such split.
        """
        _, ends = self.history_bounds(split)
        return *self._without_last(TARGET_PLACES[split]), self.items[ends]

    def history_bounds(self, split: Literal['validation', 'test']) -> tuple[np.ndarray, np.ndarray]:
        """Returns where each user's history in `leave_one_out` starts and ends; copies no items.

        Returns:
          (starts, ends), int64 [U] each: user u's history is `items[starts[u]:ends[u]]`, the target
          `items[ends[u]]`.

        Raises:
          ValueError: if there is no such split.
        """
        if split not in TARGET_PLACES:
            raise ValueError(f"no split {split!r}; choose 'validation' or 'test'")
        return self.offsets[:-1], self.offsets[1:] - TARGET_PLACES[split]

    def _without_last(self, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns items and offsets without the last `last` items of each user."""
        kept = np.ones(len(self.items), bool)
        for back in range(1, last + 1):
            kept[self.offsets[1:] - back] = False
        return self.items[kept], self.offsets - last * np.arange(len(self.offsets))

    def with_counts(self) -> Self:
        """Returns the data set with its counts and its fingerprint in the card.

        Raises:
          ValueError: if the fields contradict one another.
        """
        fault = self.find_fault()
        if fault:
            raise ValueError(fault)
        return dataclasses.replace(self, card=self.card | self._counts())

    def fingerprint(self) -> str:
        """Returns the SHA-256 of all fields but the card."""
        digest = hashlib.sha256()
        for name, array in self._arrays().items():
            digest.update(f'{name} {array.dtype} {array.shape};'.encode())
            digest.update(np.ascontiguousarray(array).reshape(-1))
        # The JSON text of both lists of ids, in blocks.
        for before, ids, after in (('[[', self.user_ids, '], '), ('[', self.item_ids, ']]')):
            digest.update(before.encode())
            for start in range(0, len(ids), BLOCK):
                comma = ', ' if start else ''
                digest.update((comma + json.dumps(ids[start : start + BLOCK])[1:-1]).encode())
            digest.update(after.encode())
        return digest.hexdigest()

    def find_fault(self) -> str:
        """Returns the first contradiction among the fields in words, or ''."""
        items, offsets = self.items, self.offsets
        if (items.dtype, offsets.dtype, items.ndim, offsets.ndim) != (np.int32, np.int64, 1, 1):
            return 'items must be int32 [A] and offsets int64 [U + 1]'
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(items):
            return 'the offsets do not span the items'
        if self.lengths.min() < MIN_LENGTH:
            return f'a user has fewer than {MIN_LENGTH} items'
        if items.min() < 1 or items.max() > self.num_items or self.item_ids[0] != '':
            return 'the item ids do not match the items'
        if len(self.user_ids) != self.num_users:
            return 'the user ids do not match the users'
        facets, followed = self.item_facets, self.user_facets
        if facets is not None and (facets.ndim != 2 or len(facets) != self.num_items + 1):
            return 'the facets do not match the items'
        if followed is not None and followed.shape != (self.num_users,):
            return 'the facets of the users do not match the users'
        for role, ids in (('user', self.user_ids), ('item', self.item_ids[1:])):
            kind = self.card.get('id_kinds', {}).get(role, 'str')
            if kind not in ID_KINDS or (kind == 'int' and not _are_integers(ids)):
                return f'the {role} ids are not of the kind {kind!r}'
        return ''

    def save(self, folder: str | os.PathLike) -> None:
        """Writes arrays (.npy), ids.json and dataset.json into a folder: all of them or none.

        A data set that is there already is replaced.

        Raises:
          UserError: if the folder cannot be written, or contains other files.
        """
        folder, data = Path(folder), self.with_counts()
        ids = {'users': data.user_ids, 'items': data.item_ids}
        with explain_os_errors(f'writing {folder}', 'choose another folder'):
            _refuse_other_files(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f'.{folder.name}-', dir=folder.parent) as temp:
                # A temporary directory is closed to other users; the data set's is not.
                new = Path(temp) / 'new'
                new.mkdir()
                for name, array in data._arrays().items():
                    np.save(new / f'{name}.npy', array)
                (new / 'ids.json').write_text(json.dumps(ids))
                (new / 'dataset.json').write_text(json.dumps(data.card, indent=2) + '\n')
                if folder.exists():
                    folder.rename(Path(temp) / 'old')
                new.rename(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> 'Dataset':
        """Reads a data set that `save` wrote. Its arrays stay on the disk, mapped into memory.

        Raises:
          UserError: if it is missing or incomplete, or differs from the counts and the fingerprint
            in its card.
        """
        folder = Path(folder)
        advice = 'delete the folder and prepare the data set again'
        if not (folder / 'dataset.json').is_file():
            raise UserError(
                f'{folder}: no prepared data set here (dataset.json is missing); prepare it'
            )
        with explain_os_errors(f'reading {folder}', advice):
            try:
                data = _read(folder)
                fault = data.find_fault()
            except (
                ValueError,
                LookupError,
                AttributeError,
                TypeError,
                EOFError,
                RecursionError,
                zipfile.BadZipFile,
                zlib.error,
            ) as error:
                raise UserError(f'{folder}: the prepared data set is damaged; {advice}') from error
        for key, value in {} if fault else data._counts().items():
            if data.card.get(key) != value:
                fault = f'its {key} is not that of dataset.json'
        if fault:
            raise UserError(f'{folder}: the prepared data set is damaged ({fault}); {advice}')
        return data

    def _counts(self) -> dict:
        return {
            'users': self.num_users,
            'items': self.num_items,
            'actions': len(self.items),
            'fingerprint': self.fingerprint(),
        }

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {name: getattr(self, name) for name in ARRAYS}
        return {name: array for name, array in arrays.items() if array is not None}


def restore_ids(ids: list[str], kind: str) -> list[ItemId]:
    """Returns ids as they were in the source: integers if the kind is 'int', else the text."""
    return [int(name) for name in ids] if kind == 'int' else list(ids)


def _are_integers(ids: list[str]) -> bool:
    try:
        return all(number is not None for number in map(int, ids))
    except ValueError:
        return False


def _read(folder: Path) -> Dataset:
    card = json.loads((folder / 'dataset.json').read_text())
    ids = json.loads((folder / 'ids.json').read_text())
    if (folder / 'sequences.npz').exists():
        with np.load(folder / 'sequences.npz', allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    else:
        paths = {name: folder / f'{name}.npy' for name in ARRAYS}
        paths = {name: path for name, path in paths.items() if path.exists() or name in ARRAYS[:2]}
        arrays = {name: np.asarray(np.load(path, mmap_mode='r')) for name, path in paths.items()}
    if not isinstance(card, dict):
        raise TypeError('dataset.json must contain an object')
    return Dataset(user_ids=ids['users'], item_ids=ids['items'], card=card, **arrays)


def _refuse_other_files(folder: Path) -> None:
    """Raises UserError where replacing the folder would delete files of something else."""
    others = (
        sorted(p.name for p in folder.iterdir() if p.name not in FILES) if folder.exists() else []
    )
    if others:
        raise UserError(
            f'{folder}: also contains {others[0]!r}; choose a folder for the data set alone'
        )
