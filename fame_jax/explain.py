"""Why these items: what each head, each expert and each past item had to do with a recommendation.

FAME's score is the sum of its heads' scores, weighted by the gate (eq. 11); so each head has a list
of its own, and the list of equal gates is what the paper's Figure 7 calls simple concatenation. For
every model, what an item of the history carried is told by leaving it out.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from fame_jax import evaluate
from fame_jax.data import pipeline
from fame_jax.serve import Recommender, Rows

Array = jax.Array

# How far the sum of the heads' parts may be from the score, in units of the score.
TOLERANCE = {'float32': 1e-4, 'bfloat16': 5e-2}


def explain(
    recommender: Recommender,
    history: Iterable[str],
    top_k: int = 10,
    *,
    filter_seen: bool = True,
    allowed_V: np.ndarray | None = None,
    target: str = '',
) -> dict[str, Any]:
    """What is recommended to a history, and why, as plain values for JSON.

    Args:
      recommender: the model and its catalogue.
      history: outside ids, the oldest first.
      top_k: length of each list.
      filter_seen: as `Recommender.recommend_all` has it.
      allowed_V: likewise.
      target: an outside id whose rank shall be told; '': none.

    Returns:
      A dict:
        history      [{item, title}], the known items that the model sees, the oldest first
        unknown      ids that the catalogue does not hold
        too_old      how many known items lie before what the model sees
        fallback     'popularity' where the history holds no known item, else ''
        recommended  [{item, title, score, without}]; without[j] is how the score changes when item
                     j of the history is left out, None if it is the only one
        target       {item, title, score, rank}, or None; rank None where it may not be recommended
      and of FAME, unless there is a fallback:
        heads        [{gate, share, top: [{item, title, score}], router: [N], attention: [N][L],
                     positions: [L][N]}]; positions is the router at every item of the history
        equal_gates  [{item, title, score}], the list if all gates were alike
        carried      [L], attention of all experts, weighted by router and gate; sums to 1
        identity     how far the sum of gated head scores is from the score, at most

    Raises:
      ArithmeticError: when that is too far: the explanation would be of another model.
    """
    items, unknown = recommender.numbers(history)
    window = items[-recommender.model.max_length :]
    options = top_k, filter_seen, allowed_V
    ((item_K, score_K, _, fallback),) = recommender.rank([(items, unknown)], *options)
    found = {
        'model': recommender.card.get('model', ''),
        'history': [_name(recommender, item) for item in window.tolist()],
        'unknown': unknown,
        'too_old': len(items) - len(window),
        'fallback': fallback,
        'recommended': _list(recommender, item_K, score_K),
        'target': None,
    }
    if fallback:
        return found
    for entry, without_L in zip(found['recommended'], _without(recommender, window, item_K)):
        entry['without'] = without_L
    barred_V = _barred(recommender, items, filter_seen, allowed_V)
    score_V = scores(recommender, window)
    number, _ = recommender.numbers([target])
    if len(number):
        found['target'] = _target(recommender, int(number[0]), score_V, barred_V)
    if recommender.model.look is not None:
        found |= _look(recommender, window, score_V, barred_V, top_k)
    return found


def scores(recommender: Recommender, window: np.ndarray) -> np.ndarray:
    """Every item's score for a history of numbers, float32 [V + 1], none left out."""
    model = recommender.model
    rows = row(window, model.max_length)
    return np.asarray(_scores(model.encode, model.combine, model.params, model.item_VD, rows))[0]


def row(window: np.ndarray, max_length: int) -> Rows:
    """A history as the judge's rows have it, [1, L]."""
    offsets, targets = np.array([0, len(window)]), np.ones(1, np.int32)
    (held,) = pipeline.held_rows(window, offsets, targets, max_length, 1)
    return tuple(held[:3])


@partial(jax.jit, static_argnums=(0, 1))
def _scores(
    encode: Callable[..., Array],
    combine: Callable[[Array], Array],
    params: Any,
    item_VD: Array,
    rows: Rows,
) -> Array:
    return evaluate.scores(encode(params, *rows), item_VD, combine)


@partial(jax.jit, static_argnums=0)
def look(look: Callable[..., dict[str, Array]], params: Any, rows: Rows) -> dict[str, Array]:
    """What a model's `look` finds, compiled once for each shape of rows."""
    return look(params, *rows)


