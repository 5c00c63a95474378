"""The benchmark of large catalogues, on a small one."""

import json
import sys

import pytest

from benchmarks import large_catalogue

SMALL = [
    *('--tokens=128', '--width=8', '--chunk_tokens=64', '--chunk_items=32', '--negatives=16'),
    *('--users=8', '--steps=1'),
]


def measure(monkeypatch, tmp_path, *flags):
    path = tmp_path / 'large.json'
    monkeypatch.setattr(sys, 'argv', ['large_catalogue', *SMALL, *flags, f'--json={path}'])
    large_catalogue.main()
    return json.loads(path.read_text())


def test_what_runs_is_timed_and_told(monkeypatch, tmp_path, capsys):
    flags = '--items=300', '--variants=sampled+popularity'
    result = measure(monkeypatch, tmp_path, *flags)
    (found,) = result['catalogues']
    assert [record['name'] for record in found['training']] == ['sampled, popularity']
    assert [record['name'] for record in found['judging']] == [
        'rank 8 users, 300 items a block',
        'top 20 of 8 users',
    ]
    told = capsys.readouterr().out
    for record in found['training'] + found['judging']:
        assert record['seconds']['median'] > 0 and record['calls'] == 1
        assert record['peak_bytes']['process'] > 0
        assert record['name'] in told
    assert all(record['loss'] > 0 for record in found['training'])
    assert result['machine']['cores'] > 0


def test_a_step_takes_a_gradient_beside_the_state_and_no_second_table(monkeypatch, tmp_path):
    """Parameters, two moments in their place, one gradient: four tables and what a chunk takes."""
    flags = '--items=100000,200000', '--abstract', '--only=training', '--variants=streamed'
    result = measure(monkeypatch, tmp_path, *flags)
    small, large = (found['training'][0] for found in result['catalogues'])
    for record in (small, large):
        assert 'seconds' not in record
        assert record['arguments_tables'] == pytest.approx(3, rel=0.05)
        assert record['aliased_tables'] == pytest.approx(3, rel=0.05)
    grown = large['temporaries_bytes'] - small['temporaries_bytes']
    assert grown == pytest.approx(4 * 100_000 * 8, rel=0.01)


def test_what_would_not_fit_is_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(large_catalogue, 'TOO_MUCH', 4 * 128 * 300)
    flags = '--items=300', '--variants=plain', '--only=training'
    (found,) = measure(monkeypatch, tmp_path, *flags)['catalogues']
    assert found['training'] == [{'name': 'plain', 'left_out': 'it would take 0.0 GiB'}]
    assert 'left out' in capsys.readouterr().out
