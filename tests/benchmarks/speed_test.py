"""benchmarks/speed.py: sections, goals and the exit code; two steps and the losses for real."""

import json

import jax
import numpy as np
import pytest

from benchmarks import speed, timing
from fame_jax.config import flags
from fame_jax.stages import settings


def fail(*_):
    raise MemoryError('too large\nand more')


def test_the_command_says_what_failed_and_ends_with_1(monkeypatch, tmp_path, capsys):
    sections = {'loss': lambda bench: timing.measure([timing.Row('plain', 'plain', fail)], 1, 0)}
    monkeypatch.setattr(speed, 'SECTIONS', sections)
    assert speed.main(['--quick', f'--out={tmp_path / "new"}']) == 1
    screen = capsys.readouterr()
    assert 'failed: plain: MemoryError: too large' in screen.err
    assert '| plain | failed: MemoryError: too large |' in screen.out
    result = json.loads((tmp_path / 'new' / 'speed.json').read_text())
    assert result['sections']['loss'][0]['failed'] == 'MemoryError: too large'
    assert result['machine']['device']['count'] == jax.device_count()


def test_a_missing_data_set_and_an_unknown_section_are_mistakes_of_the_user(tmp_path, capsys):
    (tmp_path / 'Toys_and_Games.txt').write_text('1 2 3 x\n')
    assert speed.main([f'--data_dir={tmp_path}', '--only=loss']) == 2
    assert 'Toys_and_Games.txt' in capsys.readouterr().err
    for arguments in (['--only=lunch'], ['--only=loss', '--goals']):
        with pytest.raises(SystemExit):
            speed.parse_arguments(arguments)
    assert 'choose from epoch, evaluation' in capsys.readouterr().err


def test_goals_are_reached_or_not_or_fail(monkeypatch, tmp_path, capsys):
    measured = {
        'epoch': lambda bench: {'reached': 0.5},
        'evaluation': fail,
        'job': lambda bench: {'reached': 61.0},
    }
    goals = {n: speed.GOALS[n]._replace(reach=call) for n, call in measured.items()}
    monkeypatch.setattr(speed, 'GOALS', goals)
    monkeypatch.setattr(speed, 'Bench', lambda *_: None)
    assert speed.main(['--goals', '--quick', f'--out={tmp_path}']) == 1
    last = [line.split('|')[2:-1] for line in capsys.readouterr().out.strip().splitlines()[-3:]]
    assert [[cell.strip() for cell in cells] for cells in last] == [
        ['0.5 s', '0.5 s', 'yes'],
        ['0.2 s', 'MemoryError: too large', 'failed'],
        ['60 s', '61 s', 'no'],
    ]
    assert json.loads((tmp_path / 'goals.json').read_text())['goals']['job']['most'] == 60


def test_the_forms_of_the_loss_agree():
    arrays = speed.loss_arrays(24, 30, 8)
    forms = speed.loss_forms()
    value, (d_query_TD, d_item_VD) = forms['plain'](*arrays)
    assert forms['plain, value only'](*arrays) == pytest.approx(float(value), rel=1e-6)
    for name, form in forms.items():
        if name.startswith('chunks'):
            other, gradients = form(*arrays)
            assert other == pytest.approx(float(value), rel=1e-5)
            for a, b in zip(gradients, (d_query_TD, d_item_VD)):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_packed_rows_and_rows_of_one_history_are_timed(monkeypatch, tmp_path, capsys):
    names = 'SASRec', 'SASRec, one history a row'
    small = {
        name: speed.STEPS[name]._replace(flags='--width=8 --num_blocks=1 --rows_per_step=16')
        for name in names
    }
    monkeypatch.setattr(speed, 'STEPS', small)
    assert speed.main(['--quick', '--only=step', f'--out={tmp_path}']) == 0
    packed, unpacked = json.loads((tmp_path / 'speed.json').read_text())['sections']['step']
    assert packed['ratio'] == 1 and packed['temporaries_bytes'] > 0
    assert unpacked['against'] == 'SASRec' and unpacked['ratio'] > 0
    assert '| SASRec, one history a row | ' in capsys.readouterr().out


def test_an_unpacked_epoch_has_one_history_in_a_row(tmp_path):
    bench = speed.Bench('', '', tmp_path, quick=True)
    context = bench.open('--rows_per_step=91')
    epoch = speed.unpacked_epoch(context, 0)
    rows = [row_L for batch in epoch.batches for row_L in batch.segments_BL]
    assert all(row_L.max() <= 1 for row_L in rows)
    assert sum(row_L.max() for row_L in rows) == epoch.num_histories


@pytest.mark.parametrize('table', [speed.STEPS, speed.EXPERTS], ids=['steps', 'experts'])
def test_every_variant_names_a_row_of_its_table_and_flags_that_exist(table):
    for stage, arguments, against, _ in table.values():
        assert against in table and stage in speed.MODELS.values()
        settings.complete(flags.parse(arguments.split()))


@pytest.mark.slow
def test_goals_are_measured(tmp_path):
    speed.main(['--goals', '--quick', '--only=evaluation,step,job', f'--out={tmp_path}'])
    goals = json.loads((tmp_path / 'goals.json').read_text())['goals']
    assert list(goals) == ['evaluation', 'step', 'job']
    assert all(goal['reached'] > 0 for goal in goals.values())
    compiling, again = goals['job']['rows']
    assert list(again['stages']) == ['prepare', 'pretrain', 'finetune', 'evaluate']
    assert compiling['seconds']['median'] > again['seconds']['median']