def _without(
    recommender: Recommender, window: np.ndarray, item_K: np.ndarray
) -> list[list[float] | None]:
    """How the score of each recommended item changes without each item of the history, [K][L]."""
    if len(window) < 2:
        return [None] * len(item_K)
    model = recommender.model
    others = [window, *(np.delete(window, j) for j in range(len(window)))]
    offsets = np.cumsum([0, *map(len, others)])
    targets = np.ones(len(others), np.int32)
    rows = pipeline.bucket(len(others))  # all in one batch, of a size that was compiled before
    held = pipeline.held_rows(np.concatenate(others), offsets, targets, model.max_length, rows)
    chosen_KD = model.item_VD[item_K]
    score_JK = np.zeros((len(others), len(item_K)))
    for part in held:
        real_B = part.target_B > 0
        score_BK = _scores(model.encode, model.combine, model.params, chosen_KD, tuple(part[:3]))
        score_JK[part.user_B[real_B]] = np.asarray(score_BK)[real_B]
    return (score_JK[1:] - score_JK[0]).T.tolist()


def _barred(
    recommender: Recommender,
    items: np.ndarray,
    filter_seen: bool,
    allowed_V: np.ndarray | None,
) -> np.ndarray:
    """What may not be recommended, bool [V + 1]."""
    barred_V = np.arange(recommender.num_items + 1) == 0
    if allowed_V is not None:
        barred_V |= ~np.asarray(allowed_V)
    if filter_seen:
        barred_V[items] = True
    return barred_V


def _target(
    recommender: Recommender, item: int, score_V: np.ndarray, barred_V: np.ndarray
) -> dict[str, Any]:
    """The target's score and rank; a tie counts against it, as in judging."""
    rank = None if barred_V[item] else int(np.sum((score_V >= score_V[item]) & ~barred_V))
    return _name(recommender, item) | {'score': float(score_V[item]), 'rank': rank}


def _look(
    recommender: Recommender,
    window: np.ndarray,
    score_V: np.ndarray,
    barred_V: np.ndarray,
    top_k: int,
) -> dict[str, Any]:
    """What FAME's heads and experts tell."""
    model, length = recommender.model, len(window)
    out = look(model.look, model.params, row(window, model.max_length))
    out = {name: np.asarray(x)[0] for name, x in out.items()}
    gate_H, head_HD, router_HN = out['gate_BH'], out['head_BHD'], out['router_BHN']
    attention_HNL, positions_LHN = (
        out['attention_BHNL'][..., -length:],
        out['positions_BLHN'][-length:],
    )
    score_HV = head_HD @ np.asarray(model.item_VD, np.float32).T
    identity = _check_identity(gate_H @ score_HV, score_V, str(model.item_VD.dtype))
    share_H = gate_H / gate_H.sum()
    carried_L = np.einsum('H,HN,HNL->L', share_H, router_HN, attention_HNL)
    lists = [_best_of(recommender, score_V, barred_V, top_k) for score_V in score_HV]
    equal = _best_of(recommender, score_HV.sum(0) * gate_H.mean(), barred_V, top_k)
    return {
        'heads': [
            {
                'gate': float(gate_H[h]),
                'share': float(share_H[h]),
                'top': of_head,
                'router': router_HN[h].tolist(),
                'attention': attention_HNL[h].tolist(),
                'positions': positions_LHN[:, h].tolist(),
            }
            for h, of_head in enumerate(lists)
        ],
        'equal_gates': equal,
        'carried': (carried_L / carried_L.sum()).tolist(),
        'identity': identity,
    }


def _check_identity(sum_V: np.ndarray, score_V: np.ndarray, dtype: str) -> float:
    """Holds eq. 11 in its long form against the collapsed one, all items but the padding."""
    apart = float(np.abs(sum_V - score_V)[1:].max())
    size = max(1.0, float(np.abs(score_V[1:]).max()))
    if not apart <= TOLERANCE[dtype] * size:
        raise ArithmeticError(
            f"the heads' gated scores differ from the score by {apart:.3g}; the explanation would "
            'be of another model'
        )
    return apart


def _best_of(
    recommender: Recommender, score_V: np.ndarray, barred_V: np.ndarray, top_k: int
) -> list[dict[str, Any]]:
    allowed = np.flatnonzero(~barred_V)
    item_K = allowed[np.argsort(-score_V[allowed], kind='stable')][:top_k]
    return _list(recommender, item_K, score_V[item_K])


def _list(
    recommender: Recommender, item_K: np.ndarray, score_K: Sequence[float]
) -> list[dict[str, Any]]:
    return [
        _name(recommender, item) | {'score': float(score)}
        for item, score in zip(item_K.tolist(), score_K)
    ]


def _name(recommender: Recommender, item: int) -> dict[str, Any]:
    return {'item': recommender.item_ids[item], 'title': recommender.titles[item]}
