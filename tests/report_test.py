"""The stage report, through the door: the run's own figures, without what is missing."""

import json
import re
import shutil

import numpy as np
import pytest
from page_test import Reader, sections

from fame_jax import explain, report, run
from fame_jax.config import parse
from fame_jax.data import sequences
from fame_jax.main import main
from fame_jax.page import page

WORLD = [
    *('--progress=none', '--width=8', '--num_experts=2', '--max_length=10', '--row_length=16'),
    *('--synthetic_users=60', '--synthetic_items=40', '--synthetic_facets=1'),
    *('--num_blocks=1', '--pretrain_epochs=1', '--finetune_epochs=0'),
]


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    """A trained FAME, small and poor."""
    folder = tmp_path_factory.mktemp('run')
    assert main([*WORLD, f'--workdir={folder}']) == 0
    return folder


def open_run(workdir):
    return run.open_run(parse(['--progress=none', f'--workdir={workdir}']))


@pytest.fixture(scope='module')
def collected(workdir):
    return report.collect(open_run(workdir))


def tell(workdir, *more):
    return main(['--progress=none', f'--workdir={workdir}', '--stages=report', *more])


def test_the_page_holds_every_section(workdir, collected):
    source = page(collected)
    assert Reader(source).faults == []
    assert sections(source) == [
        *('metrics', 'curves', 'groups', 'heads', 'facets', 'cases', 'protocol', 'again')
    ]
    results = json.loads((workdir / 'results.json').read_text())['results']
    for stage in results.values():
        for protocol in ('masked', 'unmasked'):
            figure = f'{stage["test"][protocol]["ndcg@20"]:.4f}'.replace('0.', '.', 1)
            assert f'<td class="number">{figure}</td>' in source
    assert '--synthetic_users=60\n' in source and '--top_k' not in source


def test_the_same_run_makes_the_same_page(workdir, collected):
    """The stage is no part of what makes a run, and says nothing of when it ran."""
    assert tell(workdir) == 0
    assert (workdir / 'report.html').read_text(encoding='utf-8') == page(collected)
    assert 'report' not in (workdir / 'flags.cfg').read_text().split('--workdir')[0]


def test_groups_hold_every_user_once_with_the_figures_of_the_ranks(workdir, collected):
    ranks = np.load(workdir / 'ranks.npz')
    data = sequences.load(workdir / 'dataset')
    users = data.num_users
    by_length, by_popularity = collected['groups']
    for group in (by_length, by_popularity):
        assert sum(row['users'] for row in group['rows']) == users
        for stage in ('popularity', 'pretrain', 'finetune'):
            whole = sum(
                row['users'] * row['figures'][stage]['unmasked']['mrr'] for row in group['rows']
            )
            expected = np.mean(1 / ranks[f'{stage}/test/unmasked'])
            assert whole / users == pytest.approx(expected)
    # By loops: users by the length of what lies before their test item, and its training count.
    histories = [data.items[a:b].tolist() for a, b in zip(data.offsets, data.offsets[1:])]
    shortest = min(len(history) - 1 for history in histories)
    first = by_length['rows'][0]['name']
    low, high = (int(first.split(' to ')[n]) for n in (0, -1))
    assert low == shortest
    assert by_length['rows'][0]['users'] == sum(low <= len(h) - 1 <= high for h in histories)
    trained = [item for history in histories for item in history[:-2]]
    cold = sum(history[-1] not in trained for history in histories)
    names = [row['name'] for row in by_popularity['rows']]
    assert (names[0] == 'never (cold)') == (cold > 0)
    if cold:
        assert by_popularity['rows'][0]['users'] == cold


def test_the_sample_is_of_test_histories_as_they_are_explained(workdir, collected):
    """Shares, routers and lists of all users, one by one through `explain`."""
    told = open_run(workdir)
    recommender = report.open_recommender(told)
    user_S = np.array([3, 5, 11])
    found = report._look(told, recommender, user_S)
    data = told.data
    for place, user in enumerate(user_S):
        history = data.items[data.offsets[user] : data.offsets[user + 1] - 1].tolist()
        one = explain.explain(recommender, [data.item_ids[item] for item in history], 10)
        shares = [head['share'] for head in one['heads']]
        np.testing.assert_allclose(found['share_UH'][place], shares, rtol=1e-4)
        routers = [head['router'] for head in one['heads']]
        np.testing.assert_allclose(found['router_UHN'][place], routers, rtol=1e-4)
        different = {entry['item'] for head in one['heads'] for entry in head['top']}
        assert found['variety_U'][place] == len(different)
    assert collected['heads']['users'] == data.num_users


