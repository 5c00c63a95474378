"""Rows for new items in the parameters of a trained model.

A parameter has a row for each item if its first axis is V + 1. The rows of old items stay as they
are. A new item's row is the mean of its neighbours' rows, or the row of a fresh initialisation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
import numpy as np

Tree = Mapping[str, Any]
# Rounds of neighbours: new item -> the items whose mean row it starts from. An item in a round may
# have neighbours of earlier rounds.
Rounds = Sequence[Mapping[int, np.ndarray]]


def grow_params(old: Tree, fresh: Tree, num_items: int, rounds: Rounds) -> dict[str, Any]:
    """The parameters of a trained model with rows for new items.

    Args:
      old: the trained parameters, V + 1 rows in those with a row for each item.
      fresh: the same model's parameters for the larger catalogue, freshly initialised; rows past
        the new V + 1 are padding.
      num_items: V of `old`.
      rounds: neighbours of new items, from texts or histories; an item in none keeps its fresh row.

    Returns:
      float32 numpy arrays in the shapes of `fresh`.

    Raises:
      ValueError: when another parameter depends on the number of items, so that the model cannot
        grow.
    """
    old_leaves = flax.traverse_util.flatten_dict(old, sep='/')
    fresh_leaves = flax.traverse_util.flatten_dict(fresh, sep='/')
    if old_leaves.keys() != fresh_leaves.keys():
        raise ValueError('the larger model has other parameters')
    grown = {}
    for path, leaf in fresh_leaves.items():
        before = np.asarray(old_leaves[path])
        grown[path] = before
        if before.shape != leaf.shape:
            _check_rows(path, before.shape, leaf.shape, num_items)
            grown[path] = _grow_rows(before[: num_items + 1], np.array(leaf), rounds)
    return flax.traverse_util.unflatten_dict(grown, sep='/')


def _grow_rows(old_VD: np.ndarray, row_VD: np.ndarray, rounds: Rounds) -> np.ndarray:
    row_VD[: len(old_VD)] = old_VD
    for found in rounds:
        means = {item: row_VD[others].mean(axis=0) for item, others in found.items()}
        for item, mean in means.items():
            row_VD[item] = mean
    return row_VD


def _check_rows(path: str, old: tuple[int, ...], new: tuple[int, ...], num_items: int) -> None:
    if not old or old[1:] != new[1:] or not num_items < old[0] <= new[0]:
        raise ValueError(f'{path} has shape {old}, and {new} for the larger catalogue')
