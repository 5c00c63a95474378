"""How FAME uses its heads and experts: whether heads differ, and whether gate and router choose.

Four figures of a trained model over users. Heads that recommend the same items are one head; a gate
or a router with equal weights chooses nothing; an expert without weight is not used.
"""

from typing import Any

import numpy as np

K = 10  # length of a head's list


def head_use(gate_BH: np.ndarray, router_BHN: np.ndarray, item_BHK: np.ndarray) -> dict[str, Any]:
    """The figures of a sample of users, ready for JSON.

    Args:
      gate_BH: float, the gate's weights of the heads; of any scale.
      router_BHN: float, the router's weights of each head's experts.
      item_BHK: int, each head's own list by itself; 0 where it is shorter.

    Returns:
      A dict:
      overlap@10  mean share of items that the lists of two heads have in common, over users and
                  pairs of heads; None for one head
      gate        mean share of each head, H values
      gate_entropy  mean over users of the entropy of the heads' shares, divided by its largest
                  value ln H: 1 is equal shares, 0 is one head alone; None for one head
      experts     mean weight of each expert, H lists of N
      balance     entropy of those means divided by ln N, the mean over heads: 1 if all experts have
                  the same weight over all users, 0 if one has it all; None for one expert
      router_entropy  as gate_entropy, of a user's experts, the mean over heads
    """
    share_BH = gate_BH / gate_BH.sum(axis=1, keepdims=True)
    mean_HN = router_BHN.mean(axis=0)
    return {
        f'overlap@{K}': overlap(item_BHK),
        'gate': share_BH.mean(axis=0).tolist(),
        'gate_entropy': entropy(share_BH),
        'experts': mean_HN.tolist(),
        'balance': entropy(mean_HN),
        'router_entropy': entropy(router_BHN),
    }


def overlap(item_BHK: np.ndarray) -> float | None:
    """The mean share of common items of two lists, of all pairs of heads; None for one head.

    The share is of the shorter list; a pair with an empty list is left out.
    """
    heads = item_BHK.shape[1]
    shares = []
    for one in range(heads):
        for other in range(one + 1, heads):
            first_BK, second_BK = item_BHK[:, one], item_BHK[:, other]
            same_BKK = (first_BK[:, :, None] == second_BK[:, None, :]) & (first_BK > 0)[:, :, None]
            length_B = np.minimum((first_BK > 0).sum(axis=1), (second_BK > 0).sum(axis=1))
            has_B = length_B > 0
            shares += (same_BKK.sum(axis=(1, 2))[has_B] / length_B[has_B]).tolist()
    return float(np.mean(shares)) if shares else None


def entropy(share: np.ndarray) -> float | None:
    """The mean entropy over the last axis, divided by its largest value; None for one entry.

    Args:
      share: float [..., N], from 0, with the sum 1 over the last axis.
    """
    number = share.shape[-1]
    if number < 2:
        return None
    positive = np.where(share > 0, share, 1)
    return float(-(share * np.log(positive)).sum(axis=-1).mean() / np.log(number))
