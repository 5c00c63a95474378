"""New days of a log: actions that are added to a data set, whose ids keep their numbers.

read_like      a file or frame, read as the log of the data set was read
append_log     the data set with the new actions; new users and items have the numbers at the end
find_rounds    for each new item, the items next to it in the histories
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fame_jax.data.build import INTEGER, find_duplicates, find_latest, sort_actions
from fame_jax.data.card import describe_data
from fame_jax.data.dataset import MIN_LENGTH, Dataset
from fame_jax.errors import UserError

if TYPE_CHECKING:  # readers import polars
    from fame_jax.data.readers import Log

# Actions at the start of a history by which a log that repeats it is recognised.
REPEATED = 10
MANY = 10  # items, of which at least one should be known


class Waiting(NamedTuple):
    """Actions of new users who have fewer than three, in the order of the log.

    Such a user has no training, validation and test part; the next update takes the actions again.

    Fields:
      users, items: ids as text, one for each action.
      times: their times; empty where the data set has none.
    """

    users: Sequence[str] = ()
    items: Sequence[str] = ()
    times: Sequence[float] = ()


NO_ACTIONS = Waiting()


class Appended(NamedTuple):
    """A data set with new actions.

    Fields:
      data: all actions that are now in it; its card lists the logs that were appended.
      old_places: int64 [A of the earlier data set], where each of its actions is now; -1 where the
        user's latest actions (`max_user_actions`) no longer include it.
      waiting: the actions that wait for more of their users.
      record: source, SHA-256 and counts of the appended log.
      notes: lines about doubtful readings.
    """

    data: Dataset
    old_places: np.ndarray
    waiting: Waiting
    record: dict[str, Any]
    notes: list[str]


def read_like(source: Any, data: Dataset, min_rating: float) -> 'Log':
    """Reads a file or a frame with the reader, the columns and the order of a data set's log.

    Args:
      source: a path, or a pandas, polars or Arrow frame.
      data: the data set.
      min_rating: above 0, ratings are needed.

    Raises:
      UserError: if the log cannot be read so: columns are missing, ids are no whole numbers where
        they were before, or times have another unit.
    """
    # polars takes a while to import, and an update that goes on does not need it.
    from fame_jax.data import from_frame, readers, sources

    card = data.card
    if 'reader' not in card:
        raise UserError(
            f'{card.get("name", "the data set")} has no log that could be appended to; update a '
            'run on a file or frame'
        )
    of_sequences = card['reader'] == 'sequences'
    columns = {} if of_sequences else {'time': '-'} | card['columns']
    if not min_rating:
        columns.pop('rating', None)
    is_path = isinstance(source, str | os.PathLike)
    place = str(source) if is_path else from_frame.PLACE
    if of_sequences != (is_path and sources.open_source(source).kind == 'txt'):
        one, other = ('user item item ...', 'a table of actions')[:: 1 if of_sequences else -1]
        raise UserError(f'{place}: {other}, and the log of the run was {one}; give the same')
    reads = ', '.join(f'{role} {name!r}' for role, name in columns.items() if name != '-')
    try:
        if is_path:
            log = readers.read_log(source, columns, min_rating > 0)
        else:
            log = from_frame.read_frame(source, columns, min_rating > 0)
    except UserError as error:
        as_before = f'; it is read as the log of the run was: {reads}' if reads else ''
        raise UserError(f'{error}{as_before}') from error
    _check_like(log, card)
    return log


def _check_like(log: 'Log', card: Mapping[str, Any]) -> None:
    """Refuses ids and times of another kind than those of the data set's log."""
    for role, ids in (('user', log.user_ids), ('item', log.item_ids)):
        if card.get('id_kinds', {}).get(role) == 'int':
            wrong = next((name for name in ids if not INTEGER.fullmatch(name)), None)
            if wrong is not None:
                raise UserError(
                    f'{log.place}: the {role} {wrong!r} is no whole number, as all {role}s of the '
                    "run's log are; correct it, or train a new run"
                )
    ours, theirs = log.card.get('time', {}).get('unit'), card.get('time', {}).get('unit')
    if ours != theirs:
        raise UserError(
            f"{log.place}: times are in {ours}, and in the run's log in {theirs}; write both in "
            'one unit'
        )


def digest(log: 'Log') -> str:
    """The SHA-256 of the actions of a log, whatever its file's form."""
    names = [[log.user_ids, log.users], [log.item_ids, log.items]]
    rows = [[ids[code] for code in codes.tolist()] for ids, codes in names]
    times = [] if log.times is None else log.times.tolist()
    return hashlib.sha256(json.dumps([*rows, times]).encode()).hexdigest()


