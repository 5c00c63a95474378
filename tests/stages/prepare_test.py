"""The stage prepare in a run's folder: all or nothing, changed logs, shared data."""

import contextlib
import errno
import json
import os

import pytest
from run_fixtures import SMALL_RUN, sequence_text

from fame_jax import stages
from fame_jax.config import flags
from fame_jax.data import prepare as data_prepare
from fame_jax.data.dataset import Dataset
from fame_jax.errors import UserError
from fame_jax.main import main

QUICK = ['--progress=lines', '--k_core=0', '--stages=prepare']


def run(*argv):
    return main([*QUICK, *map(str, argv)])


def files(folder):
    """Every path below a folder, with the bytes of files."""
    return {p: p.is_file() and p.read_bytes() for p in sorted(folder.rglob('*'))}


def refused(capsys, *argv):
    """The line with which main refuses a command; nothing else is an error."""
    capsys.readouterr()
    assert run(*argv) == 2
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith('error: ')]
    assert len(errors) == 1
    return errors[0]


@pytest.fixture
def log(tmp_path):
    path = tmp_path / 'log.txt'
    path.write_text(sequence_text())
    return path


# A log that has changed.


def test_a_changed_log_is_refused_and_nothing_changes(log, tmp_path, capsys):
    argv = [f'--dataset={log}', f'--workdir={tmp_path / "run"}']
    assert run(*argv) == 0
    before = files(tmp_path / 'run')
    log.write_text(sequence_text(users=31))
    line = refused(capsys, *argv)
    assert str(log) in line and 'has changed since' in line and '--workdir' in line
    assert files(tmp_path / 'run') == before
    # Of the same size, which only its hash shows.
    log.write_text(sequence_text().replace('6\n', '5\n'))
    assert 'has changed since' in refused(capsys, *argv)
    log.write_text(sequence_text())
    assert run(*argv) == 0


def test_a_log_with_another_time_is_hashed_and_one_with_the_same_is_not(
    log, tmp_path, capsys, monkeypatch
):
    argv = [f'--dataset={log}', f'--workdir={tmp_path / "run"}']
    assert run(*argv) == 0
    os.utime(log, ns=(1, 1))
    assert run(*argv) == 0
    monkeypatch.setattr(
        'fame_jax.data.changes.describe_files',
        lambda path: json.loads((tmp_path / 'run/dataset/dataset.json').read_text())['files'],
    )
    log.write_text('another content')
    assert run(*argv) == 0  # number, size and time of the files are as before


def test_a_log_that_is_no_longer_there_is_not_needed(log, tmp_path):
    argv = [f'--dataset={log}', f'--workdir={tmp_path / "run"}']
    assert run(*argv) == 0
    log.unlink()
    assert run(*argv) == 0


def test_a_changed_log_is_said_where_only_the_prepared_data_are_used(log, tmp_path, capsys):
    workdir = f'--workdir={tmp_path / "run"}'
    assert run(f'--dataset={log}', workdir) == 0
    log.write_text(sequence_text(users=31))
    capsys.readouterr()
    with contextlib.closing(stages.open_run(flags.parse([workdir, '--stages=pretrain']))) as later:
        assert later.data.num_users == 30
    error = capsys.readouterr().err
    assert f'warning: {log} has changed since' in error and 'prepared data are used' in error


def test_a_log_that_changes_while_it_is_read(log, tmp_path, capsys, monkeypatch):
    read = data_prepare.prepare

    def read_and_append(*args, **options):
        data = read(*args, **options)
        log.write_text(sequence_text(users=31))
        return data

    monkeypatch.setattr(data_prepare, 'prepare', read_and_append)
    line = refused(capsys, f'--dataset={log}', f'--workdir={tmp_path / "run"}')
    assert 'has changed while it was read' in line
    assert not (tmp_path / 'run').exists()


# All or nothing.


@pytest.mark.parametrize('inside', ['run', 'runs/mine/run'])
def test_a_failed_prepare_leaves_no_folder(inside, tmp_path, capsys):
    (tmp_path / 'log.csv').write_text('a,b\n1,2\n')
    before = files(tmp_path)
    refused(capsys, f'--dataset={tmp_path / "log.csv"}', f'--workdir={tmp_path / inside}')
    assert files(tmp_path) == before


def test_a_prepare_that_cannot_be_written_binds_nothing(log, tmp_path, capsys, monkeypatch):
    def full(self, folder):
        raise OSError(errno.ENOSPC, 'No space left on device')

    (tmp_path / 'run').mkdir()
    workdir = f'--workdir={tmp_path / "run"}'
    with monkeypatch.context() as patch:
        patch.setattr(Dataset, 'save', full)
        with pytest.raises(OSError):
            run(f'--dataset={log}', '--min_rating=0', '--seed=3', workdir)
    assert list((tmp_path / 'run').iterdir()) == []
    assert run('--dataset=synthetic', '--synthetic=users=50,items=40', workdir) == 0
    card = json.loads((tmp_path / 'run/dataset/dataset.json').read_text())
    assert card['users'] == 50
    assert flags.read(tmp_path / 'run/flags.cfg')['seed'] == 0


