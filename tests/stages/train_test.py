"""The stages pretrain and finetune: best epochs, learning rates, seeds, and readable stacks."""

import json
import shutil
import threading
import traceback
from pathlib import Path

import jax
import numpy as np
import pytest
from run_fixtures import SMALL_RUN, make_world

import fame_jax
from fame_jax import losses, stages
from fame_jax.config import flags
from fame_jax.evaluation.ranker import Ranker
from fame_jax.main import main
from fame_jax.models.sasrec import SASRec
from fame_jax.stages import train
from fame_jax.stages.context import abstract_params
from fame_jax.training import loop

SASREC = [flag for flag in SMALL_RUN if 'num_experts' not in flag] + ['--model=sasrec']


def open_run(folder, *more):
    """A run in memory that writes nothing to its flags.cfg."""
    argv = [f'--workdir={folder}', '--progress=none', '--stages=recommend', *more]
    return stages.open_run(flags.parse(argv))


def stored(run, stage, item):
    """The parameters that a stage's checkpoint has as `item`, 'best' or 'params' (the last)."""
    with run.checkpoints(stage) as checkpoints:
        return checkpoints.restore(**{item: abstract_params(run.module(stage))})[item]


def equal(one, other):
    return all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


# Validation NDCG@20 before the first step and after each epoch; epoch 1 is the best of both stages.
SCORES = {'pretrain': [0.1, 0.5, 0.3, 0.2], 'finetune': [0.1, 0.2, 0.15]}


@pytest.fixture(scope='module')
def worse_at_the_end(tmp_path_factory):
    """A FAME whose validation falls after epoch 1, fine-tuned at a learning rate of 0."""
    folder = tmp_path_factory.mktemp('worse') / 'run'
    scores = iter([*SCORES['pretrain'], *SCORES['finetune']])
    metrics = Ranker.metrics
    argv = [*SMALL_RUN, '--pretrain_epochs=3', '--finetune_epochs=2', f'--workdir={folder}']
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranker, 'metrics', lambda *args: metrics(*args) | {'ndcg@20': next(scores)})
        assert main([*argv, '--learning_rate=0.1', '--finetune_learning_rate=0']) == 0
    return folder


def test_the_best_epoch_is_evaluated(worse_at_the_end):
    run = open_run(worse_at_the_end)
    best, last = (stored(run, 'pretrain', item) for item in ('best', 'params'))
    assert not equal(best, last)
    assert equal(run.best_params('pretrain', run.module('pretrain')), best)
    ranks = np.load(worse_at_the_end / 'ranks.npz')
    for split in ('validation', 'test'):
        rank_U = ranks[f'pretrain/{split}/unmasked']
        np.testing.assert_array_equal(rank_U, run.ranker('pretrain')(best, split).unmasked)
        assert np.any(rank_U != run.ranker('pretrain')(last, split).unmasked)
    card = json.loads((worse_at_the_end / 'results.json').read_text())['card']
    assert (card['stages']['pretrain']['best_epoch'], card['stages']['pretrain']['epochs']) == (
        1,
        3,
    )


def test_the_best_epoch_is_exported(worse_at_the_end, tmp_path):
    shutil.copytree(
        worse_at_the_end,
        tmp_path / 'run',
        ignore=shutil.ignore_patterns('finetune', 'results.json'),
    )
    argv = [f'--workdir={tmp_path}/run', '--stages=export', f'--out={tmp_path}/export']
    assert main([*argv, '--progress=none']) == 0
    run = open_run(tmp_path / 'run')
    exported_VD = np.load(tmp_path / 'export' / 'items.npy')
    best_VD, last_VD = (
        run.module('pretrain').apply(
            {'params': stored(run, 'pretrain', item)}, method='item_vectors'
        )
        for item in ('best', 'params')
    )
    np.testing.assert_allclose(exported_VD, best_VD, rtol=1e-6)
    assert np.abs(exported_VD - last_VD).max() > 0.01


def test_fine_tuning_starts_from_the_best_backbone_at_its_own_learning_rate(worse_at_the_end):
    """At a rate of 0 the tables are still those of the backbone's best epoch."""
    run = open_run(worse_at_the_end)
    best = stored(run, 'pretrain', 'best')
    assert not np.array_equal(best['item_table'], stored(run, 'pretrain', 'params')['item_table'])
    for item in ('best', 'params'):
        tuned = stored(run, 'finetune', item)
        np.testing.assert_array_equal(tuned['item_table'], best['item_table'])


