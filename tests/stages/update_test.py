"""A run with new actions: its start, its windows, and that it is a run of its own."""

import hashlib
import json
import shutil

import jax
import numpy as np
import polars as pl
import pytest
from data_fixtures import make_dataset

import fame_jax as fj
from fame_jax import api, stages
from fame_jax.config import flags
from fame_jax.data.windows import Windows
from fame_jax.main import main
from fame_jax.stages import train, update_start
from fame_jax.stages.context import abstract_params
from fame_jax.training.step import Program

SASREC = [
    *('--progress=none', '--width=8', '--num_heads=2', '--num_blocks=1', '--model=sasrec'),
    *('--max_length=6', '--row_length=12', '--rows_per_step=4', '--steps_per_dispatch=2'),
    *('--pretrain_epochs=1', '--ema=.9', '--k_core=0'),
]
TINY = [*SASREC, '--model=fame', '--num_experts=2', '--finetune_epochs=1']
TRAIN = '--stages=update'  # without the stage evaluate
HEAD = 'user,item,time\n'
USERS, ITEMS = 24, 9


def log_text(rows):
    return HEAD + ''.join(f'{user},{item},{time}\n' for user, item, time in rows)


def first_rows():
    """Users u0.. walk round a ring of nine items; u0 begins at item 1."""
    return [
        (f'u{user}', f'i{(user + step) % ITEMS + 1}', 100 + step)
        for user in range(USERS)
        for step in range(5 + user % 6)
    ]


# u0 had items 1 to 5: item 10 comes after 5, then 6 and 7. The user n has three actions, the user
# w has two, of which one is item 11.
NEW = [('u0', 'i10', 200), ('u0', 'i6', 201), ('u0', 'i7', 202), ('u1', 'i3', 203)]
NEW += [('n', 'i1', 204), ('n', 'i2', 205), ('n', 'i3', 206), ('w', 'i4', 207), ('w', 'i11', 208)]
NEXT = [('w', 'i5', 300), ('u2', 'i12', 301), ('n', 'i4', 302)]


@pytest.fixture(scope='module')
def logs(tmp_path_factory):
    """The folder of old.csv, new.csv and next.csv."""
    folder = tmp_path_factory.mktemp('logs')
    for name, rows in (('old', first_rows()), ('new', NEW), ('next', NEXT)):
        (folder / f'{name}.csv').write_text(log_text(rows))
    return folder


@pytest.fixture(scope='module')
def old(logs):
    """A trained and evaluated FAME."""
    folder = logs / 'old'
    assert main([*TINY, f'--dataset={logs}/old.csv', f'--workdir={folder}']) == 0
    return folder


def update(logs, run, name, workdir, *more):
    """The exit code of a command that appends a log of `logs`."""
    flags = (f'--append={logs}/{name}.csv', f'--from={run}', f'--workdir={workdir}')
    return main([*flags, '--progress=none', *more])


@pytest.fixture(scope='module')
def updated(logs, old):
    """The run `old` with new.csv."""
    before = digests(old)
    folder = logs / 'updated'
    assert update(logs, old, 'new', folder) == 0
    assert digests(old) == before
    return folder


