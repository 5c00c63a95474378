"""The item graph in runs: its ranks by loops, where they are kept, and when they are made anew."""

import json
import shutil

import numpy as np
import pytest
from oracles import item_graph_loop, item_graph_rank_loop, item_graph_scores_loop
from run_fixtures import make_world

from fame_jax import run_dir, stages
from fame_jax.config import flags
from fame_jax.errors import UserError
from fame_jax.evaluation import histories, item_graph, lists, metrics
from fame_jax.main import main
from fame_jax.screen import Screen
from fame_jax.stages import graph_baseline as baseline

NUM_ITEMS = 12


def walks(seed=0, users=40):
    """Histories of unlike lengths in which items follow one another, with some noise."""
    draw = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        steps = draw.choice([1, 2, 5], size=3 + user % 5, p=[0.6, 0.3, 0.1])
        rows.append(((user + np.cumsum(steps)) % NUM_ITEMS + 1).tolist())
    return [*rows, [*range(1, NUM_ITEMS + 1)]]


HISTORIES = walks()


def open_run(folder, *more):
    return stages.open_run(flags.parse([f'--workdir={folder}', '--progress=none', *more]))


def make_run(folder, rows=HISTORIES, *more):
    folder.mkdir(exist_ok=True)
    make_world(folder, rows)
    return open_run(folder, *more)


@pytest.fixture
def computed(monkeypatch):
    """The folders of the runs that computed a baseline."""
    folders, compute = [], baseline._compute

    def counted(context):
        folders.append(context.folder.name)
        return compute(context)

    monkeypatch.setattr(baseline, '_compute', counted)
    return folders


def assert_same(one, other):
    assert (one.lists, one.setting, one.chosen_by) == (other.lists, other.setting, other.chosen_by)
    assert {*one.ranks} == {*other.ranks} == {'validation', 'test', 'shuffled'}
    for name, ranks in one.ranks.items():
        for found, same in zip(ranks, other.ranks[name], strict=True):
            np.testing.assert_array_equal(found, same)


def test_ranks_are_those_of_the_loop(tmp_path):
    found = baseline.graph_baseline(make_run(tmp_path))
    setting = item_graph.Setting(**found.setting)
    training = [row[:-2] for row in HISTORIES]
    graph_VV = item_graph_loop(training, NUM_ITEMS, setting.window, setting.decay)
    count_V = np.bincount(np.concatenate(training), minlength=NUM_ITEMS + 1)
    for split, last in (('validation', 2), ('test', 1)):
        for user, row in enumerate(HISTORIES):
            score_V = item_graph_scores_loop(row[:-last], graph_VV, count_V, setting)
            for protocol, left_out in (('masked', row[:-last]), ('unmasked', [])):
                rank = item_graph_rank_loop(score_V, count_V, row[-last], left_out)
                assert getattr(found.ranks[split], protocol)[user] == rank


def test_the_order_test_has_ranks_after_shuffled_histories(tmp_path, monkeypatch):
    monkeypatch.setattr(item_graph, 'HISTORIES', ((50, 0.7),))  # more than the last item
    run = make_run(tmp_path / 'run')
    found = baseline.graph_baseline(run)
    assert any(map(np.any, np.not_equal(found.ranks['shuffled'], found.ranks['test'])))
    starts, ends = run.data.history_bounds('test')
    shuffled = histories.shuffle_items(run.data.items, starts, ends)
    rows = [shuffled[start : end + 1].tolist() for start, end in zip(starts, ends)]
    assert rows != HISTORIES and [row[-2:] for row in rows] == [row[-2:] for row in HISTORIES]
    training = item_graph.Training(*run.data.training_histories(), NUM_ITEMS)
    setting = item_graph.Setting(**found.setting)
    items = np.concatenate(rows).astype(np.int32)
    ranks = item_graph.rank_users(
        item_graph.Histories(items, starts, ends, items[ends]),
        item_graph.paths(training, setting),
        setting,
        training.count_V,
    )
    np.testing.assert_array_equal(ranks, found.ranks['shuffled'])


