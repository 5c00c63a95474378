"""The record of a run agrees with the files in its folder; what is missing is left out."""

import json

import numpy as np
import pytest
from report_fixtures import make_agreement, make_run_folder

from fame_jax.errors import UserError
from fame_jax.report.collect import PaperRow, collect, limit_lines


def test_groups_contain_every_user_once_with_the_metrics_of_their_ranks(tmp_path):
    data, ranks = make_run_folder(tmp_path)
    by_length, by_popularity = collect(tmp_path, data).groupings
    for grouping in (by_length, by_popularity):
        assert sum(row['users'] for row in grouping.rows) == 40
        for stage in ('popularity', 'pretrain', 'finetune'):
            for protocol in ('masked', 'unmasked'):
                total = sum(
                    row['users'] * row['figures'][stage][protocol]['mrr'] for row in grouping.rows
                )
                assert total / 40 == pytest.approx(np.mean(1 / ranks[f'{stage}/test/{protocol}']))
    # By loops: the length before the test item, and the target's count in training.
    histories = [data.items[a:b].tolist() for a, b in zip(data.offsets, data.offsets[1:])]
    low, high = (int(by_length.rows[0]['name'].split(' to ')[n]) for n in (0, -1))
    assert low == min(len(history) - 1 for history in histories)
    assert by_length.rows[0]['users'] == sum(low <= len(h) - 1 <= high for h in histories)
    trained = [item for history in histories for item in history[:-2]]
    count_U = [trained.count(history[-1]) for history in histories]
    low, high = (int(by_popularity.rows[-1]['name'].split(' to ')[n]) for n in (0, -1))
    assert high == max(count_U)
    assert by_popularity.rows[-1]['users'] == sum(low <= count <= high for count in count_U)


def test_the_record_of_a_run(tmp_path):
    data, ranks = make_run_folder(tmp_path)
    (tmp_path / 'flags.cfg').write_text('--seed=0\n')
    (tmp_path / 'items.svg').write_text('<svg/>')
    rows = {stage: PaperRow('FAME', {'hr@10': 0.1}, []) for stage in ('text', 'finetune')}
    run = collect(tmp_path, data, rows)
    assert run.stage == 'finetune' and run.version == '1.2.3'
    assert [*run.names] == ['popularity', 'pretrain', 'finetune']
    assert run.names['finetune'] == 'FINETUNE'
    assert run.metrics('finetune', 'unmasked')['mrr'] == 0.035
    assert list(run.paper) == ['finetune']
    assert (run.flags, run.item_map) == ('--seed=0\n', '<svg/>')
    np.testing.assert_array_equal(run.ranks['finetune']['masked'], ranks['finetune/test/masked'])


def test_curves_are_in_order_with_the_validation_metric_last(tmp_path):
    data, _ = make_run_folder(tmp_path)
    log = [
        {'stage': 'text', 'epoch': 1, 'split': 'train', 'loss/0_brand': 7.0, 'loss/1_genre': 8.0},
        {'stage': 'pretrain', 'epoch': 0, 'split': 'validation', 'ndcg@20': 0.1, 'ndcg@10': 0.2},
        {'stage': 'pretrain', 'epoch': 2, 'split': 'train', 'loss': 4.0, 'seconds': 1.5},
        {'stage': 'pretrain', 'epoch': 1, 'split': 'train', 'loss': 5.0},
        {'stage': 'pretrain', 'epoch': 2, 'split': 'train', 'loss': 3.0},  # resumed: counts
        {'stage': 'pretrain', 'epoch': 3, 'split': 'train', 'loss': None},
        {'stage': 'finetune', 'epoch': 1, 'split': 'test', 'ndcg@20': 0.9},
    ]
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, log)) + '\ncut sho')
    text, pretrain = collect(tmp_path, data).curves
    assert (text.stage, text.best_epoch) == ('text', None)
    assert text.lines == {'loss brand': [(1, 7.0)], 'loss genre': [(1, 8.0)]}
    assert (pretrain.stage, pretrain.best_epoch) == ('pretrain', 2)
    assert list(pretrain.lines.items()) == [
        ('loss', [(1, 5.0), (2, 3.0)]),
        ('validation NDCG@20', [(0, 0.1)]),
    ]


