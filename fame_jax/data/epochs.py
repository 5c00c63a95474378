"""Rows to the batches of an epoch, in the layouts that models are trained on.

All of it is laid out by numpy before the first step. Grain then yields whole batches by index, so
that its state is one number and costs nothing.
"""

import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

import grain
import numpy as np

from fame_jax.batch import Batch, PairedBatch
from fame_jax.data import companions
from fame_jax.data.pipeline import Windows, assign_rows, lay_out


class EpochSource:
    """The batches of one epoch by index: a random-access source for Grain."""

    def __init__(self, rows: Batch | PairedBatch, rows_per_step: int, part: slice):
        """Holds an epoch.

        Args:
          rows: a record of fields [rows, L], their number a multiple of rows_per_step.
          rows_per_step: B.
          part: the rows of each batch that are given.
        """
        self.rows = rows
        self.rows_per_step = rows_per_step
        self.part = part

    def __len__(self) -> int:
        return len(self.rows.tokens_BL) // self.rows_per_step

    def __getitem__(self, index: int) -> Batch | PairedBatch:
        first = index * self.rows_per_step
        start, stop, _ = self.part.indices(self.rows_per_step)
        step = slice(first + start, first + stop)
        return type(self.rows)(*(field[step] for field in self.rows))


class PrefixSource:
    """The batches of one epoch where each prefix is a row: a random-access source for Grain.

    Rows end with their prefix, and prefixes of like length share a batch, so that little is padded
    and few shapes are compiled. The one target of a row stands in its last column.
    """

    def __init__(
        self,
        cut: Windows,
        rng: np.random.Generator,
        rows_per_step: int,
        max_length: int,
        part: slice,
    ):
        """Draws the order of prefixes and of batches; a last batch of each length is filled up."""
        self.part = part
        inputs = cut.lengths - 1
        first = np.repeat(np.cumsum(inputs) - inputs, inputs)
        self.items = cut.items
        self.starts = np.repeat(cut.starts, inputs)
        self.inputs = 1 + np.arange(inputs.sum()) - first
        order = rng.permutation(len(self.inputs))
        bits = np.ceil(np.log2(np.maximum(self.inputs[order], 4))).astype(np.int64)
        width = np.minimum(1 << bits, max_length)
        self.batches = []
        for one in np.unique(width):
            prefixes = order[width == one]
            fill = -len(prefixes) % rows_per_step
            prefixes = np.pad(prefixes, (0, fill), constant_values=-1)
            self.batches += [(int(one), part) for part in prefixes.reshape(-1, rows_per_step)]
        self.batches = [self.batches[i] for i in rng.permutation(len(self.batches))]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        width, prefix_B = self.batches[index]
        prefix_B = prefix_B[self.part]
        start_B, inputs_B = self.starts[prefix_B], np.where(prefix_B < 0, 0, self.inputs[prefix_B])
        column_BL = np.arange(width)[None, :] - (width - inputs_B)[:, None]
        real_BL = column_BL >= 0
        source_BL = np.where(real_BL, start_B[:, None] + column_BL, 0)
        last_BL = real_BL & (np.arange(width) == width - 1)[None, :]
        return Batch(
            tokens_BL=np.where(real_BL, self.items[source_BL], 0).astype(np.int32),
            positions_BL=np.where(real_BL, column_BL, 0).astype(np.int32),
            segments_BL=real_BL.astype(np.int32),
            targets_BL=np.where(last_BL, self.items[source_BL + 1], 0).astype(np.int32),
            weights_BL=last_BL.astype(np.float32),
        )


def epoch(
    cut: Windows,
    *,
    seed: int,
    epoch: int,
    packed: bool,
    row_length: int,
    rows_per_step: int,
    loss_positions: str,
    layout: str = 'next',
    part: slice = slice(None),
) -> tuple[grain.DatasetIterator, int]:
    """One epoch of training batches, every window once, in an order drawn from (seed, epoch).

    The last step is filled up with rows of padding, which weigh nothing.

    Args:
      cut: the windows.
      seed: of the run.
      epoch: from 0.
      packed: several windows to a row, or one, padded to the row.
      row_length: L.
      rows_per_step: B.
      loss_positions: 'all', or 'last': only a window's last position weighs.
      layout: 'next', the next item is the target; 'cloze', whole windows, whose items are their own
        targets; 'prefixes', each prefix of a window a row, in batches of like length; 'pairs',
        'next' with a companion to a position of each window, see companions.py.
      part: the rows of each batch that this process wants.

    Returns:
      The iterator, whose get_state and set_state are one number, and the number of batches.
    """
    rng = np.random.default_rng([seed, epoch])
    if layout == 'prefixes':
        return _iterate(PrefixSource(cut, rng, rows_per_step, row_length, part))
    whole = layout == 'cloze'
    order = rng.permutation(len(cut.starts))
    inputs = cut.lengths[order] - (0 if whole else 1)
    if packed:
        row, column = assign_rows(inputs, row_length)
        # Rows that were opened late hold the short histories: mix them.
        row = rng.permutation(row.max() + 1)[row] if len(row) else row
    else:
        row, column = np.arange(len(order)), np.zeros(len(order), np.int64)
    num_rows = int(row.max()) + 1 if len(row) else 0
    full_rows = -(-num_rows // rows_per_step) * rows_per_step
    rows = lay_out(cut, order, row, column, (full_rows, row_length), loss_positions, whole)
    if layout == 'pairs':
        rows = companions.add(rows, cut, order, row, column, rows_per_step, rng)
    return _iterate(EpochSource(rows, rows_per_step, part))


Laid = TypeVar('Laid')


def in_advance(epoch_of: Callable[[int], Laid]) -> Callable[[int], Laid]:
    """`epoch_of`, the next epoch being laid out in a thread while one is trained on."""
    thread = concurrent.futures.ThreadPoolExecutor(1, 'layout')
    waiting: dict[int, concurrent.futures.Future[Laid]] = {}

    def wait_for(epoch: int) -> Laid:
        future = waiting.pop(epoch, None)
        waiting.clear()
        laid = future.result() if future else epoch_of(epoch)
        waiting[epoch + 1] = thread.submit(epoch_of, epoch + 1)
        return laid

    return wait_for


def _iterate(source: EpochSource | PrefixSource) -> tuple[grain.DatasetIterator, int]:
    # A batch is a few slices: threads would cost more than they fetch.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options)), len(source)
