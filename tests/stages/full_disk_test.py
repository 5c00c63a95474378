"""On a full disk each stage ends with one line and exit code 2, and former files are unchanged.

Files may not grow past some bytes, which gives the errors of a full disk without one.
"""

import contextlib
import resource
import shutil
import threading

import jax
import pytest
from run_fixtures import SMALL_RUN

from fame_jax.main import main
from fame_jax.training.log import Events

PLUS = [*SMALL_RUN, '--item_init=text', '--text_options=epochs=1,inner_width=16']


@contextlib.contextmanager
def full_disk(most):
    """No file can be larger than so many bytes; compiled programs are not written at all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 1e9)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', seconds)


def snapshot(folder):
    """The files below a folder, but flags.cfg, which lists further stages."""
    return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file() and p.name != 'flags.cfg'}


def refused(capsys, *argv, most=2000):
    capsys.readouterr()
    with full_disk(most):
        code = main(list(argv))
    error = capsys.readouterr().err
    assert code == 2 and 'Traceback' not in error, error
    errors = [line for line in error.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1, error
    return errors[0]


def test_prepare(tmp_path, capsys):
    workdir = f'--workdir={tmp_path / "run"}'
    line = refused(capsys, *SMALL_RUN, workdir, '--stages=prepare', most=500)
    assert str(tmp_path / 'run') in line
    assert list(tmp_path.iterdir()) == []
    assert main([*SMALL_RUN, workdir, '--stages=prepare']) == 0


@pytest.mark.parametrize('stage', ['text', 'pretrain'])
def test_stages_that_make_a_run(stage, tmp_path, capsys):
    argv = [*PLUS, f'--workdir={tmp_path}']
    assert main([*argv, '--stages=prepare' + (',text' if stage == 'pretrain' else '')]) == 0
    before = snapshot(tmp_path)
    assert str(tmp_path) in refused(capsys, *argv, f'--stages={stage}')
    after = snapshot(tmp_path)
    kept = [path for path in before if path.name != 'metrics.jsonl']
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept}
    assert main([*argv, f'--stages={stage}']) == 0


@pytest.mark.parametrize(
    'stage', ['evaluate', 'recommend', 'similar', 'explain', 'export', 'report']
)
def test_stages_that_use_a_run(stage, trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / 'run')
    before = snapshot(run)
    refused(capsys, f'--workdir={run}', '--progress=none', f'--stages={stage}')
    after = snapshot(run)
    assert {path: after[path] for path in before} == before
    assert not [path for path in after if path.name.startswith('.')]


def test_events_of_tensorboard_raise_and_start_no_thread(tmp_path):
    threads = threading.active_count()
    events = Events(tmp_path / 'events')
    with full_disk(2000), pytest.raises(Exception, match=r'writing TensorBoard events in .*events'):
        for step in range(1000):
            events.add(step, {'train/loss': 1.0})
    assert threading.active_count() == threads
