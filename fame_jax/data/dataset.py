"""A prepared data set: the items of each user in order, its form on disk, and its split."""

import dataclasses
import datetime
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

from fame_jax.data.split import PARTS, Split, leave_one_out, list_places, split_by_time
from fame_jax.errors import UserError, explain_os_errors

ARRAYS = ('items', 'offsets', 'item_facets', 'user_facets')  # those of the fingerprint
TIMES = 'times.npy'
# sequences.npz has all arrays; data sets were saved so until November 2026.
FILES = (*(f'{name}.npy' for name in ARRAYS), TIMES, 'sequences.npz', 'ids.json', 'dataset.json')
MIN_LENGTH = 3  # items of a user: one to train on, one for validation, one for the test
K_CORE, MIN_RATING = 5, 0.0  # default filters
ID_KINDS = ('int', 'str')
DUPLICATES = ('keep', 'drop')

BLOCK = 100_000  # ids that are turned into text at once

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
      times: [A], the time of each action, ascending in each user: int64 microseconds since 1970,
        or, where card['time']['unit'] is 'numbers', the numbers of the source, int64 or float64.
        None where the source has no times.
      time_split: a split by time, see `split_by_time`; None: leave one out.
    """

    items: np.ndarray
    offsets: np.ndarray
    user_ids: list[str]
    item_ids: list[str]
    card: dict
    item_facets: np.ndarray | None = None
    user_facets: np.ndarray | None = None
    times: np.ndarray | None = None
    time_split: Split | None = None

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

    @property
    def split(self) -> Split:
        """Which actions are trained on, and which are the targets of validation and test."""
        return self.time_split or leave_one_out(self.offsets)

    def split_by_time(
        self,
        at: float | str | datetime.date = 0.9,
        targets: Literal['last', 'successive'] = 'last',
    ) -> Self:
        """Returns the same data with a split by time in the place of leave one out.

        Training sees nothing at or after a moment, of any user. Validation targets are chosen the
        same way inside the part before the moment, and training ends where they begin.

        Args:
          at: the moment: a share of all actions by time, or a date (UTC where it has no zone).
          targets: from the moment on, 'last' item of each user, or 'successive': every item, with
            everything before it as its history.

        Raises:
          UserError: if the data have no times, `at` is neither a share nor a date, or the moment
            leaves nothing to train or to test on.
        """
        if self.times is None:
            raise UserError(f'{self.card.get("name", "the data set")}: {self._why_no_times()}')
        base = dataclasses.replace(self, time_split=None)
        fingerprint = base.fingerprint()
        has_dates = self.card.get('time', {}).get('unit') != 'numbers'
        split = split_by_time(
            self.items, self.offsets, self.times, at=at, targets=targets, has_dates=has_dates
        )
        split.card['data_sha256'] = fingerprint
        data = dataclasses.replace(base, time_split=split)
        return dataclasses.replace(
            data, card=self.card | {'fingerprint': data._of_split(fingerprint)}
        )

    def training_histories(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the training part of each user: (items int32, offsets int64 [U + 1])."""
        starts, ends = self.offsets[:-1], self.split.train_ends
        # 1 where a training part starts, -1 where it ends: their sum is 1 inside.
        edges, some = np.zeros(len(self.items) + 1, np.int8), ends > starts
        edges[starts[some]] += 1
        edges[ends[some]] -= 1
        kept = np.cumsum(edges[:-1], dtype=np.int8) > 0
        return self.items[kept], np.concatenate([[0], np.cumsum(ends - starts)])

    def held_out(
        self, part: Literal['validation', 'test']
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the targets of a part of the split, and the history before each.

        In leave one out these are, of each user, the last item ('test'; its history includes the
        validation target) and the item before the last ('validation'; its history is the training
        part). In a split by time see `split.split_by_time`: there are R targets, whose users are
        `split.parts[part].users`.

        Returns:
          (items int32, offsets int64 [R + 1], targets int32 [R]).

        Raises:
          ValueError: if there is no such part.
        """
        starts, ends = self.history_bounds(part)
        items = self.items[list_places(starts, ends)]
        return items, np.concatenate([[0], np.cumsum(ends - starts)]), self.items[ends]

    def history_bounds(self, part: Literal['validation', 'test']) -> tuple[np.ndarray, np.ndarray]:
        """Returns where each history in `held_out` starts and ends; copies no items.

        Returns:
          (starts, ends), int64 [R] each: history r is `items[starts[r]:ends[r]]`, its target
          `items[ends[r]]`.

        Raises:
          ValueError: if there is no such part.
        """
        if part not in PARTS:
            raise ValueError(f"no split {part!r}; choose 'validation' or 'test'")
        return self.split.parts[part].starts, self.split.parts[part].ends

    def _why_no_times(self) -> str:
        if 'time' in self.card:  # of a log with times, which were not kept then
            return 'an earlier version prepared it without its times; prepare it again'
        return (
            'a split by time needs the times of the actions, and it has none; use a log with a '
            'column of times, or leave one out'
        )

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
        """Returns the SHA-256 of all fields but the card and, in leave one out, the times.

        Runs whose fingerprints differ were trained or evaluated on other data. Leave one out does
        not read the times; a split by time adds its setting and its bounds.
        """
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
        return self._of_split(digest.hexdigest())

    def _of_split(self, fingerprint: str) -> str:
        """Returns the fingerprint of the data and the split, from that of the data."""
        if self.time_split is None:
            return fingerprint
        card, parts = self.time_split.card, self.time_split.parts
        names = ('moment', 'validation_moment', 'targets')
        digest = hashlib.sha256(json.dumps([fingerprint, *(card[n] for n in names)]).encode())
        for bounds in (self.time_split.train_ends, *parts['validation'], *parts['test']):
            digest.update(f'{bounds.shape};'.encode() + bounds.astype(np.int64).tobytes())
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
        fault = self._find_fault_of_times()
        if fault:
            return fault
        for role, ids in (('user', self.user_ids), ('item', self.item_ids[1:])):
            kind = self.card.get('id_kinds', {}).get(role, 'str')
            if kind not in ID_KINDS or (kind == 'int' and not _are_integers(ids)):
                return f'the {role} ids are not of the kind {kind!r}'
        return ''

    def _find_fault_of_times(self) -> str:
        times = self.times
        if times is not None:
            if times.shape != self.items.shape or times.dtype not in (np.int64, np.float64):
                return 'the times do not match the items'
            falls = np.flatnonzero(times[1:] < times[:-1]) + 1
            if not np.isin(falls, self.offsets).all():
                return 'the times of a user do not ascend'
        if self.time_split and len(self.time_split.train_ends) != self.num_users:
            return 'the split by time is that of other data; split again'
        return ''

    def save(self, folder: str | os.PathLike) -> None:
        """Writes arrays (.npy), ids.json and dataset.json into a folder: all of them or none.

        A data set that is there already is replaced. Of a split by time the setting is kept.

        Raises:
          UserError: if the folder cannot be written, or contains other files.
        """
        folder, data = Path(folder), dataclasses.replace(self, time_split=None).with_counts()
        card = data.card
        if self.time_split:
            card = card | {'split': {key: self.time_split.card[key] for key in ('at', 'targets')}}
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
                if data.times is not None:
                    np.save(new / TIMES, data.times)
                (new / 'ids.json').write_text(json.dumps(ids))
                (new / 'dataset.json').write_text(json.dumps(card, indent=2) + '\n')
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
        return data.split_by_time(**data.card.pop('split')) if 'split' in data.card else data

    def _counts(self) -> dict:
        counts = {
            'users': self.num_users,
            'items': self.num_items,
            'actions': len(self.items),
            'fingerprint': self.fingerprint(),
        }
        if self.times is not None:
            counts['times_sha256'] = hashlib.sha256(np.ascontiguousarray(self.times)).hexdigest()
        return counts

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
    if 'times_sha256' in card or (folder / TIMES).exists():
        arrays['times'] = np.asarray(np.load(folder / TIMES, mmap_mode='r'))
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
