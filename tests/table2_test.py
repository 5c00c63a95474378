"""The door of Table 2: flags, the plan, how it ends, and the files that are left."""

import json
import signal
import sys

import pytest
from children_test import Fake, begun
from runs_test import finish, options, runs_of

from benchmarks import series, table2, table_page
from benchmarks.runs import MODELS


def test_a_run_is_a_command_with_its_flag_file(tmp_path):
    sasrec, fame = runs_of(
        tmp_path, '--models=fame', '--seeds=7', '--data_dir=DATA', '--extra=--a=1 --b="x y"'
    )
    assert sasrec.command == [
        *(sys.executable, '-m', 'fame_jax.main'),
        f'--flagfile={tmp_path}/recipes/sasrec.cfg',
        *('--dataset=toys', '--seed=7', f'--workdir={tmp_path}/toys/sasrec_seed7'),
        *('--stages=prepare,pretrain,evaluate', '--data_dir=DATA', '--a=1', '--b=x y'),
    ]
    assert '--stages=prepare,finetune,evaluate' in fame.flags
    assert f'--backbone_from={tmp_path}/toys/sasrec_seed7' in fame.flags


def test_all_models_of_a_seed_come_before_the_next_and_backbones_before_fame(tmp_path):
    found = [run.workdir.name for run in runs_of(tmp_path, '--models=fame,core', '--seeds=0,1')]
    assert found == [f'{model}_seed{s}' for s in (0, 1) for model in ('sasrec', 'fame', 'core')]
    every = [run.model for run in runs_of(tmp_path, '--models=all', '--seeds=0')]
    assert sorted(every) == sorted(MODELS)
    for name, model in MODELS.items():
        assert not model.backbone or every.index(model.backbone) < every.index(name)


def test_quick_is_a_preset_that_flags_go_over():
    quick = table2.parse(['--quick'])
    assert quick.datasets == ('synthetic',) and quick.seeds == (0,)
    assert quick.extra == list(series.QUICK_FLAGS)
    other = table2.parse(['--quick', '--seeds=1,2', '--extra=--pretrain_epochs=9'])
    assert other.seeds == (1, 2) and other.extra == [*series.QUICK_FLAGS, '--pretrain_epochs=9']


@pytest.mark.parametrize(
    ('flags', 'told'),
    [
        (['--nope'], '--nope'),
        (['--models=fane'], '--models=fane: choose all, or from gru4rec'),
        (['--models='], 'names nothing'),
        (['--seeds=0,b'], '0,b should be numbers'),
        (['--seeds=-1'], '--seed=-1 is out of range'),
        (['--jobs=0'], '--jobs=0 is out of range'),
        (['--datasets=a/x.csv,b/x.txt'], 'two that are called x'),
        (['--extra=--widht=8'], 'did you mean --width?'),
        (['--recipes=/nowhere'], 'there is no recipe /nowhere/gru4rec.cfg'),
        (['--only_table'], 'holds no finished run'),
    ],
)
def test_a_bad_flag_is_one_line_and_code_2(tmp_path, capsys, flags, told):
    fake = Fake(tmp_path)
    assert table2.main([*options(tmp_path), *flags], fake) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and told in error and error.count('\n') == 1
    assert fake.events == []


def test_help_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        table2.main(['--help'])
    assert ended.value.code == 0 and '--only_table' in capsys.readouterr().out


def test_the_command_leaves_out_what_changes_no_figure():
    every = table2.parse(['--quick', '--jobs=2', '--data_dir=D', "--extra=--a=1 --b='x y'"])
    told = table2.command(every)
    assert told == (
        'python -m benchmarks.table2 --datasets=synthetic --models=all --seeds=0 --quick '
        """'--extra=--a=1 '"'"'--b=x y'"'"''"""
    )


def test_a_folder_that_holds_another_run_stops_it_before_anything_begins(tmp_path, capsys):
    (tmp_path / 'toys' / 'core_seed0').mkdir(parents=True)
    (tmp_path / 'toys' / 'core_seed0' / 'flags.cfg').write_text('--model=sasrec\n--width=32\n')
    fake = Fake(tmp_path)
    assert table2.main(options(tmp_path, '--models=gru4rec,core', '--seeds=0'), fake) == 2
    assert 'was run with other flags' in capsys.readouterr().err and fake.events == []


