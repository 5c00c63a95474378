"""--validation_users: epochs are selected on a fixed sample of users."""

import json

import numpy as np
import pytest
from run_fixtures import SMALL_RUN, make_world

from fame_jax import stages
from fame_jax.config import flags
from fame_jax.evaluation import metrics
from fame_jax.main import main

SASREC = [flag for flag in SMALL_RUN if 'num_experts' not in flag] + ['--model=sasrec']


def open_prepared(folder, histories, *more):
    """A run in memory on histories of item indices; nothing is trained."""
    make_world(folder, histories)
    argv = [f'--workdir={folder}', '--progress=none', '--stages=recommend', '--max_length=10']
    return stages.open_run(flags.parse([*argv, *more]))


def sample(folder, histories, *more):
    return open_prepared(folder, histories, *more).selection_users.tolist()


def draw_histories(seed, users=40):
    draw = np.random.default_rng(seed)
    return [draw.integers(1, 9, draw.integers(3, 12)).tolist() for _ in range(users)]


def test_all_models_and_seeds_have_the_same_sample(tmp_path):
    histories, ten = draw_histories(0), '--validation_users=10'
    users = sample(tmp_path / 'a', histories, ten, '--model=sasrec')
    assert users == sorted(set(users)) and len(users) == 10 and users[-1] < 40
    assert sample(tmp_path / 'b', histories, ten, '--model=gru4rec', '--seed=7') == users
    assert sample(tmp_path / 'c', draw_histories(1), ten) != users
    assert sample(tmp_path / 'd', histories, '--validation_users=39') != list(range(39))


@pytest.mark.parametrize('size', [0, 40, 41])
def test_no_sample_where_all_users_are_wanted(size, tmp_path):
    run = open_prepared(tmp_path / 'run', draw_histories(0), f'--validation_users={size}')
    assert run.selection_users is None
    assert run.eval_batches['selection'] is run.eval_batches['validation']
    assert run.describe_selection() == 'all users'


def test_the_sample_has_the_targets_and_histories_of_the_validation(tmp_path):
    histories = draw_histories(0)
    run = open_prepared(tmp_path / 'run', histories, '--validation_users=10')
    users = run.selection_users
    found = {}
    for batch in run.eval_batches['selection']:
        for tokens_L, target, place in zip(batch.tokens_BL, batch.target_B, batch.user_B):
            found[users[place]] = tokens_L[tokens_L > 0].tolist(), target
    expected = {user: (histories[user][:-2][-10:], histories[user][-2]) for user in users}
    assert found == expected


def test_epochs_are_selected_on_the_sample_and_all_users_are_evaluated(tmp_path, capsys):
    """Its figures are those of the sampled users among the ranks of the whole evaluation."""
    folder = tmp_path / 'run'
    argv = [*SASREC, '--pretrain_epochs=2', '--validation_users=25', '--progress=lines']
    assert main([*argv, f'--workdir={folder}']) == 0
    assert 'validation on a fixed sample of 25 of 60 users' in capsys.readouterr().err
    results = json.loads((folder / 'results.json').read_text())
    stage = results['card']['stages']['pretrain']
    lines = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
    (line,) = (
        line
        for line in lines
        if (line['split'], line['epoch']) == ('validation', stage['best_epoch'])
    )
    users = stages.open_run(
        flags.parse([f'--workdir={folder}', '--stages=recommend'])
    ).selection_users
    rank_U = np.load(folder / 'ranks.npz')['pretrain/validation/masked']
    assert (len(users), len(rank_U)) == (25, 60)
    of_sample = metrics.metrics(rank_U[users])
    assert {name: line[name] for name in of_sample} == of_sample != metrics.metrics(rank_U)
    assert results['results']['pretrain']['validation']['masked'] == metrics.metrics(rank_U)
    assert 'a fixed sample of 25 of 60 users' in results['card']['selection']


def test_the_sample_is_part_of_a_trained_run(tmp_path, capsys):
    argv = [*SASREC, '--pretrain_epochs=0', f'--workdir={tmp_path / "run"}']
    assert main([*argv, '--validation_users=25']) == 0
    capsys.readouterr()
    assert main([*argv, '--validation_users=26']) == 2
    assert '--validation_users=26 (there: 25)' in capsys.readouterr().err
