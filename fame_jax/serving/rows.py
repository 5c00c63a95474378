"""Histories as the rows that a model encodes, and the candidates of each as bits."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fame_jax.data import eval_batches


class HistoryRows(NamedTuple):
    """A batch of histories, each at the end of its row; padding rows have no history.

    Fields:
      tokens_BL: int32, the latest items of each history, 0 before them.
      positions_BL: int32, counted from the first item of the row.
      segments_BL: int32, 1 at an item and 0 at padding.
      history_B: int, the index of each row's history; -1 in padding rows.
    """

    tokens_BL: np.ndarray
    positions_BL: np.ndarray
    segments_BL: np.ndarray
    history_B: np.ndarray

    @property
    def inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, positions and segments, the arguments of an encoder."""
        return self.tokens_BL, self.positions_BL, self.segments_BL


def batches(
    histories: Sequence[np.ndarray], max_length: int, batch_size: int
) -> Iterator[HistoryRows]:
    """Yields all histories in batches of similar length, so that few shapes are compiled.

    Args:
      histories: int32 item indices of each, the oldest first; none is empty.
      max_length: items of a history that the model encodes, the latest.
      batch_size: B; the last batch is filled up with padding rows.
    """
    # Only the latest items, so that memory does not grow with the longest history.
    windows = [history[-max_length:] for history in histories]
    offsets = np.cumsum([0, *map(len, windows)])
    for batch in eval_batches.eval_batches(
        np.concatenate(windows), offsets, None, max_length, batch_size
    ):
        yield HistoryRows(
            batch.tokens_BL,
            batch.positions_BL,
            batch.segments_BL,
            np.where(batch.is_user_B, batch.user_B, -1),
        )


def candidate_bits(allowed_V: np.ndarray, seen: Sequence[np.ndarray]) -> np.ndarray:
    """The candidates of each row as bits, uint8 [B, X]: bit v % 8 of byte v // 8 is item v's.

    Their shape depends on the number of rows and of items alone, not on the histories.

    Args:
      allowed_V: bool [V + 1], the items that may be recommended to anyone; or [B, V + 1], those
        of each row.
      seen: B arrays of item indices that are no candidates of the row; repeats are allowed.
    """
    bits_BX = np.packbits(np.atleast_2d(allowed_V), axis=1, bitorder='little')
    bits_BX = np.array(np.broadcast_to(bits_BX, (len(seen), bits_BX.shape[1])))
    row = np.repeat(np.arange(len(seen)), [len(items) for items in seen])
    item = np.concatenate(seen).astype(int)
    np.bitwise_and.at(bits_BX, (row, item // 8), ~(1 << item % 8).astype(np.uint8))
    return bits_BX
