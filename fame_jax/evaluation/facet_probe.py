"""Disentanglement: how well the item vectors of each head represent each known facet.

Three figures for a head's vectors and a facet's labels: whether nearest neighbours share labels,
whether a linear map predicts the labels of held-out items, and whether labels form clusters. Where
each facet has its own head, the figures are high for the matched pairs and about 0 for the others.

In all functions vector_VK is float [V, K], one row per item, and label_VS is int32 [V, S], the
items' labels of one facet, padded with -1; neither has a row for the padding. Items without labels
are left out of a facet's figures, as queries and as neighbours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse

# scikit-learn is imported inside functions, since the import takes two seconds.


def neighbour_agreement(vector_VK: np.ndarray, label_VS: np.ndarray, neighbours: int = 10) -> float:
    """How often an item's nearest neighbours share a label with it, corrected for chance.

    Args:
      vector_VK: float [V, K]; neighbours are by cosine.
      label_VS: int32 [V, S], padded with -1.
      neighbours: neighbours of each item, at most all others.

    Returns:
      (agreement - chance) / (1 - chance), at most 1, with the chance that two items drawn
      independently share a label. 0 where all items share a label, or fewer than two have any.

    Raises:
      FloatingPointError: when an item vector is not finite.
    """
    vector_VK, label_VS = _labelled(vector_VK, label_VS)
    if len(vector_VK) < 2:
        return 0.0
    nearest_VN = _nearest(vector_VK, min(neighbours, len(vector_VK) - 1))
    hot_VC = _multi_hot(label_VS)
    item_P, other_P = np.repeat(np.arange(len(nearest_VN)), nearest_VN.shape[1]), nearest_VN.ravel()
    shared_P = hot_VC[item_P].multiply(hot_VC[other_P]).sum(axis=1) > 0
    return _corrected(shared_P.mean(), _chance(label_VS))


def linear_probe(vector_VK: np.ndarray, label_VS: np.ndarray, seed: int) -> float:
    """How well a linear map predicts the labels of held-out items from their vectors.

    Ridge regression to the labels, each 0 or 1, fitted on four fifths of the items; the prediction
    for an item of the last fifth is the label with the highest score. Labels with fewer than five
    training items are left out, and so are test items that have no other label. Scores favour
    frequent labels, so that with C many times K even clear clusters do not reach 1: compare heads
    of one width with each other, not facets.

    Args:
      vector_VK: float [V, K]; their scale does not matter.
      label_VS: int32 [V, S], padded with -1.
      seed: of the random split.

    Returns:
      (accuracy - baseline) / (1 - baseline): accuracy is the share of test items whose prediction
      is one of their labels, the baseline predicts the most frequent label. 0 where the baseline is
      always right or no test item is left.

    Raises:
      FloatingPointError: when an item vector is not finite.
    """
    vector_VK, label_VS = _labelled(vector_VK, label_VS)
    hot_VC = _multi_hot(label_VS)
    order_V = np.random.default_rng(seed).permutation(len(vector_VK))
    train, test = np.split(order_V, [len(order_V) * 4 // 5])
    hot_VC = hot_VC[:, np.flatnonzero(hot_VC[train].sum(axis=0) >= 5)]
    test = test[hot_VC[test].sum(axis=1) > 0]
    if not len(test):
        return 0.0
    mean_K, std_K = vector_VK[train].mean(axis=0), vector_VK[train].std(axis=0) + 1e-12
    standard_VK = (vector_VK - mean_K) / std_K
    score_BC = _ridge(standard_VK[train], hot_VC[train], standard_VK[test])
    most_frequent = hot_VC[train].sum(axis=0).argmax()
    truth_BC = hot_VC[test].toarray()
    accuracy = truth_BC[np.arange(len(test)), score_BC.argmax(axis=1)].mean()
    return _corrected(accuracy, truth_BC[:, most_frequent].mean())


def silhouette(
    vector_VK: np.ndarray, label_VS: np.ndarray, seed: int, sample: int = 2000
) -> float | None:
    """The mean silhouette coefficient by cosine distance, from -1 to 1.

    An item with several labels is assigned to its rarest. Random labels give values below 0, and
    lower ones the more labels there are, since an item is compared with the nearest of all other
    clusters.

    Args:
      vector_VK: float [V, K].
      label_VS: int32 [V, S], padded with -1; of equally rare labels the first counts.
      seed: of the sample.
      sample: number of items at most.

    Returns:
      None where it is undefined: with one label only, or as many labels as items.

    Raises:
      FloatingPointError: when an item vector is not finite.
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
    item_HVK: np.ndarray, labels: Sequence[np.ndarray], neighbours: int = 10, branches: int = 1
) -> dict[str, Any]:
    """Matches heads and facets one to one, by the highest sum of `neighbour_agreement`.

    Args:
      item_HVK: float [H, V, K], each head's item vectors.
      labels: label_VS of each of M facets.
      neighbours: neighbours of each item.
      branches: heads are matched within each branch, which has H / branches of them in a row.

    Returns:
      A dict: 'agreement', H lists of M; 'matching', pairs (head, facet); 'matched' and 'unmatched',
      the mean agreement of the matched pairs and of all others, None where there are none. The two
      are about equal where heads represent no facet of their own.
    """
    import scipy.optimize  # takes a second to import

    agreement_HM = np.array(
        [[neighbour_agreement(v, label_VS, neighbours) for label_VS in labels] for v in item_HVK]
    )
    first = np.arange(0, len(agreement_HM), len(agreement_HM) // branches)
    found = [
        scipy.optimize.linear_sum_assignment(-part_HM)
        for part_HM in np.split(agreement_HM, branches)
    ]
    head = np.concatenate([start + h for start, (h, _) in zip(first, found)])
    facet = np.concatenate([m for _, m in found])
    is_matched_HM = np.zeros(agreement_HM.shape, bool)
    is_matched_HM[head, facet] = True
    others = agreement_HM[~is_matched_HM]
    return {
        'agreement': agreement_HM.tolist(),
        'matching': [[int(h), int(m)] for h, m in zip(head, facet)],
        'matched': float(agreement_HM[is_matched_HM].mean()),
        'unmatched': float(others.mean()) if others.size else None,
    }


def compare(
    item_HVK: np.ndarray, facets: Mapping[str, np.ndarray], seed: int, branches: int = 1
) -> dict[str, Any]:
    """All three figures of every head and facet, ready for JSON.

    Args:
      item_HVK: float [H, V, K], each head's item vectors.
      facets: name -> label_VS, at least one.
      seed: of the probe's split and the silhouette's sample.
      branches: as in `match_heads`.

    Returns:
      A dict: 'facets', the M names; 'neighbours', 'probe' and 'silhouette', H lists of M; 'whole',
      lists of M under the same three names for the heads' concatenated vectors, [V, H * K];
      'matching', 'matched' and 'unmatched' as in `match_heads`.
    """
    labels = list(facets.values())
    whole_VD = np.concatenate(list(item_HVK), axis=1)
    match = match_heads(item_HVK, labels, branches=branches)
    return {
        'facets': list(facets),
        'neighbours': match.pop('agreement'),
        'probe': [[linear_probe(v, label, seed) for label in labels] for v in item_HVK],
        'silhouette': [[silhouette(v, label, seed) for label in labels] for v in item_HVK],
        'whole': {
            'neighbours': [neighbour_agreement(whole_VD, label) for label in labels],
            'probe': [linear_probe(whole_VD, label, seed) for label in labels],
            'silhouette': [silhouette(whole_VD, label, seed) for label in labels],
        },
        **match,
    }


def tsne_map(vector_VD: np.ndarray, seed: int, sample: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """Places the items in the plane: PCA to 30 dimensions, then t-SNE by cosine.

    Args:
      vector_VD: float [V, D], one row per item.
      seed: of the sample and of both methods.
      sample: number of items at most.

    Returns:
      item_B, the sampled rows in ascending order, and xy, float32 [B, 2]; zeros where the vectors
      do not span a plane.
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
    """The items that have labels of the facet, with their labels."""
    if not np.isfinite(vector_VK).all():
        raise FloatingPointError('an item vector is not finite; facets cannot be compared')
    has_V = (label_VS >= 0).any(axis=1)
    return vector_VK[has_V], label_VS[has_V]


def _nearest(vector_VK: np.ndarray, neighbours: int) -> np.ndarray:
    """The indices of each row's nearest neighbours by cosine, int [V, neighbours].

    Searched by the distance of unit vectors, which has the same order as cosine, without an array
    [V, V]. A vector of zeros, whose cosine with all others is 0, becomes a unit vector on one more
    axis.
    """
    from sklearn.neighbors import NearestNeighbors

    norm_V1 = np.linalg.norm(vector_VK, axis=1, keepdims=True)
    unit_VK = np.where(norm_V1 > 0, vector_VK / np.maximum(norm_V1, 1e-30), 0)
    unit_VK = np.concatenate([unit_VK, norm_V1 == 0], axis=1).astype(np.float32)
    search = NearestNeighbors(n_neighbors=neighbours, algorithm='brute').fit(unit_VK)
    # Without a query, all rows are the queries, and no row is its own neighbour.
    return search.kneighbors(return_distance=False)


def _multi_hot(label_VS: np.ndarray) -> scipy.sparse.csr_array:
    """1 where an item has a label, else 0; float64 [V, C]."""
    item, slot = np.nonzero(label_VS >= 0)
    shape = (len(label_VS), label_VS.max(initial=-1) + 1)
    hot_VC = scipy.sparse.csr_array((np.ones(len(item)), (item, label_VS[item, slot])), shape)
    hot_VC.sum_duplicates()
    hot_VC.data[:] = 1
    return hot_VC


def _chance(label_VS: np.ndarray) -> float:
    """The exact share of all V^2 pairs of items that have a label in common.

    Items with the same label set are counted together, 512 different sets at a time.
    """
    set_GS, count_G = np.unique(np.sort(label_VS, axis=1), axis=0, return_counts=True)
    hot_GC = _multi_hot(set_GS)
    pairs = 0.0
    for start in range(0, len(set_GS), 512):
        shared_BG = hot_GC[start : start + 512] @ hot_GC.T
        shared_BG.data[:] = 1
        pairs += count_G[start : start + 512] @ (shared_BG @ count_G)
    return pairs / len(label_VS) ** 2


def _ridge(
    standard_VK: np.ndarray, hot_VC: scipy.sparse.csr_array, test_BK: np.ndarray
) -> np.ndarray:
    """Scores [B, C] of ridge regression with an intercept; standard_VK has mean 0, variance 1."""
    gram_KK = standard_VK.T @ standard_VK + np.eye(standard_VK.shape[1])
    weight_KC = np.linalg.solve(gram_KK, (hot_VC.T @ standard_VK).T)
    return test_BK @ weight_KC + hot_VC.mean(axis=0)


def _sample(num_items: int, seed: int, size: int) -> np.ndarray:
    """Rows drawn without replacement, ascending; all rows where there are at most `size`."""
    drawn = np.random.default_rng(seed).choice(num_items, min(size, num_items), replace=False)
    return np.sort(drawn)


def _corrected(share: float, chance: float) -> float:
    """A share corrected for chance, (share - chance) / (1 - chance); 0 where chance is 1."""
    return float((share - chance) / (1 - chance)) if chance < 1 else 0.0