def append_log(
    data: Dataset,
    log: 'Log',
    waiting: Waiting = NO_ACTIONS,
    *,
    run: str,
    min_rating: float = 0.0,
    max_user_actions: int = 0,
    duplicates: str = 'keep',
    split_at: float | str | None = None,
) -> Appended:
    """Adds the actions of a log to a data set.

    Old users and items keep their numbers; new ones follow, whole numbers in ascending order,
    others in that of their first action. The k-core is not applied: every item of the log becomes
    an item, and every user with three actions a user. Where the data set keeps its times, all
    actions of a user are sorted by time; otherwise new actions follow the old ones.

    Args:
      data: the data set.
      log: as `read_like` reads it.
      waiting: the actions that waited before.
      run: the name of the run that has the data set, for the card and for messages.
      min_rating, max_user_actions, duplicates: filters, as in `prepare`.
      split_at: the moment of the new split, where the data set is split by time; None: as before,
        which is a later moment if it is a share of all actions.

    Raises:
      UserError: if the log was appended before, repeats the histories that the data set has, or
        has no item of the catalogue.
    """
    actions_sha256 = digest(log)
    _refuse_again(data, log, actions_sha256, run)
    rated = np.ones(len(log.users), bool)
    if min_rating > 0:
        rated = log.ratings >= min_rating
    new = _Actions(
        *(_rename(ids, codes[rated]) for ids, codes in _coded(log)), _times_of(log, rated)
    )
    if not len(new.users):
        raise UserError(f'{log.place}: min_rating={min_rating:g} leaves no action; append others')
    _refuse_other_items(data, log, new, run)
    old_times = data.times
    by_time = new.sorted(drop_duplicates=duplicates == 'drop')
    _refuse_repeats(data, log, by_time, run)
    if old_times is None:  # they are sorted by themselves, and follow the old ones
        new = by_time

    waited = _Actions(waiting.users, waiting.items, np.asarray(waiting.times))
    known_users, user_ids = _number(data.user_ids, [*waited.users, *new.users])
    known_items, item_ids = _number(data.item_ids[1:], [*waited.items, *new.items])
    users = np.repeat(np.arange(data.num_users), data.lengths)
    users = np.concatenate([users, known_users])
    items = np.concatenate([data.items - 1, known_items])
    times = None
    if old_times is not None:
        times = np.concatenate([old_times, waited.times.astype(old_times.dtype), new.times])
    order = sort_actions(users.astype(np.int32), times)
    kept = np.ones(len(order), bool)
    if times is not None and duplicates == 'drop':
        kept = ~find_duplicates(users[order], items[order], times[order])
    if max_user_actions:
        kept[kept] = find_latest(users[order][kept], max_user_actions)
    order = order[kept]

    counts = np.bincount(users[order], minlength=len(user_ids))
    admitted = counts >= MIN_LENGTH
    waits = ~admitted[users[order]]
    still = Waiting(
        [user_ids[user] for user in users[order[waits]].tolist()],
        [item_ids[item] for item in items[order[waits]].tolist()],
        [] if times is None else times[order[waits]].tolist(),
    )
    order = order[~waits]
    names = [name for name, kept in zip(user_ids, admitted.tolist()) if kept]
    offsets = np.concatenate([[0], np.cumsum(counts[admitted])]).astype(np.int64)
    place_of = np.full(len(users), -1, np.int64)
    place_of[order] = np.arange(len(order))

    record = {
        'source': log.card['source'],
        'sha256': log.card.get('sha256', ''),
        'actions_sha256': actions_sha256,
        'run': run,
        'actions': len(new.users),
        'new_users': len(names) - data.num_users,
        'new_items': len(item_ids) - data.num_items,
        'rare_new_items': _count_rare(items, data.num_items, data.card.get('k_core', 0)),
        'waiting_users': len(set(still.users)),
        'waiting_actions': len(still.users),
    }
    card = data.card | {'appended': [*data.card.get('appended', ()), record]}
    if 'time' in card:
        record['time'] = log.card['time']
        card['time'] = _join_spans(card['time'], log.card['time'])
    more = {} if times is None else {'times': times[order]}
    facets = data.item_facets
    if facets is not None:  # the facets of new items are not known
        facets = np.pad(facets, ((0, record['new_items']), (0, 0)), constant_values=-1)
    appended = dataclasses.replace(
        data,
        items=(items[order] + 1).astype(np.int32),
        offsets=offsets,
        user_ids=names,
        item_ids=['', *item_ids],
        card=card,
        item_facets=facets,
        user_facets=None,
        **more,
        time_split=None,
    )
    appended = _split_again(data, appended, split_at).with_counts()
    appended = dataclasses.replace(appended, card=appended.card | describe_data(appended))
    notes = [*log.card.get('notes', ()), *_note_order(data, log, new, times, run)]
    return Appended(appended, place_of[: len(data.items)], still, record, notes)


