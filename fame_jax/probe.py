"""Is it disentangled? What can be read of the facets off item vectors, head by head.

Three figures of one vector and one facet: do the nearest neighbours agree, does a linear map find
the labels of items it has not seen, do labels make clusters. Where each facet has a head of its
own, the figures are high for the head and facet that are matched and about 0 for the others.

Everywhere vector_VK is float [V, K], an item a row, and label_VS int32 [V, S], the item's labels of
one facet, padded with -1. Neither has the padding's row. Items without labels are left out of
the facet's figures, as queries and as neighbours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse

# scikit-learn takes two seconds to import, so that only those who use it wait for it.


def neighbour_agreement(vector_VK: np.ndarray, label_VS: np.ndarray, neighbours: int = 10) -> float:
    """How often an item's nearest neighbours share a label with it, less chance; 1 is always.

    Args:
      vector_VK: float [V, K]; neighbours are by cosine.
      label_VS: int32 [V, S], padded with -1.
      neighbours: how many of them, if there are so many.

    Returns:
      (agreement - chance) / (1 - chance), chance that of two items drawn at random, the same one
      twice not excluded. 0 where all items share a label, or fewer than two have any.

    Raises:
      FloatingPointError: when a vector is not finite.
    """
    vector_VK, label_VS = _labelled(vector_VK, label_VS)
    if len(vector_VK) < 2:
        return 0.0
    nearest_VN = _nearest(vector_VK, min(neighbours, len(vector_VK) - 1))
    hot_VC = _multi_hot(label_VS)
    item_P, other_P = np.repeat(np.arange(len(nearest_VN)), nearest_VN.shape[1]), nearest_VN.ravel()
    shared_P = hot_VC[item_P].multiply(hot_VC[other_P]).sum(axis=1) > 0
    return _beyond(shared_P.mean(), _chance(label_VS))


def linear_probe(vector_VK: np.ndarray, label_VS: np.ndarray, seed: int) -> float:
    """How well a linear map reads the labels off the vectors of items it has not seen.

    Ridge regression to the labels, each 0 or 1, on four fifths of the items; the answer for an item
    of the last fifth is the label of the highest score. Labels of fewer than five items to learn
    from are left out, and with them the test items that have no other. Frequent labels score
    higher, so where C is many times K even clean clusters do not reach 1: compare heads of one
    width, not facets.

    Args:
      vector_VK: float [V, K]; their scale does not matter.
      label_VS: int32 [V, S], padded with -1.
      seed: of the split.

    Returns:
      (hits - chance) / (1 - chance): the share of test items whose answer is one of their labels,
      and that of always answering the commonest. 0 where that is always right or nothing is left.

    Raises:
      FloatingPointError: when a vector is not finite.
    """
    vector_VK, label_VS = _labelled(vector_VK, label_VS)
    hot_VC = _multi_hot(label_VS)
    order_V = np.random.default_rng(seed).permutation(len(vector_VK))
    learn, test = np.split(order_V, [len(order_V) * 4 // 5])
    hot_VC = hot_VC[:, np.flatnonzero(hot_VC[learn].sum(axis=0) >= 5)]
    test = test[hot_VC[test].sum(axis=1) > 0]
    if not len(test):
        return 0.0
    mean_K, scale_K = vector_VK[learn].mean(axis=0), vector_VK[learn].std(axis=0) + 1e-12
    unit_VK = (vector_VK - mean_K) / scale_K
    score_BC = _ridge(unit_VK[learn], hot_VC[learn], unit_VK[test])
    common = hot_VC[learn].sum(axis=0).argmax()
    truth_BC = hot_VC[test].toarray()
    hits = truth_BC[np.arange(len(test)), score_BC.argmax(axis=1)].mean()
    return _beyond(hits, truth_BC[:, common].mean())


def silhouette(
    vector_VK: np.ndarray, label_VS: np.ndarray, seed: int, sample: int = 2000
) -> float | None:
    """The mean silhouette by cosine, from -1 to 1; an item of several labels counts as its rarest.

    Labels by chance are below 0, and the more so the more there are: an item is compared with the
    nearest of all other clusters.

    Args:
      vector_VK: float [V, K].
      label_VS: int32 [V, S], padded with -1; of labels alike in rarity the first slot's counts.
      seed: of the sample.
      sample: the most items that are looked at.

    Returns:
      None where it is undefined: one label in all, or as many labels as items.

    Raises:
      FloatingPointError: when a vector is not finite.
    """
    from sklearn.metrics import silhouette_score

    vector_VK, label_VS = _labelled(vector_VK, label_VS)
    if not len(label_VS):
        return None
    count_VS = np.bincount(label_VS[label_VS >= 0])[label_VS]
    rarest_V1 = np.where(label_VS >= 0, count_VS, len(label_VS) + 1).argmin(axis=1)[:, None]
    label_V = np.take_along_axis(label_VS, rarest_V1, axis=1)[:, 0]
    item_B = _sample(len(label_V), seed, sample)
    if not 1 < len(np.unique(label_V[item_B])) < len(item_B):
        return None
    return float(silhouette_score(vector_VK[item_B], label_V[item_B], metric='cosine'))


def match_heads(
    item_HVK: np.ndarray, labels: Sequence[np.ndarray], neighbours: int = 10
) -> dict[str, Any]:
    """Which head carries which facet, by the one-to-one matching of most agreement.

    Args:
      item_HVK: float [H, V, K], each head's own item vectors.
      labels: M times label_VS, a facet each.
      neighbours: of an item, whose labels are compared.

    Returns:
      'agreement', H lists of M; 'matching', pairs (head, facet); 'matched' and 'unmatched', the
      mean agreement of the pairs that are matched and of the others, None where there are none.
      Heads that carry no facet of their own have the two alike.
    """
    agreement_HM = np.array(
        [[neighbour_agreement(v, label_VS, neighbours) for label_VS in labels] for v in item_HVK]
    )
    head, facet = scipy.optimize.linear_sum_assignment(-agreement_HM)
    chosen_HM = np.zeros(agreement_HM.shape, bool)
    chosen_HM[head, facet] = True
    others = agreement_HM[~chosen_HM]
    return {
        'agreement': agreement_HM.tolist(),
        'matching': [[int(h), int(m)] for h, m in zip(head, facet)],
        'matched': float(agreement_HM[chosen_HM].mean()),
        'unmatched': float(others.mean()) if others.size else None,
    }


def compare(item_HVK: np.ndarray, facets: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Every head against every facet by all three figures, ready for JSON.

    Args:
      item_HVK: float [H, V, K], each head's own item vectors.
      facets: name -> label_VS, at least one.
      seed: of the probe's split and the silhouette's sample.

    Returns:
      'facets', the M names; 'neighbours', 'probe' and 'silhouette', H lists of M; 'whole', lists of
      M under the same three names for the heads side by side, [V, H * K]; 'matching', 'matched'
      and 'unmatched' as `match_heads` has them.
    """
    labels = list(facets.values())
    whole_VD = np.concatenate(list(item_HVK), axis=1)
    found = match_heads(item_HVK, labels)
    return {
        'facets': list(facets),
        'neighbours': found.pop('agreement'),
        'probe': [[linear_probe(v, label, seed) for label in labels] for v in item_HVK],
        'silhouette': [[silhouette(v, label, seed) for label in labels] for v in item_HVK],
        'whole': {
            'neighbours': [neighbour_agreement(whole_VD, label) for label in labels],
            'probe': [linear_probe(whole_VD, label, seed) for label in labels],
            'silhouette': [silhouette(whole_VD, label, seed) for label in labels],
        },
        **found,
    }