def test_a_failure_is_told_and_holds_up_only_what_needs_it(tmp_path, capsys):
    fake = Fake(tmp_path, codes={'sasrec_seed0': 1, 'core_seed1': -9})
    flags = options(tmp_path, '--models=fame,core', '--seeds=0,1')
    assert table2.main(flags, fake) == 1
    names = ['sasrec_seed0', 'core_seed0', 'sasrec_seed1', 'fame_seed1', 'core_seed1']
    assert begun(fake) == names
    told = capsys.readouterr().err
    log = tmp_path / 'toys' / 'sasrec_seed0.log'
    assert f'toys/sasrec_seed0: failed with code 1; {log} ends with: error: the reason' in told
    assert 'toys/fame_seed0: not run, since sasrec_seed0 failed' in told
    assert 'toys/core_seed1: killed by SIGKILL; ' in told
    text = (tmp_path / 'table2.md').read_text()
    assert 'Not done: sasrec_seed0, fame_seed0, core_seed1.' in text


def test_where_nothing_succeeds_there_is_no_table(tmp_path, capsys):
    fake = Fake(tmp_path, codes={'core_seed0': 2})
    assert table2.main(options(tmp_path, '--models=core', '--seeds=0'), fake) == 1
    assert 'failed with code 2' in capsys.readouterr().err
    assert not (tmp_path / 'table2.md').exists()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once_and_nothing_else_begins(tmp_path, capsys, number):
    fake = Fake(tmp_path, looks=1000)
    fake.hook = lambda run: run.model == 'core' and signal.raise_signal(number)
    before = signal.getsignal(number)
    flags = options(tmp_path, '--models=gru4rec,core,fame', '--seeds=0,1', '--jobs=2')
    assert table2.main(flags, fake) == 128 + number
    assert begun(fake) == ['gru4rec_seed0', 'core_seed0']
    assert fake.at_once == 0
    told = capsys.readouterr().err
    assert f'stopped by {number.name}; the same command goes on' in told and 'failed' not in told
    assert signal.getsignal(number) is before


def test_what_is_left_is_the_table_in_four_files(tmp_path, capsys):
    for seed in (0, 1):
        finish(tmp_path, 'sasrec', seed, ranks=[1, 2, 3])
        finish(tmp_path, 'fame', seed, ranks=[1, 2, 3])
    flags = options(tmp_path, '--only_table', '--models=sasrec,fame', '--seeds=0,1')
    assert table2.main(flags) == 0
    assert f'the table is in {tmp_path}/table2.md' in capsys.readouterr().err
    files = {path.suffix for path in tmp_path.glob('table2.*')}
    assert files == {'.md', '.json', '.svg', '.png'}
    told = json.loads((tmp_path / 'table2.json').read_text())
    assert told['command'] == (
        'python -m benchmarks.table2 --datasets=toys --models=sasrec,fame --seeds=0,1'
    )
    assert (tmp_path / 'table2.md').read_text() == table_page.markdown(told)


@pytest.mark.parametrize(
    'extra, told',
    [
        ('--seed=3', 'seed is what tells the runs apart'),
        ('--dropout=0.1 --model=core', 'model is what tells the runs apart'),
        ('--workdir=elsewhere', 'workdir is'),
        ("'", 'No closing quotation'),
    ],
)
def test_what_extra_may_not_say(tmp_path, capsys, extra, told):
    assert table2.main(options(tmp_path, f'--extra={extra}'), Fake(tmp_path)) == 2
    err = capsys.readouterr().err
    assert told in err and err.count('\n') == 1


def test_a_table_of_what_is_there_refuses_runs_of_other_flags(tmp_path, capsys):
    finish(tmp_path, 'sasrec', 0, ranks=[1, 2, 3])
    (tmp_path / 'toys' / 'sasrec_seed0' / 'flags.cfg').write_text('--model=sasrec\n--width=32\n')
    flags = options(tmp_path, '--only_table', '--models=sasrec', '--seeds=0')
    assert table2.main(flags) == 2
    assert 'was run with other flags' in capsys.readouterr().err
