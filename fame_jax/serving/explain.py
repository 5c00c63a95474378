"""Why a list was recommended: the shares of heads, of experts and of past items.

FAME's score is the sum of its heads' scores weighted by the gate (eq. 11 of arXiv 2411.01457), so
that each head ranks the items by itself; ranking by the sum with equal gates is what Figure 7 of
the paper calls simple concatenation. For every model, the effect of a past item is the change of a
score when the item is left out of the history.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fame_jax.data import eval_batches
from fame_jax.serving import rows, topk
from fame_jax.serving.ids import ItemId, id_list
from fame_jax.serving.recommender import Recommender

# Largest difference between the score and the sum of the heads' parts, relative to the score.
TOLERANCE = {'float32': 1e-4, 'bfloat16': 5e-2}


@dataclass(frozen=True)
class Explanation:
    """A list of recommendations with its reasons, as plain values.

    Fields:
      model: the model's name.
      history: [{item, title}], the known items that the model encodes, the oldest first.
      unknown: ids of the history that are not in the catalogue.
      too_old: number of known items before those that the model encodes.
      fallback: 'popularity' if no id of the history is known, else ''.
      score_kind: the scale of the scores of `recommended`; see `Recommendation`.
      recommended: [{item, title, score, without}]; without[j] is the change of the score when item
        j of the history is left out. `without` is None for a history of one item, and absent with a
        fallback.
      target: {item, title, score, rank} of the target, rank None if it may not be recommended;
        None without a target or with one that is not in the catalogue.

    Of FAME, and None with a fallback and for other models:
      heads: [{name, gate, share, top, router, attention, positions}] by head; name is its facet
        where each head was trained for one (FAME+), else 'head 1'; top is its own list
        [{item, title, score}], router [N] the experts' weights at the last item, attention [N][L]
        each expert's weights over the history, positions [L][N] the router at every item.
      equal_gates: [{item, title, score}], the list if all gates were equal.
      carried: [L], attention over the history, averaged with the weights of gate and router.
      identity: the largest difference between an item's score and the gated sum of its heads'.
    """

    model: str
    history: list[dict[str, Any]]
    unknown: list[ItemId]
    too_old: int
    fallback: str
    score_kind: str
    recommended: list[dict[str, Any]]
    target: dict[str, Any] | None
    heads: list[dict[str, Any]] | None = None
    equal_gates: list[dict[str, Any]] | None = None
    carried: list[float] | None = None
    identity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, without those of FAME where they are None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        of_fame = {'heads', 'equal_gates', 'carried', 'identity'}
        return {name: x for name, x in values.items() if x is not None or name not in of_fame}

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)


def explain(
    recommender: Recommender,
    history: Iterable[ItemId],
    k: int = 10,
    *,
    filter_seen: bool | None = None,
    allow: Iterable[ItemId] | None = None,
    deny: Iterable[ItemId] = (),
    target: ItemId | None = None,
) -> Explanation:
    """Recommends k items to a history and computes what each of them rests on.

    Args:
      recommender: the model and its catalogue.
      history: item ids, the oldest first.
      k: length of each list.
      filter_seen, allow, deny: as in `Recommender.recommend`.
      target: an item id whose score and rank are computed too; None: none.

    Raises:
      ArithmeticError: if the gated scores of the heads do not add up to the scores, within
        TOLERANCE; the explanation would not be of this model.
    """
    history, deny = id_list(history), id_list(deny)
    allow = None if allow is None else id_list(allow)
    filter_seen = recommender.filter_seen if filter_seen is None else filter_seen
    filters = {'filter_seen': filter_seen, 'allow': allow, 'deny': deny}
    answer = recommender.recommend(history, k, **filters)
    indices, unknown = recommender.to_indices(history)
    window = indices[-recommender.model.max_length :]
    item_K, _ = recommender.to_indices(answer.items)
    recommended = _entries(recommender, item_K, answer.scores)
    target_entry, of_fame = None, {}
    if not answer.fallback:
        for entry, without_L in zip(recommended, _without(recommender, window, item_K)):
            entry['without'] = without_L
        allowed_V, _ = recommender.candidate_mask(allow, deny)
        if filter_seen:
            allowed_V[indices] = False
        score_V = scores(recommender, window)
        target_index, _ = recommender.to_indices([] if target is None else [target])
        if len(target_index):
            target_entry = _target(recommender, int(target_index[0]), score_V, allowed_V)
        if recommender.model.intermediates is not None:
            of_fame = _heads(recommender, window, score_V, allowed_V, k)
    return Explanation(
        model=recommender.card.get('model', ''),
        history=[_name(recommender, item) for item in window],
        unknown=unknown,
        too_old=len(indices) - len(window),
        fallback=answer.fallback,
        score_kind=answer.score_kind,
        recommended=recommended,
        target=target_entry,
        **of_fame,
    )


def warm_up(recommender: Recommender, k: int) -> None:
    """Compiles all programs of explanations of up to k items; see `Recommender.warm_up`."""
    longest = recommender.model.max_length
    lengths = [*eval_batches.row_lengths(longest), 2]  # 2: the least history that loses an item
    for length in lengths:
        history = (recommender.item_ids[1:] * length)[: min(length, longest)]
        for n in topk.list_lengths(k, recommender.num_items):
            explain(recommender, history, n, filter_seen=False)


def scores(recommender: Recommender, window: np.ndarray) -> np.ndarray:
    """The scores of all items for one history of indices, float32 [V + 1]."""
    model = recommender.model
    (batch,) = rows.batches([window], model.max_length, 1)
    score_BV = topk.score_all(model.combine, recommender.encode(batch), model.item_VD)
    return np.asarray(score_BV)[0]


def _without(
    recommender: Recommender, window: np.ndarray, item_K: np.ndarray
) -> list[list[float] | None]:
    """The change of each recommended item's score without each item of the history, [K][L]."""
    if len(window) < 2:
        return [None] * len(item_K)
    model = recommender.model
    variants = [window, *(np.delete(window, j) for j in range(len(window)))]
    # Filled up with the padding, so that few programs are compiled.
    padded_K = np.zeros(topk.rounded_k(max(1, len(item_K)), recommender.num_items), np.int32)
    padded_K[: len(item_K)] = item_K
    score_JK = np.zeros((len(variants), len(item_K)))
    size = recommender.rows_for(len(variants))
    for batch in rows.batches(variants, model.max_length, size):
        query_BQD = recommender.encode(batch)
        score_BK = topk.score_items(model.combine, query_BQD, model.item_VD, padded_K)
        real_B = batch.history_B >= 0
        score_JK[batch.history_B[real_B]] = np.asarray(score_BK)[real_B, : len(item_K)]
    return (score_JK[1:] - score_JK[0]).T.tolist()


