"""The Python interface, and that it trains what the command line trains."""

import dataclasses
import json
import subprocess
import sys
import time
import warnings

import numpy as np
import polars as pl
import pytest
from fixtures import ROOT

import fame_jax as fj
from fame_jax import api
from fame_jax.config import FLAGS, flags
from fame_jax.main import main

TINY = {'width': 8, 'num_blocks': 1}
SHORT = {'pretrain_epochs': 2, 'finetune_epochs': 1, 'max_length': 8, 'row_length': 16}


def make_frame():
    """Thirty customers walk round a ring of nine items; who starts where differs."""
    rows = [(f'c{u}', (u + i) % 9 + 1, 100 * u + i) for u in range(30) for i in range(6)]
    return pl.DataFrame(rows, schema=['customer', 'sku', 'bought_at'], orient='row')


COLUMNS = {'user': 'customer', 'item': 'sku', 'time': 'bought_at'}


@pytest.fixture(scope='module')
def data():
    return fj.Dataset.from_frame(make_frame(), **COLUMNS)


@pytest.fixture(scope='module')
def result(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('fit') / 'run'
    model = fj.FAME(**TINY, num_experts=2)
    return fj.fit(data, model, fj.Training(**SHORT), workdir=folder, progress='none')


def test_importing_the_package_is_quick_and_imports_neither_jax_nor_numpy():
    code = (
        'import sys, time; began = time.perf_counter(); import fame_jax; '
        'seconds = time.perf_counter() - began; '
        "print(seconds, [m for m in ('jax', 'numpy', 'flax', 'absl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    seconds, _, modules = done.stdout.partition(' ')
    assert float(seconds) < 0.3 and modules.strip() == '[]', done.stdout + done.stderr


def test_every_public_name_can_be_imported():
    assert all(getattr(fj, name) is not None for name in fj.__all__)
    assert set(fj.__all__) <= set(dir(fj))
    with pytest.raises(AttributeError, match='no attribute'):
        _ = fj.Datasets


def test_fit_and_the_command_line_train_the_same_bits(result, tmp_path):
    make_frame().write_csv(tmp_path / 'log.csv')
    argv = ['--num_experts=2', *(f'--{name}={value}' for name, value in {**TINY, **SHORT}.items())]
    columns = ','.join(f'{role}:{name}' for role, name in COLUMNS.items())
    argv += [f'--dataset={tmp_path / "log.csv"}', f'--columns={columns}', '--progress=none']
    assert main([*argv, f'--workdir={tmp_path / "run"}']) == 0
    ours, theirs = (np.load(f / 'ranks.npz') for f in (result.workdir, tmp_path / 'run'))
    assert sorted(ours.files) == sorted(theirs.files)
    for name in ours.files:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    losses = [
        [line['loss'] for line in map(json.loads, lines) if 'loss' in line]
        for lines in (
            (folder / 'metrics.jsonl').read_text().splitlines()
            for folder in (result.workdir, tmp_path / 'run')
        )
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2 + 1


def test_a_result_has_metrics_history_and_a_recommender(result):
    assert set(result.metrics) == {'validation', 'test'}
    assert set(result.metrics['test']) == {'masked', 'unmasked'}
    assert 0 <= result.metrics['test']['masked']['ndcg@10'] <= 1
    assert [*result.stages] == ['popularity', 'item_graph', 'pretrain', 'finetune']
    assert result.metrics == result.stages['finetune'] and result.runs == ()
    assert [x['epoch'] for x in result.history if x['split'] == 'train'] == [1, 2, 1]
    found = result.recommender.recommend([1, 2, 3], k=4)
    assert len(found.items) == 4 and all(isinstance(item, int) for item in found.items)
    assert not {1, 2, 3} & set(found.items)


def test_the_same_call_again_trains_nothing_and_gives_the_same(result, data):
    model, began = fj.FAME(**TINY, num_experts=2), time.monotonic()
    again = fj.fit(data, model, fj.Training(**SHORT), workdir=result.workdir, progress='none')
    assert again.metrics == result.metrics and again.history == result.history
    assert time.monotonic() - began < 60


def test_a_folder_with_another_run_is_refused(result, data):
    model = fj.FAME(**TINY, num_experts=3)
    with pytest.raises(fj.UserError, match=r'num_experts=3 \(there: 2\)'):
        fj.fit(data, model, fj.Training(**SHORT), workdir=result.workdir, progress='none')
    with pytest.raises(fj.UserError, match=r'patience=9 \(there: 5\)'):
        model = fj.FAME(**TINY, num_experts=2)
        training = fj.Training(**SHORT, patience=9)
        fj.fit(data, model, training, workdir=result.workdir, progress='none')


def test_a_folder_with_other_data_is_refused(result):
    other = fj.Dataset.from_frame(make_frame().tail(120), **COLUMNS)
    model = fj.FAME(**TINY, num_experts=2)
    with pytest.raises(fj.UserError, match='other data'):
        fj.fit(other, model, fj.Training(**SHORT), workdir=result.workdir, progress='none')


def test_load_takes_a_run_and_an_export(result, tmp_path):
    result.recommender.export(tmp_path / 'export')
    history = [4, 5, 6]
    expected = result.recommender.recommend(history, k=5)
    for folder in (result.workdir, tmp_path / 'export'):
        found = fj.load(folder).recommend(history, k=5)
        assert found.items == expected.items
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
    with pytest.raises(fj.UserError, match='no such folder'):
        fj.load(tmp_path / 'nowhere')


def test_evaluate_gives_the_ranks_of_the_run(result, data):
    ranks = fj.evaluate(result.recommender, data)
    stored = np.load(result.workdir / 'ranks.npz')
    for protocol in ('masked', 'unmasked'):
        np.testing.assert_array_equal(getattr(ranks, protocol), stored[f'finetune/test/{protocol}'])


def test_several_seeds_are_several_runs(data, tmp_path):
    training = fj.Training(**SHORT, seeds=[0, 1])
    result = fj.fit(data, fj.SASRec(**TINY), training, workdir=tmp_path, progress='none')
    one, two = (run.metrics['test']['masked']['mrr'] for run in result.runs)
    assert one != two
    assert result.metrics['test']['masked']['mrr'] == pytest.approx((one + two) / 2)
    assert result.deviations['test']['masked']['mrr'] == pytest.approx(abs(one - two) / 2**0.5)
    for run in result.runs:
        name = f'fit_{run.workdir.name}'
        seed = int(run.workdir.name.removeprefix('seed_'))
        alone = fj.Training(**SHORT, seeds=[seed])
        single = fj.fit(data, fj.SASRec(**TINY), alone, workdir=tmp_path / name, progress='none')
        assert single.metrics == run.metrics
        loaded = fj.load(run.workdir).model.item_VD
        np.testing.assert_array_equal(loaded, single.recommender.model.item_VD)
    assert (tmp_path / 'dataset').is_dir() and not (tmp_path / 'seed_0' / 'dataset').exists()


OTHERS = {
    **{'pretrain_epochs': 3, 'finetune_epochs': 4, 'patience': 2, 'learning_rate': 0.5},
    **{'finetune_learning_rate': 0.25, 'weight_decay': 0.1, 'row_length': 70, 'rows_per_step': 3},
    **{'max_length': 7, 'long_histories': 'last', 'dtype': 'bfloat16', 'steps_per_dispatch': 2},
    **{'checkpoint_seconds': 1.5, 'backbone': 'scratch', 'loss': 'sampled', 'num_negatives': 30},
    **{'negatives': 'popularity', 'loss_chunk': (5, 6), 'select_on': 'unmasked'},
    **{'validation_users': 5, 'schedule': 'cosine', 'warmup_epochs': 0.5, 'ema': 0.9},
    **{'finetune_dropout': 0.25, 'seen_weight': 3.0, 'future_targets': (1, 0.5)},
    'finetune_future_targets': (1, 0.5),
}


@pytest.mark.parametrize('name', [f.name for f in dataclasses.fields(fj.Training)])
def test_each_field_of_training_is_its_flag(name):
    if name == 'seeds':
        return  # one run for each, see test_several_seeds_are_several_runs
    given = flags.parse(fj.Training(**{name: OTHERS[name]}).flags())
    expected = OTHERS[name]
    if isinstance(expected, tuple):
        expected = tuple(map(str, expected))
    assert given.values == {name: expected} and expected != FLAGS[name].default


@pytest.mark.parametrize('protocol, other', [('masked', 'unmasked'), ('unmasked', 'masked')])
def test_the_best_seed_by_validation_recommends(protocol, other, data, monkeypatch, tmp_path):
    """Three runs by hand, of which the best by test or by the other ranking is another one."""
    validation, test = [0.1, 0.3, 0.2], [0.6, 0.1, 0.5]

    def run(data, model, training, folders, parent, progress):
        results = []
        for seed, folder in folders.items():
            values = {'validation': validation[seed], 'test': test[seed]}
            metrics = {
                s: {protocol: {'ndcg@20': v}, other: {'ndcg@20': 1 - v}} for s, v in values.items()
            }
            folder.mkdir()
            (folder / 'results.json').write_text(json.dumps({'card': {'select_on': protocol}}))
            results.append(fj.FitResult(metrics, {}, {}, [], folder, recommender=f'of seed {seed}'))
        return tuple(results)

    monkeypatch.setattr(api, '_fit', run)
    training = fj.Training(seeds=[0, 1, 2])
    result = fj.fit(data, fj.SASRec(**TINY), training, workdir=tmp_path)
    assert result.recommender == 'of seed 1'
    for split, values in (('validation', validation), ('test', test)):
        mean, deviation = np.mean(values), np.std(values, ddof=1)
        assert result.metrics[split][protocol]['ndcg@20'] == pytest.approx(mean)
        assert result.deviations[split][protocol]['ndcg@20'] == pytest.approx(deviation)


def test_evaluate_takes_items_in_another_order(result):
    """The data have a part of the catalogue, so that their items have other numbers."""
    frame = make_frame().filter(pl.col('sku') > 3)
    other = fj.Dataset.from_frame(frame, **COLUMNS, k_core=0)
    ranks = fj.evaluate(result.recommender, other)
    for rank, (_, items) in zip(ranks.masked, other.histories(), strict=True):
        *history, target = items
        assert result.recommender.recommend(history, k=9).items[rank - 1] == target


def test_wrong_arguments_name_the_right_ones(data):
    with pytest.raises(TypeError, match=r'Dataset\.from_frame'):
        fj.fit(make_frame())
    with pytest.raises(TypeError, match=r'SASRec\(width=128\)'):
        fj.fit(data, fj.SASRec)
    with pytest.raises(TypeError, match='Training'):
        fj.fit(data, fj.SASRec(), {'pretrain_epochs': 2})
    for seeds, words in (([], 'no seed'), ([1, 1], 'a seed twice')):
        with pytest.raises(ValueError, match=words):
            fj.fit(data, fj.SASRec(), fj.Training(seeds=seeds))
    with pytest.raises(TypeError, match=r'fit: Training\(seeds=0\) is one number'):
        fj.fit(data, fj.SASRec(), fj.Training(seeds=0))
    with pytest.raises(TypeError, match='evaluate: recommender is a str; give fit'):
        fj.evaluate('runs/shop', data)
    with pytest.raises(TypeError, match='epochs'):
        fj.Training(epochs=3)
    with pytest.raises(fj.UserError, match='width=9'):
        fj.fit(data, fj.SASRec(width=9, num_heads=2), fj.Training(), progress='none')


def test_an_unknown_history_warns_and_falls_back(result):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        found = result.recommender.recommend(['nothing'], k=3)
    assert found.fallback == 'popularity' and len(caught) == 1
    with pytest.raises(ValueError, match='nothing'):
        result.recommender.recommend(['nothing'], k=3, unknown='raise')
