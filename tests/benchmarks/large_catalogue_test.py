"""benchmarks/large_catalogue.py on small catalogues."""

import json

import pytest

from benchmarks import large_catalogue

SMALL = [
    *('--tokens=128', '--width=8', '--loss_chunk=64,32', '--negatives=16'),
    *('--users=8', '--steps=1'),
]


def measure(tmp_path, *flags):
    path = tmp_path / 'large.json'
    large_catalogue.main([*SMALL, *flags, f'--out={path}'])
    return json.loads(path.read_text())['catalogues']


def test_steps_and_ranking_are_timed_and_printed(tmp_path, capsys):
    (catalogue,) = measure(tmp_path, '--items=300', '--forms', 'sampled, popularity')
    assert [record['name'] for record in catalogue['training']] == ['sampled, popularity']
    assert [record['name'] for record in catalogue['ranking']] == [
        'rank 8 users, 300 items a block',
        'top 20 of 8 users',
    ]
    screen = capsys.readouterr().out
    for record in catalogue['training'] + catalogue['ranking']:
        assert record['seconds']['median'] > 0 and record['n'] == 1
        assert record['peak_bytes']['process'] > 0 and record['name'] in screen
    assert all(record['loss'] > 0 for record in catalogue['training'])


def test_a_step_needs_a_gradient_besides_the_state_and_no_second_table(tmp_path):
    """Parameters, two moments in their place, one gradient: four tables and a chunk's logits."""
    flags = '--items=100000,200000', '--abstract', '--only=training', '--forms', 'chunks of items'
    small, large = (catalogue['training'][0] for catalogue in measure(tmp_path, *flags))
    for record in (small, large):
        assert 'seconds' not in record
        assert record['arguments_tables'] == pytest.approx(3, rel=0.05)
        assert record['aliased_tables'] == pytest.approx(3, rel=0.05)
    grown = large['temporaries_bytes'] - small['temporaries_bytes']
    assert grown == pytest.approx(4 * 100_000 * 8, rel=0.01)


def test_a_form_that_would_not_fit_is_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(large_catalogue, 'TOO_LARGE', 4 * 128 * 300)
    flags = '--items=300', '--only=training', '--forms', 'plain'
    (catalogue,) = measure(tmp_path, *flags)
    assert catalogue['training'] == [{'name': 'plain', 'left_out': 'it would need 0.0 GiB'}]
    assert 'left out' in capsys.readouterr().out
