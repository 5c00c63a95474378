"""The item graph, a baseline without training: items that follow one another in histories.

With s the training histories, w the window and c_v the number of training actions of item v:

    A_ij = sum over histories, over p, q with s_p = i, s_q = j, 1 <= q - p <= w, of decay^(q-p-1)
    T = the rows of A + A' divided by their sums
    score(v) = sum over the last items h of a history, n = 0 for its last one, of
               fade^n (T + second_hop T T)_hv / c_v^exponent

An item that no path reaches has the score 0. Items of equal score, these among them, are ranked by
their training actions; if these are equal too, the tie counts against the target. As everywhere,
the masked ranking leaves the items of the history out, and puts a target among them last.

The idea is that of arXiv 2605.07125: last items, a graph of few hops, nothing trained. That paper
also uses the similarity of item features, and other weights; here there are only ids.

The settings are chosen on validation users. Nothing of size [U, V] or [V, V] is ever dense.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse

from fame_jax.evaluation.metrics import PROTOCOLS, metrics
from fame_jax.evaluation.ranking import Ranks

Sparse = scipy.sparse.csr_array

# The values tried of (window, decay), second_hop, exponent, and (last, fade). With the fade .7 the
# 50th item has a weight of 3e-8: these are whole histories.
GRAPHS = ((1, 1.0), (5, 0.5), (50, 0.8))
SECOND_HOPS = (0.15,)  # besides none
EXPONENTS = (0.0, 0.3)
HISTORIES = ((1, 1.0), (2, 0.5), (50, 0.7))

SELECT_ON = 'ndcg@20'  # of the validation users
SAMPLE = 4000  # validation users on whom the settings are chosen

# A setting is left out where it needs more: pairs of items of a graph, entries of its two hops, and
# multiplications of its two hops or of ranking all users once.
MAX_PAIRS, MAX_ENTRIES, MAX_PRODUCTS = 2**27, 2**27, 2**32
ENTRIES_AT_ONCE = 2**22  # scores and items of the histories of a block of users


class Setting(NamedTuple):
    """A point of the grid; the letters of the module's equations."""

    window: int
    decay: float
    second_hop: float
    exponent: float
    last: int
    fade: float


class Histories(NamedTuple):
    """Histories `items[starts[u]:ends[u]]`, int64 [U], and their targets, int32 [U]."""

    items: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    targets: np.ndarray

    def of(self, users: slice | np.ndarray) -> 'Histories':
        """The histories of some users."""
        return Histories(self.items, *(field[users] for field in self[1:]))


class Training(NamedTuple):
    """The training histories: int32 items of all actions, int64 [U + 1] offsets, and V."""

    items: np.ndarray
    offsets: np.ndarray
    num_items: int

    @property
    def count_V(self) -> np.ndarray:
        """The training actions of each item, int64 [V + 1]."""
        return np.bincount(self.items, minlength=self.num_items + 1)


class Chosen(NamedTuple):
    """The best setting, its matrix of paths, [V + 1, V + 1], and the validation metric."""

    setting: Setting
    path_VV: Sparse
    value: float


def transitions(training: Training, window: int, decay: float) -> Sparse:
    """A + A', float64 [V + 1, V + 1]: how often two items are near in a history, in either order.

    Args:
      training: the histories.
      window: the greatest distance of the two items.
      decay: factor of each further step of distance.
    """
    items, offsets, num_items = training
    shape_VV = (num_items + 1, num_items + 1)
    user_A = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
    total_VV = Sparse(shape_VV)
    for distance in range(1, window + 1):
        first_P = np.flatnonzero(user_A[distance:] == user_A[:-distance])
        if not len(first_P):
            break
        places = items[first_P], items[first_P + distance]
        weight_P = np.full(len(first_P), decay ** (distance - 1))
        total_VV = total_VV + scipy.sparse.coo_array((weight_P, places), shape_VV).tocsr()
    return (total_VV + total_VV.T).tocsr()


def step_shares(graph_VV: Sparse) -> Sparse:
    """T: the rows of a graph divided by their sums, float32; rows without an entry stay empty."""
    total_V = np.asarray(graph_VV.sum(axis=1)).ravel()
    share_E = graph_VV.data / np.repeat(total_V, np.diff(graph_VV.indptr))
    return Sparse((share_E.astype(np.float32), graph_VV.indices, graph_VV.indptr), graph_VV.shape)


