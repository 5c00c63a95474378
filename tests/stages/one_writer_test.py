"""A workdir has one writer: the second process gets one line and loses nothing."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from fixtures import ROOT
from run_fixtures import SMALL_RUN

from fame_jax import run_dir, stages
from fame_jax.config import flags
from fame_jax.errors import UserError
from fame_jax.main import main
from fame_jax.serving.recommender import Recommender

TINY = ['--progress=none', '--width=8', '--max_length=10', '--row_length=16']
TINY += ['--synthetic=users=50,items=40']
WRITERS = ['prepare', 'pretrain', 'finetune', 'evaluate']
USERS = ['recommend', 'similar', 'explain', 'export', 'report']


def snapshot(folder):
    return {p: p.is_file() and p.read_bytes() for p in folder.rglob('*') if p.name != '.lock'}


def open_run(folder, *more):
    return contextlib.closing(stages.open_run(flags.parse([*TINY, *more, f'--workdir={folder}'])))


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a trained run."""
    return shutil.copytree(trained, tmp_path / 'run')


@pytest.mark.parametrize('stage', [*WRITERS, *USERS])
def test_a_stage_that_writes_into_a_locked_run_is_refused(stage, run, capsys):
    before = snapshot(run)
    with run_dir.lock(run):
        assert main([*SMALL_RUN, f'--stages={stage}', f'--workdir={run}']) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and f'{run}: another process is writing there' in error
    assert snapshot(run) == before


def test_explain_is_refused_before_it_computes(run, monkeypatch):
    monkeypatch.setattr(Recommender, 'explain', None)  # a call would be a TypeError
    with run_dir.lock(run):
        assert main([*SMALL_RUN, '--stages=explain', f'--workdir={run}']) == 2


@pytest.mark.parametrize('stage', USERS)
def test_a_locked_run_can_be_used_where_the_output_goes_elsewhere(stage, run, tmp_path, capsys):
    before = snapshot(run)
    argv = [f'--stages={stage}', f'--workdir={run}', '--progress=none']
    with run_dir.lock(run):
        assert main([*argv, f'--out={tmp_path / "elsewhere"}']) == 0
        assert main([*argv, f'--out={run / "mine"}']) == 2  # in the run's own folder
    assert snapshot(run) == before


@pytest.mark.parametrize('stage', ['prepare', 'evaluate'])
def test_the_lock_is_kept_from_the_first_stage_that_writes_to_the_end(stage, run, tmp_path):
    """The first context has finished its stage, and another stage may follow."""
    with open_run(run, '--stages=prepare', *SMALL_RUN) as first:
        stages.STAGES['prepare'](first)
        with (
            open_run(run, f'--stages={stage}', *SMALL_RUN) as second,
            pytest.raises(UserError, match='another process'),
        ):
            stages.STAGES[stage](second)
    with open_run(run, f'--stages={stage}', *SMALL_RUN) as second:
        second.begin_writing()


def test_a_run_that_was_made_between_opening_and_locking_is_not_overwritten(tmp_path):
    """Both contexts see an empty folder; the first one prepares and ends before the second."""
    with (
        open_run(tmp_path / 'run', '--synthetic=seed=1', '--stages=prepare') as first,
        open_run(tmp_path / 'run', '--synthetic=seed=2', '--stages=prepare') as second,
        open_run(tmp_path / 'run', '--synthetic=seed=1', '--stages=prepare') as same,
    ):
        stages.STAGES['prepare'](first)
        first.close()
        before = snapshot(tmp_path / 'run')
        with pytest.raises(UserError, match=r'holds another run: --synthetic=seed=2 \(there: 1\)'):
            stages.STAGES['prepare'](second)
        second.close()
        stages.STAGES['prepare'](same)
        assert snapshot(tmp_path / 'run') == before


def test_a_run_whose_flags_changed_between_opening_and_locking(tmp_path):
    """The second context took a flag from the former flags.cfg."""
    with open_run(tmp_path, '--seed=1', '--stages=prepare') as first:
        stages.STAGES['prepare'](first)
    given = [f'--workdir={tmp_path}', '--stages=pretrain', '--progress=none']
    with contextlib.closing(stages.open_run(flags.parse(given))) as second:
        assert second.config.run.seed == 1
        with open_run(tmp_path, '--seed=2', '--stages=prepare') as other:
            other.begin_writing()
        with pytest.raises(UserError, match='has just changed this run'):
            stages.STAGES['pretrain'](second)
    assert flags.read(tmp_path / 'flags.cfg')['seed'] == 2


def start(*argv):
    """A process of the program, which shares compiled programs with this one."""
    return subprocess.Popen(
        [sys.executable, '-m', 'fame_jax.main', *argv],
        cwd=ROOT,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize('last', ['prepare', 'pretrain'])
def test_processes_that_begin_at_once(last, tmp_path):
    """One of them makes the run; the others are refused, whichever of two reasons it is."""
    argv = [*TINY, f'--workdir={tmp_path / "run"}', '--pretrain_epochs=2']
    argv += [f'--stages={"prepare,pretrain" if last == "pretrain" else last}']
    processes = {seed: start(*argv, f'--synthetic=seed={seed}') for seed in (1, 2, 3)}
    errors = {seed: process.communicate()[1] for seed, process in processes.items()}
    codes = {seed: process.returncode for seed, process in processes.items()}
    assert sorted(codes.values()) == [0, 2, 2], errors
    (winner,) = (seed for seed, code in codes.items() if code == 0)
    stored = flags.read(tmp_path / 'run' / 'flags.cfg')
    assert f'seed={winner}' in stored['synthetic']
    assert main([*argv, f'--synthetic=seed={winner}']) == 0
    card = json.loads((tmp_path / 'run' / 'dataset' / 'dataset.json').read_text())
    with open_run(tmp_path / 'alone', f'--synthetic=seed={winner}', '--stages=prepare') as alone:
        stages.STAGES['prepare'](alone)
        assert card['fingerprint'] == alone.data.card['fingerprint']
    for seed, error in errors.items():
        if seed != winner:
            assert error.count('error: ') == 1 and 'Traceback' not in error
            assert 'another process' in error or 'holds another run' in error