def _target(
    recommender: Recommender, item: int, score_V: np.ndarray, allowed_V: np.ndarray
) -> dict[str, Any]:
    """The target's score and rank; a tie counts against it, as in the evaluation."""
    rank = int(np.sum((score_V >= score_V[item]) & allowed_V)) if allowed_V[item] else None
    return _name(recommender, item) | {'score': float(score_V[item]), 'rank': rank}


def _heads(
    recommender: Recommender,
    window: np.ndarray,
    score_V: np.ndarray,
    allowed_V: np.ndarray,
    k: int,
) -> dict[str, Any]:
    """The fields of an Explanation that only FAME has."""
    model, length = recommender.model, len(window)
    (batch,) = rows.batches([window], model.max_length, 1)
    out = topk.encode_rows(model.intermediates, model.params, batch.inputs)
    out = {name: np.asarray(x)[0] for name, x in out.items()}
    gate_H, head_HD, router_HN = out['gate_BH'], out['head_BHD'], out['router_BHN']
    attention_HNL = out['attention_BHNL'][..., -length:]
    router_LHN = out['positions_BLHN'][-length:]
    score_HV = head_HD @ np.asarray(model.item_VD, np.float32).T
    identity = _check_identity(gate_H @ score_HV, score_V, str(model.item_VD.dtype))
    share_H = gate_H / gate_H.sum()
    carried_L = np.einsum('H,HN,HNL->L', share_H, router_HN, attention_HNL)
    return {
        'heads': [
            {
                'name': recommender.head_name(h),
                'gate': float(gate_H[h]),
                'share': float(share_H[h]),
                'top': _top_k(recommender, score_HV[h], allowed_V, k),
                'router': router_HN[h].tolist(),
                'attention': attention_HNL[h].tolist(),
                'positions': router_LHN[:, h].tolist(),
            }
            for h in range(len(gate_H))
        ],
        'equal_gates': _top_k(recommender, score_HV.sum(0) * gate_H.mean(), allowed_V, k),
        'carried': (carried_L / carried_L.sum()).tolist(),
        'identity': identity,
    }


def _check_identity(sum_V: np.ndarray, score_V: np.ndarray, dtype: str) -> float:
    """Compares the gated sum of the heads' scores (eq. 11) with the scores; row 0 is padding."""
    difference = float(np.abs(sum_V - score_V)[1:].max())
    largest = max(1.0, float(np.abs(score_V[1:]).max()))
    if not difference <= TOLERANCE[dtype] * largest:  # a NaN is refused too
        raise ArithmeticError(
            f"the heads' gated scores differ from the scores by {difference:.3g}; the explanation "
            'would not be of this model'
        )
    return difference


def _top_k(
    recommender: Recommender, score_V: np.ndarray, allowed_V: np.ndarray, k: int
) -> list[dict[str, Any]]:
    allowed = np.flatnonzero(allowed_V)
    item_K = allowed[np.argsort(-score_V[allowed], kind='stable')][:k]
    return _entries(recommender, item_K, score_V[item_K])


def _entries(
    recommender: Recommender, item_K: np.ndarray, score_K: Sequence[float]
) -> list[dict[str, Any]]:
    return [
        _name(recommender, item) | {'score': float(score)} for item, score in zip(item_K, score_K)
    ]


def _name(recommender: Recommender, item: int) -> dict[str, Any]:
    (item_id,) = recommender.to_ids(np.array([item]))
    return {'item': item_id, 'title': recommender.titles[item]}
