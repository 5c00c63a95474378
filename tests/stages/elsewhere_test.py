"""A trained run that is read-only, has moved or is named by another path can still be used."""

import contextlib
import ctypes
import os
import shutil
import sys

import pytest

from fame_jax.api import load
from fame_jax.main import main

USERS = ('recommend', 'similar', 'explain', 'export', 'report')


@contextlib.contextmanager
def without_privilege():
    """Takes from root, in this thread, the capability to write where the modes do not allow it."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(header, data) == 0
    before = data[0]
    data[0] &= ~(1 << 1)  # CAP_DAC_OVERRIDE
    assert libc.capset(header, data) == 0
    try:
        yield
    finally:
        data[0] = before
        assert libc.capset(header, data) == 0


@pytest.fixture
def read_only(trained, tmp_path):
    """A copy of a run in which this process may not write."""
    run = shutil.copytree(trained, tmp_path / 'run')
    paths = [*run.rglob('*'), run]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    with without_privilege():
        yield run
    for path in paths:
        path.chmod(0o755)


@pytest.mark.skipif(sys.platform != 'linux', reason='uses the capabilities of Linux')
@pytest.mark.parametrize('stage', USERS)
def test_a_read_only_run_is_used_where_the_output_goes_elsewhere(stage, read_only, capsys):
    before = {path: path.stat().st_mtime_ns for path in read_only.rglob('*')}
    out = read_only.parent / 'out'
    out.mkdir()
    argv = [f'--workdir={read_only}', f'--stages={stage}', '--progress=none']
    with pytest.raises(OSError):
        (read_only / 'mine').touch()
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and str(read_only) in error and 'ermission denied' in error
    assert main([*argv, f'--out={out / "answers"}']) == 0, capsys.readouterr().err
    assert list(out.iterdir())
    assert load(read_only).recommend(['item-1'], 3).items
    assert {path: path.stat().st_mtime_ns for path in read_only.rglob('*')} == before


def test_a_run_that_has_moved_by_any_spelling_of_its_path(trained, tmp_path, monkeypatch):
    run = shutil.copytree(trained, tmp_path / 'deep' / 'run')
    (tmp_path / 'link').symlink_to(run)
    monkeypatch.chdir(tmp_path)
    before = (run / 'flags.cfg').read_bytes()
    spellings = ['deep/run', './deep/../deep/run/', tmp_path / 'link', run]
    for number, spelling in enumerate(spellings):
        argv = [f'--workdir={spelling}', '--stages=recommend', '--progress=none']
        assert main([*argv, f'--out=out{number}']) == 0
        assert main(argv) == 0
    assert (run / 'flags.cfg').read_bytes() == before