def two_hops(step_VV: Sparse, second_hop: float) -> Sparse:
    """T + second_hop T T, float32."""
    if not second_hop:
        return step_VV
    path_VV = step_VV @ step_VV
    path_VV.data *= np.float32(second_hop)  # in place: it may be a large part of the memory
    return (path_VV + step_VV).tocsr()


def divide_by_popularity(score: Sparse, count_V: np.ndarray, exponent: float) -> Sparse:
    """Each column divided by its item's count^exponent; items without actions count as one."""
    factor_V = np.maximum(count_V, 1.0) ** -exponent
    factor_E = factor_V.astype(np.float32)[score.indices]
    return Sparse((score.data * factor_E, score.indices, score.indptr), score.shape)


def paths(training: Training, setting: Setting) -> Sparse:
    """The matrix of a setting, by which the weights of a history are multiplied to scores."""
    step_VV = step_shares(transitions(training, setting.window, setting.decay))
    path_VV = two_hops(step_VV, setting.second_hop)
    return divide_by_popularity(path_VV, training.count_V, setting.exponent)


def weigh_histories(histories: Histories, num_items: int, last: int, fade: float) -> Sparse:
    """The weights of the last items of each history, float32 [B, V + 1], fade^n for the n-th."""
    items, starts_B, ends_B, _ = histories
    length_B = np.minimum(ends_B - starts_B, last)
    # int32, since a product with int64 indices copies the indices of the other factor.
    offset_B = np.concatenate([[0], np.cumsum(length_B)]).astype(np.int32)
    back_E = np.arange(offset_B[-1]) - np.repeat(offset_B[:-1], length_B)
    item_E = items[np.repeat(ends_B, length_B) - 1 - back_E]
    weight_E = np.float32(fade) ** back_E.astype(np.float32)
    return Sparse((weight_E, item_E, offset_B), (len(starts_B), num_items + 1))


def seen_items(histories: Histories, num_items: int) -> Sparse:
    """The distinct items of each history as ones, float32 [B, V + 1]."""
    longest = int(np.max(histories.ends - histories.starts, initial=1))
    seen_BV = weigh_histories(histories, num_items, longest, 1.0)
    seen_BV.sum_duplicates()
    seen_BV.data[:] = 1
    return seen_BV


class Popularity(NamedTuple):
    """The order of items of equal score.

    Fields:
      place_V: int64 [V + 1], the number of items with at least as many training actions; V + 1 for
        the padding.
      item_V: int64 [V], the items by training actions, most first, then by id.
    """

    place_V: np.ndarray
    item_V: np.ndarray


def popularity(count_V: np.ndarray) -> Popularity:
    """The order of items by their training actions, int [V + 1]."""
    ascending = np.sort(count_V[1:])
    place_V = len(ascending) - np.searchsorted(ascending, count_V, side='left')
    place_V[0] = len(count_V)
    return Popularity(place_V, np.argsort(-count_V[1:], kind='stable') + 1)


