"""Files of a run are written whole or not at all; a line that a kill cut short is ignored."""

import errno
import fcntl
import json
import os
import threading

import pytest

from fame_jax import run_dir
from fame_jax.errors import UserError


def names(folder):
    return sorted(os.listdir(folder))


def one_line(error):
    message = str(error.value)
    assert '\n' not in message
    return message


def test_an_atomic_write_replaces_the_file_at_its_end(tmp_path):
    path = tmp_path / 'a.bin'
    with run_dir.atomic_write(path) as file:
        file.write(b'one')
        assert not path.exists()
    assert path.read_bytes() == b'one'
    with run_dir.atomic_write(path) as file:
        file.write(b'two')
        file.flush()
        assert path.read_bytes() == b'one'
    assert path.read_bytes() == b'two'
    assert names(tmp_path) == ['a.bin']
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize('fault', [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize('exists', [True, False])
def test_a_failed_write_leaves_the_old_file(tmp_path, fault, exists):
    path = tmp_path / 'a.json'
    if exists:
        path.write_text('old')
    with pytest.raises(fault), run_dir.atomic_write(path) as file:
        file.write(b'half')
        raise fault
    assert names(tmp_path) == (['a.json'] if exists else [])
    assert not exists or path.read_text() == 'old'


def test_a_full_disk_is_an_error_with_advice(tmp_path, monkeypatch):
    path = tmp_path / 'a.json'
    path.write_text('old')

    def full(handle):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError) as error:
        run_dir.write_json(path, {'new': 1})
    message = one_line(error)
    assert str(path) in message and 'No space left' in message and 'free some space' in message
    assert names(tmp_path) == ['a.json']
    assert path.read_text() == 'old'


def test_a_missing_folder_or_a_folder_of_that_name_is_an_error(tmp_path):
    with pytest.raises(UserError) as error:
        run_dir.write_text(tmp_path / 'missing' / 'a', 'x')
    assert 'No such file or directory' in one_line(error)
    (tmp_path / 'folder').mkdir()
    with pytest.raises(UserError) as error:
        run_dir.write_text(tmp_path / 'folder', 'x')
    assert str(tmp_path / 'folder') in one_line(error)
    assert names(tmp_path) == ['folder']
    assert names(tmp_path / 'folder') == []


def test_json_round_trip(tmp_path):
    path = tmp_path / 'a.json'
    value = {'a': [1, 2.5, None, True], 'é': {'x': 'ü'}}
    run_dir.write_json(path, value)
    assert run_dir.read_json(path) == value
    assert path.read_text().endswith('}\n')


def test_json_with_nan_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / 'a.json'
    run_dir.write_json(path, 1)
    with pytest.raises(ValueError):
        run_dir.write_json(path, {'loss': float('nan')})
    assert run_dir.read_json(path) == 1
    assert names(tmp_path) == ['a.json']


def test_half_a_character_is_refused_and_the_older_file_stays(tmp_path):
    (tmp_path / 'a.txt').write_text('old')
    with pytest.raises(UserError) as error:
        run_dir.write_text(tmp_path / 'a.txt', 'title: \ud83d!')
    assert "half a character in 'title: \\ud83d!'" in one_line(error)
    assert (tmp_path / 'a.txt').read_text() == 'old'
    assert names(tmp_path) == ['a.txt']


@pytest.mark.parametrize('content', [b'[' * 100_000, b'', b'{"a": 1', b'\x00\x00', b'\xff\xfe{}'])
def test_a_file_that_is_not_json_is_an_error(tmp_path, content):
    path = tmp_path / 'a.json'
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        run_dir.read_json(path)
    assert str(path) in one_line(error) and 'not JSON' in str(error.value)


def test_a_missing_json_file_is_an_error(tmp_path):
    for path in (tmp_path / 'a.json', tmp_path):
        with pytest.raises(UserError) as error:
            run_dir.read_json(path)
        assert str(path) in one_line(error)


@pytest.fixture
def metrics(tmp_path):
    return run_dir.Metrics(tmp_path / 'metrics.jsonl')


def test_metrics_are_read_as_they_were_appended(metrics):
    assert metrics.read() == []
    lines = [{'stage': 'pretrain', 'step': i, 'loss': 1 / (i + 1)} for i in range(3)]
    for line in lines:
        metrics.append(**line)
    assert metrics.read() == lines
    assert metrics.path.read_text().count('\n') == 3
    assert run_dir.Metrics(metrics.path).read() == lines


def test_nan_and_infinity_become_null(metrics):
    metrics.append(loss=float('nan'), high=float('inf'), low=-float('inf'), fine=0.5, name='nan')
    text = metrics.path.read_text()
    assert 'NaN' not in text and 'Infinity' not in text
    (line,) = metrics.read()
    assert line == {'loss': None, 'high': None, 'low': None, 'fine': 0.5, 'name': 'nan'}


def test_a_line_cut_short_anywhere_is_ignored(metrics):
    first, second = {'stage': 'pretrain', 'epoch': 1}, {'stage': 'pretrain', 'epoch': 23}
    metrics.append(**first)
    whole = len(metrics.path.read_bytes())
    metrics.append(**second)
    content = metrics.path.read_bytes()
    for size in range(whole, len(content) + 1):
        metrics.path.write_bytes(content[:size])
        # A last line that lacks only its newline is complete.
        lines = [first, second] if size >= len(content) - 1 else [first]
        assert metrics.read() == lines, content[:size]
    metrics.path.write_bytes(content[:whole] + b'\x00\xff\xfe')
    assert metrics.read() == [first]


def test_a_resumed_run_appends_after_a_cut_line(metrics):
    metrics.append(epoch=1)
    metrics.append(epoch=2)
    metrics.path.write_bytes(metrics.path.read_bytes()[:-3])
    metrics.keep(lambda line: True)
    assert metrics.path.read_text() == '{"epoch": 1}\n'
    metrics.append(epoch=2)
    assert metrics.read() == [{'epoch': 1}, {'epoch': 2}]


def test_keep_drops_the_other_lines(metrics):
    for stage in ('pretrain', 'finetune'):
        for epoch in range(3):
            metrics.append(stage=stage, epoch=epoch, loss=float('nan'))
    metrics.keep(lambda line: line['stage'] != 'finetune' or line['epoch'] <= 1)
    kept = [(line['stage'], line['epoch']) for line in metrics.read()]
    assert kept == [('pretrain', e) for e in range(3)] + [('finetune', e) for e in range(2)]
    for line in metrics.path.read_text().splitlines():
        assert json.loads(line)['loss'] is None
    assert names(metrics.path.parent) == ['metrics.jsonl']


def test_keep_creates_the_file(metrics):
    metrics.keep(lambda line: True)
    assert metrics.path.read_text() == ''


def test_metrics_that_cannot_be_written_are_an_error(tmp_path):
    metrics = run_dir.Metrics(tmp_path / 'missing' / 'metrics.jsonl')
    with pytest.raises(UserError) as error:
        metrics.append(step=1)
    assert str(metrics.path) in one_line(error)


def test_only_one_process_trains_in_a_folder(tmp_path):
    with (
        run_dir.lock(tmp_path),
        pytest.raises(UserError, match='another process'),
        run_dir.lock(tmp_path),
    ):
        pass
    with run_dir.lock(tmp_path):
        pass


def test_the_lock_makes_folders_and_leaves_no_empty_ones(tmp_path):
    folder = tmp_path / 'runs' / 'a' / 'b'
    with run_dir.lock(folder):
        assert names(folder) == ['.lock']
    assert names(tmp_path) == []
    with run_dir.lock(folder):
        (folder / 'flags.cfg').touch()
    assert names(folder) == ['flags.cfg']
    with pytest.raises(ZeroDivisionError), run_dir.lock(tmp_path / 'mine'):
        raise ZeroDivisionError
    assert names(tmp_path) == ['runs']
    (tmp_path / 'mine').mkdir()
    with run_dir.lock(tmp_path / 'mine'):
        pass
    assert names(tmp_path / 'mine') == []  # a folder that was there before stays


def test_a_file_that_the_process_before_removes_locks_nothing(tmp_path, monkeypatch):
    """The other process ends between the opening of the file and its lock."""
    lock_file, removed = fcntl.flock, []

    def remove_and_lock(file, operation):
        if not removed:
            removed.append((tmp_path / 'run' / '.lock').unlink())
            (tmp_path / 'run').rmdir()
        lock_file(file, operation)

    monkeypatch.setattr(fcntl, 'flock', remove_and_lock)
    with run_dir.lock(tmp_path / 'run'):
        assert removed and names(tmp_path / 'run') == ['.lock']
        with pytest.raises(UserError, match='another process'), run_dir.lock(tmp_path / 'run'):
            pass


def test_one_of_many_threads_is_inside_at_a_time(tmp_path):
    folder, inside, entered, faults = tmp_path / 'a' / 'run', [], [], []

    def work():
        for _ in range(200):
            try:
                with run_dir.lock(folder):
                    inside.append(1)
                    if len(inside) != 1 or names(folder) != ['.lock']:
                        faults.append((len(inside), names(folder)))
                    entered.append(inside.pop())
            except UserError as error:
                faults.extend([] if 'another process' in str(error) else [str(error)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == [] and entered
    assert not (folder / '.lock').exists()


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
    (tmp_path / 'file').touch()
    for path in ('link', 'link/run', 'file', 'file/run'):
        with pytest.raises(UserError) as error, run_dir.lock(tmp_path / path):
            pass
        assert str(tmp_path / path) in one_line(error)
    assert names(tmp_path) == ['file', 'link']


def make(folder, *files):
    """Empty files below a folder, which is made."""
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


DATA = ('flags.cfg', 'dataset/dataset.json', 'item_graph.npz')


@pytest.mark.parametrize(
    'files, expected',
    [
        ([], {}),
        (DATA, {}),
        (['checkpoints/pretrain/.tmp'], {}),
        (['checkpoints/pretrain/12/best'], {'run': 'a single run'}),
        (['results.json'], {'run': 'a single run'}),
        (['seed_10/flags.cfg', 'seed_2/a'], {'seeds': 'runs of the seeds 2, 10'}),
        (['seed_7/flags.cfg'], {'seeds': 'the run of seed 7'}),
        (['seed_x/flags.cfg', 'seed_1', 'more/flags.cfg'], {}),
        (['dropout=0.1,ema=0.9/flags.cfg'], {'sweep': 'a sweep'}),
        (['dropout=0.1/seed_3/flags.cfg'], {'sweep': 'a sweep'}),
        (['setting_2/flags.cfg'], {'sweep': 'a sweep'}),
        (['sweep.json'], {'sweep': 'a sweep'}),
        (['dropout=0.1/notes.txt', 'setting_2/x'], {}),
        (['trial_0/flags.cfg'], {'search': 'a search'}),
        (['study.log', 'sweep.json'], {'search': 'a search'}),
        (
            ['results.json', 'seed_0/flags.cfg', 'seed_1/flags.cfg', 'sweep.json'],
            {'run': 'a single run', 'seeds': 'runs of the seeds 0, 1', 'sweep': 'a sweep'},
        ),
    ],
)
def test_what_a_folder_holds(tmp_path, files, expected):
    assert run_dir.contents(make(tmp_path, *files)) == expected
    assert run_dir.contents(make(tmp_path, *DATA)) == expected


SINGLE, OF_SEEDS = ['checkpoints/pretrain/1/best'], ['seed_0/a', 'seed_3/a']
SWEPT, SEARCHED = ['dropout=0.1/flags.cfg'], ['study.log']


@pytest.mark.parametrize(
    'files, kind, words',
    [
        (OF_SEEDS, 'run', 'runs of the seeds 0, 3; choose another --workdir, or add --seeds=0,3'),
        (OF_SEEDS, 'sweep', 'of the seeds 0, 3; choose another --workdir, or leave --sweep out'),
        (OF_SEEDS, 'search', 'runs of the seeds 0, 3; choose another --workdir'),
        (SINGLE, 'seeds', 'a single run; choose another --workdir, or leave --seeds out'),
        (SINGLE, 'sweep', 'a single run; choose another --workdir, or leave --sweep out'),
        (SINGLE, 'search', 'a single run; choose another --workdir'),
        (SWEPT, 'run', 'a sweep; choose another --workdir, or add its --sweep'),
        (SWEPT, 'seeds', 'a sweep; choose another --workdir, or add its --sweep'),
        (SWEPT, 'search', 'a sweep; choose another --workdir'),
        (SEARCHED, 'sweep', 'a search; choose another --workdir'),
        (SEARCHED, 'run', 'a search; choose another --workdir'),
        (SINGLE, 'run', ''),
        (OF_SEEDS, 'seeds', ''),
        ([*SINGLE, *OF_SEEDS], 'run', ''),  # of an earlier version: each can go on
        ([*SINGLE, *OF_SEEDS], 'seeds', ''),
        ([], 'sweep', ''),
        (DATA, 'seeds', ''),
    ],
)
def test_a_folder_holds_runs_of_one_kind(tmp_path, files, kind, words):
    make(tmp_path, *files)
    if not words:
        assert run_dir.refuse_other_kind(tmp_path, kind) is None
        return
    with pytest.raises(UserError) as error:
        run_dir.refuse_other_kind(tmp_path, kind)
    assert one_line(error).startswith(f'{tmp_path} holds ') and one_line(error).endswith(words)


@pytest.mark.parametrize(
    'files, words',
    [
        (OF_SEEDS, 'runs of several seeds; name one of them, such as {}/seed_0'),
        (SWEPT, 'runs of a sweep; name one of them, such as {}/dropout=0.1'),
        (['a=1/seed_4/b'], 'runs of a sweep; name one of them, such as {}/a=1/seed_4'),
        (['trial_1/flags.cfg'], 'runs of a search; name one of them, such as {}/trial_1'),
        (SEARCHED, 'runs of a search; name one of them'),
    ],
)
def test_several_runs_are_named_in_the_place_of_one(tmp_path, files, words):
    make(tmp_path, *files)
    words = words.format(tmp_path)
    assert str(run_dir.several_runs(tmp_path)) == f'{tmp_path} holds {words}'
    assert str(run_dir.several_runs(tmp_path, '--from=x')) == f'--from=x holds {words}'
    assert run_dir.several_runs(make(tmp_path, *SINGLE)) is None
    assert run_dir.several_runs(tmp_path / 'none') is None


def test_the_run_of_a_seed_belongs_below_those_of_other_seeds(tmp_path):
    make(tmp_path, *SINGLE)
    for name in ('seed_x', 'other'):
        assert run_dir.check_single(tmp_path / name, ()) is None
    with pytest.raises(UserError, match=f'{tmp_path} holds a single run; .* leave --seeds out'):
        run_dir.check_single(tmp_path / 'seed_1', ())
    make(tmp_path / 'seed_1', 'flags.cfg')
    assert run_dir.check_single(tmp_path / 'seed_1', ()) is None


def test_prepared_data_are_shared_with_every_kind(tmp_path):
    make(tmp_path, *OF_SEEDS)
    assert run_dir.check_single(tmp_path, ['prepare']) is None
    for stages in ([], ['prepare', 'pretrain'], ['text'], ['finetune'], ['update', 'evaluate']):
        with pytest.raises(UserError, match='or add --seeds=0,3'):
            run_dir.check_single(tmp_path, stages)
    for stage in ('recommend', 'similar', 'explain', 'export', 'report'):
        with pytest.raises(UserError, match=r'holds runs of several seeds; name .*/seed_0$'):
            run_dir.check_single(tmp_path, [stage])
    with pytest.raises(UserError, match=r'several seeds; name .*/seed_0, or add --seeds=0,3$'):
        run_dir.check_single(tmp_path, ['evaluate', 'report'])
