"""Windows to the batches of an epoch, in the row layout that a model is trained on.

Windows get their places in the rows of an epoch before its first step; rows are written in blocks,
when they are needed, so that memory grows with the number of windows and not with that of actions.
Grain yields whole batches by index, so that the state of the iterator is one number.

Row layouts:
  'next': packed windows; the target of an item is the next one.
  'masked': packed windows; all items are inputs and their own targets, for masked-item training.
  'pairs': 'next', and to one position of each window another prefix with the same target (see
    same_target_pairs.py).
  'prefixes': each prefix of a window is a row; its target is in the last column.
"""

from collections.abc import Iterator
from typing import Literal

import grain
import numpy as np

from fame_jax.batch import Batch, PairedBatch
from fame_jax.data.packing import Layout, assign_rows
from fame_jax.data.same_target_pairs import Pairs, add_pairs, draw_pairs
from fame_jax.data.windows import BLOCK, Windows, blocks_of_windows

RowLayout = Literal['next', 'masked', 'pairs', 'prefixes']


class EpochSource:
    """The batches of an epoch by index: a random-access source for Grain.

    Rows are written for a block of batches at a time, and kept until another block is wanted.
    """

    def __init__(
        self,
        layout: Layout,
        num_rows: int,
        row_length: int,
        rows_per_step: int,
        part: slice,
        own_targets: bool,
        pairs: Pairs | None = None,
    ):
        """Takes the layout of an epoch.

        Args:
          layout: windows in rows.
          num_rows: a multiple of rows_per_step.
          row_length: L.
          rows_per_step: B.
          part: the rows of each batch that this process gets.
          own_targets: see `packing.pack`.
          pairs: the pairs of the layout 'pairs'.
        """
        self.layout = layout
        self.num_rows = num_rows
        self.row_length = row_length
        self.rows_per_step = rows_per_step
        self.part = part
        self.own_targets = own_targets
        self.pairs = pairs
        steps = max(1, BLOCK // (rows_per_step * row_length))
        self._block_rows = steps * rows_per_step
        self._rows, self._block = range(0), None

    def __len__(self) -> int:
        return self.num_rows // self.rows_per_step

    def __getitem__(self, index: int) -> Batch | PairedBatch:
        first = index * self.rows_per_step
        if first not in self._rows:
            start = first // self._block_rows * self._block_rows
            self._rows = range(start, min(start + self._block_rows, self.num_rows))
            self._block = None  # before the next one is written
            self._block = self._write(self._rows)
        first -= self._rows.start
        start, stop, _ = self.part.indices(self.rows_per_step)
        step = slice(first + start, first + stop)
        return type(self._block)(*(field[step] for field in self._block))

    def _write(self, rows: range) -> Batch | PairedBatch:
        batch = self.layout.pack(rows, self.row_length, self.own_targets)
        return add_pairs(batch, self.pairs, rows) if self.pairs else batch


class PrefixSource:
    """The batches of an epoch with a row for each prefix: a random-access source for Grain.

    Prefixes are right-aligned. A batch has prefixes of similar length, so that there is little
    padding and few shapes are compiled.
    """

    def __init__(
        self,
        windows: Windows,
        rng: np.random.Generator,
        rows_per_step: int,
        max_length: int,
        part: slice,
    ):
        """Draws the order of prefixes and batches; rows of padding fill up the last batch a length.

        Args:
          windows: the windows.
          rng: is advanced.
          rows_per_step: B.
          max_length: the largest L.
          part: the rows of each batch that this process gets.
        """
        self.part = part
        self.windows = windows
        self.ends = np.cumsum(windows.lengths - 1)  # of the prefixes of each window
        number = int(self.ends[-1]) if len(self.ends) else 0
        whole = np.int32 if number < 2**31 else np.int64
        order = rng.permutation(number).astype(whole)
        length_P = np.concatenate([np.zeros(0, np.int32), *self._lengths(max_length)])[order]
        self.batches = []
        for length in np.unique(length_P).tolist():
            prefixes = order[length_P == length]
            missing = -len(prefixes) % rows_per_step
            prefixes = np.pad(prefixes, (0, missing), constant_values=-1)
            batches = prefixes.reshape(-1, rows_per_step)
            self.batches += [(length, prefix_B) for prefix_B in batches]
        self.batches = [self.batches[i] for i in rng.permutation(len(self.batches))]

    def _lengths(self, max_length: int) -> Iterator[np.ndarray]:
        """Yields the row length of each prefix, int32, of some windows after the other."""
        for block in blocks_of_windows(self.windows):
            inputs = self.windows.lengths[block] - 1
            prefix = 1 + np.arange(inputs.sum()) - np.repeat(np.cumsum(inputs) - inputs, inputs)
            bits = np.ceil(np.log2(np.maximum(prefix, 4))).astype(np.int64)
            yield np.minimum(1 << bits, max_length).astype(np.int32)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        length, prefix_B = self.batches[index]
        prefix_B = prefix_B[self.part]
        window_B = np.searchsorted(self.ends, prefix_B, side='right')
        start_B, length_B = self.windows.starts[window_B], self.windows.lengths[window_B]
        inputs_B = np.where(prefix_B < 0, 0, prefix_B - self.ends[window_B] + length_B)
        position_BL = np.arange(length)[None, :] - (length - inputs_B)[:, None]
        real_BL = position_BL >= 0
        source_BL = np.where(real_BL, start_B[:, None] + position_BL, 0)
        last_BL = real_BL & (np.arange(length) == length - 1)[None, :]
        return Batch(
            tokens_BL=np.where(real_BL, self.windows.items[source_BL], 0).astype(np.int32),
            positions_BL=np.where(real_BL, position_BL, 0).astype(np.int32),
            segments_BL=real_BL.astype(np.int32),
            targets_BL=np.where(last_BL, self.windows.items[source_BL + 1], 0).astype(np.int32),
            weights_BL=last_BL.astype(np.float32),
        )


def epoch_batches(
    windows: Windows,
    *,
    seed: int,
    epoch: int,
    row_length: int,
    rows_per_step: int,
    row_layout: RowLayout = 'next',
    packed: bool = True,
    part: slice = slice(None),
) -> tuple[grain.DatasetIterator, int]:
    """Returns the training batches of an epoch: every window once, in an order of (seed, epoch).

    Rows of padding with weight 0 fill up the last batch.

    Args:
      windows: the windows.
      seed: of the run.
      epoch: from 0.
      row_length: L; for 'prefixes', the largest L.
      rows_per_step: B.
      row_layout: see the top of this file.
      packed: if false, a row has one window; 'prefixes' are never packed.
      part: the rows of each batch that this process gets.

    Returns:
      The iterator, and the number of its batches.
    """
    rng = np.random.default_rng([seed, epoch])
    if row_layout == 'prefixes':
        return _iterate(PrefixSource(windows, rng, rows_per_step, row_length, part))
    own_targets = row_layout == 'masked'
    order = rng.permutation(len(windows.starts)).astype(np.int32)
    inputs = windows.lengths[order] - (0 if own_targets else 1)
    if packed:
        row, column = assign_rows(inputs, row_length)
        # Best fit leaves the short windows to the last rows: shuffle the rows.
        row = rng.permutation(row.max() + 1)[row] if len(row) else row
    else:
        row, column = np.arange(len(order), dtype=np.int32), np.zeros(len(order), np.int32)
    num_rows = int(row.max()) + 1 if len(row) else 0
    num_rows = -(-num_rows // rows_per_step) * rows_per_step
    pairs = None
    if row_layout == 'pairs':
        pairs = draw_pairs(windows, order, row, column, rows_per_step, row_length, rng)
    layout, _ = Layout.sort(windows, order, row, column)
    source = EpochSource(layout, num_rows, row_length, rows_per_step, part, own_targets, pairs)
    return _iterate(source)


def _iterate(source: EpochSource | PrefixSource) -> tuple[grain.DatasetIterator, int]:
    # A batch is mostly a few slices of an array: threads would cost more than they gain.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options)), len(source)
