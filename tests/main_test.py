"""The command line as a process: its first word, and that no stage is silent."""

import contextlib
import os
import subprocess
import sys
import time

import pytest
from fixtures import ROOT

from fame_jax import screen, stages
from fame_jax.main import COMMANDS, main


def first_line(*argv):
    """The first line on stderr, and the processor seconds that the process had used by then."""
    process = subprocess.Popen(
        [sys.executable, '-m', 'fame_jax.main', *argv],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stderr.readline()
    with open(f'/proc/{process.pid}/stat') as file:
        user, system = file.read().rpartition(')')[2].split()[11:13]
    process.kill()
    process.communicate()
    return line, (int(user) + int(system)) / os.sysconf('SC_CLK_TCK')


@pytest.mark.skipif(not os.path.exists('/proc/self/stat'), reason='needs Linux')
@pytest.mark.parametrize('stages', ['', 'prepare', 'evaluate', 'report'])
def test_the_first_word_comes_before_jax_is_imported(stages, tmp_path):
    argv = [f'--workdir={tmp_path / "run"}'] + ([f'--stages={stages}'] if stages else [])
    line, seconds = first_line(*argv)
    assert line.startswith('fame_jax ') and line.endswith(
        f'{stages and stages + " in "}{tmp_path}/run\n'
    )
    assert seconds < 1, line


def test_a_flag_that_is_wrong_is_the_first_word(tmp_path):
    line, seconds = first_line('--hedas=2')
    assert line.startswith('error: ') and seconds < 1


def test_a_slow_stage_is_named(tmp_path, monkeypatch, capsys):
    """Whatever the stage does, and although it says nothing itself."""
    monkeypatch.setattr(screen, 'QUIET', 0.05)

    def slow(context):
        deadline, shown = time.monotonic() + 20, ''
        while 'report, ' not in shown:
            assert time.monotonic() < deadline
            time.sleep(0.01)
            shown += capsys.readouterr().err

    monkeypatch.setitem(stages.STAGES, 'report', slow)
    argv = [f'--workdir={tmp_path}', '--stages=report', '--progress=lines']
    assert main(argv) == 0


def test_without_arguments_the_usage_is_printed_and_nothing_is_trained(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    assert capsys.readouterr().out.startswith('usage: fame_jax')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('name', COMMANDS)
def test_the_usage_names_each_command_and_each_has_help(name, capsys):
    assert main([]) == 0
    assert f'\n  fame_jax {name} ' in capsys.readouterr().out
    with contextlib.suppress(SystemExit):
        main([name, '--help'])
    assert f'fame_jax {name}' in capsys.readouterr().out
