"""Actions of a log to a Dataset: filter, sort, number."""

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Literal

import numpy as np

from fame_jax.data.card import describe_data, tie_share
from fame_jax.data.dataset import DUPLICATES, MIN_LENGTH, Dataset
from fame_jax.errors import UserError

if TYPE_CHECKING:  # readers import polars
    from fame_jax.data.readers import Log

INTEGER = re.compile('-?[0-9]{1,4000}')


def build_dataset(
    log: 'Log',
    name: str,
    *,
    k_core: int,
    min_rating: float,
    max_user_actions: int = 0,
    duplicates: Literal['keep', 'drop'] = 'keep',
) -> Dataset:
    """Makes a Dataset of the actions of a file or frame.

    The filters follow one another: ratings, duplicates, each user's latest actions, k-core.

    Args:
      log: the actions; with ratings if `min_rating` is above 0.
      name: of the data set, for its card.
      k_core, min_rating, max_user_actions, duplicates: filters, see `prepare`.

    Raises:
      UserError: if a filter's value makes no sense, or the filters leave nothing.
    """
    _check_filters(log, k_core, min_rating, max_user_actions, duplicates)
    card = {'name': name, **log.card, 'min_rating': min_rating, 'k_core': k_core}
    card |= {'max_user_actions': max_user_actions} if max_user_actions else {}
    user_ids, item_ids, clock = log.user_ids, log.item_ids, log.clock
    actions = _Actions(log)
    if min_rating > 0:
        actions.keep('min_rating', f'min_rating={min_rating:g}', log.ratings >= min_rating)
    del log  # where the caller has no reference either, its arrays go when they are filtered
    if duplicates == 'drop' or max_user_actions:
        actions.sort()
    if duplicates == 'drop':
        actions.keep('duplicates', 'duplicates=drop', ~actions.find_duplicates())
    if max_user_actions:
        latest = find_latest(actions.users, max_user_actions)
        actions.keep('max_user_actions', f'max_user_actions={max_user_actions}', latest)
    if k_core > 1:
        core = find_core(actions.users, actions.items, k_core, k_core)
        actions.keep('k_core', f'k_core={k_core}', core)
    long_enough = np.ones(len(actions.users), bool)
    if k_core < MIN_LENGTH:
        # Without its short users the rest may no longer be a k-core (where k is 2): by both.
        long_enough = find_core(actions.users, actions.items, MIN_LENGTH, max(k_core, 1))
    actions.keep('short', f'keeping users with {MIN_LENGTH} actions or more', long_enough)
    actions.check_any_left()

    actions.users, user_ids = renumber(actions.users, user_ids)
    actions.items, item_ids = renumber(actions.items, item_ids)
    actions.sort()
    counts = {'read': actions.read, 'dropped': actions.dropped}
    if actions.times is not None:
        counts['duplicates'] = int(np.count_nonzero(actions.find_duplicates()))
        counts['ties'] = tie_share(actions.users, actions.times)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(actions.users))]).astype(np.int64)
    items = actions.items + np.int32(1)
    times = None if actions.times is None else clock.read(actions.times)
    data = Dataset(items, offsets, user_ids, ['', *item_ids], card | counts, times=times)
    data = data.with_counts()
    return dataclasses.replace(data, card=data.card | describe_data(data))


class _Actions:
    """Actions of a log that filters have left, and the counts of those that they removed.

    Attributes:
      users, items: int32 [A], codes.
      times: [A], or None.
      read: the counts of users, items and actions before any filter.
      dropped: these counts of what each filter removed, by its name.
    """

    def __init__(self, log: 'Log'):
        """Takes all actions of a log."""
        self.users, self.items = log.users.astype(np.int32), log.items.astype(np.int32)
        self.times = log.times
        self.read = self._left = self._count()
        self.dropped: dict[str, dict[str, int]] = {}
        self._place, self._steps = log.place, [f'{self._left["actions"]:,} actions read']

    def keep(self, name: str, label: str, kept: np.ndarray) -> None:
        """Removes the actions where `kept`, bool [A], is false."""
        before = self._left
        if not kept.all():
            self.users, self.items = self.users[kept], self.items[kept]
            self.times = None if self.times is None else self.times[kept]
            self._left = self._count()
        self.dropped[name] = {key: before[key] - self._left[key] for key in before}
        self._steps.append(f'{self._left["actions"]:,} left by {label}')

    def check_any_left(self) -> None:
        """Raises UserError, with the counts of all filters, if they left nothing."""
        if not len(self.users):
            steps = ', '.join(self._steps)
            advice = 'filter less or add data'
            raise UserError(f'{self._place}: nothing is left: {steps}; {advice}')

    def sort(self) -> None:
        """Sorts by user, then by time; ties keep their order."""
        order = sort_actions(self.users, self.times)
        self.users, self.items = self.users[order], self.items[order]
        self.times = None if self.times is None else self.times[order]

    def find_duplicates(self) -> np.ndarray:
        """Returns which of the sorted actions repeat an earlier one, bool [A]."""
        return find_duplicates(self.users, self.items, self.times)

    def _count(self) -> dict[str, int]:
        counts = {'users': _distinct(self.users), 'items': _distinct(self.items)}
        return counts | {'actions': len(self.users)}


