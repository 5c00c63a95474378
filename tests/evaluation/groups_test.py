"""Groups of users, the use of heads and experts, and the choice of example users."""

import numpy as np
import pytest

from fame_jax.evaluation import groups
from fame_jax.evaluation.metrics import metrics


def members(parts):
    return {name: np.flatnonzero(is_member_U).tolist() for name, is_member_U in parts}


def test_groups_have_about_equal_sizes_and_equal_counts_stay_together():
    assert members(groups.by_quantile(np.arange(1, 9))) == {
        '1 to 2': [0, 1],
        '3 to 4': [2, 3],
        '5 to 6': [4, 5],
        '7 to 8': [6, 7],
    }
    # The quartiles are 4, 4, 5 and 1,200, so the first two groups are one.
    count_U = np.array([4, 4, 4, 4, 5, 5, 9, 1200])
    assert members(groups.by_quantile(count_U)) == {
        '4': [0, 1, 2, 3],
        '5': [4, 5],
        '6 to 1,200': [6, 7],
    }
    assert members(groups.by_quantile(np.array([7]))) == {'7': [0]}


def test_each_user_is_in_exactly_one_group():
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 50):
        count_U = rng.geometric(0.2, size) - 1
        for parts in (groups.by_quantile(count_U), groups.by_popularity(count_U)):
            assert np.array_equal(
                sum(is_member_U.astype(int) for _, is_member_U in parts), [1] * size
            )


def test_users_of_cold_targets_are_a_separate_group():
    parts = groups.by_popularity(np.array([0, 3, 0, 1]))
    assert members(parts) == {'never (cold)': [0, 2], '1': [3], '2 to 3': [1]}
    assert members(groups.by_popularity(np.array([0, 0]))) == {'never (cold)': [0, 1]}
    assert 'never (cold)' not in members(groups.by_popularity(np.array([1, 2])))


def test_group_metrics_are_the_metrics_of_its_members():
    rank_U = np.array([1, 3, 50, 12])
    parts = [('odd', np.array([False, True, False, True]))]
    (row,) = groups.group_metrics(parts, {'pretrain': {'masked': rank_U}})
    figures = row['figures']['pretrain']['masked']
    assert (row['name'], row['users']) == ('odd', 2)
    assert figures == metrics(np.array([3, 12])) | {'error': figures['error']}
    gains = [1 / 2, 0]
    assert figures['error'] == pytest.approx(np.std(gains) / np.sqrt(2))


def test_group_metrics_of_several_seeds_are_means():
    rank_SU = np.array([[1, 3, 50, 12], [1, 1, 50, 2]])
    parts = [('odd', np.array([False, True, False, True]))]
    (row,) = groups.group_metrics(parts, {'run': {'masked': rank_SU}})
    figures = row['figures']['run']['masked']
    gains = [(1 / 2 + 1) / 2, (0 + 1 / np.log2(3)) / 2]  # of the two users
    assert figures['ndcg@10'] == pytest.approx(np.mean(gains))
    assert figures['error'] == pytest.approx(np.std(gains) / np.sqrt(2))
    assert (row['users'], figures['hr@10']) == (2, 3 / 4)


def test_usage_of_heads_and_experts():
    share_UH = np.array([[0.9, 0.1], [0.7, 0.3]])
    router_UHN = np.array([[[1.0, 0, 0], [0.5, 0.3, 0.2]], [[0.9, 0.1, 0], [0.1, 0.6, 0.3]]])
    usage = groups.usage(share_UH, router_UHN)
    assert usage['users'] == 2 and usage['limits'] == [0.1 / 2, 0.1 / 3]
    first, second = usage['heads']
    assert (first['share'], first['top'], second['top']) == (pytest.approx(0.8), 1, 0)
    assert [expert['share'] for expert in first['experts']] == pytest.approx([0.95, 0.05, 0])
    assert [expert['top'] for expert in second['experts']] == [0.5, 0.5, 0]
    assert usage['dead_heads'] == [] and usage['dead_experts'] == [[0, 2]]
    assert usage['edges'][0] == pytest.approx(0.1) and usage['edges'][-1] == pytest.approx(0.9)
    for head, column in zip(usage['heads'], share_UH.T):
        assert sum(head['histogram']) == 2
        where = np.flatnonzero(head['histogram'])
        assert np.all(np.take(usage['edges'], where) <= np.sort(column) + 1e-9)


def test_a_head_below_a_tenth_of_an_equal_share_is_dead():
    share_UH = np.array([[0.97, 0.03], [0.98, 0.02]])
    assert groups.usage(share_UH, np.ones((2, 2, 1)))['dead_heads'] == [1]
    share_UH = np.array([[0.94, 0.06], [0.94, 0.06]])
    assert groups.usage(share_UH, np.ones((2, 2, 1)))['dead_heads'] == []


def test_mean_entropy_and_entropy_of_the_mean():
    """Each user uses one head only; on average the heads are used equally."""
    usage = groups.usage(np.eye(2), np.full((2, 2, 4), 1 / 4))
    assert (usage['entropy'], usage['entropy_of_mean']) == (0, pytest.approx(1))
    assert usage['heads'][0]['entropy'] == pytest.approx(1)
    single = groups.usage(np.ones((3, 1)), np.ones((3, 1, 1)))
    assert single['entropy'] is None and single['heads'][0]['entropy'] is None


RANK_U = np.array([40, 2, 1, 99, 100, 11])
LENGTH_U = np.array([5, 3, 3, 4, 9, 9])


def test_example_users_of_a_model_without_heads():
    users = [user for _, user in groups.example_users(RANK_U, LENGTH_U, last_rank=100)]
    assert users == [1, 3, 4]  # the first hit, the lowest rank above the last, the longest


def test_example_users_of_a_model_with_heads():
    share_UH = np.array([[0.5, 0.5]] * 6)
    share_UH[2] = 0.9, 0.1
    share_UH[4] = 0.2, 0.8
    variety_U = np.array([15, 18, 12, 20, 20, 11])
    chosen = groups.example_users(RANK_U, LENGTH_U, 100, share_UH, variety_U)
    # Users 3 and 4 have equal variety, and the gate of user 3 is even. User 0 is the worst left.
    assert [user for _, user in chosen] == [2, 3, 0, 4]
    assert len({rule for rule, _ in chosen}) == 4


def test_no_user_is_an_example_twice_and_rules_without_a_user_are_left_out():
    assert [user for _, user in groups.example_users(np.array([1]), np.array([3]), 9)] == [0]
    chosen = groups.example_users(np.array([5, 6]), np.array([3, 3]), 9)
    assert chosen == [('the longest history', 0)]
    one_head = groups.example_users(
        np.array([1, 30]), np.array([3, 4]), 99, np.ones((2, 1)), np.ones(2)
    )
    assert [user for _, user in one_head] == [0, 1]