class _Actions(NamedTuple):
    """Actions by the ids of users and items."""

    users: Sequence[str]
    items: Sequence[str]
    times: np.ndarray | None

    def sorted(self, drop_duplicates: bool) -> '_Actions':
        """By time; ties keep their order."""
        if self.times is None:
            return self
        order = np.argsort(self.times, kind='stable').tolist()
        if drop_duplicates:
            seen: dict[tuple, int] = {}
            for n in order:
                seen.setdefault((self.users[n], self.items[n], self.times[n]), n)
            order = list(seen.values())
        return self.take(order)

    def take(self, order: Sequence[int]) -> '_Actions':
        users, items = ([ids[n] for n in order] for ids in (self.users, self.items))
        return _Actions(users, items, None if self.times is None else self.times[order])


def _coded(log: 'Log') -> list[tuple[list[str], np.ndarray]]:
    return [(log.user_ids, log.users), (log.item_ids, log.items)]


def _rename(ids: Sequence[str], codes: np.ndarray) -> list[str]:
    return [ids[code] for code in codes.tolist()]


def _times_of(log: 'Log', rated: np.ndarray) -> np.ndarray | None:
    """The times in the unit of the data set's, where it keeps them."""
    if log.times is None:
        return None
    return log.clock.read(log.times)[rated]


