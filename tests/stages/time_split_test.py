"""A run with --split=time through all stages: what is trained on, ranked, said and kept."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
from data_fixtures import unflatten

import fame_jax as fj
from fame_jax import stages
from fame_jax.config import flags
from fame_jax.data.dataset import Dataset
from fame_jax.errors import UserError
from fame_jax.evaluation import histories, item_graph
from fame_jax.main import main
from fame_jax.report import tables
from fame_jax.stages import graph_baseline
from fame_jax.stages.open_recommender import open_recommender
from fame_jax.stages.report import explain_cases
from fame_jax.stages.train import make_windows

DAY = 86_400
START = 1_577_836_800  # 2020-01-01
USERS, ITEMS = 40, 12
SMALL = [
    *('--progress=none', '--width=8', '--num_blocks=1', '--num_experts=2', '--max_length=6'),
    *('--row_length=16', '--k_core=0', '--pretrain_epochs=1', '--finetune_epochs=1'),
]
SASREC = ['--model=sasrec', *SMALL[:3], *SMALL[4:7]]
SPLIT = ['--split=time', '--split_at=.8', '--split_targets=successive']


def write_log(path):
    """40 users with 5 to 9 actions in a year. Item 12 is new in the last month."""
    draw = np.random.default_rng(0)
    lines = ['user,item,time']
    for user in range(USERS):
        for day in np.sort(draw.integers(0, 366, 5 + user % 5)):
            item = ITEMS if day > 335 and draw.random() < 0.3 else draw.integers(1, ITEMS)
            lines.append(f'u{user},{item},{START + day * DAY}')
    path.write_text('\n'.join(lines) + '\n')


@pytest.fixture(scope='module')
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp('log') / 'shop.csv'
    write_log(path)
    return path


@pytest.fixture(scope='module')
def run(log):
    """The folder of a FAME that is trained and evaluated with a split by time."""
    folder = log.parent / 'run'
    assert main([*SMALL, *SPLIT, f'--dataset={log}', f'--workdir={folder}']) == 0
    return folder


def open_run(folder, *more):
    return stages.open_run(flags.parse([f'--workdir={folder}', '--progress=none', *more]))


def read_results(folder):
    return json.loads((folder / 'results.json').read_text())


def split_loop(log, share=None, moment=None):
    """(training by user, (user, history, target) of validation and of test), from the file."""
    rows = [line.split(',') for line in log.read_text().splitlines()[1:]]
    times = sorted(int(time) for *_, time in rows)
    moment = moment or times[int(share * len(times))]
    before = [time for time in times if time < moment]
    earlier = before[int((share or len(before) / len(times)) * len(before))]
    training, parts = {}, {'validation': [], 'test': []}
    for user in dict.fromkeys(row[0] for row in rows):
        history = []
        for _, item, time in (row for row in rows if row[0] == user):
            part = 'test' if int(time) >= moment else 'validation'
            if int(time) < earlier:
                training.setdefault(user, []).append(item)
            elif history:
                parts[part].append((user, history[:], item))
            history.append(item)
    return training, parts, earlier * 10**6


def test_popularity_is_ranked_as_by_a_loop(log, run):
    """Counts of training alone, each target after its own history, in the order of the data."""
    training, parts, _ = split_loop(log, 0.8)
    flat = list(itertools.chain.from_iterable(training.values()))
    count = {str(item): flat.count(str(item)) for item in range(1, ITEMS + 1)}
    card = read_results(run)['card']
    data = open_run(run).data
    with np.load(run / 'ranks.npz') as ranks:
        for part, rows in parts.items():
            assert card['time_split'][part]['targets'] == len(rows) > USERS / 4
            found = data.split.parts[part].users
            order = sorted(rows, key=lambda row: data.user_ids.index(row[0]))
            assert [data.user_ids[user] for user in found] == [user for user, _, _ in order]
            for protocol in ('masked', 'unmasked'):
                expected = [
                    sum(
                        count[other] >= count[target]
                        for other in count
                        if other == target or protocol == 'unmasked' or other not in history
                    )
                    if protocol == 'unmasked' or target not in history
                    else ITEMS
                    for _, history, target in order
                ]
                assert ranks[f'popularity/{part}/{protocol}'].tolist() == expected
            for stage in ('pretrain', 'finetune', 'item_graph'):
                assert len(ranks[f'{stage}/{part}/masked']) == len(rows)
    assert count['12'] == 0 and card['time_split']['test']['items_without_training'] == 1


def test_windows_and_counts_have_nothing_of_the_moment_or_later(log, run):
    training, _, earlier = split_loop(log, 0.8)
    context = open_run(run)
    data, windows = context.data, make_windows(context)
    for start, length in zip(windows.starts, windows.lengths):
        assert data.times[start : start + length].max() < earlier
    histories = unflatten(*data.training_histories())
    found = dict(zip(data.user_ids, ([data.item_ids[i] for i in row] for row in histories)))
    assert found == {user: training.get(user, []) for user in data.user_ids}
    flat = list(itertools.chain.from_iterable(training.values()))
    counts = fj.load(run).count_V
    assert counts.tolist() == [0, *(flat.count(name) for name in data.item_ids[1:])]


def test_the_card_and_the_screen_name_the_split(log, tmp_path, capsys):
    argv = ['--model=sasrec', '--stages=prepare', f'--dataset={log}', f'--workdir={tmp_path}/a']
    assert main([*argv, *SPLIT, '--progress=lines', '--k_core=0']) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if 'split by time' in line]
    assert len(said) == 3
    moment = Dataset.load(tmp_path / 'a' / 'dataset').split_by_time(0.8).split.card['moment']
    assert moment in said[0] and moment.startswith('2020-') and moment.endswith('Z')
    assert 'test targets' in said[2] and '1 items' in said[2]


def test_the_protocol_card_has_moment_targets_and_counts(run):
    card = read_results(run)['card']
    assert card['split'].startswith('by time: test targets (successive) from 2020-')
    found = card['time_split']
    assert found['at'] == '0.8' and found['targets'] == 'successive'
    assert found['validation_moment'] < found['moment']
    assert 'before the validation moment' in found['trained_on']
    assert card['config']['split'] == 'time'
    plain = Dataset.load(run / 'dataset').card['fingerprint']
    assert found['data_sha256'] == plain != card['dataset']['fingerprint']


def test_the_later_stages_use_the_run(log, run, tmp_path):
    shutil.copytree(run, tmp_path / 'run')
    argv = [f'--workdir={tmp_path}/run', '--progress=none']
    assert main([*argv, '--stages=recommend,explain,export,report']) == 0
    lines = (tmp_path / 'run' / 'recommendations.jsonl').read_text().splitlines()
    assert len(lines) == USERS
    page = (tmp_path / 'run' / 'report.html').read_text()
    found = read_results(run)['card']['time_split']
    assert f'The split is by time at {found["moment"]}' in page
    assert f'{found["test"]["targets"]:,} targets' in page
    assert 'a user with several targets counts once for each' in page
    assert fj.load(tmp_path / 'run').card['protocol']['split'].startswith('by time')


def test_a_page_explains_the_histories_before_their_targets(run):
    """Of several targets of a user each case has its own history."""
    context = open_run(run, '--stages=report')
    data, recommender = context.data, open_recommender(context)
    starts, ends = data.history_bounds('test')
    rows = np.arange(len(ends))[-5:]
    cases = explain_cases(recommender, data, rows, np.full(len(ends), 2), {})
    known = [
        (
            data.user_ids[data.split.parts['test'].users[row]],
            [data.item_ids[item] for item in data.items[starts[row] : ends[row]]],
            data.item_ids[data.items[ends[row]]],
        )
        for row in rows
    ]
    assert cases
    for case in cases:
        found = case.explanation
        shown = [one['item'] for one in found['history']]
        assert any(
            (case.user, found['too_old'] + len(shown), found['target']['item'])
            == (user, len(history), target)
            and history[-len(shown) :] == shown
            for user, history, target in known
        )


def test_more_epochs_are_those_of_an_uninterrupted_run(run, tmp_path):
    """The same run, resumed; its split comes from its flags.cfg."""
    argv = [*SASREC, f'--prepared={run}', *SPLIT]
    assert main([*argv, '--pretrain_epochs=2', f'--workdir={tmp_path}/whole']) == 0
    assert main([*argv, '--pretrain_epochs=1', f'--workdir={tmp_path}/resumed']) == 0
    argv = [f'--workdir={tmp_path}/resumed', '--progress=none', '--pretrain_epochs=2']
    assert main([*argv, '--stages=pretrain,evaluate']) == 0
    with (
        np.load(tmp_path / 'whole' / 'ranks.npz') as whole,
        np.load(tmp_path / 'resumed' / 'ranks.npz') as resumed,
    ):
        assert whole.files == resumed.files
        for name in whole.files:
            np.testing.assert_array_equal(whole[name], resumed[name])


def test_another_split_is_another_run(log, run, tmp_path, capsys):
    for more in (
        ['--split=leave_one_out', '--split_at=.9', '--split_targets=last'],
        ['--split_at=.5'],
    ):
        assert main([f'--workdir={run}', '--progress=none', '--stages=finetune', *more]) == 2
        assert 'holds another run: --split' in capsys.readouterr().err
    assert main([f'--workdir={run}', '--progress=none', '--stages=prepare', '--split_at=.80']) == 0
    # A backbone of leave one out has seen what is later here.
    argv = [*SMALL, f'--dataset={log}', f'--workdir={tmp_path}/a', '--stages=prepare,finetune']
    assert main([*argv, f'--backbone={run}']) == 2
    assert 'trained on other data' in capsys.readouterr().err


def test_runs_with_other_splits_share_prepared_data(log, run, tmp_path):
    shutil.copytree(run / 'dataset', tmp_path / 'data' / 'dataset')
    shutil.copy(run / 'flags.cfg', tmp_path / 'data')
    argv = [*SASREC, '--pretrain_epochs=1', f'--prepared={tmp_path}/data']
    assert main([*argv, f'--workdir={tmp_path}/one']) == 0
    assert main([*argv, *SPLIT, f'--workdir={tmp_path}/time']) == 0
    assert len(list((tmp_path / 'data').glob('item_graph*.npz'))) == 2
    one, time = (read_results(tmp_path / name) for name in ('one', 'time'))
    assert one['card']['split'].startswith('leave one out') and 'time_split' not in one['card']
    assert one['results']['item_graph']['test'] != time['results']['item_graph']['test']
    # Two tables, each with its own baselines; no figure of one split stands in the other's.
    found = tables.collect(*tables.read_runs([tmp_path / 'one', tmp_path / 'time']))['datasets']
    moment = time['card']['time_split']['moment']
    assert [*found] == ['shop.csv', f'shop.csv, split by time at {moment}, successive']
    for table, results in zip(found.values(), (one, time)):
        for row in table['rows']:
            name = {'popularity': 'popularity', 'item_graph': 'item_graph'}.get(
                row['model'], 'pretrain'
            )
            value = results['results'][name]['test']['masked']['ndcg@10']
            assert row['test']['masked']['ndcg@10']['values'] == [value]
    page = tables.markdown({'datasets': found})
    assert f'split by time at {moment}' in page and 'leave one out except' in page


def test_each_history_of_a_user_is_shuffled_by_itself():
    """Histories of 9, 10 and 11 items of one user overlap, and each keeps its last item."""
    items = np.arange(1, 17, dtype=np.int32)
    bounds = np.array([0, 0, 0, 12]), np.array([9, 10, 11, 15])
    found = graph_baseline._shuffle(item_graph.Histories(items, *bounds, items[bounds[1]]))
    rows = [found.items[a:b].tolist() for a, b in zip(found.starts, found.ends)]
    expected = [items[a:b].tolist() for a, b in zip(*bounds)]
    assert [sorted(row) for row in rows] == expected and rows != expected
    assert [row[-1] for row in rows] == [9, 10, 11, 15]
    assert found.targets.tolist() == [10, 11, 12, 16]
    alone = histories.shuffle_items(items, bounds[0][:1], bounds[1][:1])[:9]
    assert rows[0] == alone.tolist()


def test_a_sample_of_targets_selects(run, tmp_path):
    given = [f'--prepared={run}', *SPLIT, '--validation_users=5']
    context = open_run(tmp_path / 'new', *given)
    assert len(context.selection_users) == 5
    assert context.eval_batches['selection'].num_users == 5
    total = len(context.data.split.parts['validation'].users)
    assert context.describe_selection() == f'a fixed sample of 5 of {total} targets'


def test_logs_without_times_are_refused_and_nothing_is_written(tmp_path, capsys):
    (tmp_path / 'log.txt').write_text(''.join(f'{u} 1 2 3 4 5\n' for u in range(9)))
    for dataset in (tmp_path / 'log.txt', 'synthetic'):
        argv = ['--split=time', '--k_core=0', f'--dataset={dataset}', f'--workdir={tmp_path}/run']
        assert main([*argv, '--progress=none']) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert 'a split by time needs the times of the actions' in line
        assert not (tmp_path / 'run' / 'dataset').exists()


@pytest.mark.parametrize(
    'argv, words',
    [
        (['--split_at=.5'], '--split_at=0.5 has no effect where --split=leave_one_out'),
        (['--split_targets=successive'], 'has no effect'),
        (['--split=time', '--split_at=2'], 'give a share of all actions'),
        (['--split=time', '--split_at=soon'], 'give a share of all actions'),
        (['--split=when'], 'there is no such value'),
    ],
)
def test_mistakes_are_one_line(argv, words, tmp_path, capsys):
    assert main([*argv, f'--workdir={tmp_path}/run', '--progress=none']) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and not (tmp_path / 'run').exists()


def test_python_fits_and_evaluates_the_split(log, run, tmp_path):
    """The same run as of the command, and `evaluate` has the ranks of its ranks.npz."""
    data = Dataset.from_file(log, k_core=0).split_by_time(at=0.8, targets='successive')
    model = fj.SASRec(width=8, num_blocks=1)
    training = fj.Training(pretrain_epochs=1, row_length=16, max_length=6)
    found = fj.fit(data, model, training, workdir=tmp_path / 'run', progress='none')
    with np.load(found.workdir / 'ranks.npz') as ranks:
        for part in ('validation', 'test'):
            again = fj.evaluate(found.recommender, data, part)
            np.testing.assert_array_equal(again.masked, ranks[f'pretrain/{part}/masked'])
            assert len(again.masked) == len(data.split.parts[part].users)
    card = read_results(found.workdir)['card']
    assert card['time_split'] == data.split.card
    with pytest.raises(UserError, match=r'another run|another split'):
        plain = dataclasses.replace(data, time_split=None)
        fj.fit(plain, model, training, workdir=tmp_path / 'run', progress='none')


def append_month(log, folder):
    """(new.csv: each user has an action in January 2021, of items 1 to 13; both logs as one)."""
    lines = [f'u{user},{1 + user % 13},{START + (366 + user % 31) * DAY}' for user in range(USERS)]
    (folder / 'new.csv').write_text('\n'.join(['user,item,time', *lines]) + '\n')
    (folder / 'both.csv').write_text(log.read_text() + '\n'.join(lines) + '\n')
    return folder / 'new.csv', folder / 'both.csv'


def training_of(folder):
    """The training part of each user, by the ids of the log."""
    data = open_run(folder).data
    histories = unflatten(*data.training_histories())
    return dict(zip(data.user_ids, ([data.item_ids[i] for i in row] for row in histories)))


def test_an_update_of_a_share_moves_the_moment(log, run, tmp_path):
    new, both = append_month(log, tmp_path)
    folder = tmp_path / 'updated'
    argv = [f'--append={new}', f'--from={run}', f'--workdir={folder}', '--progress=none']
    assert main([*argv, '--finetune_epochs=1']) == 0
    training, parts, earlier = split_loop(both, 0.8)
    assert training_of(folder) == {f'u{u}': training.get(f'u{u}', []) for u in range(USERS)}
    context = open_run(folder)
    windows = make_windows(context)
    for start, length in zip(windows.starts, windows.lengths):
        assert context.data.times[start : start + length].max() < earlier
    found, before = (read_results(one)['card']['time_split'] for one in (folder, run))
    assert found['moment'] > before['moment'] and found['at'] == before['at'] == '0.8'
    for part, rows in parts.items():
        assert found[part]['targets'] == len(rows)


def test_an_update_of_a_date_needs_a_later_date(log, tmp_path, capsys):
    """Under the old date everything new would be a target."""
    new, both = append_month(log, tmp_path)
    first, folder = tmp_path / 'run', tmp_path / 'updated'
    split = ['--split=time', '--split_at=2020-10-01', '--split_targets=successive']
    assert main([*SASREC, *split, f'--dataset={log}', f'--workdir={first}']) == 0
    argv = [f'--append={new}', f'--from={first}', f'--workdir={folder}', '--progress=none']
    capsys.readouterr()
    for more in ([], ['--split_at=2020-09-01']):
        assert main([*argv, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert 'give a later --split_at' in line and not (folder / 'flags.cfg').exists()
    assert main([*argv, '--split_targets=last']) == 2
    assert 'leave out --split_targets=last' in capsys.readouterr().err
    options = {'workdir': folder, 'epochs': 1, 'progress': 'none', 'split_at': '2020-12-01'}
    found = fj.update(first, new, **options)
    december = START + (366 - 31) * DAY
    training, parts, _ = split_loop(both, moment=december)
    assert training_of(folder) == {f'u{u}': training.get(f'u{u}', []) for u in range(USERS)}
    card = read_results(found.workdir)['card']['time_split']
    assert card['at'] == '2020-12-01' and card['moment'].startswith('2020-12-01T00')
    for part, rows in parts.items():
        assert card[part]['targets'] == len(rows)
