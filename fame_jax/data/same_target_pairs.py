"""Pairs of prefixes with the same target: the positives of DuoRec.

DuoRec (Qiu et al., WSDM 2022, arXiv 2110.05730, section 4.2.2) treats two prefixes of any users as
positives of each other if the same item follows them. Here one position of each window per epoch
gets such a pair, in rows of their own. The authors' code differs: every prefix gets one.
"""

from typing import NamedTuple

import numpy as np

from fame_jax.batch import Batch, PairedBatch
from fame_jax.data.packing import Layout, assign_rows
from fame_jax.data.windows import Windows, blocks_of_windows, places_in_windows


class Pairs(NamedTuple):
    """Prefixes in rows, each with the position that it is the positive of.

    Fields:
      layout: the prefixes as windows that end with the target, and their places.
      anchor: int32 [W], the position in the step's own rows, row * L + column, in the order of the
        layout.
    """

    layout: Layout
    anchor: np.ndarray


def draw_pairs(
    windows: Windows,
    order: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    rows_per_step: int,
    row_length: int,
    rng: np.random.Generator,
) -> Pairs:
    """Draws a prefix with the same target for one position of each window, and gives it a place.

    A step has as many rows of paired prefixes as rows of its own. A prefix for which these have no
    space is left out: long ones more often, and prefixes drawn by their target come from long
    histories more often than from short ones. On Amazon Toys an eighth is left out, on MovieLens
    none.

    Args:
      windows: the windows.
      order: int [W], indices of windows, in the order of `row` and `column`.
      row: int [W].
      column: int [W], the first column.
      rows_per_step: B.
      row_length: L.
      rng: is advanced.
    """
    position, prefixes = draw_prefixes(windows, order, rng)
    inputs = prefixes.lengths - 1
    step = row // rows_per_step
    pair_row, pair_column = assign_rows_per_step(inputs, step, rows_per_step, row_length)
    kept = np.flatnonzero(pair_row >= 0)
    layout, by_place = Layout.sort(prefixes, kept, pair_row[kept], pair_column[kept])
    anchor = (row % rows_per_step) * row_length + column + position
    return Pairs(layout, anchor[kept[by_place]].astype(np.int32))


def add_pairs(batch: Batch, pairs: Pairs, rows: range) -> PairedBatch:
    """Adds the pairs of a range of rows to these rows.

    Args:
      batch: the rows themselves, whole steps.
      pairs: of the epoch.
      rows: their numbers in the epoch.
    """
    shape = batch.tokens_BL.shape
    packed = pairs.layout.pack(rows, shape[1])
    part = pairs.layout.find(rows)
    _, order, row, column = pairs.layout
    last = column[part] + pairs.layout.windows.lengths[order[part]] - 2
    anchor_BL = np.full(shape, -1, np.int32)
    anchor_BL[row[part] - rows.start, last] = pairs.anchor[part]
    return PairedBatch(*batch, packed.tokens_BL, packed.positions_BL, packed.segments_BL, anchor_BL)


def draw_prefixes(
    windows: Windows, order: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, Windows]:
    """Draws a position of each window, and another prefix with the target of that position.

    Both are uniform: among the inputs of the window, and among all positions of all windows with
    that target. The drawn position itself is taken only if it is the only one, as in the authors'
    code.

    Returns:
      The positions, int64 [W] in the order of `order`, and the prefixes as windows that end with
      the target.
    """
    inputs = windows.lengths - 1
    ends = np.cumsum(inputs)
    target = np.empty(inputs.sum(), np.int32)
    targets = windows._replace(starts=windows.starts + 1, lengths=inputs)
    for block in blocks_of_windows(targets):
        at = slice(int(ends[block.start] - inputs[block.start]), int(ends[block.stop - 1]))
        target[at] = windows.items[places_in_windows(targets, block)]
    position = rng.integers(inputs[order])
    chosen = draw_other(target, (ends - inputs)[order] + position, rng)
    window = np.searchsorted(ends, chosen, side='right')
    lengths = chosen - (ends - inputs)[window] + 2
    return position, Windows(windows.items, windows.starts[window], lengths)


def draw_other(target: np.ndarray, index: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws for each index another one with the same target; the index itself if there is none.

    Args:
      target: int [N].
      index: int64 [W], indices into `target`.
      rng: is advanced.

    Returns:
      int64 [W].
    """
    whole = np.int32 if len(target) < 2**31 else np.int64
    by_target = np.argsort(target, kind='stable').astype(whole)
    rank = np.empty_like(by_target)
    rank[by_target] = np.arange(len(by_target), dtype=whole)
    counts = np.bincount(target)
    low = (np.cumsum(counts) - counts)[target[index]]
    others = counts[target[index]] - 1
    drawn = low + rng.integers(np.maximum(others, 1))
    # Skip the index's own place among those of its target.
    return by_target[drawn + ((others > 0) & (drawn >= rank[index]))].astype(np.int64)


def assign_rows_per_step(
    lengths: np.ndarray, step: np.ndarray, rows_per_step: int, row_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Assigns segments to the rows of their steps by best fit.

    Args:
      lengths: int64 [W], positions of the segments, each at most row_length.
      step: int64 [W], the step of each segment.
      rows_per_step: B.
      row_length: L.

    Returns:
      The row in the epoch and the first column of each segment, int64 [W]; row -1 where the step's
      rows are full.
    """
    row, column = np.full(len(lengths), -1), np.zeros(len(lengths), np.int64)
    by_step = np.argsort(step, kind='stable')
    edges = np.flatnonzero(np.diff(step[by_step])) + 1
    for part in np.split(by_step, edges):
        rows, column[part] = assign_rows(lengths[part], row_length)
        fits = rows < rows_per_step
        row[part[fits]] = step[part[fits]] * rows_per_step + rows[fits]
    return row, column
