"""Histories to windows: parts of a history that are short enough for the model."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

BLOCK = 2**18  # items of windows that are worked on at once


class Windows(NamedTuple):
    """Windows of a flat array of items, each with 2 to max_length + 1 items.

    Fields:
      items: int32 [A], all histories end to end.
      starts: int64 [W], the first item of each window.
      lengths: int64 [W], items of each window; one more than the inputs of next-item training.
    """

    items: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


def make_windows(
    items: np.ndarray,
    offsets: np.ndarray,
    max_length: int,
    long_histories: Literal['split', 'last'],
    ends: np.ndarray | None = None,
) -> Windows:
    """Makes windows of histories; a history of one item has none.

    Args:
      items: int32 [A], the histories end to end.
      offsets: int64 [U + 1], the start of each history, and A.
      max_length: the largest number of inputs of a window.
      long_histories: 'last' keeps the last window of a history. 'split' keeps the whole history, in
        windows that overlap by one item: the target of one window's last input is the first input
        of the next.
      ends: int64 [U], where the training part of each history ends; None: with the history.
    """
    starts, ends = offsets[:-1], offsets[1:] if ends is None else ends
    if long_histories == 'split':
        parts = np.maximum(-(-(ends - starts - 1) // max_length), 0)
        first = np.repeat(np.cumsum(parts) - parts, parts)
        starts = np.repeat(starts, parts) + (np.arange(parts.sum()) - first) * max_length
        ends = np.minimum(np.repeat(ends, parts), starts + max_length + 1)
    else:
        starts = np.maximum(starts, ends - (max_length + 1))
    lengths = ends - starts
    keep = lengths >= 2
    return Windows(items, starts[keep], lengths[keep])


def items_in_windows(windows: Windows, num_items: int) -> np.ndarray:
    """Returns which items occur in a window, bool [V + 1]."""
    found = np.zeros(num_items + 1, bool)
    for block in blocks_of_windows(windows):
        found[windows.items[places_in_windows(windows, block)]] = True
    return found


def blocks_of_windows(windows: Windows) -> Iterator[slice]:
    """Yields ranges of windows, one after the other, of at most 2^18 items or of one window."""
    ends = np.cumsum(windows.lengths)
    first, before = 0, 0
    while first < len(ends):
        last = max(int(np.searchsorted(ends, before + BLOCK, side='right')), first + 1)
        yield slice(first, last)
        first, before = last, int(ends[last - 1])


def places_in_windows(windows: Windows, block: slice) -> np.ndarray:
    """Returns the index in `windows.items` of each item of a range of windows, int64."""
    starts, lengths = windows.starts[block], windows.lengths[block]
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())
