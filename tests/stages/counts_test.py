"""Counts of actions come from the training parts alone.

In the run of clock_fixtures items 1 and 2 are the targets of all users and in no training part;
counted with the held-out actions they would be the most popular items of all.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clock_fixtures import HISTORIES, ITEMS, held_out

from fame_jax import api, losses, stages
from fame_jax.config import flags
from fame_jax.data.dataset import Dataset
from fame_jax.evaluation.metrics import metrics
from fame_jax.report import collect
from fame_jax.serving import export
from fame_jax.stages import train
from fame_jax.training import step

SPLITS, PROTOCOLS = ('validation', 'test'), ('masked', 'unmasked')
TRAINING = [item for history in HISTORIES.values() for item in history[:-2]]
COUNTS = {item: TRAINING.count(item) for item in ITEMS}


def open_run(folder, *more):
    """A run in memory that writes nothing to its flags.cfg."""
    argv = [f'--workdir={folder}', '--progress=none', '--stages=recommend', *more]
    return stages.open_run(flags.parse(argv))


def test_held_out_actions_would_change_the_counts():
    everything = [item for history in HISTORIES.values() for item in history]
    assert COUNTS[1] == COUNTS[2] == 0 < min(COUNTS[item] for item in ITEMS if item > 2)
    assert everything.count(1) == everything.count(2) == len(HISTORIES) > COUNTS[4]


def popularity_rank(user, split, protocol):
    """1 + the other items with as many training actions or more, by a loop."""
    history, target = held_out(user, split)
    left_out = history if protocol == 'masked' else []
    others = [item for item in ITEMS if item != target and item not in left_out]
    return 1 + sum(COUNTS[item] >= COUNTS[target] for item in others)


@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_the_popularity_baseline(split, protocol, clock_run):
    expected = [popularity_rank(user, split, protocol) for user in HISTORIES]
    found = np.load(clock_run / 'ranks.npz')[f'popularity/{split}/{protocol}']
    assert found.tolist() == expected
    results = json.loads((clock_run / 'results.json').read_text())['results']
    assert results['popularity'][split][protocol] == metrics(np.array(expected))


@pytest.mark.parametrize('split', SPLITS)
def test_all_targets_are_unseen(split, clock_run):
    results = json.loads((clock_run / 'results.json').read_text())['results']
    for name in ('popularity', 'pretrain', 'finetune'):
        groups = results[name]['by_target'][split]
        assert {group: values['users'] for group, values in groups.items()} == {
            'unseen': len(HISTORIES),
            'rare': 0,
            'common': 0,
        }


def test_groups_of_the_page(clock_run):
    run = collect.collect(clock_run, Dataset.load(clock_run / 'dataset'))
    by = {grouping.by: grouping.rows for grouping in run.groupings}
    (cold,) = by['popularity of the target']
    assert (cold['name'], cold['users']) == ('never (cold)', len(HISTORIES))
    lengths = [len(held_out(user, 'test')[0]) for user in HISTORIES]
    users = {row['name']: row['users'] for row in by['length of history']}
    assert users == {'3': lengths.count(3), '4': lengths.count(4)}


def test_popular_items_for_a_stranger(clock_run, tmp_path):
    """By training actions, ties in the order of the items; from a run and from its export."""
    expected = sorted(ITEMS, key=lambda item: -COUNTS[item])
    recommender = api.load(clock_run)
    recommender.export(tmp_path / 'export')
    for one in (recommender, export.load(tmp_path / 'export')):
        answer = one.recommend([], len(ITEMS))
        assert (answer.items, answer.fallback) == (list(map(str, expected)), 'popularity')
        assert answer.scores == [COUNTS[item] for item in expected]


def test_popular_negatives(clock_run):
    """The loss's table is the cumulative sum of training actions plus one."""
    flags = ['--model=sasrec', '--loss=sampled', '--negatives=popularity', '--num_negatives=16']
    run = open_run(clock_run.parent / 'other', f'--prepared={clock_run}', *flags)
    objective = train._objective(run, 'pretrain', run.module('pretrain'))
    count_V = np.array([0, *(COUNTS[item] for item in ITEMS)])
    expected = losses.cumulative_counts(count_V)
    np.testing.assert_array_equal(objective.keywords['loss'].popularity_V, expected)


def test_rows_of_items_that_are_only_held_out_are_kept(tmp_path, clock_run):
    """One step with weight decay moves the rows of all items but 1 and 2."""
    np.save(tmp_path / 'rows.npy', np.ones((len(ITEMS) + 1, 8), np.float32))
    flags = ['--model=sasrec', '--width=8', '--unseen_items=kept', '--weight_decay=.1']
    flags += [f'--item_init={tmp_path}/rows.npy', f'--prepared={clock_run}']
    run = open_run(tmp_path / 'run', *flags)
    table = jnp.ones((len(ITEMS) + 1, 8))
    optimizer = train._make_optimizer(run, 'pretrain', run.module('pretrain'), 1)

    def objective(params, batch, key):
        return jnp.sum(params['item_table']), jnp.float32(1), {}

    params = {'item_table': table}
    take_step = step.make_step(objective, optimizer)
    state = step.State(jnp.int32(0), jax.tree.map(jnp.copy, params), optimizer.init(params))
    batch = train.make_setup(run, 'pretrain').batch
    state, _ = take_step(state, batch, jax.random.key(0))
    moved = {v for v in ITEMS if np.any(state.params['item_table'][v] != table[v])}
    assert moved == {item for item in ITEMS if COUNTS[item]}
