"""Metrics as expressions and against another library; the popularity baseline."""

import math

import ir_measures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import make_eval_batches
from ir_measures import RR, Success, nDCG

from fame_jax.evaluation import metrics, ranking
from fame_jax.models.item_model import ItemModel


def test_metrics_as_expressions():
    """Ranks 1, 2, 5, 6, 20, 21: which are within each cut-off, and their gains."""
    result = metrics.metrics(np.array([1, 2, 5, 6, 20, 21], np.int32))
    log2 = math.log2
    expected = {
        'hr@5': 3 / 6,
        'hr@10': 4 / 6,
        'hr@20': 5 / 6,
        'ndcg@5': (1 + 1 / log2(3) + 1 / log2(6)) / 6,
        'ndcg@10': (1 + 1 / log2(3) + 1 / log2(6) + 1 / log2(7)) / 6,
        'ndcg@20': (1 + 1 / log2(3) + 1 / log2(6) + 1 / log2(7) + 1 / log2(21)) / 6,
        'mrr': (1 + 1 / 2 + 1 / 5 + 1 / 6 + 1 / 20 + 1 / 21) / 6,
    }
    assert list(result) == list(expected)
    assert result == pytest.approx(expected, rel=1e-12)
    assert all(type(value) is float for value in result.values())


def test_the_cut_off_includes_its_rank():
    for k in metrics.CUTOFFS:
        inside, outside = (metrics.metrics(np.array([r])) for r in (k, k + 1))
        assert (inside[f'hr@{k}'], outside[f'hr@{k}']) == (1, 0)
        assert (inside[f'ndcg@{k}'], outside[f'ndcg@{k}']) == (1 / math.log2(1 + k), 0)


@pytest.mark.parametrize('ranks', [[], [0], [3, 0, 1], [-1]])
def test_metrics_refuse_invalid_ranks(ranks):
    with pytest.raises(ValueError, match='ranks start at 1'):
        metrics.metrics(np.array(ranks, np.int32))


@pytest.mark.parametrize('protocol', metrics.PROTOCOLS)
@pytest.mark.parametrize('num_items', [3, 60])
def test_metrics_agree_with_another_library(protocol, num_items):
    rng = np.random.default_rng(num_items)
    users = 40
    score_BV = np.stack([rng.permutation(num_items + 1) for _ in range(users)])
    target_B = rng.integers(1, num_items + 1, users)
    seen_BS = rng.integers(1, num_items + 1, (users, 1 if num_items == 3 else 9))
    seen_BS[seen_BS == target_B[:, None]] = 0
    for row in seen_BS:
        row[[item in row[:s] for s, item in enumerate(row)]] = 0  # each item once
    masked_B, unmasked_B, _ = jax.jit(ranking.rank)(score_BV.astype(np.float32), target_B, seen_BS)
    result = metrics.metrics(np.asarray({'masked': masked_B, 'unmasked': unmasked_B}[protocol]))

    masked = [set(row) if protocol == 'masked' else set() for row in seen_BS.tolist()]
    qrels = {f'u{b}': {f'i{target_B[b]}': 1} for b in range(users)}
    run = {
        f'u{b}': {
            f'i{v}': float(score_BV[b, v]) for v in range(1, num_items + 1) if v not in masked[b]
        }
        for b in range(users)
    }
    measures = {'mrr': RR}
    for k in metrics.CUTOFFS:
        measures |= {f'hr@{k}': Success @ k, f'ndcg@{k}': nDCG @ k}
    theirs = ir_measures.calc_aggregate(measures.values(), qrels, run)
    assert result == pytest.approx({name: theirs[m] for name, m in measures.items()}, abs=1e-9)


def test_the_popularity_baseline():
    """Item 3 three times, item 1 twice, item 4 once, items 2 and 5 never."""
    log = np.array([1, 3, 3, 4, 1, 3], np.int32)
    query_D, item_VD = metrics.popularity(log, 5)
    assert query_D.tolist() == [1]
    assert item_VD[:, 0].tolist() == [0, 2, 0, 3, 1, 0]
    assert query_D.dtype == item_VD.dtype == np.float32

    def encode(params, tokens_BL, positions_BL, segments_BL):
        return jnp.broadcast_to(params[None, None], (len(tokens_BL), 1, 1))

    batches = make_eval_batches([[1, 3], [3, 4], [1, 3]], [4, 1, 2])
    ranks = ranking.rank_users(encode, query_D, item_VD, batches, 3, ItemModel.combine)
    assert ranks.unmasked.tolist() == [3, 2, 5]
    assert ranks.masked.tolist() == [1, 1, 3]
