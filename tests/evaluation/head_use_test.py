"""The figures of heads and experts, against loops and in cases with a known answer."""

import itertools
import math

import numpy as np
import pytest

from fame_jax.evaluation import head_use


def test_figures_of_two_users_by_loops():
    gate_BH = np.array([[1.0, 3.0], [2.0, 2.0]])  # of any scale
    router_BHN = np.array([[[0.5, 0.5], [1.0, 0.0]], [[0.1, 0.9], [1.0, 0.0]]])
    item_BHK = np.array([[[1, 2, 3], [3, 9, 1]], [[4, 5, 0], [6, 7, 8]]])
    found = head_use.head_use(gate_BH, router_BHN, item_BHK)

    def entropy_of(shares):
        return -sum(p * math.log(p) for p in shares if p) / math.log(len(shares))

    share_of = [[g / sum(gate) for g in gate] for gate in gate_BH.tolist()]
    expert_HN = [[(router_BHN[0, h, n] + router_BHN[1, h, n]) / 2 for n in (0, 1)] for h in (0, 1)]
    of_users = [entropy_of(router_BHN[b, h]) for b in (0, 1) for h in (0, 1)]
    assert found['overlap@10'] == pytest.approx((2 / 3 + 0 / 2) / 2)
    assert found['gate'] == pytest.approx([(0.25 + 0.5) / 2, (0.75 + 0.5) / 2])
    assert found['gate_entropy'] == pytest.approx(sum(map(entropy_of, share_of)) / 2)
    assert np.allclose(found['experts'], expert_HN)
    assert found['balance'] == pytest.approx(sum(map(entropy_of, expert_HN)) / 2)
    assert found['router_entropy'] == pytest.approx(sum(of_users) / 4)


def test_the_overlap_of_three_heads_by_a_loop_over_pairs():
    item_BHK = np.random.default_rng(0).integers(0, 9, (7, 3, 4))
    shares = []
    for heads in item_BHK:
        for one, other in itertools.combinations(heads, 2):
            lists = [list(dict.fromkeys(v for v in items.tolist() if v)) for items in (one, other)]
            if all(lists):
                shares.append(len({*lists[0]} & {*lists[1]}) / min(map(len, lists)))
    distinct_BHK = np.zeros_like(item_BHK)  # a list has an item once
    for index in np.ndindex(7, 3):
        items = list(dict.fromkeys(v for v in item_BHK[index].tolist() if v))
        distinct_BHK[index][: len(items)] = items
    assert head_use.overlap(distinct_BHK) == pytest.approx(np.mean(shares))


def test_extremes():
    same = np.tile(np.arange(1, 11), (3, 2, 1))
    other = same + np.array([0, 10])[None, :, None]
    assert head_use.overlap(same) == 1 and head_use.overlap(other) == 0
    assert head_use.entropy(np.full((2, 4), 0.25)) == pytest.approx(1)
    assert head_use.entropy(np.eye(4)) == 0


def test_one_head_with_one_expert_has_no_choice():
    found = head_use.head_use(np.ones((2, 1)), np.ones((2, 1, 1)), np.ones((2, 1, 3), int))
    assert found == {
        **{'overlap@10': None, 'gate': [1.0], 'gate_entropy': None},
        **{'experts': [[1.0]], 'balance': None, 'router_entropy': None},
    }
