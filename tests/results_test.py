"""The verdict's own arithmetic: users by how often training has seen their target."""

import numpy as np
import pytest

from fame_jax import evaluate, results


def test_users_are_split_by_how_often_their_target_was_seen():
    rank_U = np.array([1, 3, 30, 2, 11, 1])
    ranks = evaluate.Ranks(rank_U, rank_U + 1)
    found = results.by_target(ranks, np.array([0, 1, 5, 6, 0, 400]))
    assert {name: part['users'] for name, part in found.items()} == {
        'unseen': 2,
        'rare': 2,
        'common': 2,
    }
    assert found['unseen']['masked']['hr@10'] == 1 / 2
    assert found['rare']['masked'] == evaluate.metrics(np.array([3, 30]))
    assert found['common']['unmasked'] == evaluate.metrics(np.array([3, 2]))


def test_the_parts_are_the_whole():
    rng = np.random.default_rng(0)
    rank_U = rng.integers(1, 40, 200)
    found = results.by_target(evaluate.Ranks(rank_U, rank_U), rng.integers(0, 12, 200))
    mean = sum(part['users'] * part['masked']['ndcg@20'] for part in found.values()) / 200
    assert mean == pytest.approx(evaluate.metrics(rank_U)['ndcg@20'])


def test_where_nobody_is_there_are_no_figures():
    found = results.by_target(evaluate.Ranks(np.array([2]), np.array([2])), np.array([9]))
    assert found['unseen'] == {'users': 0}
    assert found['rare'] == {'users': 0}
