"""Which actions are trained on, and which are the targets of validation and test.

Leave one out: of each user the last item is the test target, the one before the validation target,
the rest is training data. By time: nothing at or after a moment is trained on, for any user, and
the targets are items after it ("Time to Split", arXiv 2507.16289: global temporal split, targets
`last` or `successive`, validation by time, no training on the validation part).
"""

import dataclasses
import datetime
from typing import Any, Literal, NamedTuple

import numpy as np

from fame_jax.errors import UserError

PARTS = ('validation', 'test')
TARGETS = ('last', 'successive')
SECOND = 10**6  # microseconds
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


class Targets(NamedTuple):
    """The targets of validation or test. A user has one, none or several.

    Fields:
      users: int64 [R], the user of each target, ascending.
      starts, ends: int64 [R]; target r is `items[ends[r]]`, its history `items[starts[r]:ends[r]]`,
        which has at least one item.
    """

    users: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The training part of each user, and the targets.

    Fields:
      train_ends: int64 [U]; the training part of user u is `items[offsets[u]:train_ends[u]]`, which
        may be empty in a split by time.
      parts: the targets of 'validation' and of 'test'.
      card: of a split by time, its setting, moments and counts as plain values; {} of leave one
        out.
    """

    train_ends: np.ndarray
    parts: dict[str, Targets]
    card: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_by_time(self) -> bool:
        """Whether this is a split by time."""
        return bool(self.card)

    def describe(self) -> str:
        """Returns the split in words, for the protocol card."""
        if not self.card:
            return 'leave one out: last item test, the one before validation, the rest training'
        return (
            f'by time: test targets ({self.card["targets"]}) from {self.card["moment"]}, '
            f'validation targets from {self.card["validation_moment"]}, training before that'
        )

    def count_users(self, part: str) -> int:
        """Returns the number of users with a target in 'validation' or 'test'."""
        return len(np.unique(self.parts[part].users))

    def describe_targets(self, part: str) -> str:
        """Returns the number of targets and users, as a phrase such as '7 targets of 5 users'."""
        targets, users = len(self.parts[part].users), self.count_users(part)
        if targets == users:
            return f'the targets of {users:,} users'
        return f'{targets:,} targets of {users:,} users'


def leave_one_out(offsets: np.ndarray) -> Split:
    """Splits the histories of all users; each has 3 items or more.

    Args:
      offsets: int64 [U + 1], the first action of each user, and A.
    """
    users, starts, stops = np.arange(len(offsets) - 1), offsets[:-1], offsets[1:]
    parts = {'validation': Targets(users, starts, stops - 2)}
    parts['test'] = Targets(users, starts, stops - 1)
    return Split(stops - 2, parts)


def split_by_time(
    items: np.ndarray,
    offsets: np.ndarray,
    times: np.ndarray,
    *,
    at: float | str,
    targets: Literal['last', 'successive'],
    has_dates: bool,
) -> Split:
    """Splits the histories of all users at two moments that are the same for all.

    Training is before the validation moment, validation targets are from there to the test moment,
    test targets from that one on. A target's history is everything before it in the order of the
    data. A target without any is left out, and counted.

    Args:
      items: int32 [A], one user after the other, each oldest first.
      offsets: int64 [U + 1], the first action of each user, and A.
      times: [A], ascending in each user.
      at: the test moment, see `parse_moment`. A share q is the time of action number floor(q A) of
        all actions by time; the validation moment is the same share of the actions before it. Of a
        date, that share is the one of the actions before the date.
      targets: 'last', the last item of a user in each part; 'successive', every item.
      has_dates: whether `times` are microseconds since 1970.

    Raises:
      UserError: if `at` is neither a share nor a date, or a part is empty.
    """
    if targets not in TARGETS:
        raise UserError(f'split_targets={targets}: choose one of {", ".join(TARGETS)}')
    moment, earlier = choose_moments(times, at, has_dates)

    def show(value: Any) -> str:
        return show_moment(value) if has_dates else str(value)

    starts, stops = offsets[:-1], offsets[1:]
    # Times ascend in each user, so that each part is a range of places.
    bounds = _count_before(offsets, times, earlier), _count_before(offsets, times, moment), stops
    train_ends = bounds[0]
    is_trained = np.zeros(int(items.max()) + 1, bool)
    is_trained[items[times < earlier]] = True
    card: dict[str, Any] = {
        'at': show_at(at),
        'moment': show(moment),
        'validation_moment': show(earlier),
        'targets': targets,
        'trained_on': 'actions before the validation moment; not again on those after it',
        'training': {
            'users': int(np.count_nonzero(train_ends > starts)),
            'items': int(np.count_nonzero(is_trained)),
            'actions': int((train_ends - starts).sum()),
        },
    }
    parts = {}
    for part, first, stop in zip(PARTS, bounds[:-1], bounds[1:]):
        found = _find_targets(starts, first, stop, targets)
        kept = found.ends > found.starts
        parts[part] = found = Targets(*(field[kept] for field in found))
        if not len(found.users):
            raise UserError(
                f'split_at={show_at(at)}: there is no {part} target (from {show(moment)} in the '
                f'test, from {show(earlier)} in validation); choose another moment'
            )
        of_target = items[found.ends]
        is_new = train_ends[found.users] == starts[found.users]
        card[part] = {
            'targets': len(found.users),
            'users': len(np.unique(found.users)),
            'users_without_training': len(np.unique(found.users[is_new])),
            'targets_without_training': int(np.count_nonzero(~is_trained[of_target])),
            'items_without_training': len(np.unique(of_target[~is_trained[of_target]])),
            'left_out_without_history': int(np.count_nonzero(~kept)),
        }
    return Split(train_ends, parts, card)


def choose_moments(times: np.ndarray, at: float | str, has_dates: bool) -> tuple[Any, Any]:
    """Returns the moments of test and validation; see `split_by_time`.

    Raises:
      UserError: if `at` is neither a share nor a date, or no action is before a moment.
    """
    wanted = parse_moment(at)
    if isinstance(wanted, float):
        share, moment = wanted, _quantile(times, wanted)
    else:
        if not has_dates:
            raise UserError(
                f'split_at={at}: the times of these data are plain numbers, not dates; give a '
                'share of all actions, such as 0.9'
            )
        moment = (wanted - EPOCH) // datetime.timedelta(microseconds=1)
        share = float(np.mean(times < moment))
    before = times[times < moment]
    earlier = _quantile(before, share) if len(before) else moment
    if not len(before) or not (before < earlier).any() or len(before) == len(times):
        first, last = times.min(), times.max()
        first, last = map(show_moment if has_dates else str, (first, last))
        empty = 'test' if len(before) == len(times) else 'training'
        raise UserError(
            f'split_at={show_at(at)}: the {empty} part would be empty (times are {first} to '
            f'{last}); choose another moment'
        )
    return moment, earlier


def parse_moment(at: float | str | datetime.date) -> float | datetime.datetime:
    """Reads a share of all actions between 0 and 1, or a date (and time) in ISO form.

    A date without a time is its first moment; a time without a zone is in UTC.

    Raises:
      UserError: if it is neither.
    """
    text = show_at(at)
    try:
        share = float(text)
    except ValueError:
        share = None
    if share is not None and 0 < share < 1:
        return share
    try:
        moment = datetime.datetime.fromisoformat(text) if share is None else None
    except ValueError:
        moment = None
    if moment is None:
        raise UserError(
            f'split_at={text}: give a share of all actions between 0 and 1, such as 0.9, or a '
            'date, such as 1998-03-01'
        )
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)


def show_at(at: float | str | datetime.date) -> str:
    """Returns the value of --split_at as text."""
    return at.isoformat() if isinstance(at, datetime.date) else str(at).strip()


def show_moment(microseconds: int) -> str:
    """Returns microseconds since 1970 as ISO text in UTC."""
    moment = EPOCH + datetime.timedelta(microseconds=int(microseconds))
    return moment.replace(tzinfo=None).isoformat() + 'Z'


def _quantile(times: np.ndarray, share: float) -> Any:
    """Returns the time of action number floor(share A) by time, counted from 0."""
    place = min(int(share * len(times)), len(times) - 1)
    return np.partition(times, place)[place]


def _count_before(offsets: np.ndarray, times: np.ndarray, moment: Any) -> np.ndarray:
    """Returns the end of each user's actions before a moment, int64 [U]."""
    counts = np.concatenate([[0], np.cumsum(times < moment)])
    return offsets[:-1] + counts[offsets[1:]] - counts[offsets[:-1]]


def _find_targets(starts: np.ndarray, first: np.ndarray, stop: np.ndarray, targets: str) -> Targets:
    """Returns the targets among the places `first` to `stop` of each user, int64 [U] each."""
    if targets == 'successive':
        users = np.repeat(np.arange(len(starts)), stop - first)
        return Targets(users, starts[users], list_places(first, stop))
    users = np.flatnonzero(stop > first)
    return Targets(users, starts[users], stop[users] - 1)


def list_places(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Returns the numbers from each start to before its stop, end to end."""
    lengths = stops - starts
    return np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
