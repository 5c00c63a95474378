"""The best epoch by validation is the one that is evaluated, served, exported and grown from.

The run is that of clock_fixtures: of both stages the best epoch is neither the last nor the best by
test, so that any other choice gives other numbers.
"""

import json

import numpy as np
import pytest
from clock_fixtures import (
    BEST_EPOCH,
    BEST_TIME,
    EPOCHS,
    HISTORIES,
    best_items,
    make_clock_run,
    rank,
    ranks,
    score,
)

from fame_jax import api, stages
from fame_jax.config import flags
from fame_jax.data.dataset import Dataset
from fame_jax.evaluation.metrics import metrics
from fame_jax.main import main
from fame_jax.report import collect, tables
from fame_jax.serving import export
from fame_jax.stages.context import abstract_params
from fame_jax.training.step import Program

STAGES, SPLITS, PROTOCOLS = ('pretrain', 'finetune'), ('validation', 'test'), ('masked', 'unmasked')
# The times of each stage: before its first epoch, and after each epoch.
TIMES = {'pretrain': [0, 1, 2, 3, 4], 'finetune': [2, 3, 4, 5]}
LAST_TIME = {stage: times[-1] for stage, times in TIMES.items()}


@pytest.fixture
def folder(clock_run):
    return clock_run


class Kill(BaseException):
    """Ends main as a kill does, without a checkpoint."""


def use(folder, stage, *more):
    assert main(['--progress=none', f'--workdir={folder}', f'--stages={stage}', *more]) == 0


def results_of(folder):
    return json.loads((folder / 'results.json').read_text())


def ndcg(stage, split, time):
    return metrics(np.array(ranks(stage, time, split, 'masked')))['ndcg@20']


def test_the_script_has_no_second_best():
    """Another split, protocol, time or stage has other ranks, so that a mix-up is seen."""
    for stage in STAGES:
        by_split = {
            split: max(TIMES[stage], key=lambda time, split=split: ndcg(stage, split, time))
            for split in SPLITS
        }
        assert by_split['validation'] == BEST_TIME[stage] not in (by_split['test'], TIMES[stage][0])
        assert BEST_TIME[stage] != LAST_TIME[stage] != by_split['test']
        for split in SPLITS:
            of_times = [ranks(stage, time, split, 'masked') for time in TIMES[stage]]
            assert of_times.count(ranks(stage, BEST_TIME[stage], split, 'masked')) == 1
    kinds = [
        ranks(stage, BEST_TIME[stage], split, protocol)
        for stage in STAGES
        for split in SPLITS
        for protocol in PROTOCOLS
    ]
    # Item 1 is at time 2 of the backbone where it is at time 3 of the grown one.
    assert kinds[:2] == kinds[4:6] and len({*map(tuple, kinds)}) == 6


@pytest.mark.parametrize('stage', STAGES)
def test_epochs_are_selected_on_validation(stage, folder):
    """The log has the masked metrics of the validation split at each time."""
    lines = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
    of_stage = [line for line in lines if (line['stage'], line['split']) == (stage, 'validation')]
    assert [line['epoch'] for line in of_stage] == list(range(EPOCHS[stage] + 1))
    for line, time in zip(of_stage, TIMES[stage], strict=True):
        expected = metrics(np.array(ranks(stage, time, 'validation', 'masked')))
        assert {name: line[name] for name in expected} == expected
    card = results_of(folder)['card']['stages'][stage]
    assert (card['best_epoch'], card['epochs']) == (BEST_EPOCH[stage], EPOCHS[stage])


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_the_best_epoch_is_evaluated(stage, split, protocol, folder):
    expected = ranks(stage, BEST_TIME[stage], split, protocol)
    assert np.load(folder / 'ranks.npz')[f'{stage}/{split}/{protocol}'].tolist() == expected
    assert results_of(folder)['results'][stage][split][protocol] == metrics(np.array(expected))


def test_the_checkpoint_holds_the_best_epoch_and_the_last(folder):
    run = stages.open_run(flags.parse([f'--workdir={folder}', '--stages=recommend']))
    for stage in STAGES:
        module = run.module(stage)
        assert run.best_params(stage, module)['clock'].tolist() == [BEST_TIME[stage]]
        with run.checkpoints(stage) as checkpoints:
            last = checkpoints.restore(params=abstract_params(module))['params']
        assert last['clock'].tolist() == [LAST_TIME[stage]]


def recommended(folder, path, *more):
    use(folder, 'recommend', f'--out={path}', *more)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_best_epoch_of_the_last_stage_is_recommended(folder, tmp_path):
    answers = recommended(folder, tmp_path / 'lists.jsonl', '--top_k=3', '--filter_seen=true')
    for answer, (user, history) in zip(answers, HISTORIES.items(), strict=True):
        expected = best_items('finetune', BEST_TIME['finetune'], history, 3)
        assert (answer['user'], answer['items']) == (user, list(map(str, expected)))
        assert answer['scores'] == [score('finetune', 3, item) for item in expected]


def test_without_a_filter_the_items_of_the_history_are_recommended_too(folder, tmp_path):
    answers = recommended(folder, tmp_path / 'lists.jsonl', '--top_k=8', '--nofilter_seen')
    expected = list(map(str, best_items('finetune', BEST_TIME['finetune'], [], 8)))
    assert [answer['items'] for answer in answers] == [expected] * len(HISTORIES)