def test_the_seed_decides_the_initial_parameters_and_the_key(trained, tmp_path, monkeypatch):
    starts = []

    def fit(*, state, key, **_):
        starts.append((state.params['item_table'], jax.random.key_data(key)))
        return state.params, loop.Progress()

    monkeypatch.setattr(loop, 'fit', fit)
    monkeypatch.setattr(train, 'precompile', lambda context, stage: None)
    for seed in (0, 1, 1):
        run = open_run(trained)
        folder = tmp_path / str(len(starts))
        folder.mkdir()
        config = run.config.replace(seed=seed, prepared=str(trained))
        fresh = stages.RunContext(config, run.model, folder, run.screen)
        train.pretrain(fresh)
    (table, key), (other_table, other_key), again = starts
    assert not np.any(table == other_table) and np.any(key != other_key)
    assert equal(again, (other_table, other_key))


def test_the_seed_and_the_epoch_decide_the_order_of_batches(trained):
    run = open_run(trained)

    def batches(seed, epoch):
        config = run.config.replace(seed=seed)
        seeded = stages.RunContext(config, run.model, run.folder, run.screen)
        data = train.make_epochs(seeded, run.module('pretrain'))(epoch)
        return [batch.tokens_BL.tolist() for batch in data.batches]

    assert batches(0, 0) == batches(0, 0)
    assert batches(0, 0) != batches(0, 1)
    assert batches(0, 0) != batches(1, 0)


def test_popular_negatives_are_drawn_by_training_actions(tmp_path):
    histories = [[1, 2, 3, 4], [1, 2, 4, 3], [1, 5, 3, 2], [5, 2, 4, 3]]
    make_world(tmp_path, histories)
    run = open_run(tmp_path, '--loss=sampled', '--negatives=popularity', '--num_negatives=16')
    objective = train._objective(run, 'pretrain', run.module('pretrain'))
    trained = [item for history in histories for item in history[:-2]]
    count_V = np.bincount(trained, minlength=run.data.num_items + 1)
    np.testing.assert_array_equal(
        objective.keywords['loss'].popularity_V, losses.cumulative_counts(count_V)
    )


PACKAGE = Path(fame_jax.__file__).parent


def package_frames(stack):
    return [frame for frame in stack if Path(frame.filename).is_relative_to(PACKAGE)]


def test_twelve_frames_lead_from_main_to_the_loss(tmp_path, monkeypatch):
    """All on the stack of the main thread."""
    stacks, cross_entropy = [], losses.cross_entropy

    def record(*args, **options):
        stacks.append(package_frames(traceback.extract_stack()))
        assert threading.current_thread() is threading.main_thread()
        return cross_entropy(*args, **options)

    monkeypatch.setattr(losses, 'cross_entropy', record)
    assert main([*SASREC, '--stages=prepare,pretrain', f'--workdir={tmp_path}']) == 0
    assert stacks
    for frames in stacks:
        names = [f'{Path(frame.filename).stem}.{frame.name}' for frame in frames]
        assert names[:3] == ['main.main', 'train.pretrain', 'train.train'], names
        assert len(names) <= 12, names


def test_an_error_in_an_objective_has_one_stack(tmp_path, monkeypatch):
    def broken(self, params, batch, key, loss):
        raise ZeroDivisionError('a bug')

    monkeypatch.setattr(SASRec, 'objective', broken)
    with pytest.raises(ZeroDivisionError) as error:
        main([*SASREC, '--stages=prepare,pretrain', f'--workdir={tmp_path}'])
    stack = traceback.extract_tb(error.value.__traceback__)
    names = [(Path(frame.filename).name, frame.name) for frame in stack]
    assert names.index(('main.py', 'main')) < names.index(('train.py', 'train'))
    assert names[-1] == (Path(__file__).name, 'broken')
    assert not any('concurrent' in frame.filename for frame in stack)


@pytest.mark.parametrize('schedule', ['--schedule=cosine', '--warmup_epochs=2'])
@pytest.mark.parametrize('resumed', [0, 3])
def test_a_resumed_stage_has_the_rates_of_its_first_epoch(schedule, resumed, tmp_path, monkeypatch):
    """Epochs differ in their steps; here epoch e has e steps more than epoch 0."""
    make_world(tmp_path, [[user + i + 1 for i in range(6)] for user in range(9)])
    run = open_run(tmp_path, *SASREC, '--k_core=0', '--rows_per_step=2', schedule)
    monkeypatch.setattr(run, 'progress', lambda stage: {'epoch': resumed})
    make_epochs, counted = train.make_epochs, []

    def growing(context, module):
        make_epoch = make_epochs(context, module)

        def longer(epoch):
            data = make_epoch(epoch)
            return data._replace(num_steps=data.num_steps + epoch)

        return longer

    def make_schedule(rate, name, warmup_steps, num_steps):
        counted.append((warmup_steps, num_steps))
        return rate

    first = make_epochs(run, run.module('pretrain'))(0).num_steps
    monkeypatch.setattr(train, 'make_epochs', growing)
    monkeypatch.setattr(train, 'make_schedule', make_schedule)
    train.make_setup(run, 'pretrain')
    training = run.config.training
    expected = training.warmup_epochs * first, training.pretrain_epochs * first
    assert counted == [expected]
