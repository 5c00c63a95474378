"""Histories to rows: windows and packing for training; right-aligned rows for judging.

All of it is vectorised numpy, once an epoch and ahead of the steps.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fame_jax.batch import Batch


class Windows(NamedTuple):
    """Stretches of a flat array of items, each at most max_length + 1 long and at least 2."""

    items: np.ndarray  # int32, all histories end to end
    starts: np.ndarray  # int64, one per window
    lengths: np.ndarray  # int64, items in the window; it gives one input less


def windows(
    items: np.ndarray, offsets: np.ndarray, max_length: int, long_histories: str
) -> Windows:
    """Cuts training histories into what fits a row.

    Args:
      items: int32, the histories end to end.
      offsets: int64 [U + 1], where each begins.
      max_length: most inputs of a window.
      long_histories: 'last' keeps the last window of a history; 'split' keeps all of it, in
        windows that share one item, the target of the one and the first input of the next.
    """
    starts, ends = offsets[:-1], offsets[1:]
    if long_histories == 'split':
        pieces = np.maximum(-(-(ends - starts - 1) // max_length), 0)
        first = np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = np.repeat(starts, pieces) + (np.arange(pieces.sum()) - first) * max_length
        ends = np.minimum(np.repeat(ends, pieces), starts + max_length + 1)
    else:
        starts = np.maximum(starts, ends - (max_length + 1))
    lengths = ends - starts
    keep = lengths >= 2
    return Windows(items, starts[keep], lengths[keep])


def seen(cut: Windows, num_items: int) -> np.ndarray:
    """Which items any window holds, bool [V + 1]."""
    edges = np.zeros(len(cut.items) + 1, np.int64)
    np.add.at(edges, cut.starts, 1)
    np.add.at(edges, cut.starts + cut.lengths, -1)
    held = cut.items[np.cumsum(edges[:-1]) > 0]
    return np.bincount(held, minlength=num_items + 1) > 0


def assign_rows(inputs: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Puts stretches in rows, each in the row with the least room that still holds it (best fit).

    Args:
      inputs: int [W], lengths of the stretches, none over row_length.
      row_length: positions in a row.

    Returns:
      The row and the first column of each stretch, int64 [W].
    """
    open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]  # by room left
    rooms = 0  # bit r is set while a row with room r is open: finds the least room in one step
    num_rows = 0
    placed = []
    for length in inputs.tolist():
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row, num_rows = row_length, num_rows, num_rows + 1
        placed.append((row, row_length - room))
        if room > length:
            open_rows[room - length].append(row)
            rooms |= 1 << (room - length)
    row, column = np.array(placed, np.int64).reshape(-1, 2).T
    return row, column


def lay_out(
    cut: Windows,
    order: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    shape: tuple[int, int],
    loss_positions: str = 'all',
    whole: bool = False,
) -> Batch:
    """Writes windows into rows.

    Args:
      cut: the windows.
      order: int64 [W], windows in the order of `row` and `column`.
      row: int64 [W].
      column: int64 [W].
      shape: rows and row length of the result.
      loss_positions: 'all', or 'last' to weigh only the last position of each window.
      whole: every item of a window is an input, the last one too, and its own target.
    """
    by_place = np.lexsort((column, row))
    order, row, column = order[by_place], row[by_place], column[by_place]
    ahead = 0 if whole else 1
    starts, inputs = cut.starts[order], cut.lengths[order] - ahead
    position = np.arange(inputs.sum()) - np.repeat(np.cumsum(inputs) - inputs, inputs)
    source = np.repeat(starts, inputs) + position
    target = np.repeat(row * shape[1] + column, inputs) + position
    segment = 1 + np.arange(len(row)) - np.searchsorted(row, row)
    weight = np.ones(len(source), np.float32)
    if loss_positions == 'last':
        weight[position != np.repeat(inputs, inputs) - 1] = 0

    def write(values: np.ndarray, dtype: type) -> np.ndarray:
        flat = np.zeros(shape[0] * shape[1], dtype)
        flat[target] = values
        return flat.reshape(shape)

    return Batch(
        tokens_BL=write(cut.items[source], np.int32),
        positions_BL=write(position, np.int32),
        segments_BL=write(np.repeat(segment, inputs), np.int32),
        targets_BL=write(cut.items[source + ahead], np.int32),
        weights_BL=write(weight, np.float32),
    )


class Held(NamedTuple):
    """Users to be judged: rows that end with the item before the target.

    tokens, positions, segments: int32 [B, L], padding first. seen_BS: int32, the distinct items of
    the whole history, 0 for none. target_B: int32, 0 in rows that fill up. user_B: int64.
    """

    tokens_BL: np.ndarray
    positions_BL: np.ndarray
    segments_BL: np.ndarray
    seen_BS: np.ndarray
    target_B: np.ndarray
    user_B: np.ndarray


def held_rows(
    items: np.ndarray, offsets: np.ndarray, targets: np.ndarray, max_length: int, users: int
) -> Iterator[Held]:
    """Cuts users into chunks of like length, so that few shapes are compiled and little is padded.

    Args:
      items: int32, the histories before the target, end to end.
      offsets: int64 [U + 1].
      targets: int32 [U].
      max_length: items of a history that the model sees, the latest.
      users: rows in a chunk.
    """
    lengths = np.diff(offsets)
    order = np.argsort(lengths, kind='stable')
    for start in range(0, len(order), users):
        user_B = order[start : start + users]
        widest = int(lengths[user_B].max())
        length = min(bucket(widest), max_length)
        fill = users - len(user_B)
        tokens_BL = _last_items(items, offsets, user_B, length)
        yield Held(
            *(_fill(field, fill) for field in _right_aligned(tokens_BL, lengths[user_B])),
            _fill(_distinct(_last_items(items, offsets, user_B, bucket(widest))), fill),
            _fill(targets[user_B].astype(np.int32), fill),
            _fill(user_B, fill),
        )


def row_lengths(max_length: int) -> list[int]:
    """The lengths that rows of `held_rows` have, whatever the histories."""
    return sorted({min(bucket(length), max_length) for length in range(1, max_length + 1)})


def bucket(length: int) -> int:
    """The next power of four, 16 at the least: each is one more shape to compile."""
    bits = max(int(length) - 1, 0).bit_length()
    return max(16, 1 << (bits + bits % 2))


def _last_items(
    items: np.ndarray, offsets: np.ndarray, user_B: np.ndarray, width: int
) -> np.ndarray:
    """The last `width` items of each user, right-aligned, 0 before them; int32 [B, width]."""
    index = offsets[user_B + 1][:, None] + np.arange(-width, 0)[None, :]
    real = index >= offsets[user_B][:, None]
    return np.where(real, items[np.where(real, index, 0)], 0).astype(np.int32)


def _right_aligned(
    tokens_BL: np.ndarray, lengths_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens with their positions from the start of the window, and one segment a row."""
    length = tokens_BL.shape[1]
    column = np.arange(length)[None, :] - (length - np.minimum(lengths_B, length))[:, None]
    real = column >= 0
    return tokens_BL, np.where(real, column, 0).astype(np.int32), real.astype(np.int32)


def _distinct(seen_BS: np.ndarray) -> np.ndarray:
    """Each row's items once; the repeats become 0."""
    ordered = np.sort(seen_BS, axis=1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = 0
    return ordered


def _fill(field: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(field, [(0, rows)] + [(0, 0)] * (field.ndim - 1)) if rows else field