def flatten(vector_VD: np.ndarray, seed: int, sample: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """A map of the items in the plane: PCA to 30 dimensions, then t-SNE by cosine.

    Args:
      vector_VD: float [V, D], an item a row.
      seed: of the sample and of both methods.
      sample: the most items that are drawn.

    Returns:
      item_B, the rows that are drawn, ascending, and xy, float32 [B, 2]; all at one place where
      the vectors do not span a plane.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    item_B = _sample(len(vector_VD), seed, sample)
    vector_BD = vector_VD[item_B]
    if min(vector_BD.shape) < 2 or np.linalg.matrix_rank(vector_BD - vector_BD.mean(axis=0)) < 2:
        return item_B, np.zeros((len(item_B), 2), np.float32)
    low_BD = PCA(min(30, *vector_BD.shape), random_state=seed).fit_transform(vector_BD)
    perplexity = min(30, (len(item_B) - 1) / 3)
    plane = TSNE(metric='cosine', init='pca', perplexity=perplexity, random_state=seed)
    return item_B, plane.fit_transform(low_BD).astype(np.float32)


def _labelled(vector_VK: np.ndarray, label_VS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The items that have labels of the facet."""
    if not np.isfinite(vector_VK).all():
        raise FloatingPointError('an item vector is not finite; nothing can be read off it')
    has_V = (label_VS >= 0).any(axis=1)
    return vector_VK[has_V], label_VS[has_V]


def _nearest(vector_VK: np.ndarray, neighbours: int) -> np.ndarray:
    """The rows of each row's nearest others by cosine, int [V, neighbours]; never a [V, V].

    The nearest of unit vectors by distance are the nearest by cosine. A vector of zeros, which has
    a cosine of 0 with all, gets an axis of its own.
    """
    from sklearn.neighbors import NearestNeighbors

    norm_V1 = np.linalg.norm(vector_VK, axis=1, keepdims=True)
    unit_VK = np.where(norm_V1 > 0, vector_VK / np.maximum(norm_V1, 1e-30), 0)
    unit_VK = np.concatenate([unit_VK, norm_V1 == 0], axis=1).astype(np.float32)
    search = NearestNeighbors(n_neighbors=neighbours, algorithm='brute').fit(unit_VK)
    return search.kneighbors(
        return_distance=False
    )  # without a query: all rows, themselves left out


def _multi_hot(label_VS: np.ndarray) -> scipy.sparse.csr_array:
    """1 where an item has a label, float64 [V, C]."""
    item, slot = np.nonzero(label_VS >= 0)
    shape = (len(label_VS), label_VS.max(initial=-1) + 1)
    hot_VC = scipy.sparse.csr_array((np.ones(len(item)), (item, label_VS[item, slot])), shape)
    hot_VC.sum_duplicates()
    hot_VC.data[:] = 1
    return hot_VC


def _chance(label_VS: np.ndarray) -> float:
    """The share of all V^2 pairs of items that have a label in common, counted and not estimated.

    Items of the same labels are taken together, and 512 such kinds at a time.
    """
    kind_GS, count_G = np.unique(np.sort(label_VS, axis=1), axis=0, return_counts=True)
    hot_GC = _multi_hot(kind_GS)
    pairs = 0.0
    for start in range(0, len(kind_GS), 512):
        shared_BG = hot_GC[start : start + 512] @ hot_GC.T
        shared_BG.data[:] = 1
        pairs += count_G[start : start + 512] @ (shared_BG @ count_G)
    return pairs / len(label_VS) ** 2


def _ridge(unit_VK: np.ndarray, hot_VC: scipy.sparse.csr_array, test_BK: np.ndarray) -> np.ndarray:
    """Scores [B, C] of ridge regression with an intercept; unit_VK has mean 0 and variance 1."""
    gram_KK = unit_VK.T @ unit_VK + np.eye(unit_VK.shape[1])
    weight_KC = np.linalg.solve(gram_KK, (hot_VC.T @ unit_VK).T)
    return test_BK @ weight_KC + hot_VC.mean(axis=0)


def _sample(num_items: int, seed: int, size: int) -> np.ndarray:
    """Rows drawn without repetition, ascending; all of them where they are fewer."""
    drawn = np.random.default_rng(seed).choice(num_items, min(size, num_items), replace=False)
    return np.sort(drawn)


def _beyond(share: float, chance: float) -> float:
    """What a share is above chance, of what it could be; 0 where chance is always right."""
    return float((share - chance) / (1 - chance)) if chance < 1 else 0.0