def test_the_setting_is_chosen_on_validation_alone(tmp_path):
    """Other test targets change neither the setting nor the validation ranks."""
    draw = np.random.default_rng(1)
    others = [[*row[:-1], int(draw.integers(1, NUM_ITEMS + 1))] for row in HISTORIES[:-1]]
    one = baseline.graph_baseline(make_run(tmp_path / 'one'))
    other = baseline.graph_baseline(make_run(tmp_path / 'other', [*others, HISTORIES[-1]]))
    assert (one.setting, one.chosen_by) == (other.setting, other.chosen_by)
    np.testing.assert_array_equal(one.ranks['validation'], other.ranks['validation'])
    assert np.any(np.not_equal(one.ranks['test'], other.ranks['test']))


@pytest.mark.parametrize('repeated, protocol', [(0, 'masked'), (41, 'unmasked')])
def test_users_and_ranking_of_the_choice(repeated, protocol, tmp_path, monkeypatch):
    """Where repeats are the rule the unmasked ranking decides; --select_on has no part in it."""
    rows = [[*row[:-2], row[0], row[-1]] if u < repeated else row for u, row in enumerate(walks())]
    seen, choose = [], item_graph.choose

    def spied(training, validation, users, protocol):
        seen.append((users, protocol))
        return choose(training, validation, users, protocol)

    monkeypatch.setattr(item_graph, 'choose', spied)
    monkeypatch.setattr(item_graph, 'SAMPLE', 10)
    for folder, select_on in (('a', 'masked'), ('b', 'unmasked')):
        found = baseline.graph_baseline(
            make_run(tmp_path / folder, rows, f'--select_on={select_on}')
        )
        assert found.chosen_by == f'ndcg@20 of 10 validation users, {protocol}'
    (users, first), (again, second) = seen
    assert first == second == protocol
    assert users.tolist() == again.tolist() == sorted({*users.tolist()}) and len(users) == 10


def test_lists_are_those_of_the_test_users(tmp_path):
    run = make_run(tmp_path)
    found = baseline.graph_baseline(run)
    assert {*found.lists} == {*metrics.PROTOCOLS}
    assert all({*of_lists} == {*lists.COLUMNS} for of_lists in found.lists.values())
    assert found.lists['masked'] != found.lists['unmasked']


# The kept file.


def test_a_run_and_the_runs_on_its_data_compute_it_once(tmp_path, computed):
    first = baseline.graph_baseline(make_run(tmp_path / 'data'))
    again = baseline.graph_baseline(open_run(tmp_path / 'data'))
    other = baseline.graph_baseline(
        open_run(tmp_path / 'run', f'--prepared={tmp_path / "data"}', '--model=sasrec')
    )
    assert computed == ['data']
    assert_same(first, again)
    assert_same(first, other)
    assert not (tmp_path / 'run').exists()


def test_a_run_on_data_of_another_folder_keeps_it_there(tmp_path, computed):
    make_run(tmp_path / 'data')
    for name in ('one', 'two'):
        baseline.graph_baseline(open_run(tmp_path / name, f'--prepared={tmp_path / "data"}'))
    assert computed == ['one']
    assert (tmp_path / 'data' / baseline.FILE).is_file()


def test_a_run_on_data_that_cannot_be_written_keeps_its_own(tmp_path, computed, monkeypatch):
    make_run(tmp_path / 'data')
    write = run_dir.atomic_write

    def read_only(path):
        if path.parent.name == 'data':
            raise UserError(f'writing {path}: read-only')
        return write(path)

    monkeypatch.setattr(run_dir, 'atomic_write', read_only)
    (tmp_path / 'run').mkdir()
    found = [
        baseline.graph_baseline(open_run(tmp_path / 'run', f'--prepared={tmp_path / "data"}'))
        for _ in range(2)
    ]
    assert computed == ['run'] and (tmp_path / 'run' / baseline.FILE).is_file()
    assert_same(*found)
    with pytest.raises(UserError, match='read-only'):
        baseline.graph_baseline(make_run(tmp_path / 'data'))


