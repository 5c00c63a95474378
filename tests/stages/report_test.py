"""The stage report: the page of a trained run agrees with the run's files and its model."""

import importlib
import json
import shutil

import numpy as np
import pytest
from fixtures import Reader, sections
from run_fixtures import recommender_of

from fame_jax.main import main

# The package has the function of the same name.
report = importlib.import_module('fame_jax.stages.report')

TEST_USERS = 60


def make_page(folder, *more):
    return main(['--progress=none', f'--workdir={folder}', '--stages=report', *more])


def test_the_page_has_every_section_and_the_results(trained):
    before = (trained / 'flags.cfg').read_text()
    assert make_page(trained) == 0
    source = (trained / 'report.html').read_text(encoding='utf-8')
    assert Reader(source).faults == []
    assert sections(source) == [
        *('metrics', 'curves', 'groups', 'heads', 'facets', 'cases', 'protocol', 'flags')
    ]
    results = json.loads((trained / 'results.json').read_text())['results']
    for stage in ('popularity', 'item_graph', 'pretrain', 'finetune'):
        for protocol in ('masked', 'unmasked'):
            value = f'{results[stage]["test"][protocol]["ndcg@20"]:.4f}'.replace('0.', '.', 1)
            assert f'<td class="number">{value}</td>' in source
    assert f'{TEST_USERS} test users' in source
    assert make_page(trained) == 0 and (trained / 'flags.cfg').read_text() == before
    assert (trained / 'report.html').read_text(encoding='utf-8') == source


def test_what_is_missing_is_left_out(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(report, 'SAMPLE', 7)
    folder, path = tmp_path / 'run', tmp_path / 'page.html'
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns('report.html', 'metrics.jsonl'))
    assert make_page(folder, f'--out={path}') == 0
    assert 'curves' not in sections(path.read_text()) and '>7 test users' in path.read_text()
    assert not (folder / 'report.html').exists()
    shutil.rmtree(folder / 'checkpoints')
    assert make_page(folder, f'--out={path}') == 0
    assert sections(path.read_text()) == ['metrics', 'groups', 'facets', 'protocol', 'flags']


def test_mistakes_are_one_line(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / 'run')
    (tmp_path / 'run' / 'results.json').unlink()
    capsys.readouterr()
    assert make_page(tmp_path / 'run') == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1 and '--stages=evaluate' in error


@pytest.fixture(scope='module')
def fame(tiny_run):
    """A FAME with random parameters as a recommender, its data set, and users out of order."""
    run, module, params = tiny_run('fame')
    return recommender_of(run, module, params), run.data, np.array([3, 11, 5, 59])


def test_heads_of_a_sample_are_those_of_single_explanations(fame):
    recommender, data, user_S = fame
    found = report.read_heads(recommender, data, user_S, max_length=10)
    for place, user in enumerate(user_S):
        history = data.items[data.offsets[user] : data.offsets[user + 1] - 1].tolist()
        ids = [data.item_ids[item] for item in history]
        heads = recommender.explain(ids, report.TOP_K).to_dict()['heads']
        shares = [head['share'] for head in heads]
        np.testing.assert_allclose(found['share_UH'][place], shares, rtol=1e-4)
        routers = [head['router'] for head in heads]
        np.testing.assert_allclose(found['router_UHN'][place], routers, rtol=1e-4)
        items = {entry['item'] for head in heads for entry in head['top']}
        assert found['variety_U'][place] == len(items)


def test_cases_are_the_users_that_the_rules_select(fame):
    recommender, data, user_S = fame
    rank_U = np.full(data.num_users, 5)
    rank_U[11] = 1  # the only hit
    use = report.read_heads(recommender, data, user_S, max_length=10)
    cases = report.explain_cases(recommender, data, user_S, rank_U, use)
    users = [data.user_ids.index(case.user) for case in cases]
    assert users[0] == 11 and {*users} <= {*user_S} and len({*users}) == len(users) == 3
    for case, user in zip(cases, users):
        end = data.offsets[user + 1] - 1
        assert str(case.explanation['target']['item']) == data.item_ids[data.items[end]]
        history = [data.item_ids[item] for item in data.items[data.offsets[user] : end][-10:]]
        assert [str(entry['item']) for entry in case.explanation['history']] == history
