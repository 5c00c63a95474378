"""The command `fame_jax serve`: its flags, its token, and what it refuses."""

import importlib.util
import socket

import pytest
from service_fixtures import make_exact

from fame_jax import main
from fame_jax.errors import UserError
from fame_jax.serving.service import command

TOKEN = 'correct-horse-battery'


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv(command.TOKEN, raising=False)


@pytest.mark.parametrize(
    'argv, part',
    [
        ([], '--export'),
        (['--export=x', '--prot=1'], 'unrecognized arguments: --prot=1'),
        (['--export=x', '--token=secret'], 'unrecognized'),
        (['--export=x', '--port=65536'], '--port=65536'),
        (['--export=x', '--port=a'], '--port'),
        (['--export=x', '--max_k=0'], '--max_k=0'),
        (['--export=x', '--max_waiting=-1'], '--max_waiting=-1'),
        (['--export=x', '--timeout=0'], '--timeout=0'),
        (['--export=x', '--timeout=nan'], '--timeout=nan'),
        (['--export=x', '--reload_seconds=-1'], '--reload_seconds=-1'),
        (['--export=x', '--token_file=/no/such/file'], '/no/such/file'),
        (['--export=x', '--host=no such host'], 'no such host'),
        (['--export=x', '--host=192.0.2.1', '--port=0'], '192.0.2.1'),
        (['--export=no/such/folder', '--port=0'], 'no/such/folder'),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, part, capsys):
    assert main.main(['serve', *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1 and part in error


def test_a_port_in_use_is_said_before_the_export_is_read(capsys):
    with socket.socket() as other:
        other.bind(('127.0.0.1', 0))
        other.listen()
        port = other.getsockname()[1]
        assert command.main(['--export=no/such', f'--port={port}']) == 2
    assert f'port {port}' in capsys.readouterr().err


def test_without_the_extra_the_line_names_it(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name: None if name == 'uvicorn' else find_spec(name)
    )
    assert command.main(['--export=x', '--port=0']) == 2
    assert "pip install 'fame_jax[serve]'" in capsys.readouterr().err


def test_the_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    assert command.read_token(None) == ''
    path = tmp_path / 'token'
    path.write_text(f'{TOKEN}\n')
    assert command.read_token(str(path)) == TOKEN
    monkeypatch.setenv(command.TOKEN, f'x{TOKEN}')
    assert command.read_token(None) == f'x{TOKEN}'
    assert command.read_token(str(path)) == TOKEN
    for bad in '', 'short', f'{TOKEN} {TOKEN}', f'{TOKEN}é':
        monkeypatch.setenv(command.TOKEN, bad)
        with pytest.raises(UserError) as caught:
            command.read_token(None)
        assert command.TOKEN in str(caught.value) and (not bad or bad not in str(caught.value))


class Stopped(Exception):
    """The server would have started."""


@pytest.mark.parametrize(
    'host, token, warned, hosts',
    [
        ('127.0.0.1', '', False, {'localhost', '127.0.0.1', '[::1]'}),
        ('localhost', '', False, {'localhost', '127.0.0.1', '[::1]'}),
        ('127.0.0.1', TOKEN, False, None),
        ('0.0.0.0', '', True, None),
        ('0.0.0.0', TOKEN, False, None),
    ],
)
def test_other_machines_are_let_in_with_a_warning_or_a_token(
    host, token, warned, hosts, tmp_path, monkeypatch, capsys
):
    pytest.importorskip('starlette')
    from fame_jax.serving.service import app

    def service(versions, limits, given_token, own_hosts):
        raise Stopped(limits, given_token, own_hosts)

    monkeypatch.setattr(app, 'Service', service)
    make_exact().export(tmp_path / 'v1')
    if token:
        monkeypatch.setenv(command.TOKEN, token)
    argv = [f'--export={tmp_path}', '--port=0', f'--host={host}', '--no-demo', '--max_k=3']
    argv += ['--max_items=7', '--max_histories=8', '--max_body=99', '--max_waiting=5']
    with pytest.raises(Stopped) as caught:
        command.main([*argv, '--timeout=2.5'])
    assert caught.value.args == ((99, 8, 7, 3, 5, 2.5), token, hosts)
    assert ('warning: whoever reaches' in capsys.readouterr().err) == warned


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(['--help'])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for flag in vars(command.parse_flags(['--export=x'])):
        assert f'--{flag}' in text
