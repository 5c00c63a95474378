"""Histories in random order, for the test of how much a model uses their order."""

import numpy as np

from fame_jax.data.eval_batches import EvalBatch

ORDER_SEED = 0  # of the order test: the same for all runs, so that their figures can be compared


def shuffle_all_but_last(batch: EvalBatch, seed: int = ORDER_SEED) -> EvalBatch:
    """The batch with the items that a model reads in random order, but for the last item.

    The order of a user depends on the user and the seed, and not on the other users of the batch.
    Items of the history that the model does not read stay where they are.
    """
    back_L = np.arange(batch.tokens_BL.shape[1])[::-1]  # 0 is the last item
    key_BL = _random(batch.user_B.astype(np.uint64)[:, None] << 32 | back_L.astype(np.uint64), seed)
    key_BL >>= 1  # so that the largest number and 0 are no random keys
    # Padding first, the last item last.
    key_BL = np.where(batch.segments_BL > 0, key_BL + 1, 0)
    key_BL[:, -1] = np.iinfo(np.uint64).max
    order_BL = np.argsort(key_BL, axis=1, kind='stable')
    return batch._replace(tokens_BL=np.take_along_axis(batch.tokens_BL, order_BL, axis=1))


def shuffle_items(
    items: np.ndarray, starts_U: np.ndarray, ends_U: np.ndarray, seed: int = ORDER_SEED
) -> np.ndarray:
    """The items of all users, those of each history but the last in random order.

    The order is that of `shuffle_all_but_last` for a model that reads whole histories.

    Args:
      items: int32 [A], all actions end to end; those outside of the histories stay.
      starts_U, ends_U: int64 [U], user u's history is `items[starts_U[u]:ends_U[u]]`.
      seed: of the order.
    """
    length_U = ends_U - starts_U
    user_E = np.repeat(np.arange(len(length_U)), length_U)
    place_E = np.arange(len(user_E)) + np.repeat(starts_U + length_U - length_U.cumsum(), length_U)
    back_E = ends_U[user_E] - 1 - place_E  # 0 is the last item
    key_E = _random(user_E.astype(np.uint64) << 32 | back_E.astype(np.uint64), seed)
    key_E = np.where(back_E == 0, np.iinfo(np.uint64).max, key_E >> 1)
    shuffled = np.array(items)
    shuffled[place_E] = items[place_E[np.lexsort((key_E, user_E))]]
    return shuffled


def _random(number: np.ndarray, seed: int) -> np.ndarray:
    """A random uint64 for each uint64: the output function of SplitMix64 (Steele et al., 2014)."""
    number = (number + np.uint64(seed + 1)) * np.uint64(0x9E3779B97F4A7C15)
    number = (number ^ (number >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> 27)) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> 31)