def find_core(users: np.ndarray, items: np.ndarray, user_least: int, item_least: int) -> np.ndarray:
    """Returns the k-core: the largest set of actions where all users and items have enough of them.

    Args:
      users, items: int [A], codes from 0.
      user_least, item_least: the number of actions that a user and an item must have.

    Returns:
      Which actions are kept, bool [A].
    """
    kept = np.ones(len(users), bool)
    user_counts, item_counts = np.bincount(users), np.bincount(items)
    # Removing an item may leave a user with too few actions, and so on: repeat until none goes.
    while True:
        good = (user_counts >= user_least)[users]
        good &= (item_counts >= item_least)[items]
        if good.all():
            return kept
        user_counts -= np.bincount(users[~good], minlength=len(user_counts))
        item_counts -= np.bincount(items[~good], minlength=len(item_counts))
        kept[kept] = good
        users, items = users[good], items[good]


def sort_actions(users: np.ndarray, times: np.ndarray | None) -> np.ndarray:
    """Returns the indices of the actions by user, then by time; ties keep their order."""
    import polars as pl

    def sort(keys: np.ndarray) -> np.ndarray:
        place = pl.arg_sort_by('keys', maintain_order=True)
        return pl.DataFrame({'keys': keys}).select(place).to_series().to_numpy()

    # Twice by one key costs a quarter of once by two keys.
    if times is None:
        return sort(users)
    order = sort(times)
    return order[sort(users[order])]


def find_duplicates(users: np.ndarray, items: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Returns which actions repeat an earlier one: user, item and time are equal; bool [A].

    Args:
      users, items: int [A], codes from 0.
      times: [A]. Actions are sorted by user, then by time.
    """
    tied = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
    repeated = np.zeros(len(users), bool)
    places = np.flatnonzero(np.append(tied, False) | np.append(False, tied))
    if not len(places):
        return repeated
    # Actions at one time of one user have the same run.
    run = np.cumsum(np.append(True, ~tied)[places])
    keys = run * (int(items.max()) + 1) + items[places]
    order = np.argsort(keys, kind='stable')
    equal = keys[order[1:]] == keys[order[:-1]]
    repeated[places[order[1:][equal]]] = True
    return repeated


def find_latest(users: np.ndarray, number: int) -> np.ndarray:
    """Returns which actions are among the last `number` of their user, bool [A].

    Args:
      users: int [A], codes in ascending order.
      number: at least 1.
    """
    ends = np.cumsum(np.bincount(users))
    return np.arange(len(users)) >= ends[users] - number


def renumber(codes: np.ndarray, ids: list[str]) -> tuple[np.ndarray, list[str]]:
    """Returns the codes numbered from 0 without gaps, int32 [A], and the ids of the new numbers.

    If all ids are integers, they are numbered in ascending order; else in the order of `ids`.
    """
    found = np.zeros(len(ids), bool)
    found[codes] = True
    present = np.flatnonzero(found)
    names = [ids[code] for code in present.tolist()]
    if all(map(INTEGER.fullmatch, names)):
        values = list(map(int, names))
        order = sorted(range(len(names)), key=values.__getitem__)
        present, names = present[order], [names[n] for n in order]
    numbers = np.zeros(len(ids), np.int32)
    numbers[present] = np.arange(len(present), dtype=np.int32)
    return numbers[codes], names


def _check_filters(
    log: 'Log', k_core: int, min_rating: float, max_user_actions: int, duplicates: str
) -> None:
    if k_core < 0:
        raise UserError(f'k_core={k_core}: choose 0 (no k-core) or a larger number')
    if not (math.isfinite(min_rating) and min_rating >= 0):
        raise UserError(f'min_rating={min_rating}: choose 0 (all ratings) or a larger number')
    if max_user_actions != 0 and max_user_actions < MIN_LENGTH:
        what = f'max_user_actions={max_user_actions}: choose 0 (all actions) or {MIN_LENGTH}'
        raise UserError(f'{what} or more, which a user needs at least')
    if duplicates not in DUPLICATES:
        raise UserError(f'duplicates={duplicates}: choose one of {", ".join(DUPLICATES)}')
    if duplicates == 'drop' and log.times is None:
        what = 'duplicates=drop needs times: without them a repeat may be a second action'
        raise UserError(f'{log.place}: {what}; name their column, or keep duplicates')


def _distinct(codes: np.ndarray) -> int:
    found = np.zeros(int(codes.max(initial=-1)) + 1, bool)
    found[codes] = True
    return int(np.count_nonzero(found))