def test_agreement_with_facets_before_and_after_text_training(tmp_path):
    make_run_folder(tmp_path)
    path = tmp_path / 'results.json'
    stored = json.loads(path.read_text())
    stored['results']['finetune']['facets'] = make_agreement(seed=2)
    path.write_text(json.dumps(stored))
    assert collect(tmp_path).facets == {'fine-tuned': make_agreement(seed=2)}
    (tmp_path / 'text').mkdir()
    probes = {'before': make_agreement(seed=0), 'after': make_agreement(seed=1)}
    (tmp_path / 'text' / 'text.json').write_text(json.dumps({'probes': probes}))
    assert [*collect(tmp_path).facets] == ['text, before', 'text, after', 'fine-tuned']
    assert collect(tmp_path).facets['text, after'] == make_agreement(seed=1)


def test_what_is_missing_is_left_out(tmp_path):
    data, _ = make_run_folder(tmp_path)
    (tmp_path / 'ranks.npz').unlink()
    for run in (collect(tmp_path, data), collect(tmp_path)):
        assert not (run.ranks or run.groupings or run.curves or run.facets or run.paper)
        assert (run.flags, run.item_map, run.heads, run.cases) == ('', '', None, ())


def test_mistakes_are_user_errors_that_name_the_file_and_the_next_step(tmp_path):
    data, _ = make_run_folder(tmp_path)
    path = tmp_path / 'results.json'
    stored = json.loads(path.read_text())
    (tmp_path / 'ranks.npz').write_bytes(b'no archive')
    with pytest.raises(UserError, match=r'ranks\.npz.*--stages=evaluate again'):
        collect(tmp_path, data)
    stored['card']['dataset']['fingerprint'] = 'another'
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r'other data.*--stages=evaluate again'):
        collect(tmp_path, data)
    for broken in ({'card': {}, 'results': {'popularity': {}}}, {'card': {}}, []):
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r'results\.json.*--stages=evaluate again'):
            collect(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r'--stages=evaluate first'):
        collect(tmp_path)


def test_the_curve_is_that_of_the_ranking_that_selects(tmp_path):
    make_run_folder(tmp_path)
    line = {'stage': 'pretrain', 'split': 'validation'}
    log = [
        {**line, 'epoch': 0, 'ndcg@20': 0.1, 'unmasked/ndcg@20': 0.3},
        {**line, 'epoch': 1, 'ndcg@20': 0.2, 'unmasked/ndcg@20': 0.4},
    ]
    (tmp_path / 'metrics.jsonl').write_text(''.join(f'{json.dumps(one)}\n' for one in log))
    (curves,) = collect(tmp_path).curves
    assert curves.lines == {'validation NDCG@20': [(0, 0.1), (1, 0.2)]}
    stored = json.loads((tmp_path / 'results.json').read_text())
    stored['card']['select_on'] = 'unmasked'
    (tmp_path / 'results.json').write_text(json.dumps(stored))
    (curves,) = collect(tmp_path).curves
    assert curves.lines == {'validation NDCG@20': [(0, 0.3), (1, 0.4)]}


@pytest.mark.parametrize(
    'best, epochs, limit, says',
    [
        (58, 60, 60, True),  # still improving
        (60, 60, 60, True),
        (55, 60, 60, False),  # patience of 5 ended it in the same epoch
        (58, 59, 60, False),  # not finished
        (0, 3, 3, True),
        (0, 0, 0, False),  # no training was wanted
    ],
)
def test_stages_that_ended_at_their_limit(best, epochs, limit, says):
    card = {
        'config': {'pretrain_epochs': limit, 'patience': 5},
        'stages': {'pretrain': {'best_epoch': best, 'epochs': epochs}},
    }
    assert bool(limit_lines(card)) == says == bool(limit_lines(card, 'pretrain'))
    assert limit_lines(card, 'finetune') == [] == limit_lines({})


def test_an_update_ends_at_its_few_epochs_without_a_word():
    config = {'finetune_epochs': 3, 'patience': 5}
    card = {'config': config, 'stages': {'finetune': {'best_epoch': 3, 'epochs': 3}}}
    assert len(limit_lines(card)) == 1
    assert limit_lines({**card, 'config': {**config, 'append': 'monday.csv'}}) == []


def test_the_line_about_a_limit_of_one_epoch_that_was_no_better():
    of_stage = {'epochs': 1, 'best_epoch': 0}
    card = {'config': {'finetune_epochs': 1, 'patience': 5}, 'stages': {'finetune': of_stage}}
    assert limit_lines(card) == [
        'finetune ended at its limit of 1 epoch (none better than before training) and not by '
        'patience (5); more epochs may give better figures.'
    ]
