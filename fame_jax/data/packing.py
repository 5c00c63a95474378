"""Windows to packed rows: several windows end to end in one row, each a segment.

An epoch's layout is three numbers a window. Its rows are written in blocks, when they are needed.
"""

import itertools
from array import array
from typing import NamedTuple, Self

import numpy as np

from fame_jax.batch import Batch
from fame_jax.data.windows import BLOCK, Windows


class Layout(NamedTuple):
    """Windows in rows, in the order of their places.

    Fields:
      windows: the windows.
      order: int32 [W], indices of windows.
      row: int32 [W], ascending.
      column: int32 [W], the first column; ascending in each row.
    """

    windows: Windows
    order: np.ndarray
    row: np.ndarray
    column: np.ndarray

    @classmethod
    def sort(
        cls, windows: Windows, order: np.ndarray, row: np.ndarray, column: np.ndarray
    ) -> tuple[Self, np.ndarray]:
        """Sorts windows by their places; returns the layout and the indices that sort."""
        by_place = np.lexsort((column, row))
        fields = (field[by_place].astype(np.int32) for field in (order, row, column))
        return cls(windows, *fields), by_place

    def find(self, rows: range) -> slice:
        """Returns the entries of the layout that are in a range of rows."""
        return slice(*np.searchsorted(self.row, (rows.start, rows.stop)))

    def pack(self, rows: range, row_length: int, own_targets: bool = False) -> Batch:
        """Writes a range of rows; see `pack`."""
        part = self.find(rows)
        row = self.row[part] - rows.start
        shape = len(rows), row_length
        return pack(self.windows, self.order[part], row, self.column[part], shape, own_targets)


def assign_rows(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Assigns segments to rows by best fit: to the fullest row that has enough space.

    Args:
      lengths: int [W], positions of the segments, each at most row_length.
      row_length: L.

    Returns:
      The row and the first column of each segment, int32 [W].
    """
    open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows by their free space
    free = 0  # bit s is set if a row with s free positions exists: the best fit is the lowest bit
    num_rows = 0
    rows, columns = array('i'), array('i')
    parts = (lengths[n : n + BLOCK].tolist() for n in range(0, len(lengths), BLOCK))
    for length in itertools.chain.from_iterable(parts):
        fitting = free >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                free ^= 1 << space
        else:
            space, row, num_rows = row_length, num_rows, num_rows + 1
        rows.append(row)
        columns.append(row_length - space)
        if space > length:
            open_rows[space - length].append(row)
            free |= 1 << (space - length)
    return np.array(rows, np.int32), np.array(columns, np.int32)


def pack(
    windows: Windows,
    order: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    shape: tuple[int, int],
    own_targets: bool = False,
) -> Batch:
    """Writes windows into rows.

    Args:
      windows: the windows.
      order: int64 [W], indices of windows, in the order of `row` and `column`.
      row: int64 [W].
      column: int64 [W], the first column.
      shape: number of rows, and L.
      own_targets: if false, the target of an item is the next one, and the last item of a window
        is no input. If true, all items are inputs, and each is its own target.
    """
    by_place = np.lexsort((column, row))
    order, row, column = order[by_place], row[by_place], column[by_place]
    ahead = 0 if own_targets else 1
    starts, inputs = windows.starts[order], windows.lengths[order] - ahead
    position = np.arange(inputs.sum()) - np.repeat(np.cumsum(inputs) - inputs, inputs)
    source = np.repeat(starts, inputs) + position
    place = np.repeat(row * shape[1] + column, inputs) + position
    segment = 1 + np.arange(len(row)) - np.searchsorted(row, row)

    def write(values: np.ndarray | float, dtype: type) -> np.ndarray:
        flat = np.zeros(shape[0] * shape[1], dtype)
        flat[place] = values
        return flat.reshape(shape)

    return Batch(
        tokens_BL=write(windows.items[source], np.int32),
        positions_BL=write(position, np.int32),
        segments_BL=write(np.repeat(segment, inputs), np.int32),
        targets_BL=write(windows.items[source + ahead], np.int32),
        weights_BL=write(1.0, np.float32),
    )
