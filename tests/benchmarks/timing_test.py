"""benchmarks/timing.py: turns, ratios and failures."""

import numpy as np
import pytest

from benchmarks import timing


def make_row(name, log, items=1.0, against='a'):
    def call():
        log.append(name)
        return np.zeros(1)

    return timing.Row(name, against, lambda: timing.Case(call, items, 'items'))


def test_rows_take_alternating_turns_after_a_call_that_is_not_timed():
    log = []
    records = timing.measure([make_row('a', log), make_row('b', log)], turns=3, seconds=0)
    assert ''.join(log) == 'aabb' + 3 * 'ab'  # compiling, how long a call lasts, and the turns
    assert [(record['name'], record['n']) for record in records] == [('a', 3), ('b', 3)]
    for record in records:
        seconds = record['seconds']
        assert 0 < seconds['min'] <= seconds['median'] <= seconds['max']


def test_a_ratio_is_of_the_same_amount_of_work():
    records = [
        {'name': 'a', 'against': 'a', 'per_second': 10.0},
        {'name': 'b', 'against': 'a', 'per_second': 2.5},
        {'name': 'c', 'against': 'no such row', 'per_second': 1.0},
    ]
    assert [record.get('ratio') for record in timing.add_ratios(records)] == [1, 4, None]


def test_a_dispatch_of_several_steps_is_reported_by_the_step():
    row = timing.Row('a', 'a', lambda: timing.Case(lambda: np.zeros(1), 80.0, 'targets', parts=8))
    (record,) = timing.measure([row], turns=1, seconds=0)
    assert record['per_second'] == pytest.approx(10 / record['seconds']['median'])


def fail(*_):
    raise MemoryError('too large\nand more')


def test_a_row_that_fails_is_reported_and_the_others_go_on():
    def fail_later():
        calls.append(1)
        return fail() if len(calls) > 2 else np.zeros(1)

    log, calls = [], []
    rows = [
        timing.Row('a', 'a', fail),
        make_row('b', log),
        timing.Row('c', 'b', lambda: timing.Case(fail_later, 1, 'items')),
    ]
    a, b, c = timing.measure(rows, turns=2, seconds=0)
    assert a['failed'] == c['failed'] == 'MemoryError: too large'
    assert b['n'] == 2 and 'ratio' not in b  # what it is compared with failed


def test_times_are_printed_in_a_readable_unit():
    seconds = {'median': 0.0125, 'min': 0.012, 'max': 0.014}
    record = {'name': 'a', 'against': 'a', 'seconds': seconds, 'n': 3, 'ratio': 1.0}
    record |= {'per_second': 1234.5, 'unit': 'users', 'first_seconds': 0.25}
    failed = {'name': 'b', 'against': 'a', 'failed': 'MemoryError: too large'}
    *_, section, row, last = timing.table({'step': [record, failed]})
    assert section.startswith('| **step** |')
    assert row == '| a | 12.5 (12 - 14) ms | 3 | a | 1.00 | 1,234 users | 0.2 |  |'
    assert last.startswith('| b | failed: MemoryError: too large |')
