"""What a report counts: groups of users, use of heads and experts, and whom it shows."""

import numpy as np
import pytest

from fame_jax import evaluate, facts


def members(groups):
    return {name: np.flatnonzero(chosen_U).tolist() for name, chosen_U in groups}


def test_groups_have_about_one_size_and_equals_stay_together():
    assert members(facts.by_quantile(np.arange(1, 9))) == {
        '1 to 2': [0, 1],
        '3 to 4': [2, 3],
        '5 to 6': [4, 5],
        '7 to 8': [6, 7],
    }
    # The quarters end at 4, 4, 5 and 1,200, so that two of them are one.
    value_U = np.array([4, 4, 4, 4, 5, 5, 9, 1200])
    assert members(facts.by_quantile(value_U)) == {
        '4': [0, 1, 2, 3],
        '5': [4, 5],
        '6 to 1,200': [6, 7],
    }
    assert members(facts.by_quantile(np.array([7]))) == {'7': [0]}


def test_everybody_is_in_one_group():
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 50):
        value_U = rng.geometric(0.2, size) - 1
        for groups in (facts.by_quantile(value_U), facts.by_popularity(value_U)):
            assert np.array_equal(sum(chosen_U.astype(int) for _, chosen_U in groups), [1] * size)


def test_cold_targets_are_a_group_of_their_own():
    groups = facts.by_popularity(np.array([0, 3, 0, 1]))
    assert members(groups) == {'never (cold)': [0, 2], '1': [3], '2 to 3': [1]}
    assert members(facts.by_popularity(np.array([0, 0]))) == {'never (cold)': [0, 1]}
    assert 'never (cold)' not in members(facts.by_popularity(np.array([1, 2])))


def test_the_figures_of_a_group_are_those_of_its_users():
    rank_U = np.array([1, 3, 50, 12])
    groups = [('odd', np.array([False, True, False, True]))]
    (row,) = facts.judge_groups(groups, {'pretrain': {'masked': rank_U}})
    found = row['figures']['pretrain']['masked']
    assert (row['name'], row['users']) == ('odd', 2)
    assert found == evaluate.metrics(np.array([3, 12])) | {'error': found['error']}
    gains = [1 / 2, 0]
    assert found['error'] == pytest.approx(np.std(gains) / np.sqrt(2))


def test_use_of_heads_and_experts():
    share_UH = np.array([[0.9, 0.1], [0.7, 0.3]])
    router_UHN = np.array([[[1.0, 0, 0], [0.5, 0.3, 0.2]], [[0.9, 0.1, 0], [0.1, 0.6, 0.3]]])
    found = facts.use(share_UH, router_UHN)
    assert found['users'] == 2 and found['limits'] == [0.1 / 2, 0.1 / 3]
    first, second = found['heads']
    assert (first['share'], first['top'], second['top']) == (pytest.approx(0.8), 1, 0)
    assert [expert['share'] for expert in first['experts']] == pytest.approx([0.95, 0.05, 0])
    assert [expert['top'] for expert in second['experts']] == [0.5, 0.5, 0]
    assert found['dead_heads'] == [] and found['dead_experts'] == [[0, 2]]
    assert found['edges'][0] == pytest.approx(0.1) and found['edges'][-1] == pytest.approx(0.9)
    for head, column in zip(found['heads'], share_UH.T):
        assert sum(head['histogram']) == 2
        where = np.flatnonzero(head['histogram'])
        assert np.all(np.take(found['edges'], where) <= np.sort(column) + 1e-9)


def test_a_head_that_nobody_is_sent_to_is_dead():
    share_UH = np.array([[0.97, 0.03], [0.98, 0.02]])
    assert facts.use(share_UH, np.ones((2, 2, 1)))['dead_heads'] == [1]
    share_UH = np.array([[0.94, 0.06], [0.94, 0.06]])
    assert facts.use(share_UH, np.ones((2, 2, 1)))['dead_heads'] == []


def test_entropy_of_users_and_of_their_mean():
    """Each user has one head alone, and all of them together use both alike."""
    found = facts.use(np.eye(2), np.full((2, 2, 4), 1 / 4))
    assert (found['entropy'], found['entropy_of_mean']) == (0, pytest.approx(1))
    assert found['heads'][0]['entropy'] == pytest.approx(1)
    alone = facts.use(np.ones((3, 1)), np.ones((3, 1, 1)))
    assert alone['entropy'] is None and alone['heads'][0]['entropy'] is None


RANK = np.array([40, 2, 1, 99, 100, 11])
LENGTH = np.array([5, 3, 3, 4, 9, 9])


def test_cases_of_a_model_without_heads():
    places = [place for _, place in facts.choose(RANK, LENGTH, last_rank=100)]
    assert places == [1, 3, 4]  # the first hit, the worst that is not the last, the longest


def test_cases_of_a_model_with_heads():
    share_UH = np.array([[0.5, 0.5]] * 6)
    share_UH[2] = 0.9, 0.1
    share_UH[4] = 0.2, 0.8
    variety_U = np.array([15, 18, 12, 20, 20, 11])
    found = facts.choose(RANK, LENGTH, 100, share_UH, variety_U)
    # 3 and 4 have as many different items; 3's gate is even. 0 is then the worst that is left.
    assert [place for _, place in found] == [2, 3, 0, 4]
    assert len({rule for rule, _ in found}) == 4


def test_nobody_is_shown_twice_and_who_is_not_there_not_at_all():
    assert [place for _, place in facts.choose(np.array([1]), np.array([3]), 9)] == [0]
    found = facts.choose(np.array([5, 6]), np.array([3, 3]), 9)
    assert found == [('the longest history', 0)]
    one_head = facts.choose(np.array([1, 30]), np.array([3, 4]), 99, np.ones((2, 1)), np.ones(2))
    assert [place for _, place in one_head] == [0, 1]