def test_flags_of_a_killed_prepare_do_not_filter_another_data_set(log, tmp_path):
    """A kill between flags.cfg and the data leaves the flags alone."""
    workdir = tmp_path / 'run'
    workdir.mkdir()
    (workdir / 'flags.cfg').write_text('--dataset=other.csv\n--k_core=9\n--min_rating=4\n')
    assert (
        main(['--progress=none', '--stages=prepare', f'--dataset={log}', f'--workdir={workdir}'])
        == 0
    )
    values = flags.read(workdir / 'flags.cfg')
    assert (values['k_core'], values['min_rating']) == (5, 0)


USES = ['text', 'pretrain', 'finetune', 'evaluate']
USES += ['recommend', 'similar', 'explain', 'export', 'report']


@pytest.mark.parametrize('stage', USES)
def test_a_mistyped_workdir_leaves_nothing(stage, tmp_path, capsys):
    argv = [f'--stages={stage}', f'--workdir={tmp_path / "runs" / "typo"}']
    argv += ['--item_init=text'] if stage == 'text' else []
    if stage in USES[4:]:
        argv.append(f'--out={tmp_path / "out" / "answers"}')
    assert 'typo' in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


# Data of another run.


def test_data_of_a_run_that_uses_those_of_another(tmp_path, capsys):
    small = ['--synthetic=users=50,items=40', '--progress=none']
    first, second = tmp_path / 'first', tmp_path / 'second'
    assert run(*small, f'--workdir={first}') == 0
    assert run(f'--prepared={first}', f'--workdir={second}') == 0
    assert run(f'--prepared={second}', f'--workdir={tmp_path / "third"}') == 0
    assert flags.read(tmp_path / 'third' / 'flags.cfg')['prepared'] == str(first)
    # Its own command again, also by another spelling of the first folder's path.
    (tmp_path / 'link').symlink_to(first)
    for spelling in (second, first, f'{first}/../first/', tmp_path / 'link'):
        assert run(f'--prepared={spelling}', f'--workdir={tmp_path / "third"}') == 0
    (first / 'dataset').rename(tmp_path / 'gone')
    line = refused(capsys, f'--prepared={second}', f'--workdir={tmp_path / "fourth"}')
    assert f'{second} uses the data of {first}, which holds no prepared data' in line


def test_prepared_data_that_have_moved(tmp_path, capsys):
    small = ['--synthetic=users=50,items=40', '--progress=none']
    assert run(*small, f'--workdir={tmp_path / "data"}') == 0
    assert run(f'--prepared={tmp_path / "data"}', f'--workdir={tmp_path / "run"}') == 0
    (tmp_path / 'data').rename(tmp_path / 'moved')
    assert 'holds no prepared data' in refused(capsys, f'--workdir={tmp_path / "run"}')
    assert run(f'--prepared={tmp_path / "moved"}', f'--workdir={tmp_path / "run"}') == 0
    assert run(f'--workdir={tmp_path / "run"}') == 0


def test_two_runs_that_use_the_data_of_one_another(tmp_path, capsys):
    for one, other in (('a', 'b'), ('b', 'a')):
        (tmp_path / one).mkdir()
        (tmp_path / one / 'flags.cfg').write_text(f'--prepared={tmp_path / other}\n')
    line = refused(capsys, f'--prepared={tmp_path / "a"}', f'--workdir={tmp_path / "run"}')
    assert 'holds no prepared data' in line


def test_another_spelling_of_the_logs_path(log, tmp_path, monkeypatch):
    workdir = f'--workdir={tmp_path / "run"}'
    assert run(f'--dataset={log}', workdir) == 0
    (tmp_path / 'link.txt').symlink_to(log)
    monkeypatch.chdir(tmp_path)
    for spelling in ('log.txt', './log.txt', tmp_path / 'link.txt', f'{tmp_path}//log.txt'):
        assert run(f'--dataset={spelling}', workdir) == 0
    (tmp_path / 'copy.txt').write_text(log.read_text())
    assert run('--dataset=copy.txt', workdir) == 2


# Words on the screen.


def test_the_log_and_its_size_are_named_before_it_is_read(log, tmp_path, capsys, monkeypatch):
    def look(*args, **options):
        assert f'prepare: reading {log} ({log.stat().st_size} B)\n' in capsys.readouterr().err
        raise KeyboardInterrupt

    monkeypatch.setattr(data_prepare, 'prepare', look)
    assert run(f'--dataset={log}', f'--workdir={tmp_path / "run"}') == 130
    assert not (tmp_path / 'run').exists()


def test_titles_do_not_bind_a_run_without_texts(trained, tmp_path):
    """--items gives titles to later stages; the file is not read before them, but it is there."""
    path = tmp_path / 'titles.csv'
    argv = [*SMALL_RUN, f'--workdir={trained}', '--stages=evaluate', f'--items={path}']
    with pytest.raises(UserError, match=f'--items={path}: No such file'):
        stages.settings.complete(flags.parse(argv))
    path.write_text('')
    assert stages.settings.complete(flags.parse(argv))[0].text.items == str(path)
