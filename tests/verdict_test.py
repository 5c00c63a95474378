"""The verdict is what the folders hold: figures over seeds, and FAME against the others."""

import json

import numpy as np
import pytest
from runs_test import finish, runs_of
from scipy import stats

from benchmarks import verdict
from fame_jax import evaluate
from fame_jax.errors import UserError


def collected(tmp_path, *flags):
    return verdict.collect(runs_of(tmp_path, *flags))


def test_mean_and_standard_deviation():
    found = verdict.spread([1.0, 2.0, 6.0])
    assert found == {
        'mean': 3.0,
        'sd': pytest.approx(((4 + 1 + 9) / 2) ** 0.5),
        'values': [1, 2, 6],
    }
    assert verdict.spread([4.0])['sd'] is None


def test_what_is_done_and_what_is_missing(tmp_path):
    finish(tmp_path, 'core', 1, epochs=5)
    finish(tmp_path, 'core', 0, epochs=9)
    found = collected(tmp_path, '--datasets=toys,beauty', '--models=core,duorec', '--seeds=1,0')
    assert list(found) == ['toys']  # nothing of Beauty is done
    assert found['toys']['missing'] == ['duorec_seed1', 'duorec_seed0']
    (row,) = found['toys']['rows']
    assert row['seeds'] == [0, 1] and row['epochs'] == [9, 5]
    assert collected(tmp_path, '--models=duorec') == {}


def test_runs_of_other_data_are_refused(tmp_path):
    finish(tmp_path, 'core', 0)
    finish(tmp_path, 'duorec', 0, fingerprint='g')
    with pytest.raises(UserError, match='are of different data'):
        collected(tmp_path, '--models=core,duorec', '--seeds=0')


def planted(tmp_path, seeds=(0, 1)):
    """FAME has 30 % of SASRec's items at the top instead; CORE is drawn as FAME is, and no more."""
    rng = np.random.default_rng(0)
    theirs = rng.integers(1, 60, (len(seeds), 600))
    ours = np.where(rng.random(theirs.shape) < 0.3, 1, theirs)
    same = np.where(rng.random(theirs.shape) < 0.3, 1, rng.integers(1, 60, theirs.shape))
    for i, seed in enumerate(seeds):
        finish(tmp_path, 'sasrec', seed, base=0.1, ranks=theirs[i])
        finish(tmp_path, 'fame', seed, base=0.3, ranks=ours[i])
        finish(tmp_path, 'core', seed, base=0.2, ranks=same[i])
        finish(tmp_path, 'fame_bert4rec', seed, base=0.9, ranks=theirs[i])
    return ours, theirs, same


def test_a_big_difference_is_found_and_none_is_not(tmp_path):
    planted(tmp_path)
    found = collected(tmp_path, '--models=all', '--seeds=0,1')['toys']['significance']
    for protocol in evaluate.PROTOCOLS:
        for metric in ('ndcg@10', 'ndcg@20'):
            tests = found[protocol][metric]
            assert set(tests) == {'sasrec', 'core', 'fame_bert4rec'}
            assert 0 < tests['sasrec']['low'] < tests['sasrec']['difference']
            assert tests['sasrec']['p'] < 1e-6
            assert tests['core']['low'] < 0 < tests['core']['high']
            assert tests['core']['p'] > 0.05


def test_the_figures_are_each_users_mean_over_the_seeds_both_have(tmp_path):
    ours, theirs, _ = planted(tmp_path, (0, 1))
    finish(tmp_path, 'fame', 5, ranks=[1] * 600)  # SASRec has no such seed
    found = collected(tmp_path, '--models=all', '--seeds=0,1,5')['toys']
    test = found['significance']['masked']['ndcg@20']['sasrec']
    assert test['seeds'] == [0, 1] and test['users'] == 600
    mean = [np.mean([evaluate.metrics(rank_U)['ndcg@20'] for rank_U in r]) for r in (ours, theirs)]
    assert [test['fame'], test['other']] == pytest.approx(mean)
    difference_U = [
        sum((a <= 20) / np.log2(1 + a) - (b <= 20) / np.log2(1 + b) for a, b in zip(*pair)) / 2
        for pair in zip(ours.T.tolist(), theirs.T.tolist())
    ]
    assert test['difference'] == pytest.approx(np.mean(difference_U))
    assert test['p'] == pytest.approx(stats.wilcoxon(np.round(difference_U, 12)).pvalue)


def test_the_best_other_is_chosen_on_validation_and_is_no_fame(tmp_path):
    planted(tmp_path)
    path = tmp_path / 'toys' / 'core_seed0' / 'results.json'
    told = json.loads(path.read_text())
    told['results']['pretrain']['test']['masked']['ndcg@20'] = 0.99  # test is not asked
    told['results']['pretrain']['validation']['unmasked']['ndcg@20'] = 0.99
    told['results']['pretrain']['validation']['masked']['ndcg@20'] = 0.0
    path.write_text(json.dumps(told))
    found = collected(tmp_path, '--models=all', '--seeds=0,1')['toys']
    # CORE: (0 + .75) / 2 against SASRec's .65; FAME over BERT4Rec would be 1.45.
    assert found['significance']['best_other'] == 'sasrec'


def test_without_fame_or_shared_seeds_there_is_no_test(tmp_path):
    finish(tmp_path, 'sasrec', 0)
    assert collected(tmp_path, '--models=all')['toys']['significance'] is None
    finish(tmp_path, 'fame', 1)
    assert collected(tmp_path, '--models=all')['toys']['significance'] is None
