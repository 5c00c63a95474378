"""benchmarks/members.py: the steps it times are those of the runs, and failures are said."""

import functools
import json
import sys

import jax
import numpy as np
import pytest
from run_fixtures import largest_difference

from benchmarks import members
from benchmarks.speed import Bench, Training


def make_bench(folder):
    return Bench('', '', folder, quick=True)


def test_an_epoch_of_two_seeds_is_the_epoch_of_each(tmp_path):
    bench = make_bench(tmp_path)
    group = members.Members(bench, 2)
    group.epoch()
    for seed in range(2):
        alone = Training(bench.open(f'--seed={seed}'), 'pretrain')
        alone.epoch()
        state = jax.tree.map(lambda leaf, seed=seed: leaf[seed], group.state)
        assert state.step == alone.state.step > 0
        assert largest_difference(state.params, alone.state.params) < 1e-4


def test_the_bytes_of_a_copy_are_read_and_written():
    case = members.copy_case(4000)
    assert case.items == 8000
    assert np.asarray(case.call()).nbytes == 4000


def test_a_row_that_fails_is_said_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise MemoryError('too large')

    monkeypatch.setattr(members, 'time_jobs', lambda *_: [])
    monkeypatch.setattr(members, 'time_command_buffers', lambda *_: [])
    monkeypatch.setattr(members, 'packed_case', fail)
    monkeypatch.setattr(members, 'epoch_case', functools.partial(_constant, 3.0))
    monkeypatch.setattr(members, 'step_case', functools.partial(_constant, 5.0))
    out = tmp_path / 'new' / 'members.json'
    assert members.main(['--quick', f'--out={out}']) == 1
    assert 'failed: FAME, joined: MemoryError: too large' in capsys.readouterr().err
    epochs = json.loads(out.read_text())['sections']['an epoch of SASRec']
    assert [row['name'] for row in epochs] == ['1 seed', '2 seeds']
    assert {row['against'] for row in epochs} == {'1 seed'}


def _constant(amount, *_):
    return members.Case(lambda: np.zeros(1), amount, 'histories')


def test_an_option_that_xla_does_not_know_ends_its_own_process_alone(monkeypatch):
    """The child is replaced by one that fails where the option is unknown, as XLA does."""
    child = 'import os, sys; "nonsense" in os.environ["XLA_FLAGS"] and sys.exit("Unknown flag");'
    child += 'print("""{"seconds": {"median": 2.0}, "per_second": 0.5}""")'
    options = {'by default': '', 'wrong': '--xla_nonsense=1', 'empty': ''}
    monkeypatch.setattr(members, 'COMMAND_BUFFERS', options)
    monkeypatch.setattr(members, 'step_command', lambda _: [sys.executable, '-c', child])
    rows = members.time_command_buffers(members.parse_arguments(['--quick']))
    assert [row.get('ratio') for row in rows] == [1, None, 1]
    assert rows[1]['failed'] == 'RuntimeError: exit code 1: Unknown flag'
    assert rows[1]['name'] == 'command buffers wrong'


def test_one_seed_is_always_among_the_numbers(capsys):
    assert members.parse_arguments(['--seeds=16,5']).seeds == [1, 5, 16]
    assert members.parse_arguments([]).seeds == [1, 5, 16]
    with pytest.raises(SystemExit) as stopped:
        members.parse_arguments(['--seeds=five'])
    assert stopped.value.code == 2 and "'five' is not a list of numbers" in capsys.readouterr().err
