"""The stage evaluate: popularity and counts of targets by hand, groups of targets."""

import json

import numpy as np
import pytest
from run_fixtures import make_world

from fame_jax import api, stages
from fame_jax.config import flags
from fame_jax.data.dataset import Dataset
from fame_jax.evaluation import metrics, ranking
from fame_jax.stages import top_lists
from fame_jax.stages.evaluate import _rank_by_popularity, _target_actions, by_target

# The training parts have no action of item 3, which is in all histories, and three of item 1.
HISTORIES = [[1, 2, 3, 4], [1, 2, 4, 3], [1, 5, 3, 2], [5, 2, 4, 3]]
ITEMS = {1, 2, 3, 4, 5}


@pytest.fixture
def by_hand(tmp_path):
    """A run whose data set is HISTORIES."""
    make_world(tmp_path, HISTORIES)
    return stages.open_run(flags.parse([f'--workdir={tmp_path}', '--progress=none']))


def popularity_rank(history, target, protocol):
    """1 + the other items with as many training actions or more, by a loop."""
    counts = {item: sum(h[:-2].count(item) for h in HISTORIES) for item in ITEMS}
    others = ITEMS - {target} - (set(history) if protocol == 'masked' else set())
    return 1 + sum(counts[item] >= counts[target] for item in others)


@pytest.mark.parametrize('split, last', [('validation', 2), ('test', 1)])
def test_popularity_counts_training_actions_only(split, last, by_hand):
    ranks = _rank_by_popularity(by_hand)['popularity', split]
    for protocol in metrics.PROTOCOLS:
        expected = [popularity_rank(h[:-last], h[-last], protocol) for h in HISTORIES]
        assert getattr(ranks, protocol).tolist() == expected


@pytest.mark.parametrize('split, last', [('validation', 2), ('test', 1)])
def test_actions_of_a_target_are_those_in_training(split, last, by_hand):
    targets = [history[-last] for history in HISTORIES]
    expected = [sum(history[:-2].count(target) for history in HISTORIES) for target in targets]
    assert _target_actions(by_hand, split).tolist() == expected


def test_the_use_of_heads_is_that_of_explanations(trained):
    """Over the test users of the sample, each explained by itself."""
    recommender, data = api.load(trained), Dataset.load(trained / 'dataset')
    stored = json.loads((trained / 'results.json').read_text())['results']['finetune']['heads']
    users = min(data.num_users, top_lists.HEAD_USERS)
    assert users == data.num_users <= 60
    shares, lists, routers = [], [], []
    for start, end in zip(data.offsets[:-1], data.offsets[1:]):
        history = [data.item_ids[item] for item in data.items[start : end - 1]]
        heads = recommender.explain(history, 10, filter_seen=True).heads
        shares.append([head['share'] for head in heads])
        routers.append([head['router'] for head in heads])
        lists.append([{entry['item'] for entry in head['top']} for head in heads])
    assert stored['gate'] == pytest.approx(np.mean(shares, axis=0).tolist(), abs=1e-5)
    np.testing.assert_allclose(stored['experts'], np.mean(routers, axis=0), atol=1e-5)
    common = [len(one & other) / min(len(one), len(other)) for one, other in lists]
    assert stored['overlap@10'] == pytest.approx(np.mean(common), abs=0.02)
    assert 0 < stored['gate_entropy'] <= 1 + 1e-6 and 0 < stored['balance'] <= 1 + 1e-6


def test_users_are_grouped_by_training_actions_of_their_target():
    rank_U = np.array([1, 3, 30, 2, 11, 1])
    groups = by_target(ranking.Ranks(rank_U, rank_U + 1), np.array([0, 1, 5, 6, 0, 400]))
    users = {name: group['users'] for name, group in groups.items()}
    assert users == {'unseen': 2, 'rare': 2, 'common': 2}
    assert groups['unseen']['masked']['hr@10'] == 1 / 2
    assert groups['rare']['masked'] == metrics.metrics(np.array([3, 30]))
    assert groups['common']['unmasked'] == metrics.metrics(np.array([3, 2]))


def test_metrics_of_the_groups_add_up_to_those_of_all_users():
    rng = np.random.default_rng(0)
    rank_U = rng.integers(1, 40, 200)
    groups = by_target(ranking.Ranks(rank_U, rank_U), rng.integers(0, 12, 200))
    mean = sum(group['users'] * group['masked']['ndcg@20'] for group in groups.values()) / 200
    assert mean == pytest.approx(metrics.metrics(rank_U)['ndcg@20'])


def test_a_group_without_users_has_no_metrics():
    groups = by_target(ranking.Ranks(np.array([2]), np.array([2])), np.array([9]))
    assert groups['unseen'] == groups['rare'] == {'users': 0}


def test_results_are_the_metrics_of_the_stored_ranks(trained):
    results = json.loads((trained / 'results.json').read_text())
    ranks = np.load(trained / 'ranks.npz')
    assert [*results['results']] == ['popularity', 'item_graph', 'pretrain', 'finetune']
    for name, result in results['results'].items():
        for split in ('validation', 'test'):
            for protocol in metrics.PROTOCOLS:
                expected = metrics.metrics(ranks[f'{name}/{split}/{protocol}'])
                assert result[split][protocol] == expected
    assert {*results['card']['stages']} == {'pretrain', 'finetune'}
    assert results['card']['dataset']['users'] == len(ranks['finetune/test/masked']) == 60


@pytest.mark.parametrize('stage', ['pretrain', 'finetune'])
def test_validation_while_training_is_that_of_the_evaluation(stage, trained):
    """The line of the best epoch in metrics.jsonl; the other split has other metrics."""
    lines = map(json.loads, (trained / 'metrics.jsonl').read_text().splitlines())
    card = json.loads((trained / 'results.json').read_text())
    best = card['card']['stages'][stage]['best_epoch']
    (line,) = (
        line
        for line in lines
        if (line['stage'], line['split'], line['epoch']) == (stage, 'validation', best)
    )
    result = card['results'][stage]
    logged = {name: line[name] for name in result['validation']['masked']}
    assert logged == result['validation']['masked'] != result['test']['masked']