def digests(folder):
    """Path -> SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


def open_run(folder):
    """The run in a folder."""
    given = {'workdir': str(folder), 'stages': ('recommend',), 'progress': 'none'}
    return stages.open_run(flags.Given(given))


def read_trees(folder, stage='finetune'):
    """The best parameters and the optimizer's state of a run, as lists of (path, array)."""
    run = open_run(folder)
    module = run.module(stage)
    params = abstract_params(module)
    optimizer = train._make_optimizer(run, stage, module, 1)
    state = jax.eval_shape(optimizer.init, params)
    with run.checkpoints(stage) as checkpoints:
        trees = checkpoints.restore(best=params, params=params, optimizer=state)
    return {
        name: {
            jax.tree_util.keystr(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for name, tree in trees.items()
    }


def test_an_update_is_a_run_with_all_data(old, updated):
    """Its ids begin with those of the run; new users and items follow."""
    before, after = open_run(old).data, open_run(updated).data
    assert after.user_ids == [*before.user_ids, 'n']
    assert after.item_ids == [*before.item_ids, 'i10', 'i11']
    assert dict(after.histories())['u0'] == [f'i{n}' for n in (1, 2, 3, 4, 5, 10, 6, 7)]
    results = json.loads((updated / 'results.json').read_text())
    assert list(results['results']) == ['popularity', 'item_graph', 'finetune']
    assert 'updated' in results['results']['finetune']['model']
    (record,) = results['card']['dataset']['appended']
    assert record['waiting_actions'] == 2 and record['new_users'] == 1


def test_without_an_epoch_an_update_is_its_run_with_rows_for_new_items(logs, old, tmp_path):
    """Old rows and moments keep every bit; a new row is a mean, its moments are zeros.

    Item 10 is between 5 and 6 in the history of u0, and 6 is its validation target, which no row
    may know of; item 11 is after 4 in actions that wait.
    """
    assert update(logs, old, 'new', tmp_path / 'run', TRAIN, '--finetune_epochs=0') == 0
    before, after = read_trees(old), read_trees(tmp_path / 'run')
    number = {name: index for index, name in enumerate(open_run(tmp_path / 'run').data.item_ids)}
    for name, tree in before.items():
        counts = after[name].keys() - tree.keys()  # of the schedule, which begins
        assert len(counts) == (name == 'optimizer') and tree.keys() <= after[name].keys()
        assert not any(after[name][path] for path in counts)
        for path, leaf in tree.items():
            if name == 'params':
                leaf = before['best'][path]  # training goes on from the best epoch
            if name == 'optimizer' and '.params' in path:  # the average, likewise
                leaf = before['best'][path.partition('.params')[2]]
            found = after[name][path]
            if 'item_table' not in path:
                np.testing.assert_array_equal(found, leaf, err_msg=f'{name} {path}')
                continue
            np.testing.assert_array_equal(found[: len(leaf)], leaf, err_msg=f'{name} {path}')
            assert len(found) == len(leaf) + 2
            if name == 'optimizer' and '.params' not in path:
                assert not found[len(leaf) :].any()
            else:
                new, next_to = (
                    [number[name] for name in names] for names in (('i10', 'i11'), ('i5', 'i4'))
                )
                np.testing.assert_array_equal(found[new], leaf[next_to])
    moments = [path for path in before['optimizer'] if 'item_table' in path]
    assert len(moments) == 3 and all(before['optimizer'][path].any() for path in moments)


def test_windows_with_new_actions_are_all_trained_on_with_a_share_of_the_others(logs, old, updated):
    """Against a loop over all windows; the windows of an old and of a new action are known."""
    run = open_run(updated)
    run.config = run.config.replace(replay=0.4)
    windows = train.make_windows(run)
    chosen = [update_start.windows_by_epoch(run, windows)(epoch) for epoch in (0, 1)]
    items = [
        [windows.items[s : s + n].tolist() for s, n in zip(one.starts, one.lengths)]
        for one in chosen
    ]
    data, before = run.data, open_run(old).data
    number = {name: index for index, name in enumerate(data.item_ids)}
    has_new, others = [], 0
    for user, history in data.histories():
        known = before.user_ids.index(user) if user in before.user_ids else None
        old_length = max(before.lengths[known] - 2, 0) if known is not None else 0
        part = [number[item] for item in history[:-2]]
        for start in range(0, len(part) - 1, 6):
            stop = min(start + 7, len(part))
            if stop > old_length > -1 and stop > max(start + 1, old_length):
                has_new.append(part[max(0, stop - 7) : stop])
            else:
                others += 1
    assert len(has_new) == 2  # u0, and u1 whose former validation target is now trained on
    for found in items:
        assert all(window in found for window in has_new)
        assert len(found) == len(has_new) + round(0.4 * others)
    assert items[0] != items[1]  # another share


def test_the_share_of_old_windows(updated):
    run = open_run(updated)
    windows = train.make_windows(run)
    lengths = {}
    for replay in (0.0, 0.5, 1.0):
        run.config = run.config.replace(replay=replay)
        lengths[replay] = len(update_start.windows_by_epoch(run, windows)(0).starts)
    assert lengths[1.0] == len(windows.starts) and lengths[0.0] == 2
    assert lengths[0.5] == 2 + round((len(windows.starts) - 2) / 2)
    # Without a new action, one window keeps the epoch from being empty.
    np.save(updated / 'update' / 'all.npy', np.ones(len(run.data.items), bool))
    run.config = run.config.replace(replay=0.0)
    original = updated / 'update' / 'trained.npy'
    content = original.read_bytes()
    try:
        (updated / 'update' / 'all.npy').replace(original)
        assert len(update_start.windows_by_epoch(run, windows)(0).starts) == 1
    finally:
        original.write_bytes(content)


def test_a_long_window_with_new_actions_reaches_back(tmp_path):
    """A history of 15 with 13 to train on, of which 12 were: its last window has 7 items."""

    class Run:
        folder, config = tmp_path, open_tiny_config()

        class data:
            offsets = np.array([0, 15, 20])

    (tmp_path / 'update').mkdir()
    trained = np.arange(20) != 12
    np.save(tmp_path / 'update' / 'trained.npy', trained)
    windows = Windows(np.arange(20), np.array([0, 6, 12 - 1, 15]), np.array([7, 6, 2, 3]))
    found = update_start.windows_by_epoch(Run, windows)(0)
    assert list(zip(found.starts, found.lengths)) == [(6, 7)]


def test_targets_that_were_trained_on_are_refused():
    """Of two histories of 4, places 2 and 6 are validation targets, 3 and 7 test targets."""
    data = make_dataset([1, 2, 3, 4], [4, 3, 2, 1])
    trained = np.zeros(8, bool)
    trained[[0, 1, 4, 5]] = True
    update_start.refuse_trained_targets(data, trained, 'runs/a')
    trained[7] = True
    with pytest.raises(fj.UserError, match='1 test targets of the new data set are training data'):
        update_start.refuse_trained_targets(data, trained, 'runs/a')


def open_tiny_config():
    return flags.complete(flags.parse([*TINY, '--append=a', '--from=b', '--replay=0']), {}, {})


class Kill(BaseException):
    """Ends a command as a kill does."""


@pytest.mark.parametrize('moment', ['data', 'block'])
def test_a_killed_update_goes_on_to_the_same_bits(
    moment, logs, old, updated, tmp_path, monkeypatch
):
    workdir, calls, take_block = tmp_path / 'run', [], Program.__call__

    def kill_before(*args):
        calls.append(1)
        if len(calls) == 2:
            raise Kill
        return take_block(*args)

    def kill(*_):
        raise Kill

    with monkeypatch.context() as patch:
        if moment == 'data':
            patch.setattr('fame_jax.data.dataset.Dataset.save', kill)
        else:
            patch.setattr(Program, '__call__', kill_before)
        with pytest.raises(Kill):
            update(logs, old, 'new', workdir, TRAIN, '--checkpoint_seconds=0')
    assert update(logs, old, 'new', workdir, TRAIN, '--checkpoint_seconds=0') == 0
    trees, expected = read_trees(workdir), read_trees(updated)
    for name, tree in expected.items():
        for path, leaf in tree.items():
            np.testing.assert_array_equal(trees[name][path], leaf, err_msg=f'{name} {path}')
    for name in ('items.npy', 'offsets.npy', 'ids.json'):
        assert (workdir / 'dataset' / name).read_bytes() == (
            updated / 'dataset' / name
        ).read_bytes()


def test_an_update_of_an_update(logs, updated, tmp_path):
    """The actions that waited are those of a user now; ids still keep their numbers."""
    before = digests(updated)
    assert update(logs, updated, 'next', tmp_path / 'run', TRAIN, '--finetune_epochs=1') == 0
    assert digests(updated) == before
    first, second = open_run(updated).data, open_run(tmp_path / 'run').data
    assert second.user_ids == [*first.user_ids, 'w']
    assert second.item_ids == [*first.item_ids, 'i12']
    assert dict(second.histories())['w'] == ['i4', 'i11', 'i5']
    assert [one['source'] for one in second.card['appended']] == ['new.csv', 'next.csv']
    # Limits of an update, and twice the rate and the rows of its run, which the next one keeps.
    for folder in (updated, tmp_path / 'run'):
        values = flags.read(folder / 'flags.cfg')
        names = 'finetune_learning_rate', 'patience', 'schedule', 'rows_per_step', 'ema', 'width'
        assert [values[name] for name in names] == [0.002, 3, 'cosine', 8, 0.9, 8]
        assert values['replay'] == 1
    recorded = update_start.read_record(tmp_path / 'run')
    assert recorded['run'] == str(updated) and recorded['waiting_actions'] == 0


def test_other_stages_use_an_update(logs, updated, tmp_path):
    """New users get lists, new items are in the catalogue, of the run and of its export."""
    folder = tmp_path / 'copy'
    shutil.copytree(updated, folder)
    used = f'--workdir={folder}', '--progress=none'
    lists = [*used, '--stages=evaluate,recommend,report', '--top_k=3', f'--out={tmp_path}']
    assert main(lists) == 0
    lines = (tmp_path / 'recommendations.jsonl').read_text().splitlines()
    assert 'n' in [json.loads(line)['user'] for line in lines] and len(lines) == USERS + 1
    assert main([*used, '--stages=export', f'--out={tmp_path}/export']) == 0
    for place in (folder, tmp_path / 'export'):
        recommender = fj.load(place)
        answer = recommender.recommend(['i10', 'i11'], k=12)
        assert not answer.unknown and not answer.fallback
        assert set(recommender.item_ids[1:]) == {f'i{n}' for n in range(1, 12)}
    ready = digests(folder)
    assert main([f'--workdir={folder}', '--stages=update', '--progress=none']) == 0
    assert digests(folder) == ready  # finished before


def test_another_run_from_scratch_on_the_same_data(updated, tmp_path):
    """--prepared takes the data of an update and not the update."""
    argv = [*SASREC, f'--prepared={updated}', f'--workdir={tmp_path}/scratch']
    assert main([*argv, '--stages=prepare']) == 0
    text = (tmp_path / 'scratch' / 'flags.cfg').read_text()
    assert '--append' not in text and '--from' not in text


MISTAKES = {
    'no run': ('--from={logs}', ['--from={logs} is no run']),
    'no folder': ('--from={logs}/none', ['there is no such folder']),
    'no log': ('--append={logs}/none.csv', ['none.csv', 'No such file']),
    'itself': ('--workdir={old}', ['is in the run of --from']),
    'inside': ('--workdir={old}/more', ['is in the run of --from']),
    'own log': ('--append={logs}/old.csv', ['is the log that', 'was prepared from']),
    'a model': ('--width=16', ['an update keeps the settings of its run', '--width=16']),
    'data': ('--k_core=5', ['an update keeps the settings of its run', '--k_core=5']),
    'a stage': ('--stages=pretrain', ['--stages=pretrain is not for', 'update and evaluate']),
    'seeds': ('--seeds=0,1', ['--seeds=0,1 is not for --append']),
    'columns': ('--append={logs}/columns.csv', ["no column 'time'", 'read as the log of the run']),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(mistake, logs, old, tmp_path, capsys):
    (logs / 'columns.csv').write_text(log_text(NEW).replace('time', 'moment'))
    flag, parts = MISTAKES[mistake]
    flag = flag.format(logs=logs, old=old)
    before = digests(logs)
    assert update(logs, old, 'new', tmp_path / 'run', flag) == 2
    line = capsys.readouterr().err
    assert line.startswith('error: ') and line.count('\n') == 1
    for part in parts:
        assert part.format(logs=logs) in line
    assert digests(logs) == before and not (tmp_path / 'run').exists()


def test_one_flag_without_the_other(logs, old, tmp_path, capsys):
    for flag, other in ((f'--append={logs}/new.csv', '--from=RUN'), (f'--from={old}', '--append')):
        assert main([flag, f'--workdir={tmp_path}/run', '--progress=none']) == 2
        assert f'only together with {other}' in capsys.readouterr().err
    argv = [f'--append={logs}/new.csv', f'--from={old}', '--progress=none']
    assert main(argv) == 2
    assert '--append needs a folder for the updated run' in capsys.readouterr().err
    assert main([*argv, f'--workdir={tmp_path}/run', '--split_at=.5']) == 2
    assert '--split_at=.5: the run of --from has --split=leave_one_out' in capsys.readouterr().err
    assert main(['--stages=update', f'--workdir={tmp_path}/run', '--progress=none']) == 2
    assert 'needs new actions and the run' in capsys.readouterr().err


def test_a_second_log_in_the_same_folder_is_refused(logs, old, updated, capsys):
    before = digests(updated)
    assert update(logs, old, 'next', updated) == 2
    assert 'holds another run: --append=' in capsys.readouterr().err
    changed = logs / 'changed.csv'
    changed.write_text(log_text(NEW))
    assert update(logs, old, 'changed', logs / 'run2', TRAIN, '--finetune_epochs=0') == 0
    changed.write_text(log_text(NEXT))
    capsys.readouterr()
    assert update(logs, old, 'changed', logs / 'run2', TRAIN, '--finetune_epochs=0') == 2
    assert 'is not the log that' in capsys.readouterr().err
    assert digests(updated) == before


def test_a_log_is_appended_once(logs, updated, tmp_path, capsys):
    assert update(logs, updated, 'new', tmp_path / 'run') == 2
    assert 'new.csv was appended before' in capsys.readouterr().err


def test_a_run_that_has_changed_since_is_refused(logs, old, tmp_path, monkeypatch, capsys):
    """An update is killed before its first checkpoint, and its run was trained further."""

    def kill(*_):
        raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(train, 'init_state', kill)
        with pytest.raises(Kill):
            update(logs, old, 'new', tmp_path / 'run', TRAIN)
    path = tmp_path / 'run' / 'update' / 'update.json'
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {'step': record['step'] - 1}))
    assert update(logs, old, 'new', tmp_path / 'run', TRAIN) == 2
    assert 'has changed since' in capsys.readouterr().err
    path.write_text('{}')
    assert update(logs, old, 'new', tmp_path / 'run', TRAIN) == 2
    assert 'update.json is damaged' in capsys.readouterr().err


def test_a_new_item_starts_from_its_text(logs, tmp_path, monkeypatch):
    """Item 10 has the text of item 3; item 11 has none, and follows item 4 in its history."""
    words = ['red shoe', 'blue hat', 'green coat', 'old lamp', 'new desk', 'tall tree']
    words += ['cold milk', 'warm bread', 'sweet cake', 'green coat', '']
    rows = [f'i{n},{text}\n' for n, text in enumerate(words, 1)]
    (tmp_path / 'items.csv').write_text('item,title\n' + ''.join(rows))
    text = ['--item_init=text', '--facets=instance', '--text_options=epochs=1']
    text += [f'--items={tmp_path}/items.csv', f'--dataset={logs}/old.csv']
    stages = '--stages=prepare,text,pretrain'
    assert main([*SASREC, *text, f'--workdir={tmp_path}/run', stages]) == 0
    monkeypatch.setattr(update_start, 'NEAREST', 1)
    no_epoch = TRAIN, '--pretrain_epochs=0'
    assert update(logs, tmp_path / 'run', 'new', tmp_path / 'next', *no_epoch) == 0
    before = read_trees(tmp_path / 'run', 'pretrain')['best']["['item_table']"]
    after = read_trees(tmp_path / 'next', 'pretrain')['best']["['item_table']"]
    number = {name: index for index, name in enumerate(open_run(tmp_path / 'next').data.item_ids)}
    np.testing.assert_array_equal(after[number['i10']], before[number['i3']])
    np.testing.assert_array_equal(after[number['i11']], before[number['i4']])


def frame(rows):
    """Rows of a log as a frame."""
    return pl.DataFrame(rows, schema=['user', 'item', 'time'], orient='row')


def test_an_update_in_python(tmp_path):
    """The update of a result, and of its folder; the same call goes on with the same run."""
    data = fj.Dataset.from_frame(frame(first_rows()), k_core=0)
    training = fj.Training(pretrain_epochs=1, max_length=6, row_length=12)
    model = fj.SASRec(width=8, num_blocks=1)
    result = fj.fit(data, model, training, workdir=tmp_path / 'run', progress='none')
    new = frame(NEW)
    after = result.update(new, epochs=1, progress='none')
    assert after.workdir.parent == tmp_path and after.workdir.name.startswith('run_')
    assert 'i10' in after.recommender.item_ids
    again = fj.update(result.workdir, new, epochs=1, progress='none')
    assert (again.workdir, again.metrics) == (after.workdir, after.metrics)
    with pytest.raises(fj.UserError, match='is not the log'):
        fj.update(result.workdir, frame(NEXT), workdir=again.workdir, progress='none', epochs=1)


def test_several_seeds_are_updated_one_by_one(tmp_path, monkeypatch):
    calls = []

    def update_one(run, actions, *, workdir, **more):
        calls.append((run, workdir))
        workdir.mkdir(parents=True)
        (workdir / 'results.json').write_text('{"card": {"select_on": "masked"}}')
        value = {'masked': {'ndcg@20': float(run.name[-1])}}
        metrics = {'validation': value, 'test': value}
        return api.FitResult(metrics, {}, {}, [], workdir, f'of {run.name}')

    monkeypatch.setattr(api, 'update', update_one)
    runs = [api.FitResult({}, {}, {}, [], tmp_path / f'seed_{n}', None) for n in (1, 3)]
    result = api.FitResult({}, {}, {}, [], tmp_path, None, runs=tuple(runs))
    after = result.update(frame(NEW), workdir=tmp_path / 'new')
    folders = [tmp_path / 'new' / f'seed_{n}' for n in (1, 3)]
    assert calls == [(tmp_path / f'seed_{n}', path) for n, path in zip((1, 3), folders)]
    assert after.metrics['test']['masked']['ndcg@20'] == 2 and after.recommender == 'of seed_3'
    assert [run.workdir for run in after.runs] == folders


def test_a_run_with_a_text_path_is_refused(logs, old, tmp_path, capsys):
    """Its map would need the text vectors of new items, which such a run does not have."""
    run = tmp_path / 'run'
    shutil.copytree(old, run)
    lines = (run / 'flags.cfg').read_text().splitlines()
    lines = [line for line in lines if not line.startswith('--text_path')]
    (run / 'flags.cfg').write_text('\n'.join([*lines, '--text_path=0.5', '']))
    assert update(logs, run, 'new', tmp_path / 'updated') == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error')]
    assert '--text_path cannot be updated' in line
    assert not (tmp_path / 'updated' / 'dataset').exists()