def test_other_data_in_the_folder_are_ranked_anew(tmp_path, computed):
    one = baseline.graph_baseline(make_run(tmp_path / 'run'))
    other = baseline.graph_baseline(make_run(tmp_path / 'run', walks(seed=1)))
    assert computed == ['run', 'run']
    assert np.any(np.not_equal(one.ranks['test'], other.ranks['test']))
    assert_same(other, baseline.graph_baseline(open_run(tmp_path / 'run')))
    assert len(computed) == 2


def damage(path):
    path.write_bytes(path.read_bytes()[:100])


def rewrite(path, **changes):
    """Changes entries of the card of a kept file."""
    with np.load(path) as file:
        arrays = dict(file)
    arrays['card'] = np.array(json.dumps(json.loads(str(arrays['card'])) | changes))
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    'change',
    [
        damage,
        lambda path: path.write_bytes(b''),
        lambda path: np.savez(path, card='[]'),
        lambda path: np.savez(path, card='{}'),
        lambda path: rewrite(path, version=baseline.VERSION - 1),
    ],
)
def test_a_file_that_cannot_be_used_is_replaced(change, tmp_path, computed):
    first = baseline.graph_baseline(make_run(tmp_path / 'run'))
    path = tmp_path / 'run' / baseline.FILE
    change(path)
    assert_same(first, baseline.graph_baseline(open_run(tmp_path / 'run')))
    assert computed == ['run', 'run']
    assert_same(first, baseline.graph_baseline(open_run(tmp_path / 'run')))
    assert computed == ['run', 'run']


def test_the_screen_says_where_it_is_kept_or_that_it_is_left_out(tmp_path, monkeypatch, capsys):
    for limit, line in ((0, 'the item graph is left out'), (2**27, f'{baseline.FILE}\n')):
        monkeypatch.setattr(item_graph, 'MAX_PAIRS', limit)
        run = make_run(tmp_path / str(limit))
        run.screen = Screen('lines')
        found = baseline.graph_baseline(run)
        (said,) = capsys.readouterr().err.splitlines(keepends=True)
        assert said.startswith('evaluate: the item graph') and line in said
        assert (found is None) == (limit == 0) == (not (run.folder / baseline.FILE).exists())


# Whole runs.


def results_of(folder):
    return json.loads((folder / 'results.json').read_text())['results']


def test_a_run_has_a_row_which_evaluating_again_does_not_compute(trained, tmp_path, computed):
    run = shutil.copytree(trained, tmp_path / 'run')
    before = results_of(run)
    assert {*before['item_graph']} - {'setting', 'chosen_by'} == {*before['popularity']}
    assert before['item_graph']['model'] == 'item graph'
    assert {*before['item_graph']['setting']} == {*item_graph.Setting._fields}
    argv = [f'--workdir={run}', '--stages=evaluate', '--progress=none']
    assert main(argv) == 0 and computed == []
    assert results_of(run) == before
    (run / baseline.FILE).unlink()
    assert main(argv) == 0 and computed == ['run']
    assert results_of(run) == before


def test_without_the_graph_a_run_has_the_other_rows(trained, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(trained, tmp_path / 'run')
    before = results_of(run)
    (run / baseline.FILE).unlink()
    monkeypatch.setattr(item_graph, 'MAX_PAIRS', 0)
    argv = [f'--workdir={run}', '--progress=none']
    assert main([*argv, '--stages=evaluate,report']) == 0
    del before['item_graph']
    assert results_of(run) == before
    assert 'item graph' not in capsys.readouterr().out
    assert 'tem graph' not in (run / 'report.html').read_text(encoding='utf-8')
