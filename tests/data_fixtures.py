"""Small histories, windows and data sets, without jax."""

import os
from pathlib import Path

import numpy as np
import pytest

from fame_jax.data.dataset import Dataset


def flatten(*histories):
    """Histories end to end, int32 [A], and the start of each, int64 [U + 1]."""
    items = np.array([item for history in histories for item in history], np.int32)
    return items, np.cumsum([0, *map(len, histories)], dtype=np.int64)


def unflatten(items, offsets):
    """The inverse of `flatten`: lists of items."""
    return [row.tolist() for row in np.split(items, offsets[1:-1])]


def distinct_histories(lengths):
    """Histories of these lengths in which no item occurs twice: 1 2 3, 4 5, ..."""
    ends = np.cumsum(lengths)
    return [list(range(end - n + 1, end + 1)) for n, end in zip(lengths, ends)]


def window_items(windows):
    """The items of each window, as lists."""
    ends = windows.starts + windows.lengths
    return [windows.items[start:end].tolist() for start, end in zip(windows.starts, ends)]


def make_dataset(*histories, **fields):
    """A Dataset of histories of item indices; users are u0, u1, ... and items i1, i2, ..."""
    num_items = max(map(max, histories))
    default = {
        'user_ids': [f'u{n}' for n in range(len(histories))],
        'item_ids': ['', *(f'i{n}' for n in range(1, num_items + 1))],
        'card': {'name': 'small', 'source': 'x.txt'},
    }
    return Dataset(*flatten(*histories), **default | fields)


# Files of the real data, below FAME_JAX_DATA.
PLACES = {
    'toys': 'amazon/Toys_and_Games.txt',
    'beauty': 'amazon/Beauty.txt',
    'sports': 'amazon/Sports_and_Outdoors.txt',
    'scientific': 'amazon-scientific/Scientific.txt',
    'ml-100k': 'ml-100k/ml-100k.inter',
}


def real_file(name):
    """The file of a real data set; the test is skipped where it is not."""
    return real_path(PLACES[name])


def real_path(place):
    """A file below the folder of the real data; the test is skipped where it is not."""
    path = Path(os.environ.get('FAME_JAX_DATA', '')) / place
    if not (path.is_absolute() and path.is_file()):
        pytest.skip('set FAME_JAX_DATA to the folder of the real data')
    return path