def check_recommender(recommender, stage, folder):
    """Lists, scores, ranks and card are those of the stage's best epoch."""
    time = BEST_TIME[stage]
    history = HISTORIES['d'][:-1]
    answer = recommender.recommend(list(map(str, history)), 5, filter_seen=True)
    expected = best_items(stage, time, history, 5)
    assert answer.items == list(map(str, expected))
    assert answer.scores == [score(stage, time, item) for item in expected]
    data = Dataset.load(folder / 'dataset')
    for split in SPLITS:
        found = api.evaluate(recommender, data, split)
        for protocol in PROTOCOLS:
            assert getattr(found, protocol).tolist() == ranks(stage, time, split, protocol)
    card = recommender.card
    assert (card['stage'], card['best_epoch']) == (stage, BEST_EPOCH[stage])
    assert card['test'] == results_of(folder)['results'][stage]['test']


def test_the_best_epoch_is_loaded_and_exported(folder, tmp_path):
    use(folder, 'export', f'--out={tmp_path}/export')
    check_recommender(api.load(folder), 'finetune', folder)
    check_recommender(export.load(tmp_path / 'export'), 'finetune', folder)
    columns = np.load(tmp_path / 'export' / 'params.npz')
    assert [3.0] in [columns[name].tolist() for name in columns.files]  # the clock


def test_the_best_epoch_is_explained(folder, tmp_path):
    """The target is a user's last item, and its rank is that of the evaluation."""
    path = tmp_path / 'why.json'
    for user, history in HISTORIES.items():
        use(folder, 'explain', f'--user={user}', f'--out={path}', '--top_k=4')
        found = json.loads(path.read_text())
        expected = best_items('finetune', BEST_TIME['finetune'], history[:-1], 4)
        assert [int(entry['item']) for entry in found['recommended']] == expected
        assert found['target']['item'] == str(history[-1])
        assert found['target']['rank'] == rank('finetune', 3, user, 'test', 'masked')
        assert [int(entry['item']) for entry in found['history']] == history[:-1]


def test_the_page_shows_the_best_epoch(folder, tmp_path):
    use(folder, 'report', f'--out={tmp_path}/page.html')
    page = (tmp_path / 'page.html').read_text()
    data = Dataset.load(folder / 'dataset')
    run = collect.collect(folder, data)
    assert run.stage == 'finetune'
    curves = {curve.stage: curve for curve in run.curves}
    for stage in STAGES:
        for protocol in PROTOCOLS:
            expected = ranks(stage, BEST_TIME[stage], 'test', protocol)
            assert run.ranks[stage][protocol].tolist() == expected
            value = f'{metrics(np.array(expected))["ndcg@10"]:.4f}'.replace('0.', '.', 1)
            assert f'>{value}</td>' in page
        assert curves[stage].best_epoch == BEST_EPOCH[stage]
        selected = [(e, ndcg(stage, 'validation', time)) for e, time in enumerate(TIMES[stage])]
        assert curves[stage].lines['validation NDCG@20'] == selected


def test_tables_take_the_best_epoch(folder):
    runs, popularity = tables.read_runs([folder])
    found = tables.collect(runs, popularity)['datasets']['hand-made']
    rows = {row['title']: row for row in found['rows']}
    for stage, title in (('pretrain', 'Clock'), ('finetune', 'Grown clock')):
        for split in SPLITS:
            for protocol in PROTOCOLS:
                expected = metrics(np.array(ranks(stage, BEST_TIME[stage], split, protocol)))
                for name in ('hr@5', 'ndcg@10'):
                    assert rows[title][split][protocol][name]['values'] == [expected[name]]
        assert rows[title]['best_epochs'] == [BEST_EPOCH[stage]]
        assert rows[title]['epochs'] == [EPOCHS[stage]]


def test_without_fine_tuning_the_best_backbone_is_served(tmp_path):
    folder = make_clock_run(tmp_path, stages='pretrain,evaluate')
    check_recommender(api.load(folder), 'pretrain', folder)


def test_another_runs_best_backbone_is_grown(folder, tmp_path):
    make_clock_run(tmp_path, f'--backbone={folder}', stages='finetune,evaluate')
    assert results_of(tmp_path)['results']['finetune'] == results_of(folder)['results']['finetune']


def test_a_stage_that_is_not_finished_has_its_best_epoch_so_far(tmp_path, monkeypatch, capsys):
    """Killed in the third epoch of fine-tuning, each epoch of which is one block of steps."""
    take_block, calls = Program.__call__, []

    def take_or_die(self, *args):
        calls.append(1)
        if len(calls) == EPOCHS['pretrain'] + 3:
            raise Kill
        return take_block(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Program, '__call__', take_or_die)
        with pytest.raises(Kill):
            make_clock_run(tmp_path, '--checkpoint_seconds=0')
    assert not (tmp_path / 'results.json').exists()
    use(tmp_path, 'evaluate')
    card = results_of(tmp_path)['card']['stages']['finetune']
    assert (card['best_epoch'], card['epochs']) == (BEST_EPOCH['finetune'], 2)
    for split in SPLITS:
        expected = ranks('finetune', BEST_TIME['finetune'], split, 'masked')
        assert np.load(tmp_path / 'ranks.npz')[f'finetune/{split}/masked'].tolist() == expected
    check_recommender(api.load(tmp_path), 'finetune', tmp_path)


def test_patience_ends_a_stage_after_its_best_epoch(tmp_path):
    folder = make_clock_run(tmp_path, '--patience=1')
    for stage, card in results_of(folder)['card']['stages'].items():
        assert card['best_epoch'] == BEST_EPOCH[stage]
        assert card['epochs'] == BEST_EPOCH[stage] + 1
