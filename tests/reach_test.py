"""The table of what is to be reached."""

import json

import pytest

from benchmarks import reach


def test_a_goal_is_reached_or_not_or_fails(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise MemoryError('too large')

    measures = {
        'epoch': lambda *_: {'reached': 0.5},
        'job': lambda *_: {'reached': 61.0},
        'evaluation': fail,
    }
    monkeypatch.setattr(reach, 'MEASURES', measures)
    out = tmp_path / 'there' / 'reach.json'
    assert reach.main(['--only=epoch,job,evaluation', f'--out={out}']) == 0
    last = [line.split('|')[1:-1] for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [[cell.strip() for cell in cells[1:]] for cells in last] == [
        ['0.5 s', '0.5 s', 'yes'],
        ['60 s', '61 s', 'no'],
        ['0.2 s', 'MemoryError: too large', 'failed'],
    ]
    goals = json.loads(out.read_text())['goals']
    assert [goal['most'] for goal in goals.values()] == [0.5, 60, 0.2]


def test_a_data_set_that_is_not_there_is_told_in_a_line(tmp_path, capsys):
    (tmp_path / 'Toys_and_Games.txt').write_text('1 2 3 x\n')
    assert reach.main(['--only=epoch', f'--data_dir={tmp_path}']) == 2
    assert 'Toys_and_Games.txt' in capsys.readouterr().err


def test_a_goal_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        reach.parse_arguments(['--only=lunch'])
    assert '--only=lunch: there are epoch, ' in capsys.readouterr().err


@pytest.mark.slow
def test_every_goal_is_measured(tmp_path, capsys):
    out = tmp_path / 'reach.json'
    assert reach.main(['--quick', f'--out={out}']) == 0
    found = json.loads(out.read_text())['goals']
    assert list(found) == list(reach.GOALS)
    assert all(goal['reached'] > 0 for goal in found.values())
    job = found['job']
    assert list(job['stages']) == ['prepare', 'pretrain', 'finetune', 'evaluate']
    # Programs that are compiled take longer than those that are read.
    assert sum(job['with_compiling'].values()) > job['reached']
