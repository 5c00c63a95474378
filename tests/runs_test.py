"""A run of Table 2: whether it is done, what it left, and that it is the run that is wanted.

Here is also what the tests of the other rooms stand on: runs that were never run.
"""

import json

import numpy as np
import pytest

from benchmarks import runs, table2
from fame_jax import evaluate
from fame_jax.errors import UserError

METRICS = ('hr@5', 'hr@10', 'hr@20', 'ndcg@5', 'ndcg@10', 'ndcg@20')
MACHINE = {
    'code': '9.9',
    'versions': {'python': '3.11.0', 'jax': '0.10.2'},
    'device': {'kind': 'cpu', 'platform': 'cpu', 'count': 1},
    'system': 'Linux',
    'cores': 2,
    'date': '2026-11-21',
}


def options(tmp_path, *flags):
    recipes = tmp_path / 'recipes'
    recipes.mkdir(exist_ok=True)
    for name in runs.MODELS:
        kind = 'fame' if name.startswith('fame') else 'sasrec'
        (recipes / f'{name}.cfg').write_text(f'--model={kind}\n')
    return ['--datasets=toys', f'--folder={tmp_path}', f'--recipes={recipes}', *flags]


def runs_of(tmp_path, *flags):
    return table2.plan(table2.parse(options(tmp_path, *flags)))


def values(base):
    """Made-up metrics that are all different."""
    return {metric: base + i / 100 for i, metric in enumerate(METRICS)} | {'mrr': 0.5}


def finish(folder, model, seed, base=0.1, ranks=(), seconds=10.0, fingerprint='f', **about):
    """Writes by hand what a finished run leaves."""
    stage = runs.MODELS[model].stage
    about = {'best_epoch': 3, 'epochs': 8, 'seconds': seconds, 'parameters': 1234} | about
    result = {
        split: {'masked': values(base + shift), 'unmasked': values(base + shift - 0.05)}
        for split, shift in (('test', 0), ('validation', 0.5))
    }
    floor = {'test': {'masked': values(0.01), 'unmasked': values(0)}}
    card = {'name': 'Toys', 'users': max(len(ranks), 1), 'items': 30, 'fingerprint': fingerprint}
    workdir = folder / 'toys' / f'{model}_seed{seed}'
    workdir.mkdir(parents=True, exist_ok=True)
    told = {
        'card': {'dataset': card, 'stages': {stage: {'machine': MACHINE, **about}}},
        'results': {'popularity': floor, stage: {'model': f'{model} told', **result}},
    }
    (workdir / 'results.json').write_text(json.dumps(told))
    rank_U = np.array(ranks if len(ranks) else [1], np.int32)
    arrays = {f'{stage}/test/{protocol}': rank_U for protocol in evaluate.PROTOCOLS}
    np.savez(workdir / 'ranks.npz', **arrays)


def test_a_verdict_on_another_stage_is_not_the_one(tmp_path):
    finish(tmp_path, 'core', 0)
    (tmp_path / 'toys' / 'core_seed0').rename(tmp_path / 'toys' / 'fame_seed0')
    assert [run.done() for run in runs_of(tmp_path, '--models=fame', '--seeds=0')] == [False] * 2


def recipe(tmp_path, run):
    return tmp_path / 'recipes' / f'{run.model}.cfg'


@pytest.mark.parametrize('done', [False, True])
def test_a_run_with_other_flags_is_not_taken_for_this_one(tmp_path, done):
    """Not even for flags that this command leaves to their defaults."""
    if done:
        finish(tmp_path, 'core', 0)
    flags = ('--models=core', '--seeds=0')
    (one,) = runs_of(tmp_path, *flags)
    one.workdir.mkdir(parents=True, exist_ok=True)
    (one.workdir / 'flags.cfg').write_text('--model=sasrec\n--dataset=toys\n--width=32\n')
    with pytest.raises(UserError) as error:
        runs.check(one, recipe(tmp_path, one))
    told = f'{one.workdir} was run with other flags: --width=64 (there: 32); give the same, or '
    assert str(error.value) == f'{told}choose another --folder'
    (same,) = runs_of(tmp_path, *flags, '--extra=--width=32')
    runs.check(same, recipe(tmp_path, same))


@pytest.mark.parametrize('done', [False, True])
def test_a_folder_may_be_moved_when_all_is_done(tmp_path, done):
    fame = runs_of(tmp_path, '--models=fame', '--seeds=0')[1]
    fame.workdir.mkdir(parents=True)
    if done:
        finish(tmp_path, 'fame', 0)
    flags = '--model=fame\n--dataset=toys\n--backbone_from=elsewhere\n'
    (fame.workdir / 'flags.cfg').write_text(flags)
    if done:
        runs.check(fame, recipe(tmp_path, fame))
    else:
        with pytest.raises(UserError, match='--backbone_from'):
            runs.check(fame, recipe(tmp_path, fame))


def test_ranks_are_those_of_the_stage_and_protocol(tmp_path):
    finish(tmp_path, 'fame', 0, ranks=[3, 1, 2])
    fame = runs_of(tmp_path, '--models=fame', '--seeds=0')[1]
    arrays = {f'pretrain/test/{protocol}': [9] for protocol in evaluate.PROTOCOLS}
    arrays |= {'finetune/test/masked': [3, 1, 2], 'finetune/test/unmasked': [4, 1, 2]}
    np.savez(fame.workdir / 'ranks.npz', **arrays)
    assert fame.ranks('masked').tolist() == [3, 1, 2]
    assert fame.ranks('unmasked').tolist() == [4, 1, 2]


@pytest.mark.parametrize('content', [None, b'', b'PK no zip'])
def test_ranks_that_are_gone_are_a_mistake_that_can_be_mended(tmp_path, content):
    finish(tmp_path, 'core', 0)
    (one,) = runs_of(tmp_path, '--models=core', '--seeds=0')
    path = one.workdir / 'ranks.npz'
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError) as error:
        one.ranks('masked')
    told = str(error.value)
    assert str(path) in told and 'remove results.json there and run it again' in told