def rank(
    score_BV: Sparse, target_B: np.ndarray, seen_BV: Sparse, place_V: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The masked and the unmasked rank of each target, int32 [B], 1 is best.

    Args:
      score_BV: scores above 0; items without an entry have the score 0.
      target_B: int32 ids.
      seen_BV: ones at the items of the history.
      place_V: as `Popularity` has it.
    """
    length_B, place_B = np.diff(score_BV.indptr), place_V[target_B]
    target_score_B = np.zeros(len(target_B), np.float32)
    found_T = np.flatnonzero(score_BV.indices == np.repeat(target_B, length_B))
    target_score_B[_rows(score_BV, found_T)] = score_BV.data[found_T]
    is_zero_B = target_score_B == 0

    def count_ahead(part_BV: Sparse, as_popular_B: np.ndarray) -> np.ndarray:
        """Of a set of items, those ahead of the target or tied with it.

        part_BV has the scores of the set's items; as_popular_B is the number of all items of the
        set, reached or not, that are at least as popular as the target.
        """
        score_E = np.repeat(target_score_B, np.diff(part_BV.indptr))
        ahead_E = part_BV.data > score_E
        # Few items have the score of the target, and few targets are not reached.
        tie_T = np.flatnonzero(part_BV.data == score_E)
        ahead_E[tie_T] = place_V[part_BV.indices[tie_T]] <= place_B[_rows(part_BV, tie_T)]
        ahead_B = _row_sums(part_BV, ahead_E)
        # A target that no path reaches: all reached items, then the others that are as popular.
        zero_E = np.flatnonzero(score_E == 0)
        row_Z = _rows(part_BV, zero_E)
        is_counted_Z = place_V[part_BV.indices[zero_E]] <= place_B[row_Z]
        counted_B = np.bincount(row_Z[is_counted_Z], minlength=len(target_B))
        return ahead_B + np.where(is_zero_B, as_popular_B - counted_B, 0)

    seen_length_B = np.diff(seen_BV.indptr)
    as_popular_E = place_V[seen_BV.indices] <= np.repeat(place_B, seen_length_B)
    unmasked_B = count_ahead(score_BV, place_B)
    seen_score_BV = score_BV.multiply(seen_BV).tocsr()
    masked_B = unmasked_B - count_ahead(seen_score_BV, _row_sums(seen_BV, as_popular_E))
    is_target_E = seen_BV.indices == np.repeat(target_B, seen_length_B)
    masked_B = np.where(_row_sums(seen_BV, is_target_E) > 0, len(place_V) - 1, masked_B)
    return masked_B.astype(np.int32), unmasked_B.astype(np.int32)


def _rows(matrix: Sparse, entries: np.ndarray) -> np.ndarray:
    """The rows of some entries, given by their places."""
    return np.searchsorted(matrix.indptr, entries, side='right') - 1


def _row_sums(matrix: Sparse, is_counted_E: np.ndarray) -> np.ndarray:
    """The number of counted entries of each row, int [B]."""
    total_E = np.concatenate([[0], np.cumsum(is_counted_E, dtype=np.int32)])
    return np.diff(total_E[matrix.indptr])


def top_items(score_BV: Sparse, hidden_BV: Sparse, order: Popularity, k: int) -> np.ndarray:
    """The best k items of each row, best first, int32 [B, k]; 0 where no item is left.

    Equal scores, 0 among them, are ranked by training actions, and then by id.

    Args:
      score_BV: as `rank` has it.
      hidden_BV: ones at the items that are in no list.
      order: of items of equal score.
      k: length of a list.
    """
    # A number minus itself is exactly 0, so that hidden items are no entries any more.
    score_BV = (score_BV - score_BV.multiply(hidden_BV)).tocsr()
    score_BV.eliminate_zeros()
    item_BK = np.zeros((score_BV.shape[0], k), np.int32)
    for b, item_K in enumerate(item_BK):
        row = slice(*score_BV.indptr[b : b + 2])
        item_R, score_R = score_BV.indices[row], score_BV.data[row]
        if len(item_R) > k:
            # No more than the items that are at least as good as the k-th.
            best_R = score_R >= np.partition(score_R, -k)[-k]
            item_R, score_R = item_R[best_R], score_R[best_R]
        chosen = item_R[np.lexsort((item_R, order.place_V[item_R], -score_R))][:k]
        if len(chosen) < k:
            hidden = hidden_BV.indices[slice(*hidden_BV.indptr[b : b + 2])]
            popular = order.item_V[: k + len(hidden)]
            left = popular[~np.isin(popular, np.concatenate([chosen, hidden]))]
            chosen = np.concatenate([chosen, left[: k - len(chosen)]])
        item_K[: len(chosen)] = chosen
    return item_BK


def blocks(histories: Histories, path_VV: Sparse, last: int) -> Iterator[slice]:
    """Slices of users whose scores and histories take at most ENTRIES_AT_ONCE, or one user."""
    lengths_U = histories.ends - histories.starts
    total_U = np.cumsum(products(histories, path_VV, last) + lengths_U)
    start = 0
    while start < len(total_U):
        before = total_U[start - 1] if start else 0
        stop = int(np.searchsorted(total_U, before + ENTRIES_AT_ONCE, side='right'))
        stop = max(stop, start + 1)
        yield slice(start, stop)
        start = stop


def products(histories: Histories, path_VV: Sparse, last: int) -> np.ndarray:
    """The multiplications of each user's scores, int64 [U]."""
    items, starts_U, ends_U, _ = histories
    total_A = np.concatenate([[0], np.cumsum(np.diff(path_VV.indptr)[items], dtype=np.int64)])
    return total_A[ends_U] - total_A[np.maximum(starts_U, ends_U - last)]


def rank_users(
    histories: Histories, path_VV: Sparse, setting: Setting, count_V: np.ndarray
) -> Ranks:
    """The ranks of all targets, with the scores of only one block of users in memory.

    Args:
      histories: of U users.
      path_VV: the setting's matrix, of `paths`.
      setting: the last items and their weights.
      count_V: int [V + 1], training actions.
    """
    ranks = Ranks(*(np.zeros(len(histories.starts), np.int32) for _ in Ranks._fields))
    place_V, _ = popularity(count_V)
    for part in blocks(histories, path_VV, setting.last):
        score_BV, seen_BV = _scores(histories.of(part), path_VV, setting)
        ranks.masked[part], ranks.unmasked[part] = rank(
            score_BV, histories.targets[part], seen_BV, place_V
        )
    return ranks


def list_users(
    histories: Histories, path_VV: Sparse, setting: Setting, count_V: np.ndarray, k: int
) -> dict[str, np.ndarray]:
    """Protocol -> the best k items of each user, int32 [U, min(k, V)], best first; see `top_items`.

    Args:
      histories: as `rank_users` has it.
      path_VV: as `rank_users` has it.
      setting: as `rank_users` has it.
      count_V: as `rank_users` has it.
      k: length of a list; masked lists are without the items of the history.
    """
    shape_UK = len(histories.starts), min(k, len(count_V) - 1)
    item_UK = {protocol: np.zeros(shape_UK, np.int32) for protocol in PROTOCOLS}
    order = popularity(count_V)
    for part in blocks(histories, path_VV, setting.last):
        score_BV, seen_BV = _scores(histories.of(part), path_VV, setting)
        nothing_BV = Sparse(seen_BV.shape, dtype=np.float32)
        for protocol, hidden_BV in (('masked', seen_BV), ('unmasked', nothing_BV)):
            item_UK[protocol][part] = top_items(score_BV, hidden_BV, order, shape_UK[1])
    return item_UK


def _scores(histories: Histories, path_VV: Sparse, setting: Setting) -> tuple[Sparse, Sparse]:
    """Scores and seen items of a block of users."""
    num_items = path_VV.shape[1] - 1
    weight_BV = weigh_histories(histories, num_items, setting.last, setting.fade)
    return weight_BV @ path_VV, seen_items(histories, num_items)


def choose(
    training: Training, validation: Histories, users: np.ndarray, protocol: str
) -> Chosen | None:
    """The setting with the best validation metric, the first one if several have it.

    All values but those of second_hop are tried together. The second hop makes a graph so dense
    that ranking takes a hundred times as long; it is tried on each graph with the exponent and the
    history that are the best ones of that graph with one hop.

    Args:
      training: what the graph is made of.
      validation: histories and validation targets of all users.
      users: int [S], the users whose targets decide.
      protocol: the ranking that decides, 'masked' or 'unmasked'.

    Returns:
      None where every setting needs more than the limits of this module.
    """
    sample, count_V = validation.of(users), training.count_V

    def best_of(path_VV: Sparse, settings: Iterable[Setting]) -> Chosen | None:
        found = []
        for setting in settings:
            if products(validation, path_VV, setting.last).sum() > MAX_PRODUCTS:
                continue
            scaled_VV = divide_by_popularity(path_VV, count_V, setting.exponent)
            ranks = rank_users(sample, scaled_VV, setting, count_V)
            value = metrics(getattr(ranks, protocol))[SELECT_ON]
            found.append(Chosen(setting, scaled_VV, value))
        return best(found)

    def best(found: Iterable[Chosen | None]) -> Chosen | None:
        return max(filter(None, found), key=lambda one: one.value, default=None)

    chosen = None
    for window, decay in GRAPHS:
        if window * len(training.items) > MAX_PAIRS:
            continue
        step_VV = step_shares(transitions(training, window, decay))
        one_hop = best_of(
            step_VV,
            (
                Setting(window, decay, 0.0, exponent, *history)
                for exponent in EXPONENTS
                for history in HISTORIES
            ),
        )
        chosen = best([chosen, one_hop])
        for second_hop in SECOND_HOPS if one_hop and has_two_hops(step_VV) else ():
            setting = one_hop.setting._replace(second_hop=second_hop)
            chosen = best([chosen, best_of(two_hops(step_VV, second_hop), [setting])])
    return chosen


def has_two_hops(step_VV: Sparse) -> bool:
    """Whether the product of the matrix with itself is within the limits."""
    length_V = np.diff(step_VV.indptr)
    needed = int(length_V[step_VV.indices].sum(dtype=np.int64))
    return needed <= MAX_PRODUCTS and min(needed, len(length_V) ** 2) <= MAX_ENTRIES
