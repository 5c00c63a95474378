"""Histories to right-aligned rows, one user per row, for evaluation and serving."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# A batch has at most so many places for seen items, 16 MiB, or else one row for each device.
SEEN_PLACES = 2**22

# The batches of a split are kept if they take no more memory, as those of 500,000 short histories.
KEPT_BYTES = 2**27


class Shape(NamedTuple):
    """The sizes of a batch: rows B, positions L, and places for seen items S."""

    rows: int
    length: int
    seen: int


class EvalBatch(NamedTuple):
    """Users whose next item is to be ranked. The last column of a row is the user's latest item.

    Rows without a user fill up the last batch; all their fields are 0.

    Fields:
      tokens_BL, positions_BL, segments_BL: int32 [B, L], padding before the history. Positions
        count from the first item in the row, and a row has one segment.
      seen_BS: int32 [B, S], the distinct items of the whole history, 0 elsewhere.
      target_B: int32 [B], the item to be ranked, 0 where there is none.
      user_B: int64 [B], the index of the history.
      is_user_B: bool [B], false in rows without a user.
    """

    tokens_BL: np.ndarray
    positions_BL: np.ndarray
    segments_BL: np.ndarray
    seen_BS: np.ndarray
    target_B: np.ndarray
    user_B: np.ndarray
    is_user_B: np.ndarray


class EvalBatches:
    """All users of a split in batches of similar length, so that there is little padding.

    Iteration makes the batches. Those of a small data set are kept, those of a large one are made
    anew in each pass, so that memory grows neither with the number of users nor with the longest
    history.

    Lengths are rounded up by `bucket`, so that few shapes are compiled. A batch is as wide as the
    longest of its histories, and wide batches have fewer rows. Batches of the same B and L have the
    same S where that adds little padding.
    """

    def __init__(
        self,
        items: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        targets: np.ndarray | None,
        max_length: int,
        batch_size: int,
        multiple: int = 1,
    ):
        """Plans the batches and makes none.

        Args:
          items: int32 [A], all actions end to end.
          starts, ends: int64 [U]; user u's history is `items[starts[u]:ends[u]]`.
          targets: int32 [U]; None: there are none, and target_B is 0.
          max_length: the number of latest items that the model reads.
          batch_size: B, the largest number of rows; a multiple of `multiple`.
          multiple: B is a multiple of it in every batch.
        """
        self._items, self._starts, self._ends, self._targets = items, starts, ends, targets
        self._max_length = max_length
        lengths = ends - starts
        self._order = np.argsort(lengths, kind='stable')
        self._plan = _plan(lengths[self._order], max_length, batch_size, multiple)
        places = sum(shape.rows * (3 * shape.length + shape.seen) for shape, _, _ in self._plan)
        self._kept: dict[int, EvalBatch] | None = {} if 4 * places <= KEPT_BYTES else None

    @property
    def num_users(self) -> int:
        """U."""
        return len(self._starts)

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[EvalBatch]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> EvalBatch:
        if self._kept is None:
            return self._make(index)
        if index not in self._kept:
            self._kept[index] = self._make(index)
        return self._kept[index]

    def one_of_each_shape(self) -> Iterator[EvalBatch]:
        """Yields the first batch of each shape."""
        first = {}
        for index, (shape, _, _) in enumerate(self._plan):
            first.setdefault(shape, index)
        return (self[index] for index in first.values())

    def _make(self, index: int) -> EvalBatch:
        (rows, length, seen), first, last = self._plan[index]
        user_B = self._order[first:last]
        starts_B, ends_B = self._starts[user_B], self._ends[user_B]
        positions_BL, segments_BL = _number_positions(length, ends_B - starts_B)
        target_B = np.zeros(len(user_B)) if self._targets is None else self._targets[user_B]
        fields = (
            _last_items(self._items, starts_B, ends_B, length),
            positions_BL,
            segments_BL,
            _zero_repeats(_last_items(self._items, starts_B, ends_B, seen)),
            target_B.astype(np.int32),
            user_B,
            np.ones(len(user_B), bool),
        )
        return EvalBatch(*(_pad_rows(field, rows) for field in fields))


def eval_batches(
    items: np.ndarray,
    offsets: np.ndarray,
    targets: np.ndarray | None,
    max_length: int,
    batch_size: int,
) -> Iterator[EvalBatch]:
    """Yields the batches of `EvalBatches` once.

    Args:
      items: int32 [A], the histories before the targets, end to end.
      offsets: int64 [U + 1], the start of each history, and A.
      targets: as `EvalBatches` has them.
      max_length: as `EvalBatches` has it.
      batch_size: B.
    """
    batches = EvalBatches(items, offsets[:-1], offsets[1:], targets, max_length, batch_size)
    return (batches._make(index) for index in range(len(batches)))


def row_lengths(max_length: int) -> list[int]:
    """Returns all values that L can have in `eval_batches`."""
    return sorted({min(bucket(length), max_length) for length in range(1, max_length + 1)})


def bucket(length: int) -> int:
    """Returns the length rounded up to a power of four, at least 16. Each is a shape to compile."""
    bits = max(int(length) - 1, 0).bit_length()
    return max(16, 1 << (bits + bits % 2))


def _plan(
    lengths: np.ndarray, max_length: int, batch_size: int, multiple: int
) -> list[tuple[Shape, int, int]]:
    """Returns the shape, the first user and the end of the users of each batch.

    Args:
      lengths: int64 [U], ascending.
      max_length: as in `EvalBatches`.
      batch_size: as in `EvalBatches`.
      multiple: as in `EvalBatches`.
    """
    # The rows of a batch for each width, and the end of the users whose histories are no wider.
    ends: dict[int, int] = {}
    width = bucket(0)
    while len(lengths) not in ends.values():
        rows = multiple * max(1, SEEN_PLACES // (multiple * width))
        ends[min(rows, batch_size)] = int(np.searchsorted(lengths, width, side='right'))
        width = bucket(width + 1)
    plan, start = [], 0
    for rows, end in ends.items():
        for first in range(start, end, rows):
            last = min(first + rows, end)
            seen = bucket(lengths[last - 1])
            plan.append((Shape(rows, min(seen, max_length), seen), first, last))
        start = end
    return _merge_shapes(plan)


def _merge_shapes(plan: list[tuple[Shape, int, int]]) -> list[tuple[Shape, int, int]]:
    """Gives all batches of the same B and L the largest S among them, if that adds little padding.

    Each S is a program that takes a second and more to compile, and to look up a seen item is cheap
    next to encoding a position.
    """
    same: dict[tuple[int, int], list[int]] = {}
    for shape, _, _ in plan:
        same.setdefault((shape.rows, shape.length), []).append(shape.seen)
    few = {
        sizes: max(seen)
        for sizes, seen in same.items()
        if len(seen) * sizes[0] * max(seen) <= SEEN_PLACES
    }
    return [
        (shape._replace(seen=few.get((shape.rows, shape.length), shape.seen)), first, last)
        for shape, first, last in plan
    ]


def _last_items(
    items: np.ndarray, starts_B: np.ndarray, ends_B: np.ndarray, width: int
) -> np.ndarray:
    """Returns the last `width` items of each history, right-aligned, 0 before them; int32."""
    index = ends_B[:, None] + np.arange(-width, 0)[None, :]
    real = index >= starts_B[:, None]
    return np.where(real, items[np.where(real, index, 0)], 0).astype(np.int32)


def _number_positions(length: int, lengths_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns positions and segments of right-aligned histories, int32 [B, L]."""
    position_BL = np.arange(length)[None, :] - (length - np.minimum(lengths_B, length))[:, None]
    real_BL = position_BL >= 0
    return np.where(real_BL, position_BL, 0).astype(np.int32), real_BL.astype(np.int32)


def _zero_repeats(item_BS: np.ndarray) -> np.ndarray:
    """Returns the distinct items of each row, sorted, with 0 in place of repeats."""
    sorted_BS = np.sort(item_BS, axis=1)
    sorted_BS[:, 1:][sorted_BS[:, 1:] == sorted_BS[:, :-1]] = 0
    return sorted_BS


def _pad_rows(field: np.ndarray, rows: int) -> np.ndarray:
    missing = rows - len(field)
    return np.pad(field, [(0, missing)] + [(0, 0)] * (field.ndim - 1)) if missing else field
