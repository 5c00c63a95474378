"""Companions: other training prefixes with the same target, DuoRec's second views.

DuoRec (Qiu et al., WSDM 2022, arXiv 2110.05730, section 4.2.2) takes two prefixes of any users for
alike if the same item follows. Here each window of an epoch gives one position, and what is found
for it lies in rows of its own beside the step's. The authors give a companion to every prefix.
"""

import numpy as np

from fame_jax.batch import Batch, PairedBatch
from fame_jax.data.pipeline import Windows, assign_rows, lay_out


def add(
    rows: Batch,
    cut: Windows,
    order: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    rows_per_step: int,
    rng: np.random.Generator,
) -> PairedBatch:
    """Lays a companion to one position of each window beside the rows of an epoch.

    A step has as many companion rows as rows of its own; a companion that finds no room in them is
    left out, a long one more often. Prefixes drawn by their target come from long histories more
    often than from short ones: of Amazon's Toys an eighth is left out, of MovieLens nothing.

    Args:
      rows: what `lay_out` made of the windows, steps end to end.
      cut: the windows.
      order: int64 [W], windows in the order of `row` and `column`.
      row: int64 [W].
      column: int64 [W], where a window begins.
      rows_per_step: B.
      rng: moved on; the same for the same epoch.
    """
    position, prefixes = draw(cut, order, rng)
    shape, length = rows.tokens_BL.shape, rows.tokens_BL.shape[1]
    inputs = prefixes.lengths - 1
    pair_row, pair_column = place(inputs, row // rows_per_step, rows_per_step, length)
    kept = np.flatnonzero(pair_row >= 0)
    pair_row, pair_column = pair_row[kept], pair_column[kept]
    pairs = lay_out(prefixes, kept, pair_row, pair_column, shape)
    anchor_BL = np.full(shape, -1, np.int32)
    anchor = (row % rows_per_step) * length + column + position
    anchor_BL[pair_row, pair_column + inputs[kept] - 1] = anchor[kept]
    return PairedBatch(*rows, pairs.tokens_BL, pairs.positions_BL, pairs.segments_BL, anchor_BL)


def draw(cut: Windows, order: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Windows]:
    """Draws a position of each window, and another prefix with the target of that position.

    Both uniformly: among the inputs of the window, and among all places in any window where the
    item is a target. The place itself is taken only where there is no other, as in the authors'
    code.

    Returns:
      The positions, int64 [W] in the order given, and the prefixes as windows that end with the
      target.
    """
    inputs = cut.lengths - 1
    first = np.cumsum(inputs) - inputs
    window = np.repeat(np.arange(len(inputs)), inputs)
    item = cut.items[np.arange(len(window)) - first[window] + cut.starts[window] + 1]
    by_item = np.argsort(item, kind='stable')
    position = rng.integers(inputs[order])
    chosen = another(item, by_item, first[order] + position, rng)
    starts = cut.starts[window[chosen]]
    return position, Windows(cut.items, starts, chosen - first[window[chosen]] + 2)


def another(
    item: np.ndarray, by_item: np.ndarray, place: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Another place of the item at each place, uniformly; the same one if there is no other.

    Args:
      item: [N].
      by_item: int64 [N], what sorts `item`.
      place: int64 [W], indices into `item`.
      rng: moved on.
    """
    ordered = item[by_item]
    low = np.searchsorted(ordered, item[place], side='left')
    others = np.searchsorted(ordered, item[place], side='right') - low - 1
    rank = np.empty_like(by_item)
    rank[by_item] = np.arange(len(by_item))
    drawn = low + rng.integers(np.maximum(others, 1))
    return by_item[drawn + ((others > 0) & (drawn >= rank[place]))]


def place(
    inputs: np.ndarray, step: np.ndarray, rows_per_step: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Puts stretches in the rows of their steps by best fit.

    Args:
      inputs: int64 [W], lengths of the stretches, none over `length`.
      step: int64 [W], which step each belongs to.
      rows_per_step: B.
      length: L.

    Returns:
      The row in the epoch and the first column of each, int64 [W]; row -1 where there was no room.
    """
    row, column = np.full(len(inputs), -1), np.zeros(len(inputs), np.int64)
    by_step = np.argsort(step, kind='stable')
    edges = np.flatnonzero(np.diff(step[by_step])) + 1
    for part in np.split(by_step, edges):
        rows, column[part] = assign_rows(inputs[part], length)
        fits = rows < rows_per_step
        row[part[fits]] = step[part[fits]] * rows_per_step + rows[fits]
    return row, column
