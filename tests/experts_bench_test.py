"""benchmarks/experts.py: every way is measured at a small size, and told against the first."""

import numpy as np

from benchmarks import experts
from benchmarks.turns import Effort

TINY = experts.Size(heads=2, experts=3, rows=2, length=6)


def test_a_batch_is_full_of_short_histories():
    batch = experts.make_batch(experts.Size(1, 1, 2, 8), 5)
    assert batch.segments_BL.tolist() == [[1, 1, 1, 1, 1, 1, 2, 2]] * 2
    assert batch.positions_BL[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert min(batch.tokens_BL.min(), batch.targets_BL.min()) >= 1
    assert batch.weights_BL.all() and batch.tokens_BL.max() <= 5


def test_only_ways_that_leave_something_out_are_sparse():
    assert [name for name, _ in experts.ways(TINY)] == [*experts.WAYS]
    few = [name for name, _ in experts.ways(TINY._replace(experts=2))]
    assert few == [name for name in experts.WAYS if 'active' not in name]


def test_a_way_is_measured_and_told(monkeypatch, capsys):
    monkeypatch.setattr(experts, 'ITEMS', 20)
    monkeypatch.setattr(experts, 'WAYS', {n: experts.WAYS[n] for n in ('dense', 'remat')})
    dense, remat = experts.measure([TINY], Effort(rounds=1, seconds=0))
    assert (dense['size'], dense['name'], remat['name']) == ('H 2 N 3 L 6', 'dense', 'remat')
    for record in (dense, remat):
        assert record['temporaries_bytes'] > 0 and np.isfinite(record['cpu_seconds'])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith('| dense |') and '| 1.00 |' in lines[2]


def test_what_fails_has_a_row():
    told = experts.table([{'name': 'dense', 'failed': 'ValueError: no'}], 'H 1')
    assert told.splitlines()[-1] == '| dense | ValueError: no | | | | |'