def _number(known: Sequence[str], names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """The number of each name, int64, and all names by number: the known ones, then new ones.

    New names that are all whole numbers are in ascending order, others in that of their first
    appearance.
    """
    numbers = {name: number for number, name in enumerate(known)}
    new = list(dict.fromkeys(name for name in names if name not in numbers))
    if all(map(INTEGER.fullmatch, new)):
        new.sort(key=int)
    numbers |= {name: len(known) + number for number, name in enumerate(new)}
    return np.array([numbers[name] for name in names], np.int64), [*known, *new]


def _count_rare(items: np.ndarray, first_new: int, k_core: int) -> int:
    """How many new items have fewer actions than a k-core would ask for."""
    counts = np.bincount(items)[first_new:]
    return int(np.count_nonzero(counts < k_core))


def _join_spans(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The unit of the times with the first and the last of both."""
    key = float if old['unit'] == 'numbers' else str
    firsts, lasts = ((old[name], new[name]) for name in ('first', 'last'))
    return dict(old) | {'first': min(firsts, key=key), 'last': max(lasts, key=key)}


def _split_again(old: Dataset, new: Dataset, at: float | str | None) -> Dataset:
    """The new data set with the setting of the old one's split by time, if it has one."""
    if old.time_split is None:
        return new
    card = old.time_split.card
    return new.split_by_time(at=card['at'] if at is None else at, targets=card['targets'])


def _refuse_again(data: Dataset, log: 'Log', actions_sha256: str, run: str) -> None:
    """Refuses a log that the data set has already."""
    sha256 = log.card.get('sha256')
    if sha256 and sha256 == data.card.get('sha256'):
        raise UserError(f'{log.place} is the log that {run} was prepared from; append a new one')
    for before in data.card.get('appended', ()):
        if actions_sha256 == before['actions_sha256'] or (sha256 and sha256 == before['sha256']):
            raise UserError(
                f'{log.place} was appended before, as {before["source"]}; append a new log'
            )


def _refuse_other_items(data: Dataset, log: 'Log', new: _Actions, run: str) -> None:
    """Refuses a log without a known item, and without a known user or of many items.

    Its ids are probably others than those of the data set.
    """
    items, users = dict.fromkeys(new.items), set(new.users)
    has_others = len(items) >= MANY or not users & set(data.user_ids)
    if has_others and not items.keys() & set(data.item_ids[1:]):
        raise UserError(
            f'{log.place}: none of its {len(items):,} items, such as {next(iter(items))!r}, is in '
            f'the catalogue of {run}, whose ids are like {data.item_ids[1]!r}; check the ids'
        )


def _refuse_repeats(data: Dataset, log: 'Log', new: _Actions, run: str) -> None:
    """Refuses a log that begins with the histories that the data set has, as a full export does.

    The same items at other times are new actions, such as the groceries of the next week.
    """
    before, after = data.card.get('time'), log.card.get('time')
    if data.times is None and before and after and not _is_before_end(after['first'], before):
        return
    has_times = data.times is not None and new.times is not None
    numbers = {name: number for number, name in enumerate(data.user_ids)}
    times = new.times.tolist() if has_times else [0] * len(new.users)
    histories: dict[int, list[tuple[str, int]]] = {}
    for user, item, time in zip(new.users, new.items, times):
        if user in numbers:
            histories.setdefault(numbers[user], []).append((item, time))
    shared = {user: rows for user, rows in histories.items() if len(rows) >= MIN_LENGTH}
    repeated = 0
    for user, rows in shared.items():
        length = min(data.lengths[user], len(rows), REPEATED)
        own = slice(data.offsets[user], data.offsets[user] + length)
        old_times = data.times[own].tolist() if has_times else [0] * length
        old = [data.item_ids[item] for item in data.items[own].tolist()]
        repeated += list(zip(old, old_times)) == rows[:length]
    if repeated and 2 * repeated >= len(shared):
        raise UserError(
            f'{log.place} repeats the history that {run} has, for {repeated:,} of {len(shared):,} '
            'users in both; append only actions that are new'
        )


def _is_before_end(moment: str, span: dict[str, str]) -> bool:
    """Whether a moment, as the card of a log writes it, is before the last of a span."""
    key = float if span['unit'] == 'numbers' else str
    return key(moment) < key(span['last'])


def _note_order(
    data: Dataset, log: 'Log', new: _Actions, times: np.ndarray | None, run: str
) -> list[str]:
    """Says if new actions are older than the last ones of the data set."""
    before, after = data.card.get('time'), log.card.get('time')
    if not before or not after:
        return []
    if not _is_before_end(after['first'], before):
        return []
    end = f'actions from {after["first"]} on, and those of {run} end at {before["last"]}'
    if times is not None:
        return [f'{log.place} has {end}: all are sorted by time']
    return [f'{log.place} has {end}: {run} keeps no times, so new actions follow the old ones']


def find_rounds(
    lefts: np.ndarray, rights: np.ndarray, known_V: np.ndarray
) -> list[dict[int, np.ndarray]]:
    """The neighbours from which new items get their first vectors.

    Args:
      lefts, rights: int [P], pairs of items next to each other in a history, indices from 1.
      known_V: bool [V + 1], items that have a vector.

    Returns:
      Rounds, one after the other: item -> its neighbours, int64, an item as often as it is next to
      it. Those of a round have a vector, or are in an earlier round; an item that is next to none
      of these is in no round.
    """
    lefts, rights = np.concatenate([lefts, rights]), np.concatenate([rights, lefts])
    of_new = ~known_V[lefts]
    lefts, rights = lefts[of_new], rights[of_new]
    known, rounds = known_V.copy(), []
    while True:
        ready = ~known[lefts] & known[rights]
        if not ready.any():
            return rounds
        items, neighbours = lefts[ready].astype(np.int64), rights[ready].astype(np.int64)
        order = np.lexsort((neighbours, items))
        items, neighbours = items[order], neighbours[order]
        found, starts = np.unique(items, return_index=True)
        rounds.append(dict(zip(found.tolist(), np.split(neighbours, starts[1:]))))
        known[found] = True


def describe(appended: Appended, k_core: int) -> list[str]:
    """The lines that an update shows: counts of new users and items, and doubtful readings."""
    record = appended.record
    lines = [
        f'appended: {record["actions"]:,} actions from {record["source"]}; '
        f'{record["new_users"]:,} new users, {record["new_items"]:,} new items',
    ]
    if record['rare_new_items']:
        lines.append(
            f'k_core={k_core} is not applied again: {record["rare_new_items"]:,} of the new items '
            'have fewer actions and are kept'
        )
    if record['waiting_actions']:
        lines.append(
            f'{record["waiting_users"]:,} new users have fewer than {MIN_LENGTH} actions; their '
            f'{record["waiting_actions"]:,} actions wait for the next update'
        )
    return lines + [f'warning: {note}' for note in appended.notes]