def test_cases_are_who_the_rules_name(workdir, collected):
    ranks = np.load(workdir / 'ranks.npz')['finetune/test/masked']
    data = sequences.load(workdir / 'dataset')
    cases = {case['rule']: case for case in collected['cases']}
    longest = cases['the longest history']
    assert 3 <= len(cases) <= 4
    for case in cases.values():
        user = data.user_ids.index(case['user'])
        target = data.item_ids[data.items[data.offsets[user + 1] - 1]]
        assert case['found']['target']['item'] == target
        assert case['found']['target']['rank'] == ranks[user]
        if 'rank 1 to 3' in case['rule']:
            assert ranks[user] <= 3
    place = data.user_ids.index(longest['user'])
    others = [data.user_ids.index(case['user']) for case in cases.values()]
    left = [u for u in range(data.num_users) if u not in others or u == place]
    assert data.lengths[place] == max(data.lengths[left])


def test_curves_of_each_stage_with_its_best_epoch(collected):
    """Fine-tuning has no epoch here, and so no loss."""
    told = {curve['stage']: curve['about'] for curve in collected['curves']}
    assert list(told) == ['pretrain', 'finetune']
    assert told['pretrain'].startswith('loss and validation NDCG@20 by epoch, the best one ')
    assert told['finetune'] == 'validation NDCG@20 by epoch, the best one 0'
    for curve in collected['curves']:
        assert '>validation NDCG@20<' in curve['svg'] and '>best: ' in curve['svg']


def test_what_is_missing_is_left_out(workdir, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(workdir, folder, ignore=shutil.ignore_patterns('report.html', '*.svg'))
    (folder / 'metrics.jsonl').write_text('{"stage": "pretrain", "loss": null}\nnot JSON\n')
    shutil.rmtree(folder / 'checkpoints')
    path = tmp_path / 'page.html'
    assert tell(folder, f'--report={path}') == 0
    left = ['metrics', 'groups', 'facets', 'protocol', 'again']
    assert sections(path.read_text()) == left
    (folder / 'metrics.jsonl').unlink()
    (folder / 'ranks.npz').unlink()
    shutil.rmtree(folder / 'dataset')
    assert tell(folder, f'--report={path}') == 0
    assert sections(path.read_text()) == ['metrics', 'facets', 'protocol', 'again']


def test_a_baseline_has_cases_and_no_heads(tmp_path):
    flags = [f'--workdir={tmp_path}/run', '--model=gru4rec', '--hidden_width=8']
    flags.append('--stages=prepare,pretrain,evaluate,report')
    assert main([*(flag for flag in WORLD if 'finetune' not in flag), *flags]) == 0
    source = (tmp_path / 'run' / 'report.html').read_text()
    assert sections(source) == ['metrics', 'curves', 'groups', 'cases', 'protocol', 'again']
    assert 'Items by ids' in source and 'equal gates' not in source


def test_titles_are_text_and_the_sample_is_no_larger_than_told(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(report, 'SAMPLE', 7)
    data = sequences.load(workdir / 'dataset')
    titles, path = tmp_path / 'titles.jsonl', tmp_path / 'page.html'
    names = ['<script>alert(1)</script>', 'שלום "עולם"']
    rows = [{'item_id': i, 'title': names[n % 2]} for n, i in enumerate(data.item_ids[1:])]
    titles.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    assert tell(workdir, f'--titles={titles}', f'--report={path}') == 0
    source = path.read_text(encoding='utf-8')
    reader = Reader(source)
    assert reader.faults == [] and not [tag for tag, _ in reader.tags if tag == 'script']
    assert '<bdi>&lt;script&gt;alert(1)&lt;/script&gt;</bdi>' in source
    assert '<bdi>שלום &quot;עולם&quot;</bdi>' in source
    assert '>7 test users drawn by the seed' in source


def broken(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_mistakes_get_one_line(workdir, tmp_path, capsys):
    def refused(*more):
        capsys.readouterr()
        assert tell(folder, *more) == 2
        out, err = capsys.readouterr()
        assert out == '' and err.count('\n') == 1 and err.startswith('error: ')
        return err

    folder = tmp_path / 'run'
    shutil.copytree(workdir, folder)
    assert 'missing' in refused(f'--report={tmp_path}/missing/page.html')
    (folder / 'ranks.npz').write_bytes(b'no archive')
    assert 'ranks.npz' in refused() and 'evaluate' in refused()
    results = folder / 'results.json'
    broken(results, lambda value: value['card']['dataset'].update(fingerprint='another'))
    assert 'other data' in refused()
    broken(results, lambda value: value.update(results={}))
    assert 'run --stages=evaluate again' in refused()
    results.unlink()
    assert re.search('was not judged; run --stages=evaluate first', refused())
